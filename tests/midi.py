"""MIDI files for tests: small ones, and real ones damaged."""

import io
from pathlib import Path

import mido
from hypothesis import strategies as st

from data_pipeline import sources


def write_midi(
    path: Path, tracks: dict[str, list[tuple[float, int]]], channels: dict[str, int], beats: int = 8
) -> None:
    """Tracks of (beat, note), 120 BPM, then 240 BPM from beat 4 on."""
    midi = mido.MidiFile(ticks_per_beat=480)
    midi.tracks.append(mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=500_000)]))
    midi.tracks[0].append(mido.MetaMessage("set_tempo", tempo=250_000, time=4 * 480))
    for name, notes in tracks.items():
        events = [(round(beat * 480), "note_on", note) for beat, note in notes]
        events += [(round(beat * 480) + 120, "note_off", note) for beat, note in notes]
        track, last = mido.MidiTrack([mido.MetaMessage("track_name", name=name)]), 0
        for tick, kind, note in sorted(events):
            track.append(mido.Message(kind, channel=channels[name], note=note, time=tick - last))
            last = tick
        midi.tracks.append(track)
    midi.tracks[0].append(mido.MetaMessage("end_of_track", time=(beats - 4) * 480))
    midi.save(path)


def track(*messages: mido.Message | mido.MetaMessage) -> mido.MidiTrack:
    return mido.MidiTrack(messages)


def note(time: int = 480, **more) -> list[mido.Message]:
    return [mido.Message("note_on", note=60, **more), mido.Message("note_off", note=60, time=time, **more)]


def saved(**fields) -> bytes:
    buffer = io.BytesIO()
    mido.MidiFile(**fields).save(file=buffer)
    return buffer.getvalue()


def mutated() -> st.SearchStrategy[bytes]:
    """Real files with bytes replaced (most in their lower seven bits only, which still parses), removed or repeated."""
    originals = [path.read_bytes() for path in sorted(Path(sources.SHIPPED.partition(":")[2]).glob("mid/*.mid"))]
    kinds = st.sampled_from([*["value"] * 20, "set", "cut", "repeat"])
    edits = st.lists(st.tuples(kinds, st.integers(0, 20_000), st.binary(min_size=1, max_size=6)), max_size=12)

    def apply(original: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
        content = original
        for kind, at, new in edits:
            at %= len(content)
            old = content[at : at + len(new)]
            match kind:
                case "value":
                    new = bytes(a & 0x80 | b & 0x7F for a, b in zip(old, new, strict=False))
                case "cut":
                    new = b""
                case "repeat":
                    new = new * 50 + old
            content = content[:at] + new + content[at + len(old) :]
        return content

    return st.builds(apply, st.sampled_from(originals), edits)
