"""DDIM with eta = 0 (Song et al. 2021, eq. 12), as diffusers' DDIMScheduler spaces and takes its steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.diffusion.schedule import Array, alphas_cumprod
from subtractive_jax.errors import UserError, unknown_name

SPACINGS = ("leading", "trailing")


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The timesteps a sample passes through, from noisy to clean, and the share of data after each: both [steps]."""

    timesteps: np.ndarray
    next_abar: np.ndarray


def ddim_ladder(schedule: Any, steps: int) -> Ladder:
    """Where `steps` DDIM steps stand and go.

    "leading" is what Stable Diffusion was sampled with; "trailing" starts at the last timestep, which v-prediction
    wants (Lin et al. 2024, "Common Diffusion Noise Schedules"). A step goes exactly where the next one begins;
    diffusers goes to `t - num_train_timesteps // steps`, which for "trailing" is another place when `steps` does not
    divide the timesteps.

    Args:
      schedule: `config.schedule`, with the names of diffusers' scheduler configs.
      steps: number of denoiser calls.

    Raises:
      UserError: a number of steps that cannot be, or an unknown `timestep_spacing`.
    """
    count = schedule.num_train_timesteps
    if not 1 <= steps <= count:
        raise UserError(f"{steps} sampling steps: choose between 1 and the schedule's {count} timesteps")
    if schedule.timestep_spacing == "leading":
        timesteps = (np.arange(steps) * (count // steps))[::-1] + schedule.steps_offset
    elif schedule.timestep_spacing == "trailing":
        timesteps = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
    else:
        raise unknown_name("timestep spacing", schedule.timestep_spacing, SPACINGS)
    timesteps = np.minimum(timesteps, count - 1).astype(np.int32)
    abar = alphas_cumprod(schedule)
    last = 1.0 if schedule.set_alpha_to_one else abar[0]
    return Ladder(timesteps, np.append(abar[timesteps[1:]], np.float32(last)))


def ddim_step(x0: Array, eps: Array, next_abar: float | jax.Array) -> jax.Array:
    """The sample at the next rung of the ladder, from the clean data and the noise read at this one."""
    return jnp.sqrt(next_abar) * x0 + jnp.sqrt(1.0 - next_abar) * eps
