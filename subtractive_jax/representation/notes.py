"""MIDI songs: files to notes by stem, tempo and metre, and files with parts added, all other tracks byte for byte.

The reader is our own: it has to survive any bytes, keep what it does not understand, and be fast. Where the next event
begins is known from an event's first bytes, so numpy tells it for every byte of the file at once; the chain from a
track's first event to its last is then one look-up an event.
"""

import dataclasses
import functools
import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from subtractive_jax.errors import UserError, unknown_name

STEMS = ("drums", "bass", "guitar", "keys", "vocals", "other")
PERCUSSION_CHANNEL = 9
NOTE = np.dtype([("start", np.int64), ("end", np.int64), ("pitch", np.int16), ("velocity", np.int16)])  # times in ticks

# General MIDI, programs counted from 0.
_STEM_OF_PROGRAM = (  # (first, last, stem); all others are "other"
    (0, 23, "keys"),  # pianos, mallets, organs, accordions
    (24, 31, "guitar"),
    (32, 39, "bass"),
    (105, 105, "guitar"),  # banjo
    (115, 119, "drums"),  # woodblock, taiko, toms, synth drum, reverse cymbal
)
_FAMILIES = (  # sixteen, of eight programs each
    *("piano", "mallets", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reeds", "flute"),
    *("synth lead", "synth pad", "synth effects", "folk instruments", "percussion", "sound effects"),
)
_KEY_OF_PROGRAM = {115: 76, 116: 41, 117: 47, 118: 45, 119: 49}  # drums with a pitch, as keys of a drum kit
_PROGRAM_OF_STEM = {"drums": 0, "bass": 33, "guitar": 27, "keys": 0, "vocals": 53, "other": 48}

DRUMS = ("kick", "snare", "closed hat", "open hat", "low tom", "high tom", "crash", "ride", "other percussion")
DRUM_KEYS = (36, 38, 42, 46, 45, 50, 49, 51, 54)  # the key that stands for each class
_DRUM_CLASS = {
    **dict.fromkeys((35, 36), 0),
    **dict.fromkeys((37, 38, 39, 40), 1),  # sidestick and clap too
    **dict.fromkeys((42, 44), 2),
    46: 3,
    **dict.fromkeys((41, 43, 45), 4),
    **dict.fromkeys((47, 48, 50), 5),
    **dict.fromkeys((49, 52, 55, 57), 6),  # china and splash too
    **dict.fromkeys((51, 53, 59), 7),
}
DRUM_CLASSES = np.array([_DRUM_CLASS.get(key, len(DRUMS) - 1) for key in range(128)])  # of every key

MAX_BYTES = 2 << 20  # a quarter of a million notes
_MAX_TRACKS = 65_000  # a file counts them in 16 bits, and new parts are to find room
_MAX_BEATS = 40_000  # five hours at 120 BPM
_DEFAULT_TEMPO = 500_000  # microseconds a quarter note
_DEFAULT_METRE = (4, 4)
_NO_NOTES = "the MIDI file holds no notes"
_PAD = 16  # bytes that may be looked at beyond an event's first


def stem_of_program(program: int, percussion: bool) -> str:
    """The stem of a General MIDI program (0 to 127); `percussion` for channel 10."""
    if percussion:
        return "drums"
    return next((stem for first, last, stem in _STEM_OF_PROGRAM if first <= program <= last), "other")


_STEM_INDICES = np.array([STEMS.index(stem_of_program(program, False)) for program in range(128)])


def instrument_of_program(program: int, percussion: bool) -> str:
    """What the program is called: General MIDI's family, or the number of a drum kit."""
    return f"Drum kit {program}" if percussion else _FAMILIES[program // 8]


def stem_of_track(name: str) -> str:
    """The stem that a track's name `<stem>/<instrument>` tells; empty where it tells none."""
    stem, slash, _ = name.partition("/")
    return stem if slash and stem in STEMS else ""


@dataclasses.dataclass(frozen=True)
class Score:
    """A song's notes. Times are in ticks; a beat is a quarter note.

    Attributes:
      ticks_per_beat: of a quarter note.
      parts: notes by stem, `NOTE` sorted by start and pitch. A pitch sounds once at a time: of instruments that play
        it together the longest note stays, and a note ends where the next begins. Drums that have a program instead of
        channel 10 are given as keys of a drum kit.
      programs: by stem, the General MIDI program of most of its notes; of drums the kit.
      instruments: by stem, what plays it, sorted.
      tempos: (tick, microseconds a quarter note), the first at tick 0.
      metres: (tick, numerator, denominator), the first at tick 0.
      end: where the last track ends.
      content: the file.
      remarks: what was unusual and how it was dealt with.
    """

    ticks_per_beat: int
    parts: dict[str, np.ndarray]
    programs: dict[str, int]
    instruments: dict[str, tuple[str, ...]]
    tempos: tuple[tuple[int, int], ...]
    metres: tuple[tuple[int, int, int], ...]
    end: int
    content: bytes = dataclasses.field(repr=False)
    remarks: tuple[str, ...] = ()

    @functools.cached_property
    def _tempo_points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ticks of tempo changes, the seconds at which they are, seconds a tick from there on."""
        ticks, tempos = np.array(self.tempos, np.float64).T
        rates = tempos / (1e6 * self.ticks_per_beat)
        return ticks, np.concatenate([[0.0], np.cumsum(np.diff(ticks) * rates[:-1])]), rates

    def seconds(self, tick: np.ndarray | int) -> np.ndarray:
        """When ticks are played, obeying all tempo changes."""
        ticks, seconds, rates = self._tempo_points
        point = np.maximum(np.searchsorted(ticks, tick, side="right") - 1, 0)
        return seconds[point] + (tick - ticks[point]) * rates[point]

    def beats(self, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ticks of all beats before `end` (the song's if not given), and which of them are bar lines.

        A beat is what the metre counts in: a dotted quarter note in 6/8, 9/8 and 12/8. A new metre begins a bar.
        """
        end = max(self.end if end is None else end, 1)
        ticks, lines = [], []
        for (tick, numerator, denominator), (until, *_) in zip(self.metres, (*self.metres[1:], (end,)), strict=True):
            compound = denominator == 8 and numerator > 3 and numerator % 3 == 0
            unit, in_bar = (3, numerator // 3) if compound else (1, numerator)
            length = unit * 4 * self.ticks_per_beat  # times the denominator
            index = np.arange(-(-max(0, min(until, end) - tick) * denominator // length))
            ticks.append(tick + index * length // denominator)
            lines.append(index % in_bar == 0)
        found, first = np.unique(np.concatenate(ticks), return_index=True)
        return found, np.concatenate(lines)[first]

    def bars(self, end: int | None = None) -> np.ndarray:
        """Ticks of all bar lines before `end` (the song's if not given)."""
        ticks, is_bar = self.beats(end)
        return ticks[is_bar]

    def without(self, stems: Collection[str]) -> "Score":
        """The song without these stems' notes. Tracks that hold nothing but such notes go, all others keep their rest.

        Raises:
          UserError: an unknown stem, or no note is left.
        """
        for stem in stems:
            if stem not in STEMS:
                raise unknown_name("stem", stem, STEMS)
        kept = [stem for stem in self.parts if stem not in stems]
        if not kept:
            raise UserError(f"no notes are left without {' and '.join(self.parts)}")
        return dataclasses.replace(
            self,
            parts={stem: self.parts[stem] for stem in kept},
            programs={stem: self.programs[stem] for stem in kept},
            instruments={stem: self.instruments[stem] for stem in kept},
            content=_without(self.content, stems),
        )


@dataclasses.dataclass(frozen=True)
class _Events:
    """All events of a file's tracks, in its order: arrays `[events]`.

    Attributes:
      body, last: the bytes at which what follows an event's time begins, and where the next event does.
      track, tick: where it is.
      status: of a running status the one that goes on; 0xFF is a meta event.
      data: the two bytes after the status, `[events, 2]`.
    """

    body: np.ndarray
    last: np.ndarray
    track: np.ndarray
    tick: np.ndarray
    status: np.ndarray
    data: np.ndarray

    def of_kind(self, kind: int) -> np.ndarray:
        return self.status >> 4 == kind

    @property
    def channel(self) -> np.ndarray:
        return self.status & 15


@dataclasses.dataclass(frozen=True)
class _File:
    """A file's tracks and events.

    Attributes:
      ticks_per_beat: of a quarter note.
      tracks: (first byte after the chunk's header, byte after the last).
      names: of the tracks; empty where there is none.
      metas: (index of the event, its type, its content) of tempos and metres.
    """

    ticks_per_beat: int
    tracks: list[tuple[int, int]]
    events: _Events
    names: list[str]
    metas: list[tuple[int, int, bytes]]


_TRACK_NAME, _TEMPO, _METRE = 0x03, 0x51, 0x58
_NOTE_OFF, _NOTE_ON, _PROGRAM = 0x8, 0x9, 0xC


def _sizes(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How many bytes, of 1 to 4, the variable-length numbers at these places have; 5 where it is more."""
    more, size = np.ones(len(at), bool), np.ones(len(at), np.int32)
    for i in range(4):
        more = more & (data[at + i] >= 0x80)
        size += more
    return size


def _numbers(data: np.ndarray, at: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    value = np.zeros(len(at), np.int64)
    for i in range(4):
        value = np.where(i < sizes, value << 7 | data[at + i] & 0x7F, value)
    return value


def _following(data: np.ndarray) -> list[int]:
    """For every byte that an event may begin at, and every running status, where the next event begins.

    Index and value are twice the byte, plus 1 where the running status has one byte of data and not two. A value past
    the end of `data` says that no event can begin there.
    """
    count = len(data) - _PAD
    at = np.arange(count, dtype=np.int32)
    sizes = _sizes(data, at)
    body = at + sizes
    status = data[body]
    one_byte = (status >> 4 == 0xC) | (status >> 4 == 0xD)
    after = np.empty((count, 2), np.int64)
    for short in (0, 1):  # the running status' number of bytes: 2 or 1
        running = 2 * (body + 2 - short) + short
        after[:, short] = np.where(status < 0x80, running, 2 * (body + 3 - one_byte) + one_byte)
    other = np.flatnonzero(status >= 0xF0)  # meta events and system exclusive; others cannot be in a file
    length_at = body[other] + np.where(status[other] == 0xFF, 2, 1)
    length_at = np.minimum(length_at, count)
    length_sizes = _sizes(data, length_at)
    end = length_at + length_sizes + _numbers(data, length_at, length_sizes)
    impossible = (length_sizes > 4) | ~np.isin(status[other], (0xF0, 0xF7, 0xFF))
    end[impossible] = len(data)
    after[other] = 2 * end[:, None] + (0, 1)
    after[sizes > 4] = 2 * len(data)
    return after.ravel().tolist()


def _chunks(content: bytes) -> tuple[int, int, list[tuple[int, int]]]:
    """Ticks a beat, where the header ends, and where the tracks lie."""
    if len(content) < 14 or content[:4] != b"MThd":
        raise UserError("not a MIDI file; give a Standard MIDI File, .mid")
    length, kind, _, division = struct.unpack(">IHHh", content[4:14])
    if kind > 1:
        raise UserError("MIDI of type 2 holds independent songs; save it as type 1")
    if division <= 0:
        raise UserError("MIDI with SMPTE time has no beats; save it with ticks per quarter note")
    tracks = []
    at = header_end = 8 + max(length, 6)
    while at + 8 <= len(content):
        kind_of_chunk, length = struct.unpack_from(">4sI", content, at)
        at += 8 + length
        if kind_of_chunk == b"MTrk":
            if at > len(content):
                raise UserError("a cut MIDI file: its last track is longer than the file; copy or export it again")
            tracks.append((at - length, at))
    if len(tracks) > _MAX_TRACKS:
        raise UserError(f"a MIDI file of more than {_MAX_TRACKS} tracks")
    return division, header_end, tracks


def _parse(content: bytes) -> _File:
    if len(content) > MAX_BYTES:
        raise UserError(f"a MIDI file of more than {MAX_BYTES >> 20} MB")
    ticks_per_beat, _, tracks = _chunks(content)
    data = np.frombuffer(content + bytes(_PAD), np.uint8)
    following = _following(data)
    found: list[int] = []
    counts = []
    for number, (first, last) in enumerate(tracks, 1):
        before, state, stop = len(found), 2 * first, 2 * last
        while state < stop:
            found.append(state)
            state = following[state]
        if state >> 1 != last:
            raise UserError(f"damaged MIDI: track {number} has no event where one should begin; export it again")
        counts.append(len(found) - before)
    if not found:
        raise UserError(_NO_NOTES)
    states = np.array(found, np.int64)
    at = states >> 1
    sizes = _sizes(data, at)
    body = at + sizes
    raw = data[body]
    index = np.arange(len(at))
    track = np.repeat(np.arange(len(tracks)), counts)
    track_first = (np.cumsum(counts) - counts)[track]
    # Running status: the last one of a channel message.
    latest = np.maximum.accumulate(np.where((raw >= 0x80) & (raw < 0xF0), index, -1))
    if np.any((raw < 0x80) & (latest < track_first)):
        raise UserError("damaged MIDI: an event without a status; export it again")
    status = np.where(raw < 0x80, raw[latest], raw)
    data_at = body + (raw >= 0x80)
    values = np.minimum(np.stack([data[data_at], data[data_at + 1]], axis=1), 127)
    elapsed = np.cumsum(_numbers(data, at, sizes))
    before_track = np.concatenate([[0], elapsed])[track_first]
    ends = np.append(at[1:], 0)
    ends[np.cumsum(counts)[np.array(counts) > 0] - 1] = [last for first, last in tracks if last > first]
    events = _Events(body, ends, track, elapsed - before_track, status, values)
    names, metas = [""] * len(tracks), []
    told = np.flatnonzero((raw == 0xFF) & np.isin(data[body + 1], (_TRACK_NAME, _TEMPO, _METRE)))
    text_at = body[told] + 2 + _sizes(data, body[told] + 2)
    for i, start in zip(told.tolist(), text_at.tolist(), strict=True):
        kind, text = int(data[body[i] + 1]), content[start : int(ends[i])]
        if kind != _TRACK_NAME:
            metas.append((i, kind, text))
        elif not names[track[i]]:
            names[track[i]] = text.decode("latin-1")
    return _File(ticks_per_beat, tracks, events, names, metas)


@dataclasses.dataclass(frozen=True)
class _Notes:
    """A file's notes in the order of their events: arrays `[notes]`.

    Attributes:
      event, release: indices of the events that begin and end them; of the latter -1 where there is none.
      stem: index in `STEMS`, -1 where a note belongs to none.
      program: of the channel when the note begins.
    """

    event: np.ndarray
    release: np.ndarray
    stem: np.ndarray
    program: np.ndarray


def _notes(file: _File) -> _Notes:
    events = file.events
    is_on = events.of_kind(_NOTE_ON) & (events.data[:, 1] > 0)
    is_off = events.of_kind(_NOTE_OFF) | (events.of_kind(_NOTE_ON) & (events.data[:, 1] == 0))
    # A note ends at the next event of its key: a release, or an onset.
    found = np.flatnonzero(is_on | is_off)
    key = (events.track[found] * 16 + events.channel[found]) * 128 + events.data[found, 0]
    found, key = (x[np.argsort(key, kind="stable")] for x in (found, key))
    on, tick = is_on[found], events.tick[found]
    if not on.any():
        raise UserError(_NO_NOTES)
    same = np.append(key[1:] == key[:-1], False)  # as the next event
    following = np.where(same, np.arange(len(found)) + 1, -1)  # the last element stands for none
    # A release at the tick of its onset, where the key is down already, is that of the note before.
    was_down = np.append(False, on[:-1] & same[:-1] & (tick[:-1] < tick[1:]))
    taken = on & same & was_down & ~on[following] & (tick[following] == tick)
    following = np.where(taken, following[following], following)
    release = np.where(following >= 0, found[following], -1)
    order = np.argsort(found[on])
    event, release = found[on][order], release[on][order]

    # The channel's program: a message of any track, the last before the note.
    about = np.concatenate([np.flatnonzero(events.of_kind(_PROGRAM)), event])
    ranked = np.lexsort((about, events.tick[about], events.channel[about]))
    about = about[ranked]
    channel, is_change = events.channel[about], events.of_kind(_PROGRAM)[about]
    latest = np.maximum.accumulate(np.where(is_change, np.arange(len(about)), -1))
    known = (latest >= 0) & (channel[latest] == channel)
    programs = np.zeros(len(events.track), np.int64)
    programs[about] = np.where(known, events.data[about[latest], 0], 0)
    program = programs[event]

    named = [stem_of_track(name) for name in file.names]
    if any(named):
        indices = np.array([STEMS.index(stem) if stem else -1 for stem in named])[events.track[event]]
    else:
        percussion = events.channel[event] == PERCUSSION_CHANNEL
        indices = np.where(percussion, STEMS.index("drums"), _STEM_INDICES[program])
    return _Notes(event, release, indices, program)


def read_score(source: bytes | str | os.PathLike[str]) -> Score:
    """Reads a MIDI file, given as its path or its bytes.

    A song with tracks named `<stem>/<instrument>` is grouped by those names, and its other tracks are left out; any
    other song by General MIDI program, channel 10 being drums. Notes without end last to the end of the song; a tempo
    of 0 and an impossible metre are passed over.

    Raises:
      UserError: the file is no MIDI, damaged, of type 2, with SMPTE time, without notes, too large or too long.
    """
    if isinstance(source, bytes):
        return _score(source)
    try:
        with Path(source).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        return _score(content)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _score(content: bytes) -> Score:
    file = _parse(content)
    events, notes = file.events, _notes(file)
    if not np.any(notes.stem >= 0):
        raise UserError(_NO_NOTES)
    last_tick = int(events.tick.max(initial=0))
    if last_tick > _MAX_BEATS * file.ticks_per_beat:
        raise UserError(f"a MIDI file of more than {_MAX_BEATS} beats")
    start, pitch = events.tick[notes.event], events.data[notes.event, 0].astype(np.int16)
    endless = notes.release < 0
    ends = np.maximum(np.where(endless, last_tick, events.tick[notes.release]), start + 1)
    percussion = events.channel[notes.event] == PERCUSSION_CHANNEL
    parts, programs, instruments = {}, {}, {}
    for index, stem in enumerate(STEMS):
        own = np.flatnonzero(notes.stem == index)
        if not len(own):
            continue
        part = np.empty(len(own), NOTE)
        part["start"], part["end"], part["pitch"] = start[own], ends[own], pitch[own]
        part["velocity"] = events.data[notes.event[own], 1]
        if stem == "drums":
            keys = np.array([_KEY_OF_PROGRAM.get(program, DRUM_KEYS[-1]) for program in range(128)])
            part["pitch"] = np.where(percussion[own], part["pitch"], keys[notes.program[own]])
        parts[stem] = _one_at_a_time(part)
        kits = percussion[own] if stem == "drums" else np.ones(len(own), bool)
        programs[stem] = int(np.bincount(notes.program[own][kits], minlength=1).argmax())
        tracks = {file.names[track] for track in np.unique(events.track[notes.event[own]]).tolist()}
        if all(map(stem_of_track, tracks)):
            names = {name.split("/", 1)[1] for name in tracks}
        else:
            kinds = np.unique(notes.program[own] * 2 + percussion[own]).tolist()
            names = {instrument_of_program(kind >> 1, bool(kind & 1)) for kind in kinds}
        instruments[stem] = tuple(sorted(names))
    tempos, metres, passed_over = _maps(file)
    remarks = []
    if count := int(np.sum(endless & ~percussion & (notes.stem >= 0))):
        remarks.append(f"notes without end: {count}; they last to the end of the song")
    if passed_over:
        remarks.append(f"impossible tempos or metres: {passed_over}; passed over")
    end = max(last_tick, int(ends.max(initial=0)))
    return Score(file.ticks_per_beat, parts, programs, instruments, tempos, metres, end, content, tuple(remarks))


def _one_at_a_time(part: np.ndarray) -> np.ndarray:
    """Sorted notes, one of a pitch at a time: of those that begin together the longest, until the next begins."""
    part = part[np.lexsort((part["velocity"], part["end"], part["start"], part["pitch"]))]
    same_pitch = part["pitch"][1:] == part["pitch"][:-1]
    part = part[np.append(~same_pitch | (part["start"][1:] > part["start"][:-1]), True)]
    same_pitch = part["pitch"][1:] == part["pitch"][:-1]
    part["end"][:-1] = np.where(same_pitch, np.minimum(part["end"][:-1], part["start"][1:]), part["end"][:-1])
    return part[np.lexsort((part["pitch"], part["start"]))]


def _maps(file: _File) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int, int], ...], int]:
    """Tempos and metres, one a tick, and how many impossible ones were left out."""
    tempos, metres, passed_over = {0: _DEFAULT_TEMPO}, {0: _DEFAULT_METRE}, 0
    for i, kind, content in sorted(file.metas, key=lambda meta: int(file.events.tick[meta[0]])):
        tick = int(file.events.tick[i])
        tempo = int.from_bytes(content[:3], "big")
        if kind == _TEMPO and len(content) >= 3 and tempo:
            tempos[tick] = tempo
        elif kind == _METRE and len(content) >= 2 and content[0] and content[1] <= 6:
            metres[tick] = (content[0], 1 << content[1])
        else:
            passed_over += 1
    return tuple(tempos.items()), tuple((tick, *metre) for tick, metre in metres.items()), passed_over


# Writing.


def _number(value: int) -> bytes:
    """A variable-length number."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))


def _meta(kind: int, content: bytes) -> bytes:
    return bytes((0xFF, kind)) + _number(len(content)) + content


def _chunk(events: Iterable[tuple[int, bytes]]) -> bytes:
    """A track chunk of (tick, message) in order of time."""
    body, last = [], 0
    for tick, message in events:
        body += [_number(tick - last), message]
        last = tick
    content = b"".join(body)
    return struct.pack(">4sI", b"MTrk", len(content)) + content


def _header(tracks: int, ticks_per_beat: int) -> bytes:
    return struct.pack(">4sIHHH", b"MThd", 6, 1, tracks, ticks_per_beat)


def _part_chunk(notes: np.ndarray, name: str, channel: int, program: int, end: int) -> bytes:
    on, off = 0x90 | channel, 0x80 | channel
    events = []  # (tick, 0 for releases and 1 for onsets, message)
    for start, until, pitch, velocity in notes.tolist():
        events += [(start, 1, bytes((on, pitch, velocity))), (until, 0, bytes((off, pitch, 64)))]
    events.sort(key=lambda event: event[:2])
    head = [(0, _meta(_TRACK_NAME, name.encode("latin-1", "replace"))), (0, bytes((0xC0 | channel, program)))]
    last = max(end, int(notes["end"].max(initial=0)))
    return _chunk([*head, *((tick, message) for tick, _, message in events), (last, _meta(0x2F, b""))])


def _part_chunks(
    added: Mapping[str, np.ndarray], programs: Mapping[str, int], free: Sequence[int], named: bool, end: int
) -> bytes:
    channels = iter(free)
    chunks = []
    for stem, notes in added.items():
        percussion = stem == "drums"
        channel = PERCUSSION_CHANNEL if percussion else next(channels, None)
        if channel is None:
            raise UserError(
                "all 16 MIDI channels of the song are taken: take out a track to make room for the new part"
            )
        program = programs.get(stem, _PROGRAM_OF_STEM[stem])
        name = f"{stem}/{instrument_of_program(program, percussion)}" if named else stem
        chunks.append(_part_chunk(notes, name, channel, program, end))
    return b"".join(chunks)


def _melodic(used: Collection[int] = ()) -> list[int]:
    return [channel for channel in range(16) if channel != PERCUSSION_CHANNEL and channel not in used]


def with_parts(score: Score, added: Mapping[str, np.ndarray], programs: Mapping[str, int]) -> bytes:
    """The song's file with a new track for each part, in a channel that the song does not use.

    All chunks of the file stay byte for byte; of type 0 it becomes type 1. Where the file's tracks are named
    `<stem>/<instrument>`, so are the new ones.

    Args:
      added: `NOTE` by stem.
      programs: General MIDI programs of the new parts, by stem; a usual one where a stem has none.

    Raises:
      UserError: no channel is free.
    """
    file = _parse(score.content)
    _, header_end, tracks = _chunks(score.content)
    channel_messages = file.events.status < 0xF0
    free = _melodic(set(file.events.channel[channel_messages].tolist()))
    chunks = _part_chunks(added, programs, free, any(map(stem_of_track, file.names)), score.end)
    kept = score.content[header_end : max(last for _, last in tracks)]
    return _header(len(tracks) + len(added), score.ticks_per_beat) + kept + chunks


def parts_alone(score: Score, added: Mapping[str, np.ndarray], programs: Mapping[str, int]) -> bytes:
    """A file of these parts with the song's tempos and metres; see `with_parts` for the arguments."""
    return write(score.ticks_per_beat, added, programs, score.tempos, score.metres, score.end)


def write(
    ticks_per_beat: int,
    parts: Mapping[str, np.ndarray],
    programs: Mapping[str, int],
    tempos: Iterable[tuple[int, int]],
    metres: Iterable[tuple[int, int, int]],
    end: int,
) -> bytes:
    """A file of tempos, metres and a track `<stem>/<instrument>` for each part; see `Score` for what they are."""
    maps = [(tick, _meta(_TEMPO, tempo.to_bytes(3, "big"))) for tick, tempo in tempos]
    for tick, numerator, denominator in metres:
        maps.append((tick, _meta(_METRE, bytes((numerator, denominator.bit_length() - 1, 24, 8)))))
    conductor = _chunk([*sorted(maps, key=lambda event: event[0]), (end, _meta(0x2F, b""))])
    chunks = _part_chunks(parts, programs, _melodic(), True, end)
    return _header(1 + len(parts), ticks_per_beat) + conductor + chunks


def _without(content: bytes, stems: Collection[str]) -> bytes:
    """The file without the events of these stems' notes, and without tracks that held nothing else."""
    file = _parse(content)
    events, notes = file.events, _notes(file)
    gone = np.isin(notes.stem, [STEMS.index(stem) for stem in stems])
    dropped = np.zeros(len(events.track), bool)
    dropped[notes.event[gone]] = True
    releases = notes.release[gone]
    is_on = events.of_kind(_NOTE_ON) & (events.data[:, 1] > 0)
    releases = releases[releases >= 0]
    dropped[releases[~is_on[releases]]] = True
    left = set(events.track[notes.event[~gone]].tolist())  # tracks that still have notes
    left |= set(events.track[[i for i, _, _ in file.metas]].tolist())
    begins = np.searchsorted(events.track, np.arange(len(file.tracks) + 1))
    chunks = []
    for number, (first, last) in enumerate(file.tracks):
        own = np.arange(begins[number], begins[number + 1])
        if not dropped[own].any():
            chunks.append(content[first - 8 : last])
        elif number in left:
            kept = own[~dropped[own]]
            chunks.append(_chunk((int(events.tick[i]), _message(content, events, i)) for i in kept.tolist()))
    return _header(len(chunks), file.ticks_per_beat) + b"".join(chunks)


def _message(content: bytes, events: _Events, i: int) -> bytes:
    """An event without its time, with its status in full."""
    message = content[events.body[i] : events.last[i]]
    return message if message[0] >= 0x80 else bytes((events.status[i],)) + message
