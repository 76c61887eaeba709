"""Songs to stems: 16-bit integers at the model's rate, whose sum is exactly the mix."""

import copy
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import midirenderer
import mido
import numpy as np
import pretty_midi

from data_pipeline import grouping, sources
from subtractive_jax.errors import UserError
from subtractive_jax.representation import audio

SOUNDFONT_VARIABLE = "SUBTRACTIVE_JAX_SOUNDFONT"  # path of another SoundFont than pretty_midi's TimGM6mb
MAX_SECONDS = 1_800.0  # longer songs are refused, so that a worker's memory stays bounded
TAIL_SECONDS = 1.0  # rendered after the last event, for notes to ring out
_PEAK = 0.89  # of full scale


def quantise(stems: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mono float stems `[samples]`, of any lengths, to int16 of one length.

    All take one factor, which leaves room for every stem, for the mix and for the mix without any one stem;
    so the mix is exactly the integer sum, and the mix without a stem exactly an integer difference.

    Raises:
      UserError: every stem is silent.
    """
    length = max(len(stem) for stem in stems.values())
    padded = {name: np.pad(stem, (0, length - len(stem))) for name, stem in stems.items()}
    mix = sum(padded.values())
    peak = max(float(np.abs(x).max(initial=0.0)) for stem in padded.values() for x in (stem, mix, mix - stem))
    if peak == 0.0:
        raise UserError("every stem is silent")
    return {name: np.round(stem * (_PEAK * 32767.0 / peak)).astype(np.int16) for name, stem in padded.items()}


@functools.cache
def _soundfont() -> bytes:
    default = Path(pretty_midi.__file__).parent / "TimGM6mb.sf2"
    path = Path(os.environ.get(SOUNDFONT_VARIABLE, default))
    if not path.is_file():
        raise UserError(f"{path}: no such SoundFont (see {SOUNDFONT_VARIABLE})")
    return path.read_bytes()


def read_midi(path: str) -> mido.MidiFile:
    """Reads a MIDI file of type 0 or 1.

    Raises:
      UserError: the file is empty, damaged, or of another type.
    """
    try:
        midi = mido.MidiFile(path, clip=True)
    except Exception as error:  # mido raises whatever the damaged bytes lead to
        raise UserError(f"not readable as MIDI ({type(error).__name__}: {error})") from error
    if midi.type == 2 or not 0 < midi.ticks_per_beat < 0x8000:
        raise UserError("MIDI of type 2 or with SMPTE time is not supported; save it as type 1")
    return midi


def _conductor(midi: mido.MidiFile) -> mido.MidiTrack:
    """The tempo changes of all tracks, and an event that ends every render at the same time."""
    events, end = [], 0
    for track in midi.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type == "set_tempo":
                events.append((tick, message))
        end = max(end, tick)
    events.sort(key=lambda event: event[0])
    tempo = events[-1][1].tempo if events else 500_000
    tail = mido.second2tick(TAIL_SECONDS, midi.ticks_per_beat, tempo)
    events.append((max(end, events[-1][0] if events else 0) + tail, mido.Message("control_change", control=3)))
    return _track(events)


def _track(events: list[tuple[int, Any]]) -> mido.MidiTrack:
    track, last = mido.MidiTrack(), 0
    for tick, message in events:
        track.append(message.copy(time=tick - last))
        last = tick
    return track


def _render(midi: mido.MidiFile, conductor: mido.MidiTrack, group: list[grouping.Part], sample_rate: int) -> np.ndarray:
    """One group of parts, alone, to mono `[samples]` float32."""
    alone = mido.MidiFile(type=1, ticks_per_beat=midi.ticks_per_beat)
    alone.tracks.append(conductor)
    free = (channel for channel in range(16) if channel != grouping.PERCUSSION_CHANNEL)
    for part in group:
        channel = grouping.PERCUSSION_CHANNEL if part.percussion else next(free)
        alone.tracks.append(_track([(tick, message.copy(channel=channel)) for tick, message in part.events]))
    buffer = io.BytesIO()
    alone.save(file=buffer)
    wave = midirenderer.render_wave_from(_soundfont(), buffer.getvalue())
    rendered, rendered_rate = audio.read_audio(wave)
    return audio.resample(audio.to_mono(rendered), rendered_rate, sample_rate)


def _load_midi(song: sources.Song, sample_rate: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    midi = read_midi(song.path)
    parts = grouping.parts(midi)
    if not parts:
        raise UserError("the MIDI file holds no notes")
    if midi.length > MAX_SECONDS:
        raise UserError(f"{midi.length:.0f} s long; songs over {MAX_SECONDS:.0f} s are not rendered")
    conductor = _conductor(midi)
    stems, described = {}, {}
    for stem in dict.fromkeys(part.stem for part in parts):
        own = [part for part in parts if part.stem == stem]
        groups = [_render(midi, conductor, group, sample_rate) for group in grouping.render_groups(own)]
        stems[stem] = sum(groups[1:], groups[0])
        described[stem] = grouping.describe(own, midi.length)
    tags = {"tempo": _tempo(midi), "stems": described} | copy.deepcopy(song.tags)
    return stems, tags


def _tempo(midi: mido.MidiFile) -> float:
    """The first tempo in beats a minute."""
    tempos = [message.tempo for track in midi.tracks for message in track if message.type == "set_tempo"]
    return round(mido.tempo2bpm(tempos[0]) if tempos else 120.0, 1)


def _load_stem_files(song: sources.Song, sample_rate: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    stems = {}
    for stem, path in sources.stem_files(Path(song.path)).items():
        samples, file_rate = audio.read_audio(path)
        if samples.shape[1] > MAX_SECONDS * file_rate:
            raise UserError(f"{path.name}: over {MAX_SECONDS:.0f} s long")
        stems[stem] = audio.resample(audio.to_mono(samples), file_rate, sample_rate)
    return stems, {"stems": {stem: {} for stem in stems}} | copy.deepcopy(song.tags)


_LOADERS: dict[str, Callable[[sources.Song, int], tuple[dict[str, np.ndarray], dict[str, Any]]]] = {
    "midi": _load_midi,
    "stems": _load_stem_files,
}


def load_stems(song: sources.Song, sample_rate: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The song's stems as int16 `[samples]` of one length at `sample_rate`, and its tags.

    Tags that the source does not give are read from the notes where there are notes.

    Raises:
      UserError: the music is unreadable, empty, silent or too long.
    """
    stems, tags = _LOADERS[song.kind](song, sample_rate)
    return quantise(stems), tags
