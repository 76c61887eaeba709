"""A song without a stem and an instruction -> the stem and the full mix, at the song's own rate and channels."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.autoencoder import mode
from subtractive_jax.representation.level import context_gain
from subtractive_jax.representation.mel import Mel
from subtractive_jax.sampling import gates
from subtractive_jax.sampling.insertion import Insertion, Line, Place, levels
from subtractive_jax.sampling.sampler import SETTINGS, TIME_AXIS, Known, Sampler
from subtractive_jax.sampling.song import Recording, Song, mono
from subtractive_jax.sampling.windows import Windows

if TYPE_CHECKING:
    from subtractive_jax.model import Model

METHODS = ("insert", "sdedit")
_WINDOWS_AT_ONCE = 64  # as images, which are large
_FRAMES_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. `None` is the model's own, `config.sampling`.

    Attributes:
      solver: one of `solvers.SOLVERS`.
      steps: denoising steps.
      text_guidance: how strongly to follow the instruction.
      context_guidance: how strongly to follow the music; "sdedit" has none.
      guidance_rescale: 0 to 1, how far to undo the loudness that strong guidance gives; see `guidance.rescaled`.
      guidance_interval: between which shares of the timesteps (0 is clean, 1 is noise) there is guidance.
      method: "insert", or "sdedit" (Meng et al. 2022): the base denoiser redraws the noised song from the text alone.
      strength: "sdedit" only: how much noise, in (0, 1]; 1 keeps nothing of the song.
      stem_gain_db: makes the stem louder or softer; models that write stems only.
      start: where the stem may begin, in seconds.
      end: where it must end, in seconds; the song's end when None.
    """

    solver: str | None = None
    steps: int | None = None
    text_guidance: float | None = None
    context_guidance: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    method: str = "insert"
    strength: float | None = None
    stem_gain_db: float = 0.0
    start: float = 0.0
    end: float | None = None


