"""Training windows varied: other pitches, tempos and levels, stems of another take. Pure functions of stems and names.

What varies depends on (song, window, copy, seed) alone, so a rebuilt dataset is the same. Stems are varied before they
are added up: mix, context and stem stay exact sums.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from data_pipeline.song import Song

T = TypeVar("T")
Pitch = TypeVar("Pitch", int, np.ndarray)
_UNPITCHED = "drums"
_SAME_LENGTH_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Variation:
    """How a window is varied.

    Attributes:
      semitones: for all stems but drums; the song's `key` no longer holds unless it is zero.
      gains_db: by stem.
    """

    semitones: float
    gains_db: Mapping[str, float]


def _rng(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def variation(
    stems: Iterable[str],
    song_id: str,
    start_seconds: float,
    copy: int,
    seed: int,
    pitch_semitones: float,
    gain_db: float,
) -> Variation:
    """Draws a window's variation: a pitch within `±pitch_semitones`, for each stem a gain within `±gain_db`.

    What a stem draws does not depend on which other stems there are.
    """
    window = (song_id, float(start_seconds), copy, seed)
    gains_db = {stem: _rng("gain", *window, stem).uniform(-gain_db, gain_db) for stem in stems}
    return Variation(_rng("pitch", *window).uniform(-pitch_semitones, pitch_semitones), gains_db)


def transposition(song_id: str, start_seconds: float, copy: int, seed: int, pitch_semitones: float) -> int:
    """Draws by how many whole semitones a window's notes are moved: within `±pitch_semitones`, and not by 0."""
    steps = [step for step in range(-int(pitch_semitones), int(pitch_semitones) + 1) if step]
    return int(_rng("pitch", song_id, float(start_seconds), copy, seed).choice(steps)) if steps else 0


def transposed(pitch: Pitch, semitones: int) -> Pitch:
    """MIDI pitches moved; what would leave MIDI's range is moved by an octave less."""
    moved = pitch + semitones
    return moved + 12 * (moved < 0) - 12 * (moved > 127)


def transposed_tags(tags: Mapping[str, Any], semitones: float) -> dict[str, Any]:
    """The tags of a transposed song: its key no longer holds."""
    return {key: tag for key, tag in tags.items() if key != "key"} | {"semitones": round(semitones, 2)}


@dataclasses.dataclass(frozen=True)
class Performance:
    """How a song of notes is played.

    Attributes:
      number: of the song's performances, each of which may have a SoundFont of its own; 0 is the song as it is written.
      semitones: for all notes but drums'.
      speed: times the written tempo.
    """

    number: int = 0
    semitones: int = 0
    speed: float = 1.0


def performance(song_id: str, number: int, seed: int, pitch_semitones: float, tempo: float) -> Performance:
    """Draws how a copy of a song is played: in a key as `transposition`, up to `1 + tempo` times faster or slower."""
    speed = (1.0 + tempo) ** _rng("tempo", song_id, number, seed).uniform(-1.0, 1.0)
    return Performance(number, transposition(song_id, 0.0, number, seed, pitch_semitones), speed)


def vary(stems: Mapping[str, np.ndarray], variation: Variation, sample_rate: int) -> dict[str, np.ndarray]:
    """Stems, float32 `[samples]`, at other pitches and levels; lengths stay."""
    return {
        stem: _shifted(samples, 0.0 if stem == _UNPITCHED else variation.semitones, sample_rate)
        * np.float32(10.0 ** (variation.gains_db[stem] / 20.0))
        for stem, samples in stems.items()
    }


def _shifted(samples: np.ndarray, semitones: float, sample_rate: int) -> np.ndarray:
    if semitones == 0.0:
        return samples
    import librosa  # takes seconds to import

    return librosa.effects.pitch_shift(samples, sr=sample_rate, n_steps=semitones, res_type="soxr_hq")


def partner(song: Song, songs: Sequence[Song], copy: int, seed: int) -> Song | None:
    """Another take of the song, from which stems may come: of its kind and group, of the same tempo, key and metre.

    Returns:
      One of the takes among `songs`, in whatever order they are; None where there is none, or no tempo or key is known.
    """
    takes = sorted((other for other in songs if _is_take(song, other)), key=lambda other: other.song_id)
    return takes[_rng("partner", song.song_id, copy, seed).integers(len(takes))] if takes else None


def _is_take(song: Song, other: Song) -> bool:
    return (
        other.song_id != song.song_id
        and (other.kind, other.group_id) == (song.kind, song.group_id)
        and all(song.tags.get(tag) is not None for tag in ("tempo", "key"))
        and all(song.tags.get(tag) == other.tags.get(tag) for tag in ("tempo", "key", "time_signature"))
    )


def remixable(
    stems: Iterable[str], samples: int, partner_stems: Iterable[str], partner_samples: int, sample_rate: int
) -> bool:
    """Whether two takes, now that they are open, can be mixed: two stems in common, lengths equal within 0.05 s."""
    common = set(stems) & set(partner_stems)
    return len(common) >= 2 and abs(samples - partner_samples) <= _SAME_LENGTH_SECONDS * sample_rate


def remix(
    stems: Mapping[str, T],
    partner_stems: Mapping[str, T],
    song_id: str,
    start_seconds: float,
    copy: int,
    seed: int,
) -> dict[str, T]:
    """A window whose stems come from two takes that are `remixable`.

    Args:
      stems: the song's stems, or where they lie; those that the partner lacks stay.
      partner_stems: the same window of the partner; those that the song lacks are left out.
      song_id: the song's.
      start_seconds: of the window.
      copy: which variation of the window.
      seed: of the build.

    Returns:
      The song's stems in their order; of those in common at least one comes from each take.
    """
    common = sorted(set(stems) & set(partner_stems))
    rng = _rng("remix", song_id, float(start_seconds), copy, seed)
    taken = set(rng.permutation(common)[: rng.integers(1, len(common))])
    return {stem: partner_stems[stem] if stem in taken else samples for stem, samples in stems.items()}
