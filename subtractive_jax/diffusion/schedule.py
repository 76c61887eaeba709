"""The forward process of DDPM (Ho et al. 2020): how much of the data is left at each timestep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError, unknown_name

Array = jax.Array | np.ndarray
BETA_SCHEDULES = ("linear", "scaled_linear")


def alphas_cumprod(schedule: Any) -> np.ndarray:
    """The share of the data's variance left at each timestep, float64 [num_train_timesteps], decreasing.

    With `rescale_betas_zero_snr` nothing is left at the last timestep (Lin et al. 2024, algorithm 1).

    Args:
      schedule: `config.schedule`, with the names of diffusers' scheduler configs.

    Raises:
      UserError: unknown `beta_schedule`, or a last timestep of pure noise and a denoiser that predicts the noise.
    """
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    if schedule.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    else:
        raise unknown_name("beta schedule", schedule.beta_schedule, BETA_SCHEDULES)
    abar = np.cumprod(1.0 - betas)
    if not schedule.rescale_betas_zero_snr:
        return abar
    if schedule.prediction_type == "epsilon":
        raise UserError(
            'schedule.rescale_betas_zero_snr leaves pure noise at the last timestep, where predicting "epsilon" says '
            "nothing of the data: use v_prediction"
        )
    signal = np.sqrt(abar)
    return np.square((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1]))


def signal_and_noise_rate(abar: Array, t: Array, like: Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(abar[t]) and sqrt(1 - abar[t]), with the axes of `t` (none, or the batch) broadcast against `like`."""
    t = jnp.asarray(t)
    share = jnp.asarray(abar)[t].reshape(t.shape + (1,) * (like.ndim - t.ndim))
    return jnp.sqrt(share), jnp.sqrt(1.0 - share)


def add_noise(x: Array, noise: Array, t: Array, abar: Array) -> jax.Array:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, for `x` [B, ...] and timesteps `t` [B] or scalar."""
    signal, noise_rate = signal_and_noise_rate(abar, t, x)
    return signal * x + noise_rate * noise