def insert(
    model: "Model",
    audio: np.ndarray,
    sample_rate: int,
    instruction: str,
    stem: str = "drums",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Insertion:
    """Puts a stem into a song.

    Args:
      audio: the song without the stem, [channels, samples] or [samples] float in [-1, 1].
      sample_rate: of `audio`, in Hz.
      instruction: such as "Add reggae beats".
      stem: a name of `model.stems`.
      seed: the same seed gives the same stem.
      progress: called with (calls of the denoiser done, calls in all).
      **settings: the fields of `Settings`.

    Raises:
      UserError: anything above that cannot be, or a model without the parts it takes.
    """
    song = Recording.checked(audio, sample_rate)
    return draw(model, song, instruction, stem, [seed], Settings(**settings), progress=progress)[0]


def draw(
    model: "Model",
    song: Song,
    instruction: str,
    stem: str,
    seeds: Sequence[int],
    settings: Settings,
    old_stem: Song | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Insertion]:
    """As `insert`, for one stem a seed, drawn together, and for songs that are read block by block.

    Args:
      song: without the stem.
      old_stem: what the song had there before. Where `settings` name a part of the song, it stays outside of it, and
        the new stem is drawn to continue it.
    """
    sampler, writes_mix = sampler_for(model, instruction, stem, settings)
    began = time.perf_counter()
    excerpt = _excerpt(model, song, settings)
    contexts = excerpt.windows_of(excerpt.music)
    latents = _encoded(model, contexts)
    known, stays = None, old_stem if excerpt.is_part else None
    if stays is not None:
        before = excerpt.like_music(mono(stays, model.mel.sample_rate)[0])
        target = _encoded(model, excerpt.windows_of(excerpt.music + before if writes_mix else before))
        known = excerpt.known(target, model.config)
    drawn = sampler.latents(latents, seeds, known, progress)
    decoded_context = _decoded(model, latents) if writes_mix else None
    true_context = None  # "sdedit" redraws the music too, and is measured as it was published
    if writes_mix and settings.method == "insert":
        true_context = _blended(contexts, model.encode_image)
    sampling_seconds = time.perf_counter() - began

    insertions = []
    for seed, line in zip(seeds, drawn, strict=True):
        began = time.perf_counter()
        image = _decoded(model, Windows(latents.shape[TIME_AXIS], len(latents)).split(line, TIME_AXIS))
        stem_image, new_mix, change_db = image, None, None
        if decoded_context is not None:
            change_db = _difference_db(model, image, decoded_context)
            stem_image = _estimated_stem(model, image, decoded_context)
            if true_context is not None:
                image = _corrected(model, image, decoded_context, true_context)
            new_mix = excerpt.line(model.vocode(image))
        new_stem = excerpt.line(model.vocode(stem_image))
        insertion = Insertion(song, excerpt.place, new_stem, new_mix, 10.0 ** (settings.stem_gain_db / 20.0), stays)
        heard = levels(insertion)
        if not writes_mix and heard.lowering_db:
            insertion = dataclasses.replace(insertion, gain=insertion.gain * 10.0 ** (-heard.lowering_db / 20.0))
            heard = dataclasses.replace(levels(insertion), lowering_db=heard.lowering_db)
        info = sampler.settings() | {
            "seed": seed,
            "stem": stem,
            "method": settings.method,
            "target": "mix" if writes_mix else "stem",
            "estimated": writes_mix,
            "start_seconds": excerpt.place.first / song.sample_rate,
            "end_seconds": excerpt.place.last / song.sample_rate,
            "windows": len(latents),
            "input_gain": excerpt.gain,
            "stem_gain_db": 20.0 * math.log10(insertion.gain),
            "stem_lowered_db": 0.0 if writes_mix else heard.lowering_db,
            "figures": gates.figures(*excerpt.heard(insertion), model.mel.sample_rate, heard, change_db),
            "seconds": {"sampling": sampling_seconds / len(seeds), "decoding": time.perf_counter() - began},
        }
        insertions.append(dataclasses.replace(insertion, info=info))
    return insertions


def sampler_for(model: "Model", instruction: str, stem: str, settings: Settings) -> tuple[Sampler, bool]:
    """(what draws, whether it writes the full mix)."""
    if settings.method not in METHODS:
        raise unknown_name("method", settings.method, METHODS)
    if stem not in model.stems:
        raise unknown_name("stem", stem, model.stems)
    if not instruction.strip():
        raise UserError('the instruction is empty: say what to add, such as "Add reggae beats"')
    sdedit = settings.method == "sdedit"
    if settings.strength is not None and not sdedit:
        raise UserError('strength is for method "sdedit" only')
    writes_mix = sdedit or model.config.target == "mix"
    if settings.stem_gain_db and writes_mix:
        raise UserError("stem_gain_db needs a model that writes stems, and this one writes the full mix")
    own = {"guidance_rescale": 0.0, **model.config.sampling}  # models of earlier versions have none

    def chosen(name: str) -> Any:
        value = getattr(settings, name)
        return own[name] if value is None else value

    strength = (own["sdedit_strength"] if settings.strength is None else settings.strength) if sdedit else None
    sampler = Sampler(
        model=model,
        instruction=instruction,
        stem=model.stems.index(stem),
        **{name: chosen(name) for name in SETTINGS},
        guidance_interval=settings.guidance_interval,
        strength=strength,
    )
    return sampler, writes_mix


@dataclasses.dataclass(frozen=True)
class _Excerpt:
    """The part of a song that a model sees: some more than the part it may change.

    Attributes:
      mel: the model's representation.
      music: the whole song, mono at the model's rate.
      place: what may change.
      start: where the excerpt begins, in samples of the song; a whole sample at the model's rate.
      first, last: the same place in samples of `music`, and its end.
      gain: of the training level.
    """

    mel: Mel
    music: np.ndarray
    place: Place
    start: int
    first: int
    last: int
    gain: float

    @property
    def is_part(self) -> bool:
        """Whether some of the song is not to change."""
        return (self.place.first, self.place.last) != (0, self.place.samples)

    def windows_of(self, line: np.ndarray) -> np.ndarray:
        """The excerpt of `line`, as long as `music`, at the training level: [windows, window_samples]."""
        levelled = np.float32(self.gain) * line[self.first : self.last]
        frames = self.mel.frames(len(levelled) + self.mel.hop_length - 1)
        windows = Windows.covering(frames, self.mel.window_frames)
        return windows.split_audio(np.pad(levelled, (0, self.mel.samples(windows.total) - len(levelled))), self.mel)

    def like_music(self, line: np.ndarray) -> np.ndarray:
        """Cut or filled up to the length of `music`."""
        return np.pad(line[: len(self.music)], (0, max(0, len(self.music) - len(line))))

    def line(self, rendered: np.ndarray) -> Line:
        """What was rendered, at the song's own level."""
        audio = rendered[: self.last - self.first] / np.float32(self.gain)
        return Line(audio, self.mel.sample_rate, self.start)

    def known(self, latents: np.ndarray, config: ConfigDict) -> Known:
        """Latents [windows, F, T, C] of what was there, known where nothing may change."""
        windows = Windows(latents.shape[TIME_AXIS], len(latents))
        scaled = (latents - np.float32(config.latent_shift)) * np.float32(config.latent_scale)
        middles = (np.arange(windows.total) + 0.5) * self.mel.window_frames / windows.length * self.mel.hop_length
        at = self.start + middles * self.place.sample_rate / self.mel.sample_rate
        return Known(windows.blend(scaled, TIME_AXIS), (at < self.place.first) | (at >= self.place.last))

    def heard(self, insertion: Insertion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(song, stem, mix) mono at the model's rate, where something may change."""
        ratio = self.mel.sample_rate / self.place.sample_rate
        begin = min(round(self.place.first * ratio), self.last - 1)
        end = min(max(round(self.place.last * ratio), begin + 1), self.last)
        music = self.music[begin:end]
        inside = slice(begin - self.first, end - self.first)
        stem = np.float32(insertion.gain) * insertion.new_stem.audio[inside]
        return music, stem, insertion.new_mix.audio[inside] if insertion.new_mix else music + stem


def _excerpt(model: "Model", song: Song, settings: Settings) -> _Excerpt:
    mel, sample_rate = model.mel, song.sample_rate
    music, samples = mono(song, mel.sample_rate)
    first, last = _range(settings.start, settings.end, samples, sample_rate)
    place = Place(first, last, samples, sample_rate)
    half_window = mel.window_samples * sample_rate // mel.sample_rate // 2
    grid = sample_rate // math.gcd(sample_rate, mel.sample_rate)  # samples that are whole ones at the model's rate
    start = max(0, first - half_window) // grid * grid
    end = math.ceil(min(samples, last + half_window) * mel.sample_rate / sample_rate)
    gain = context_gain(music, mel.sample_rate, model.config.data.loudness_lufs)
    if not len(music):  # of a fraction of a sample
        music = np.zeros(1, np.float32)
    return _Excerpt(mel, music, place, start, start * mel.sample_rate // sample_rate, min(end, len(music)), gain)


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


def _encoded(model: "Model", audio: np.ndarray) -> np.ndarray:
    """Windows of audio to unscaled latents [windows, F, T, C]."""
    return np.asarray(mode(jnp.asarray(model.encode_audio(audio))))


def _blended(windows: np.ndarray, images: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The song's mel image [n_mels, frames, 1] from that of each window, few of which are in memory."""

    def one_by_one() -> Iterator[np.ndarray]:
        for start in range(0, len(windows), _WINDOWS_AT_ONCE):
            yield from images(windows[start : start + _WINDOWS_AT_ONCE])

    frames = next(one_by_one()).shape[TIME_AXIS]
    return Windows(frames, len(windows)).blend(one_by_one(), TIME_AXIS)


def _decoded(model: "Model", latents: np.ndarray) -> np.ndarray:
    """Unscaled latents [windows, F, T, C] to the song's mel image [n_mels, frames, 1]."""
    return _blended(latents, model.decode_image)


def _in_blocks(function: Callable[..., jax.Array], *images: np.ndarray) -> list[np.ndarray]:
    """The function of images [n_mels, frames, 1] of one length, some frames of all at a time."""
    starts = range(0, images[0].shape[TIME_AXIS], _FRAMES_AT_ONCE)
    blocks = ([jnp.asarray(image[:, start : start + _FRAMES_AT_ONCE]) for image in images] for start in starts)
    return [np.asarray(function(*block)) for block in blocks]


def _estimated_stem(model: "Model", mix: np.ndarray, decoded_context: np.ndarray) -> np.ndarray:
    """The mel image of what the mix has more than the context, in power, both decoded: their errors are alike."""

    def estimated(*images: jax.Array) -> jax.Array:
        of_mix, of_context = (jnp.square(model.mel.magnitude(image)) for image in images)
        return model.mel.image(jnp.sqrt(jnp.maximum(of_mix - of_context, 0.0)))

    return np.concatenate(_in_blocks(estimated, mix, decoded_context), axis=TIME_AXIS)


def _corrected(model: "Model", mix: np.ndarray, decoded_context: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The mel image of the mix without the autoencoder's error on the context, which is known.

    It is taken back in log magnitude, by as much as the mix is context. So a mix that is nothing but its context has
    the true image.
    """

    def corrected(*images: jax.Array) -> jax.Array:
        mixed, decoded, true = map(model.mel.log_magnitude, images)
        share = jnp.exp(jnp.minimum(decoded - mixed, 0.0))
        return model.mel.image(jnp.exp(mixed + share * (true - decoded)))

    return np.concatenate(_in_blocks(corrected, mix, decoded_context, context), axis=TIME_AXIS)


def _difference_db(model: "Model", image: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two mel images [n_mels, frames, 1], in dB."""

    def squares(*images: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.subtract(*map(model.mel.log_magnitude, images))))

    total = sum(map(float, _in_blocks(squares, image, other)))
    return 20.0 / math.log(10.0) * math.sqrt(total / image[..., 0].size)
