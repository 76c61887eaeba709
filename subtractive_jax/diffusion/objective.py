"""What the denoiser predicts, how it is read, and how errors are weighted.

Epsilon (Ho et al. 2020), v (Salimans & Ho 2022, appendix D), the velocity of rectified flow (Liu et al. 2022), or the
data themselves ("sample", diffusers' name): noise of many channels cannot pass through a network that is narrower than
they are, sparse data can (Li & He 2025, arXiv:2511.13720, "Back to basics"). Each is a mixture of data and noise, as
x_t is; together the two mixtures tell both.
"""

import numpy as np

from subtractive_jax.diffusion.schedule import FLOW, Array, rates_at
from subtractive_jax.errors import UserError, unknown_name

PREDICTION_TYPES = ("epsilon", "v_prediction", FLOW, "sample")


def _mixture(prediction_type: str, signal: Array, noise: Array) -> tuple[Array | float, Array | float]:
    """How much of the data and of the noise there is in the output, for the rates of x_t."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return -noise, signal
    if prediction_type == FLOW:
        return -1.0, 1.0
    if prediction_type == "sample":
        return 1.0, 0.0
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)


def target(prediction_type: str, x: Array, noise: Array, t: Array, rates: Array) -> Array:
    """The regression target for clean data `x` [B, ...], `noise` of the same shape and timesteps `t` [B].

    Raises:
      UserError: unknown `prediction_type`.
    """
    of_x, of_noise = _mixture(prediction_type, *rates_at(rates, t, x))
    return of_x * x + of_noise * noise


def reading(prediction_type: str, rates: np.ndarray) -> np.ndarray:
    """What an output stands for: matrices [..., 2, 2] with (x0, noise) = matrix (x_t, output), for `rates` [..., 2].

    Raises:
      UserError: unknown `prediction_type`.
    """
    signal, noise = np.moveaxis(rates, -1, 0)
    of_x, of_noise = _mixture(prediction_type, signal, noise)
    adjugate = np.broadcast_arrays(of_noise, -noise, -of_x, signal)
    return np.stack(adjugate, axis=-1).reshape(*rates.shape, 2) / (signal * of_noise - noise * of_x)[..., None, None]


def min_snr_weights(prediction_type: str, rates: np.ndarray, gamma: float) -> np.ndarray:
    """Min-SNR weights of the output's squared error (Hang et al. 2023, arXiv:2303.09556), for `rates` [..., 2]: [...].

    The squared error of x0 counts min(SNR, gamma) times: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v,
    and as it is for the sample.

    Raises:
      UserError: `gamma` is not positive, or unknown `prediction_type`.
    """
    if not gamma > 0:
        raise UserError(f"loss.min_snr_gamma={gamma}: it must be positive, or 0 for no weighting (5 is usual)")
    snr = np.square(rates[..., 0] / rates[..., 1])
    return np.minimum(snr, gamma) * np.square(reading(prediction_type, rates)[..., 0, 1])
