"""Distances between sets of recordings, as audioldm_eval defines them, with bootstrap intervals."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special

from subtractive_jax.errors import UserError


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to `x` and `y`: |m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½).

    Heusel et al. 2017, covariances with ddof 1 as in audioldm_eval. With S1 = AᵀA and S2 = BᵀB the trace of the root is
    the sum of the singular values of ABᵀ, which needs no matrix root and no epsilon where covariances are singular.
    They are with fewer samples than dimensions, and the distance is then biased upwards: report the counts with it.

    Args:
      x, y: embeddings `[samples, dimensions]`.

    Raises:
      UserError: fewer than two samples in either set.
    """
    if min(len(x), len(y)) < 2:
        raise UserError(f"a Fréchet distance needs two samples a side, got {len(x)} and {len(y)}: give more audio")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    difference = x.mean(axis=0) - y.mean(axis=0)
    a, b = (np.linalg.qr((z - z.mean(axis=0)) / np.sqrt(len(z) - 1)).R for z in (x, y))
    trace_of_root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(difference @ difference + np.sum(a**2) + np.sum(b**2) - 2 * trace_of_root)


def kl_softmax(target_logits: np.ndarray, logits: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """KL(target || generated) of class distributions, one value a pair; papers' "KL" or "KLD" is its mean.

    Args:
      target_logits, logits: `[pairs, classes]`.
      eps: added inside the logarithm of the generated side only.
    """
    log_p = scipy.special.log_softmax(np.asarray(target_logits, np.float64), axis=-1)
    q = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    return np.sum(np.exp(log_p) * (log_p - np.log(q + eps)), axis=-1)


def kl_sigmoid(target_logits: np.ndarray, logits: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """As `kl_softmax` with independent class probabilities; without the (1 - p) term, so not a true divergence."""
    log_p = scipy.special.log_expit(np.asarray(target_logits, np.float64))
    q = scipy.special.expit(np.asarray(logits, np.float64))
    return np.sum(np.exp(log_p) * (log_p - np.log(q + eps)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float], counts: Sequence[int], replicates: int = 100, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The statistic of the whole sample, with the spread it has over samples drawn with replacement.

    Percentiles of the replicates are taken about their mean and put around the value: a resampled Fréchet distance is
    biased upwards once more (repeats lower the rank of a covariance), so that plain percentiles would miss the value.

    Args:
      statistic: figure from one index array a population, such as `statistic(indices)` or `statistic(i, j)`.
      counts: units in each population, here files (not patches: those of one file are not independent).
      replicates: number of draws.
      seed: of the draws.
      level: coverage.
    """
    generator = np.random.default_rng(seed)
    value = statistic(*(np.arange(count) for count in counts))
    draws = [statistic(*(generator.integers(count, size=count) for count in counts)) for _ in range(replicates)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - np.mean(draws)
    return Estimate(value, float(value + low), float(value + high))
