"""A song's stems to subtractive triples: (mix, mix without the stem, the stem), window by window. Pure NumPy."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from subtractive_jax.errors import UserError
from subtractive_jax.representation.level import context_gain


@dataclasses.dataclass(frozen=True)
class Triple:
    """One window with one stem missing: int16 `[samples]`, `mix == context + stem` exactly, levels as in the song."""

    stem_name: str
    start_seconds: float
    gain: float  # the factor that brings the song's context to the training level; not applied here
    mix: np.ndarray
    context: np.ndarray
    stem: np.ndarray


def level_db(samples: np.ndarray) -> float:
    """RMS level of int16 samples in dB of full scale; -inf for silence."""
    power = np.mean(np.square(samples, dtype=np.float64)) / 32768.0**2
    return 10.0 * np.log10(power) if power > 0.0 else -np.inf


def triples(
    stems: dict[str, np.ndarray],
    wanted: tuple[str, ...],
    sample_rate: int,
    window_samples: int,
    hop_samples: int,
    min_level_db: float,
    loudness_lufs: float,
) -> Iterator[Triple]:
    """All triples of a song, window after window, and within a window in the order of `wanted`.

    A triple is left out where the stem, or the context, is more than `-min_level_db` below its own level over the song.

    Args:
      stems: int16 `[samples]` of one length; all count in the mix.
      wanted: the stems to take out (`config.data.stems`); those the song lacks are passed over.
      window_samples: length of a window.
      hop_samples: distance between the starts of windows.
      min_level_db: `config.data.min_stem_level_db`, negative.
      loudness_lufs: `config.data.loudness_lufs`.

    Raises:
      UserError: the song is shorter than one window.
    """
    mix = np.stack(list(stems.values())).sum(axis=0, dtype=np.int32).astype(np.int16)
    if len(mix) < window_samples:
        raise UserError(f"shorter than one window ({len(mix) / sample_rate:.2f} s)")
    contexts = {name: mix - stems[name] for name in wanted if name in stems}
    gains = {
        name: context_gain(context / np.float32(32768.0), sample_rate, loudness_lufs)
        for name, context in contexts.items()
    }
    floors = {
        name: (level_db(stems[name]) + min_level_db, level_db(context) + min_level_db)
        for name, context in contexts.items()
    }
    for start in range(0, len(mix) - window_samples + 1, hop_samples):
        window = slice(start, start + window_samples)
        for name, context in contexts.items():
            levels = level_db(stems[name][window]), level_db(context[window])
            if all(level > -np.inf and level >= floor for level, floor in zip(levels, floors[name], strict=True)):
                yield Triple(name, start / sample_rate, gains[name], mix[window], context[window], stems[name][window])
