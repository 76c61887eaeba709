"""The reverse process over all of a song's windows at once."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from subtractive_jax import parts, rng
from subtractive_jax.diffusion import schedule, solvers
from subtractive_jax.errors import UserError
from subtractive_jax.sampling.windows import Windows

if TYPE_CHECKING:
    from subtractive_jax.model import Model

TIME_AXIS = -2  # of latents and images, [..., F, T, C]
SETTINGS = ("solver", "steps", "text_guidance", "context_guidance", "guidance_rescale")  # that a model has its own of


@dataclasses.dataclass(frozen=True)
class Known:
    """What is not to be drawn: scaled latents [F, T, C], and where they hold, [T] bool."""

    latents: np.ndarray
    where: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model, what it is asked for, and how it is sampled.

    Every step predicts all windows of the song, which overlap by half, blends the predictions and takes one step on the
    whole song (MultiDiffusion, Bar-Tal et al. 2023), so that windows agree where they meet.

    Attributes:
      stem: index in `model.stems`.
      guidance_rescale: see `guidance.rescaled`; 0 to 1.
      guidance_interval: between which shares of the timesteps there is guidance (Kynkäänniemi et al. 2024); outside
        the denoiser is asked with context and text alone.
      strength: None for the subtractive denoiser, else SDEdit's (Meng et al. 2022) with the base denoiser.

    Raises:
      UserError: a setting that cannot be, or a model without the denoiser.
    """

    model: "Model"
    instruction: str
    stem: int
    solver: str
    steps: int
    text_guidance: float
    context_guidance: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    strength: float | None

    def __post_init__(self) -> None:
        for name in ("text_guidance", "context_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)}: it must be a finite number")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise UserError(f"guidance_rescale {self.guidance_rescale}: it must be between 0 and 1")
        low, high = self.guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise UserError(f"guidance_interval {low} to {high}: 0 <= low <= high <= 1 must hold")
        if self.strength is not None and not 0.0 < self.strength <= 1.0:
            raise UserError(f"strength {self.strength}: it must be above 0 and at most 1")
        self.model.params("denoiser" if self.strength is None else "base_denoiser")

    def settings(self) -> dict[str, Any]:
        """What `result.json` says of them."""
        settings = {
            "model": self.model.name,
            "instruction": self.instruction,
            "solver": self.solver,
            "steps": self.steps,
            "text_guidance": self.text_guidance,
            "guidance_rescale": self.guidance_rescale,
            "guidance_interval": list(self.guidance_interval),
        }
        last = {"context_guidance": self.context_guidance} if self.strength is None else {"strength": self.strength}
        return settings | last

    def latents(
        self,
        context: np.ndarray,
        seeds: Sequence[int],
        known: Known | None = None,
        progress: Callable[[int, int], None] | None = None,
        windows: Windows | None = None,
    ) -> np.ndarray:
        """Draws the whole song once for each seed, all together.

        Args:
          context: unscaled latents of the context's windows [windows, F, T, its channels].
          seeds: what is drawn for one depends on no other.
          known: what stays (Lugmayr et al. 2022, "RePaint", without resampling).
          progress: called with (calls of the denoiser done, calls in all).
          windows: where they lie; half a window apart if not given.

        Returns:
          Unscaled latents of the song [seeds, F, windows.total, C].
        """
        config = self.model.config
        begin = 0 if self.strength is None else self.steps - max(1, int(self.steps * self.strength))
        plan = solvers.plan(config.schedule, self.solver, self.steps, begin)
        rates = schedule.rates(config.schedule)
        text_states, text_mask = self.model.encode_text(["", self.instruction])
        if config.null_text == "zeros":
            text_states[0] = 0.0

        shift, scale = np.float32(config.latent_shift), np.float32(config.latent_scale)
        context = context - shift
        frequencies, length, channels = parts.latents(config).shape
        windows = windows or Windows(length, len(context))
        drawn = np.stack([noise(seed, windows, frequencies, channels) for seed in seeds])
        x = drawn
        if self.strength is not None:
            x = np.asarray(schedule.add_noise(windows.blend(context * scale, TIME_AXIS), x, plan.timesteps[0], rates))
        contexts = np.tile(context * np.float32(config.context_scale), (len(seeds), 1, 1, 1))

        def output(x: np.ndarray, timestep: int) -> np.ndarray:
            """The guided output for whole songs [seeds, F, T, C]."""
            now = np.concatenate([windows.split(song, TIME_AXIS) for song in x])
            low, high = self.guidance_interval
            guided = low <= timestep / config.schedule.num_train_timesteps <= high
            text = self.text_guidance if guided else 1.0
            if self.strength is None:
                guidance = self.context_guidance if guided else 1.0, text, self.guidance_rescale
                outputs = self.model.denoise(now, contexts, timestep, text_states, text_mask, self.stem, *guidance)
            else:
                outputs = self.model.denoise_base(now, timestep, text_states, text_mask, text, self.guidance_rescale)
            return np.stack([windows.blend(song, TIME_AXIS) for song in np.split(outputs, len(seeds))])

        state = solvers.start(plan, x)
        for call, t in enumerate(plan.timesteps):
            if known is not None:
                there = np.asarray(schedule.add_noise(known.latents, drawn, t, rates))
                state = state._replace(x=np.where(known.where[:, None], there, state.x))
            state = solvers.step(plan, call, state, output(np.asarray(state.x), int(t)))
            if progress:
                progress(call + 1, len(plan.timesteps))
        x = np.asarray(state.x)
        if known is not None:
            x = np.where(known.where[:, None], known.latents, x)
        return x / scale + shift


def noise(seed: int, windows: Windows, frequencies: int, channels: int) -> np.ndarray:
    """What a song starts from, [frequencies, windows.total, channels].

    Drawn half a window after the other, so that a longer song begins with the same.

    Raises:
      UserError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: it must be at least 0 and below 2^32")
    shape = (frequencies, windows.hop, channels)
    halves = -(-windows.total // windows.hop)
    drawn = [np.asarray(jax.random.normal(rng.stream(seed, "sampling", half), shape)) for half in range(halves)]
    return np.concatenate(drawn, axis=TIME_AXIS)[:, : windows.total]
