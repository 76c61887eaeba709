"""Which stem a MIDI part belongs to, and a song taken apart into renderable parts."""

import dataclasses
from collections import Counter
from collections.abc import Iterable

import mido

from data_pipeline import augment
from subtractive_jax.errors import unknown_name
from subtractive_jax.representation.notes import (
    PERCUSSION_CHANNEL,
    instrument_of_program,
    stem_of_program,
    stem_of_track,
)

PIECES = {  # General MIDI percussion keys
    **dict.fromkeys((35, 36), "kick"),
    **dict.fromkeys((38, 40), "snare"),
    **dict.fromkeys((41, 43, 45, 47, 48, 50), "tom"),
    **dict.fromkeys((49, 57), "crash"),
    **dict.fromkeys((51, 59), "ride"),
    **dict.fromkeys((60, 61), "bongo"),
    **dict.fromkeys((62, 63, 64), "conga"),
    **dict.fromkeys((65, 66), "timbale"),
    **{37: "sidestick", 39: "clap", 42: "closed hat", 44: "pedal hat", 46: "open hat", 52: "china", 53: "ride bell"},
    **{54: "tambourine", 55: "splash", 56: "cowbell", 69: "cabasa", 70: "maracas", 75: "claves", 81: "triangle"},
}
_MOISESDB = {  # its stems
    **{"vocals": "vocals", "bass": "bass", "drums": "drums", "percussion": "drums"},
    **{"guitar": "guitar", "other_plucked": "guitar", "piano": "keys", "other_keys": "keys"},
    **{"bowed_strings": "other", "wind": "other", "other": "other"},
}


def stem_of_moisesdb(stem_name: str, track_type: str) -> str:
    """The stem of a track of MoisesDB; mallets, which it counts as percussion, are keys as in General MIDI.

    Raises:
      UserError: its taxonomy has no such stem.
    """
    if stem_name not in _MOISESDB:
        raise unknown_name("MoisesDB stem", stem_name, _MOISESDB)
    return "keys" if track_type.startswith("pitched_percussion") else _MOISESDB[stem_name]


@dataclasses.dataclass
class Part:
    """What one instrument plays: its channel's events at absolute ticks, its own notes only."""

    stem: str
    instrument: str
    percussion: bool
    events: list[tuple[int, mido.Message]]

    def notes(self) -> list[tuple[int, mido.Message]]:
        return [(tick, message) for tick, message in self.events if _is_onset(message)]

    def transposed(self, semitones: int) -> "Part":
        """The part in another key, see `augment.transposed`; drums stay."""
        if self.percussion or not semitones:
            return self

        def moved(message: mido.Message) -> mido.Message:
            if message.type not in ("note_on", "note_off", "polytouch"):
                return message
            return message.copy(note=augment.transposed(message.note, semitones))

        return dataclasses.replace(self, events=[(tick, moved(message)) for tick, message in self.events])


def _is_onset(message: mido.Message) -> bool:
    return message.type == "note_on" and message.velocity > 0


def _absolute(track: Iterable[mido.Message]) -> list[tuple[int, mido.Message]]:
    tick, events = 0, []
    for message in track:
        tick += message.time
        if not message.is_meta and hasattr(message, "channel"):
            events.append((tick, message))
    return events


def _by_channel(events: Iterable[tuple[int, mido.Message]]) -> dict[int, list[tuple[int, mido.Message]]]:
    channels: dict[int, list[tuple[int, mido.Message]]] = {}
    for event in events:
        channels.setdefault(event[1].channel, []).append(event)
    return channels


def parts(midi: mido.MidiFile) -> list[Part]:
    """The instruments of a song, by track name or else by General MIDI program.

    A song with tracks named `<stem>/<instrument>` is grouped by those names, and its other tracks are left out.
    In any other song, a part is a channel's notes while one program is selected on it. Parts without notes are dropped.
    """
    named = [track for track in midi.tracks if stem_of_track(track.name)]
    if named:
        found = []
        for track in named:
            stem, instrument = track.name.split("/", 1)
            for channel, events in _by_channel(_absolute(track)).items():
                found.append(Part(stem, instrument, channel == PERCUSSION_CHANNEL, events))
    else:
        merged = sorted((event for track in midi.tracks for event in _absolute(track)), key=lambda event: event[0])
        found = [part for channel, events in sorted(_by_channel(merged).items()) for part in _split(channel, events)]
    return [part for part in found if part.notes()]


def _split(channel: int, events: list[tuple[int, mido.Message]]) -> list[Part]:
    """One part for every program of a channel: all get its controllers, each only the notes of its own program."""
    percussion = channel == PERCUSSION_CHANNEL
    program, programs = 0, []
    for _, message in events:
        program = message.program if message.type == "program_change" else program
        programs.append(program)
    found = []
    for own in sorted(set(programs)):
        # Releases go to every part: a note may end after the next program is selected.
        kept = [e for e, now in zip(events, programs, strict=True) if now == own or not _is_onset(e[1])]
        instrument = instrument_of_program(own, percussion)
        found.append(Part(stem_of_program(own, percussion), instrument, percussion, kept))
    return found


def render_groups(stem_parts: list[Part]) -> list[list[Part]]:
    """Packs parts into groups that fit a synthesiser: one percussion part and fifteen others, a channel each."""
    percussion = [part for part in stem_parts if part.percussion]
    melodic = [part for part in stem_parts if not part.percussion]
    groups = []
    while percussion or melodic:
        groups.append(percussion[:1] + melodic[:15])
        percussion, melodic = percussion[1:], melodic[15:]
    return groups


def describe(stem_parts: list[Part], seconds: float) -> dict[str, object]:
    """A stem's tags from its notes: instruments, drum pieces by count, onsets a second, mean velocity."""
    notes = [note for part in stem_parts for note in part.notes()]
    onsets = {tick for tick, _ in notes}
    pieces = Counter(
        PIECES[message.note]
        for part in stem_parts
        if part.percussion
        for _, message in part.notes()
        if message.note in PIECES
    )
    tags: dict[str, object] = {
        "instruments": sorted({part.instrument for part in stem_parts}),
        "onsets_per_s": round(len(onsets) / max(seconds, 1e-6), 2),
        "vel_mean": round(sum(message.velocity for _, message in notes) / len(notes), 1),
    }
    if pieces:
        tags["pieces"] = dict(pieces.most_common())
    return tags
