"""A song without a stem and an instruction -> the stem and the full mix, at the song's own rate and channels."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax import rng
from subtractive_jax.diffusion import schedule, solvers
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.autoencoder import mode
from subtractive_jax.representation.audio import resample, to_mono
from subtractive_jax.representation.level import context_gain
from subtractive_jax.sampling import gates
from subtractive_jax.sampling.windows import Windows

if TYPE_CHECKING:
    from subtractive_jax.model import Model

METHODS = ("insert", "sdedit")
FADE_SECONDS = 0.01  # where a stem starts or ends inside the song
MAX_LOWERING_DB = 6.0  # how far a stem is turned down to keep the mix below full scale
_TIME_AXIS = -2  # of latents and images, [..., F, T, C]
_GRID = 2.0**23  # 24-bit steps in [0, 1)


@dataclasses.dataclass(frozen=True)
class Insertion:
    """A new stem in its song.

    Attributes:
      stem: [channels, samples] float32, as loud as it is in the mix.
      mix: [channels, samples] float32. For a stem target exactly input + stem.
      sample_rate: the input's, in Hz.
      estimated: the model wrote the mix, and the stem is only what the mix has more than the input.
      info: settings, measures (`gates.figures`) and timings, as they go into `result.json`.
    """

    stem: np.ndarray
    mix: np.ndarray
    sample_rate: int
    estimated: bool
    info: dict[str, Any]


def insert(
    model: "Model",
    audio: np.ndarray,
    sample_rate: int,
    instruction: str,
    stem: str = "drums",
    seed: int = 0,
    solver: str | None = None,
    steps: int | None = None,
    text_guidance: float | None = None,
    context_guidance: float | None = None,
    method: str = "insert",
    strength: float | None = None,
    stem_gain_db: float = 0.0,
    start: float = 0.0,
    end: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Insertion:
    """Puts a stem into a song.

    Every step of the sampler predicts all windows of the song, which overlap by half, blends the predictions and takes
    one step on the whole song (MultiDiffusion, Bar-Tal et al. 2023), so that windows agree where they meet.

    Args:
      audio: the song without the stem, [channels, samples] or [samples] float in [-1, 1].
      sample_rate: of `audio`, in Hz.
      instruction: such as "Add reggae beats".
      stem: a name of `model.stems`.
      seed: the same seed gives the same stem.
      solver: "ddim", "pndm" or "dpmsolver++". This, steps and both guidances default to the model's `config.sampling`.
      steps: denoising steps.
      text_guidance: how strongly to follow the instruction.
      context_guidance: how strongly to follow the music; "sdedit" has none.
      method: "insert", or "sdedit" (Meng et al. 2022): the base denoiser redraws the noised song from the text alone.
      strength: "sdedit" only: how much noise, in (0, 1]; 1 keeps nothing of the song.
      stem_gain_db: makes the stem louder or softer; models that write stems only.
      start: where the stem may begin, in seconds.
      end: where it must end, in seconds; the song's end when None.
      progress: called with (calls of the denoiser done, calls in all); "pndm" makes one more than `steps`.

    Raises:
      UserError: anything above that cannot be, or a model without the parts it takes.
    """
    audio = _checked_audio(audio, sample_rate)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if stem not in model.stems:
        raise unknown_name("stem", stem, model.stems)
    if not instruction.strip():
        raise UserError('the instruction is empty: say what to add, such as "Add reggae beats"')
    if strength is not None and method != "sdedit":
        raise UserError('strength is for method "sdedit" only')
    writes_mix = method == "sdedit" or model.config.target == "mix"
    if stem_gain_db and writes_mix:
        raise UserError("stem_gain_db needs a model that writes stems, and this one writes the full mix")
    defaults = model.config.sampling
    sampler = _Sampler(
        model=model,
        instruction=instruction,
        stem=model.stems.index(stem),
        seed=seed,
        solver=defaults.solver if solver is None else solver,
        steps=defaults.steps if steps is None else steps,
        text_guidance=defaults.text_guidance if text_guidance is None else text_guidance,
        context_guidance=defaults.context_guidance if context_guidance is None else context_guidance,
        strength=(defaults.sdedit_strength if strength is None else strength) if method == "sdedit" else None,
        progress=progress,
    )
    first, last = _range(start, end, audio.shape[1], sample_rate)

    began = time.perf_counter()
    rate = model.mel.sample_rate
    mono = resample(to_mono(audio), sample_rate, rate)
    gain = context_gain(mono, rate, model.config.data.loudness_lufs)
    excerpt = gain * resample(to_mono(audio[:, first:last]), sample_rate, rate)
    mel = model.mel
    windows = Windows.covering(mel.frames(len(excerpt) + mel.hop_length - 1), mel.window_frames)
    contexts = windows.split_audio(np.pad(excerpt, (0, mel.samples(windows.total) - len(excerpt))), mel)
    latents = sampler.latents(contexts)
    sampled = time.perf_counter()
    image = windows.blend(model.decode_image(latents), _TIME_AXIS)

    def render(image: np.ndarray) -> np.ndarray:
        """A mel image to audio in the excerpt's place: [channels, samples] at the input's rate, faded at its ends."""
        rendered = resample(model.vocode(image) / gain, rate, sample_rate)[: last - first]
        line = np.zeros(audio.shape[1], np.float32)
        line[first : first + len(rendered)] = rendered
        return np.tile(line * _fades(first, last, audio.shape[1], sample_rate), (len(audio), 1))

    lowered_db = 0.0
    if writes_mix:
        outside = 1.0 - _fades(first, last, audio.shape[1], sample_rate)
        mix = render(image) + outside * audio
        new_stem = render(_estimated_stem(model, image, windows.blend(model.encode_image(contexts), _TIME_AXIS)))
    else:
        new_stem = render(image) * np.float32(10.0 ** (stem_gain_db / 20.0))
        lowered_db = _lowering_db(audio, new_stem)
        # On the grid of 24-bit audio every sum with an input of up to 24 bits is exact in float32.
        new_stem = np.round(new_stem * 10.0 ** (-lowered_db / 20.0) * _GRID).astype(np.float32) / np.float32(_GRID)
        mix = audio + new_stem
    decoded = time.perf_counter()
    info = sampler.settings() | {
        "stem": stem,
        "method": method,
        "target": "mix" if writes_mix else "stem",
        "estimated": writes_mix,
        "start_seconds": first / sample_rate,
        "end_seconds": last / sample_rate,
        "windows": windows.count,
        "input_gain": gain,
        "stem_gain_db": stem_gain_db - lowered_db,
        "stem_lowered_db": lowered_db,
        "figures": gates.figures(audio, new_stem, mix, sample_rate),
        "seconds": {"sampling": sampled - began, "decoding": decoded - sampled},
    }
    return Insertion(new_stem, mix, sample_rate, writes_mix, info)


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """The reverse process over a whole song; `strength` is None for the subtractive denoiser."""

    model: "Model"
    instruction: str
    stem: int
    seed: int
    solver: str
    steps: int
    text_guidance: float
    context_guidance: float
    strength: float | None
    progress: Callable[[int, int], None] | None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: it must be at least 0 and below 2^32")
        for name in ("text_guidance", "context_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)}: it must be a finite number")
        if self.strength is not None and not 0.0 < self.strength <= 1.0:
            raise UserError(f"strength {self.strength}: it must be above 0 and at most 1")
        self.model.params("denoiser" if self.strength is None else "base_denoiser")

    def settings(self) -> dict[str, Any]:
        settings = {
            "model": self.model.name,
            "instruction": self.instruction,
            "seed": self.seed,
            "solver": self.solver,
            "steps": self.steps,
            "text_guidance": self.text_guidance,
        }
        last = {"context_guidance": self.context_guidance} if self.strength is None else {"strength": self.strength}
        return settings | last

    def latents(self, contexts: np.ndarray) -> np.ndarray:
        """Windows of the levelled context [windows, window_samples] to unscaled latents [windows, F, T, C]."""
        config = self.model.config
        begin = 0 if self.strength is None else self.steps - max(1, int(self.steps * self.strength))
        plan = solvers.plan(config.schedule, self.solver, self.steps, begin)
        text_states, text_mask = self.model.encode_text(["", self.instruction])
        if config.null_text == "zeros":
            text_states[0] = 0.0

        shift, scale = np.float32(config.latent_shift), np.float32(config.latent_scale)
        context = np.asarray(mode(jnp.asarray(self.model.encode_audio(contexts)))) - shift
        windows = Windows(context.shape[_TIME_AXIS], len(context))
        shape = (context.shape[1], windows.total, context.shape[3])
        x = jax.random.normal(rng.stream(self.seed, "sampling"), shape)
        if self.strength is not None:
            rates = schedule.rates(config.schedule)
            x = schedule.add_noise(windows.blend(context * scale, _TIME_AXIS), x, plan.timesteps[0], rates)

        state = solvers.start(plan, x)
        for call, t in enumerate(plan.timesteps):
            now = windows.split(np.asarray(state.x), _TIME_AXIS)
            if self.strength is None:
                output = self.model.denoise(
                    now,
                    context * np.float32(config.context_scale),
                    t,
                    text_states,
                    text_mask,
                    self.stem,
                    self.context_guidance,
                    self.text_guidance,
                )
            else:
                output = self.model.denoise_base(now, t, text_states, text_mask, self.text_guidance)
            state = solvers.step(plan, call, state, windows.blend(output, _TIME_AXIS))
            if self.progress:
                self.progress(call + 1, len(plan.timesteps))
        return windows.split(np.asarray(state.x) / scale + shift, _TIME_AXIS)


def _checked_audio(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    audio = np.atleast_2d(np.asarray(audio, np.float32))
    if audio.ndim != 2:
        raise UserError(f"audio of shape {audio.shape}: it must be [channels, samples] or [samples]")
    if audio.size == 0:
        raise UserError("the audio is empty")
    if audio.shape[0] > audio.shape[1]:
        raise UserError(f"audio of {audio.shape[0]} channels and {audio.shape[1]} samples: give [channels, samples]")
    if not np.isfinite(audio).all():
        raise UserError("the audio holds NaN or infinite samples")
    if sample_rate <= 0:
        raise UserError(f"sample rate {sample_rate}: it must be positive")
    return audio


def _range(start: float, end: float | None, samples: int, sample_rate: int) -> tuple[int, int]:
    """Seconds to (first, last) samples."""
    length = samples / sample_rate
    if not 0.0 <= start < (length if end is None else min(end, length)):
        raise UserError(
            f"start {start} and end {end}: 0 <= start < end must hold within the song's {length:.2f} seconds"
        )
    first, last = round(start * sample_rate), samples if end is None else min(samples, round(end * sample_rate))
    if first >= last:
        raise UserError(f"start {start} and end {end}: not one sample lies between them")
    return first, last


def _fades(first: int, last: int, samples: int, sample_rate: int) -> np.ndarray:
    """1 from `first` to `last`, 0 outside, float32 [samples], with short ramps at ends that lie inside the song."""
    fade = min(round(FADE_SECONDS * sample_rate), (last - first) // 2)
    ramp = (np.arange(fade) + 0.5) / max(fade, 1)
    curve = np.zeros(samples, np.float32)
    curve[first:last] = 1.0
    if first > 0:
        curve[first : first + fade] = ramp
    if last < samples:
        curve[last - fade : last] = ramp[::-1]
    return curve


def _estimated_stem(model: "Model", mix: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The mel image of what the mix has more than the context, in power."""
    music = jnp.square(model.mel.magnitude(jnp.asarray(context)))
    power = jnp.square(model.mel.magnitude(jnp.asarray(mix))) - music
    return np.asarray(model.mel.image(jnp.sqrt(jnp.maximum(power, 0.0))))


def _lowering_db(audio: np.ndarray, stem: np.ndarray) -> float:
    """How far to turn the stem down so that the mix stays below full scale, or below the input's own peak.

    At most `MAX_LOWERING_DB`: a song mastered to full scale would silence its new stem.
    """
    limit = max(1.0, float(np.abs(audio).max()))
    over = np.abs(audio + stem) > limit
    if not over.any():
        return 0.0
    room = (limit - audio[over] * np.sign(stem[over])) / np.abs(stem[over])
    return float(min(MAX_LOWERING_DB, -20.0 * np.log10(max(room.min(), 1e-6))))
