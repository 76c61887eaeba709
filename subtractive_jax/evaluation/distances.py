"""Distances between sets of recordings by their published definitions, with bootstrap intervals."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.spatial
import scipy.special
import threadpoolctl

from subtractive_jax.errors import UserError

_INFINITY_FROM, _INFINITY_POINTS = 500, 25  # of fadtk
FEWEST_FOR_INFINITY = 2 * _INFINITY_FROM  # patches
_MOST_FOR_BANDWIDTH = 2_000  # patches


class Gaussian(NamedTuple):
    """A normal distribution: `mean` `[D]`, and `root` `[rank, D]` with covariance rootᵀ root."""

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def fitted(cls, x: np.ndarray) -> "Gaussian":
        """To embeddings `[samples, D]`, two at least; covariance with ddof 1 as in audioldm_eval.

        Raises:
          UserError: there are fewer than two samples.
        """
        if len(x) < 2:
            raise UserError(f"a Fréchet distance needs two samples a side, got {len(x)}: give more audio")
        x = np.asarray(x, np.float64)
        mean = x.mean(axis=0)
        return cls(mean, np.linalg.qr((x - mean) / np.sqrt(len(x) - 1)).R)

    def distance(self, other: "Gaussian") -> float:
        """The Fréchet distance, see `frechet`."""
        difference = self.mean - other.mean
        trace_of_root = np.linalg.svd(self.root @ other.root.T, compute_uv=False).sum()
        return float(difference @ difference + np.sum(self.root**2) + np.sum(other.root**2) - 2 * trace_of_root)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to `x` and `y`: |m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½).

    Heusel et al. 2017. With S1 = AᵀA and S2 = BᵀB the trace of the root is the sum of the singular values of ABᵀ, which
    needs no matrix root and no epsilon where covariances are singular. They are with fewer samples than dimensions, and
    the distance is then biased upwards: report the counts with it.

    Args:
      x, y: embeddings `[samples, dimensions]`.

    Raises:
      UserError: fewer than two samples in either set.
    """
    return Gaussian.fitted(x).distance(Gaussian.fitted(y))


