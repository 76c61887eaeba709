"""What the denoiser predicts, and how it is read: epsilon (Ho et al. 2020) or v (Salimans & Ho 2022, appendix D)."""

import numpy as np

from subtractive_jax.diffusion.schedule import Array, signal_and_noise_rate
from subtractive_jax.errors import unknown_name

PREDICTION_TYPES = ("epsilon", "v_prediction")


def target(prediction_type: str, x: Array, noise: Array, t: Array, abar: Array) -> Array:
    """The regression target for clean data `x` [B, ...], `noise` of the same shape and timesteps `t` [B].

    Raises:
      UserError: unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, noise_rate = signal_and_noise_rate(abar, t, x)
        return signal * noise - noise_rate * x
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)


def reading(prediction_type: str, abar: np.ndarray) -> np.ndarray:
    """What an output stands for: matrices [..., 2, 2] with (x0, noise) = matrix (x_t, output), for shares `abar` [...].

    Raises:
      UserError: unknown `prediction_type`.
    """
    signal, noise_rate = np.sqrt(abar), np.sqrt(1.0 - abar)
    if prediction_type == "epsilon":
        rows = [[1.0 / signal, -noise_rate / signal], [np.zeros_like(abar), np.ones_like(abar)]]
    elif prediction_type == "v_prediction":
        rows = [[signal, -noise_rate], [noise_rate, signal]]
    else:
        raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))
