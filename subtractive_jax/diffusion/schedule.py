"""The forward process: how much data and how much noise there is at each timestep.

Diffusion preserves the variance (Ho et al. 2020); rectified flow goes straight from the data to the noise (Liu et al.
2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747). Either is a table of rates, so that noising, targets,
weights and solvers need not know which it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.errors import UserError, unknown_name

Array = jax.Array | np.ndarray
BETA_SCHEDULES = ("linear", "scaled_linear")
FLOW = "flow_prediction"  # the prediction type that comes with the straight forward process
CLEAN = (1.0, 0.0)  # rates of data without noise


def rates(schedule: Any) -> np.ndarray:
    """Rates of signal and noise, float64 [num_train_timesteps, 2], the signal decreasing: x_t is their mixture.

    sqrt(abar_t) and sqrt(1 - abar_t); with prediction type "flow_prediction" 1 - s and s at s = (t + 1) /
    num_train_timesteps, where no beta is read and the last timestep is pure noise.

    Args:
      schedule: `config.schedule`.

    Raises:
      UserError: see `alphas_cumprod`.
    """
    if schedule.prediction_type == FLOW:
        noise = np.arange(1, schedule.num_train_timesteps + 1) / schedule.num_train_timesteps
        return np.stack([1.0 - noise, noise], axis=-1)
    abar = alphas_cumprod(schedule)
    return np.sqrt(np.stack([abar, 1.0 - abar], axis=-1))


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


def rates_at(rates: Array, t: Array, like: Array) -> tuple[jax.Array, jax.Array]:
    """Signal and noise rate at `t`, whose axes (none, or the batch) are broadcast against `like`."""
    t = jnp.asarray(t)
    signal, noise = jnp.moveaxis(jnp.asarray(rates)[t], -1, 0).reshape(2, *t.shape, *(1,) * (like.ndim - t.ndim))
    return signal, noise


def add_noise(x: Array, noise: Array, t: Array, rates: Array) -> jax.Array:
    """x_t = signal_t x + noise_t noise, for `x` [B, ...], timesteps `t` [B] or scalar and `rates` [timesteps, 2]."""
    signal, noise_rate = rates_at(rates, t, x)
    return signal * x + noise_rate * noise