def frechet_infinity(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """FAD-inf: the Fréchet distance that unboundedly many samples of `y` would have from `x`.

    Gui et al. 2024, by the rule of fadtk: for 25 counts n, evenly from 500 to all, n samples of `y` are drawn with
    replacement; FAD_n = a / n + b is fitted by least squares, and b is reported. Below zero only by chance.

    Args:
      x: embeddings of the reference `[samples, dimensions]`, used whole.
      y: embeddings of the candidate. Of fewer than `FEWEST_FOR_INFINITY` the result means nothing: 1 / n hardly varies.
      seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    reference = Gaussian.fitted(x)
    counts = np.linspace(_INFINITY_FROM, len(y), _INFINITY_POINTS).astype(int)
    values = [reference.distance(Gaussian.fitted(y[generator.integers(len(y), size=count)])) for count in counts]
    return float(np.polyfit(1.0 / counts, values, deg=1)[1])


class KernelDistance:
    """KAD, 100 times the unbiased squared maximum mean discrepancy (Chung et al. 2025), between sets of files.

    With Gaussian kernel k(a, b) = exp(-|a - b|² / (2 s²)) over m patches x and n patches y:
    MMD² = sum_{i!=j} k(x_i, x_j) / (m (m - 1)) + sum_{i!=j} k(y_i, y_j) / (n (n - 1)) - 2 sum k(x_i, y_j) / (m n).
    It may be negative. The bandwidth s is the median distance between patches of the *reference*, as paper and README
    of kadtk say; kadtk's code takes that of the evaluated set, so that every candidate is measured on a scale of its
    own. Of more than 2,000 reference patches, 2,000 evenly spaced ones give the median.

    The kernel's sums by pairs of files are kept, so that other drawings of files cost next to nothing; the bandwidth is
    that of the whole reference in all of them.

    Args:
      reference, candidate: files' patches, each `[patches, dimensions]`.
    """

    def __init__(self, reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray]):
        self._reference_sizes, self._candidate_sizes = (
            np.array([len(patches) for patches in files]) for files in (reference, candidate)
        )
        patches = np.concatenate(reference)
        few = patches[np.linspace(0, len(patches) - 1, min(len(patches), _MOST_FOR_BANDWIDTH)).round().astype(int)]
        bandwidth = float(np.median(scipy.spatial.distance.pdist(np.asarray(few, np.float64)))) if len(few) > 1 else 0.0
        self._scale = 1.0 / (2.0 * bandwidth**2 + 1e-8)  # kadtk's guard against patches that are all the same
        self._within_reference = self._sums(reference, reference)
        self._within_candidate = self._sums(candidate, candidate)
        self._across = self._sums(reference, candidate)

    def _sums(self, xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> np.ndarray:
        """Sums of the kernel over the patches of two files `[len(xs), len(ys)]`."""
        y = np.asarray(np.concatenate(ys), np.float64)
        starts = np.cumsum([0, *map(len, ys[:-1])])
        rows = []
        for x in xs:
            squares = scipy.spatial.distance.cdist(np.asarray(x, np.float64), y, "sqeuclidean")
            rows.append(np.add.reduceat(np.exp(-self._scale * squares).sum(axis=0), starts))
        return np.stack(rows)

    def __call__(self, i: np.ndarray, j: np.ndarray) -> float:
        """KAD of the reference's files `i` and the candidate's files `j` (indices, which may repeat)."""
        m, n = int(self._reference_sizes[i].sum()), int(self._candidate_sizes[j].sum())
        if min(m, n) < 2:
            raise UserError(f"KAD needs two patches a side, got {m} and {n}: give more audio")
        within_x = (self._within_reference[np.ix_(i, i)].sum() - m) / (m * (m - 1))
        within_y = (self._within_candidate[np.ix_(j, j)].sum() - n) / (n * (n - 1))
        return float(100.0 * (within_x + within_y - 2.0 * self._across[np.ix_(i, j)].sum() / (m * n)))


def kad(x: np.ndarray, y: np.ndarray) -> float:
    """`KernelDistance` of two sets of embeddings `[samples, dimensions]`, the reference's first."""
    return KernelDistance([x], [y])(np.zeros(1, int), np.zeros(1, int))


def prompt_adherence(candidate: np.ndarray, real: np.ndarray, shuffled: np.ndarray) -> float:
    """APA, accompaniment prompt adherence (Grachten and Nistal 2025): 0 (like strangers) to 1 (like true pairs).

    1/2 + (FAD(C, R') - FAD(C, R)) / (2 max(FAD(R, R'), |FAD(C, R') - FAD(C, R)|)), with distances below zero taken as
    zero; 1/2 where all of them are.

    Args:
      candidate: C, embeddings `[samples, dimensions]` of contexts mixed with generated stems.
      real: R, of contexts mixed with their own stems.
      shuffled: R', of contexts mixed with the stems of other songs.

    Raises:
      UserError: fewer than two samples in a set.
    """
    c, r, s = map(Gaussian.fitted, (candidate, real, shuffled))
    from_shuffled, from_real, scale = (max(0.0, a.distance(b)) for a, b in ((c, s), (c, r), (r, s)))
    closer = from_shuffled - from_real
    scale = max(scale, abs(closer))
    return 0.5 + closer / (2.0 * scale) if scale else 0.5


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
    """A figure, the ends of its interval, and the number of values it is of."""

    value: float
    low: float
    high: float
    count: int


def bootstrap(
    statistic: Callable[..., float],
    counts: Sequence[int],
    replicates: int = 100,
    seed: int = 0,
    level: float = 0.95,
    paired: bool = False,
) -> Estimate:
    """The statistic of the whole sample, with the spread it has over samples drawn with replacement.

    Percentiles of the replicates are taken about their mean and put around the value: a resampled Fréchet distance is
    biased upwards once more (repeats lower the rank of a covariance), so that plain percentiles would miss the value.

    Args:
      statistic: figure from one index array a population, such as `statistic(indices)` or `statistic(i, j)`; called
        from several threads.
      counts: units in each population, here files (not patches: those of one file are not independent).
      replicates: number of draws.
      seed: of the draws.
      level: coverage.
      paired: the populations' units belong together, so that the same ones are drawn from each.
    """
    generator = np.random.default_rng(seed)

    def drawn() -> list[np.ndarray]:
        if paired:
            return [generator.integers(counts[0], size=counts[0])] * len(counts)
        return [generator.integers(count, size=count) for count in counts]

    value = statistic(*(np.arange(count) for count in counts))
    samples = [drawn() for _ in range(replicates)]
    # BLAS's own threads wait for each other on matrices this small: 100 times slower where cores are shared.
    with threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        draws = list(pool.map(lambda sample: statistic(*sample), samples))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - np.mean(draws)
    return Estimate(value, float(value + low), float(value + high), counts[-1])
