"""Small multitrack MIDI files for tests."""

from pathlib import Path

import mido


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
