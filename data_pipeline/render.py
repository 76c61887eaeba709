"""Notes to stems: by FluidSynth where its library is installed, otherwise by a renderer that comes as a wheel.

FluidSynth streams. Every stem has a synthesiser of its own and all advance together: within one, a note sounds slightly
different (peaks of -20 dB) where others have used its voice before, and so a context would hold traces of its stem.
The wheel renders sixteen parts at a time, and all of a song before its first block is known.
"""

import bisect
import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import heapq
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import midirenderer
import mido
import numpy as np
import pretty_midi
import soundfile
import soxr

from data_pipeline import files, grouping
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.notes import PERCUSSION_CHANNEL

MAX_SECONDS = {"fluidsynth": 7_200, "midirenderer": 1_800}  # by renderer
MAX_PARTS = 256  # of a stem: FluidSynth's limit of channels
TAIL_SECONDS = 1  # rendered after the last event, for notes to ring out
_BLOCK = 1 << 16  # samples
_GRID = 64  # samples: FluidSynth acts on events at multiples of it only
_LOWEST_RATE = 44_100  # below the rate of a SoundFont's samples they would alias: rendered above it, then resampled
_CHANNEL_MODES = 124  # from this controller on, messages change how other channels play


class Clock:
    """Ticks of a song to samples, exact over all tempo changes.

    Args:
      midi: the song.
      speed: times its own tempo.

    Attributes:
      end: the tick at which the song's last track ends.

    Raises:
      UserError: a tempo is no tempo.
    """

    def __init__(self, midi: mido.MidiFile, speed: float = 1.0):
        changes, self.end = [], 0
        for track in midi.tracks:
            tick = 0
            for message in track:
                tick += message.time
                if message.type == "set_tempo":
                    if not message.tempo:
                        raise UserError("a tempo of 0 microseconds a beat")
                    changes.append((tick, round(message.tempo / speed) or 1))
            self.end = max(self.end, tick)
        # Integers, since damaged files hold ticks that no float holds.
        self._second = 1_000_000 * midi.ticks_per_beat  # a time is microseconds a beat, times ticks
        self._points = [(0, 0, round(500_000 / speed))]  # tick, time, tempo
        for tick, tempo in sorted(changes, key=lambda change: change[0]):
            last, time, old = self._points[-1]
            self._points.append((tick, time + (tick - last) * old, tempo))

    def samples(self, tick: int, rate: int) -> int:
        """The sample, at `rate` a second, that is nearest to a tick."""
        start, time, tempo = self._before(tick)
        return ((time + (tick - start) * tempo) * rate + self._second // 2) // self._second

    def beats_per_minute(self, tick: int) -> float:
        return 60e6 / self._before(tick)[2]

    def _before(self, tick: int) -> tuple[int, int, int]:
        return self._points[bisect.bisect_right(self._points, tick, key=lambda point: point[0]) - 1]


def renderer() -> str:
    """The renderer of this machine: `fluidsynth`, or `midirenderer` where FluidSynth's library is not installed."""
    return "fluidsynth" if _library() else "midirenderer"


def render(
    stems: Mapping[str, Sequence[grouping.Part]], clock: Clock, sample_rate: int, soundfont: str, renderer: str
) -> Iterator[np.ndarray]:
    """Renders a song's stems as loud as they are in the mix.

    Args:
      stems: name -> parts.
      clock: the song's.
      sample_rate: in Hz.
      soundfont: path of a SoundFont; that of the `pretty_midi` package when empty.
      renderer: `fluidsynth` or `midirenderer`.

    Returns:
      Blocks, mono `[stems, samples]` float32, which end `TAIL_SECONDS` after the song; the same on every machine that
      has the same version of the renderer.

    Raises:
      UserError: the song is too long or has too many parts; the SoundFont is missing or damaged.
      RuntimeError: this machine lacks the renderer. Not a fault of the song, so no reason to leave it out.
    """
    if renderer not in MAX_SECONDS:
        raise unknown_name("renderer", renderer, MAX_SECONDS)
    if clock.samples(clock.end, 1) > MAX_SECONDS[renderer]:
        raise UserError(f"longer than {MAX_SECONDS[renderer]} s, the most that {renderer} renders")
    for stem, parts in stems.items():
        if len(parts) > MAX_PARTS:
            raise UserError(f"{len(parts)} instruments in the stem {stem}, more than {MAX_PARTS}")
    if renderer == "midirenderer":
        return _wheel(stems, clock, sample_rate, soundfont)
    library = _library()
    if library is None:
        raise RuntimeError("the build renders with FluidSynth, and this machine has no libfluidsynth: install it")
    return _fluidsynth(library, stems, clock, sample_rate, soundfont)


def soundfont_of(song_id: str, soundfonts: Sequence[str]) -> str:
    """The SoundFont that a song is rendered with: a function of its id; empty where there are none to choose from."""
    if not soundfonts:
        return ""
    return soundfonts[int.from_bytes(hashlib.sha256(song_id.encode()).digest()[:8], "big") % len(soundfonts)]


def _local(soundfont: str) -> str:
    """A local path of the SoundFont."""
    if not soundfont:
        return str(Path(pretty_midi.__file__).parent / "TimGM6mb.sf2")
    if not files.is_local(soundfont):
        return _downloaded(soundfont).name
    if not Path(soundfont).is_file():
        raise UserError(f"{soundfont}: no such SoundFont")
    return soundfont


@functools.cache
def _downloaded(path: str) -> tempfile._TemporaryFileWrapper:
    """A copy of a remote file, made once a process and removed when the process ends."""
    copy = tempfile.NamedTemporaryFile()  # noqa: SIM115
    with files.open_file(path) as source:
        shutil.copyfileobj(source, copy)
    copy.flush()
    return copy


def _length(clock: Clock, sample_rate: int) -> int:
    return clock.samples(clock.end, sample_rate) + TAIL_SECONDS * sample_rate


def _resampled(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int, channels: int) -> Iterator[np.ndarray]:
    """Blocks `[channels, n]` at another rate."""
    stream = soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block.T).T
    yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T


# FluidSynth.


@functools.cache
def _library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("fluidsynth")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.new_fluid_settings.restype = library.new_fluid_synth.restype = ctypes.c_void_p
    for level in (1, 2, 3):  # errors, warnings, information; what matters is in the return values
        library.fluid_set_log_function(level, None, None)
    return library


@contextlib.contextmanager
def _synth(library: ctypes.CDLL, sample_rate: int, channels: int, soundfont: str) -> Iterator[ctypes.c_void_p]:
    """A new synthesiser: one that has played before plays differently."""
    settings = ctypes.c_void_p(library.new_fluid_settings())
    values = {
        "midi-channels": -(-channels // 16) * 16,  # multiples of 16 only
        "reverb.active": 0,
        "chorus.active": 0,
        "dynamic-sample-loading": 1,
        "lock-memory": 0,
    }
    if library.fluid_settings_setnum(settings, b"synth.sample-rate", ctypes.c_double(sample_rate)) < 0:
        raise UserError(f"FluidSynth does not render at {sample_rate} Hz")
    for name, value in values.items():
        library.fluid_settings_setint(settings, f"synth.{name}".encode(), value)
    synth = ctypes.c_void_p(library.new_fluid_synth(settings))
    try:
        if library.fluid_synth_sfload(synth, os.fsencode(soundfont), 1) < 0:
            raise UserError(f"{soundfont}: not readable as a SoundFont")
        yield synth
    finally:
        library.delete_fluid_synth(synth)
        library.delete_fluid_settings(settings)


def _play(library: ctypes.CDLL, synth: ctypes.c_void_p, channel: int, message: mido.Message) -> None:
    match message.type:
        case "note_on" if message.velocity:
            library.fluid_synth_noteon(synth, channel, message.note, message.velocity)
        case "note_on" | "note_off":
            library.fluid_synth_noteoff(synth, channel, message.note)
        case "control_change" if message.control < _CHANNEL_MODES:
            library.fluid_synth_cc(synth, channel, message.control, message.value)
        case "program_change":
            library.fluid_synth_program_change(synth, channel, message.program)
        case "pitchwheel":
            library.fluid_synth_pitch_bend(synth, channel, message.pitch + 8192)
        case "aftertouch":
            library.fluid_synth_channel_pressure(synth, channel, message.value)
        case "polytouch":
            library.fluid_synth_key_pressure(synth, channel, message.note, message.value)


def _events(parts: Sequence[grouping.Part], clock: Clock, rate: int) -> Iterator[tuple[int, int, mido.Message]]:
    """(sample on FluidSynth's grid, part, message) in order of time."""

    def of_part(index: int) -> Iterator[tuple[int, int, mido.Message]]:
        for tick, message in parts[index].events:
            yield (clock.samples(tick, rate) + _GRID // 2) // _GRID * _GRID, index, message

    return heapq.merge(*map(of_part, range(len(parts))), key=lambda event: event[0])


def _stem(
    library: ctypes.CDLL, parts: Sequence[grouping.Part], clock: Clock, rate: int, length: int, soundfont: str
) -> Iterator[np.ndarray]:
    """Blocks, mono `[n]`, of one stem."""
    left, right = np.empty((2, _BLOCK), np.float32)
    with _synth(library, rate, len(parts), soundfont) as synth:
        for channel, part in enumerate(parts):
            library.fluid_synth_set_channel_type(synth, channel, int(part.percussion))
            library.fluid_synth_program_change(synth, channel, 0)  # of the channel's new type
        events = _events(parts, clock, rate)
        event = next(events, None)
        for start in range(0, length, _BLOCK):
            at, end = start, min(start + _BLOCK, length)
            while at < end:
                while event and event[0] <= at:
                    _play(library, synth, *event[1:])
                    event = next(events, None)
                until = min(end, event[0]) if event else end
                offset = at - start
                library.fluid_synth_write_float(synth, until - at, left.ctypes, offset, 1, right.ctypes, offset, 1)
                at = until
            yield (left[: end - start] + right[: end - start]) / 2


def _fluidsynth(
    library: ctypes.CDLL, stems: Mapping[str, Sequence[grouping.Part]], clock: Clock, sample_rate: int, soundfont: str
) -> Iterator[np.ndarray]:
    factor = -(-_LOWEST_RATE // sample_rate)
    rate, length, path = sample_rate * factor, _length(clock, sample_rate) * factor, _local(soundfont)
    rows = [_stem(library, parts, clock, rate, length, path) for parts in stems.values()]
    return _resampled(map(np.stack, zip(*rows, strict=True)), rate, sample_rate, len(stems))


# The renderer that comes as a wheel.

_TICKS_PER_BEAT = 24_000  # at 120 beats a minute, its reader's default: 48,000 ticks a second


def _midi_bytes(group: Sequence[grouping.Part], clock: Clock) -> bytes:
    """Parts as a MIDI file of one tempo, a channel each, which ends where the song's tail ends."""
    ticks_per_second = 2 * _TICKS_PER_BEAT
    midi = mido.MidiFile(type=1, ticks_per_beat=_TICKS_PER_BEAT)
    free = (channel for channel in range(16) if channel != PERCUSSION_CHANNEL)
    for part in group:
        channel = PERCUSSION_CHANNEL if part.percussion else next(free)
        track, last = mido.MidiTrack(), 0
        for tick, message in part.events:
            now = clock.samples(tick, ticks_per_second)
            track.append(message.copy(channel=channel, time=now - last))
            last = now
        midi.tracks.append(track)
    end = mido.Message("control_change", control=3, time=_length(clock, ticks_per_second))  # undefined, so inaudible
    midi.tracks.append(mido.MidiTrack([end]))
    buffer = io.BytesIO()
    midi.save(file=buffer)
    return buffer.getvalue()


def _wheel(
    stems: Mapping[str, Sequence[grouping.Part]], clock: Clock, sample_rate: int, soundfont: str
) -> Iterator[np.ndarray]:
    path = _local(soundfont)
    content = Path(path).read_bytes()
    audio = np.zeros((len(stems), _length(clock, sample_rate)), np.float32)
    for row, parts in zip(audio, stems.values(), strict=True):
        for group in grouping.render_groups(list(parts)):
            try:
                wave = midirenderer.render_wave_from(content, _midi_bytes(group, clock))
            except RuntimeError as error:
                raise UserError(f"{path}: the notes cannot be rendered with it ({error})") from error
            with soundfile.SoundFile(io.BytesIO(wave)) as file:
                blocks = (block.mean(axis=1)[None] for block in file.blocks(_BLOCK, dtype="float32", always_2d=True))
                at = 0
                for block in _resampled(blocks, file.samplerate, sample_rate, 1):
                    piece = row[at : at + block.shape[1]]
                    piece += block[0, : len(piece)]
                    at += block.shape[1]
    yield from np.split(audio, range(_BLOCK, audio.shape[1], _BLOCK), axis=1)
