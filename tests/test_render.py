"""Notes to parts and parts to stems, with both renderers: time, independence of the stems, limits, SoundFonts."""

import contextlib
import ctypes.util
from collections.abc import Iterable
from pathlib import Path

import mido
import numpy as np
import pretty_midi
import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipeline import grouping, render, sources
from data_pipeline.grouping import Part
from data_pipeline.song import Song, Tools
from data_pipeline.sources import midi as midi_source
from subtractive_jax.errors import UserError
from tests.midi import write_midi

RATE = 16_000
SONGS = Path(sources.SHIPPED.partition(":")[2], "mid")
SOUNDFONT = Path(pretty_midi.__file__).parent / "TimGM6mb.sf2"

needs_fluidsynth = pytest.mark.skipif(render.renderer() != "fluidsynth", reason="libfluidsynth is not installed")
every_renderer = pytest.mark.parametrize(
    "renderer", [pytest.param("fluidsynth", marks=needs_fluidsynth), "midirenderer"]
)


def song(path: Path) -> tuple[dict[str, list[Part]], render.Clock]:
    midi = mido.MidiFile(path, clip=True)
    stems: dict[str, list[Part]] = {}
    for part in grouping.parts(midi):
        stems.setdefault(part.stem, []).append(part)
    return stems, render.Clock(midi)


def clock_of(seconds: int) -> render.Clock:
    """480 ticks are half a second."""
    return render.Clock(mido.MidiFile(tracks=[mido.MidiTrack([mido.MetaMessage("end_of_track", time=960 * seconds)])]))


def part(notes: Iterable[tuple[float, int]], *before: mido.Message, program: int = 0, drums: bool = False) -> Part:
    """Notes (second, pitch) of 0.25 s."""
    events = [(0, message) for message in (mido.Message("program_change", program=program), *before)]
    for second, pitch in notes:
        events.append((round(960 * second), mido.Message("note_on", note=pitch)))
        events.append((round(960 * (second + 0.25)), mido.Message("note_off", note=pitch)))
    return Part("drums" if drums else "keys", "any", drums, events)


def rendered(stems: dict[str, list[Part]], clock: render.Clock, renderer: str, rate: int = RATE) -> np.ndarray:
    return np.concatenate(list(render.render(stems, clock, rate, "", renderer)), axis=1)


def envelope(samples: np.ndarray) -> np.ndarray:
    """RMS of 10 ms."""
    return np.sqrt(np.square(samples[: len(samples) // 160 * 160].reshape(-1, 160)).mean(axis=1))


# Notes to parts.


@pytest.mark.parametrize(
    ("program", "stem"), [(0, "keys"), (18, "keys"), (25, "guitar"), (33, "bass"), (48, "other"), (118, "drums")]
)
def test_programs_without_track_names_are_grouped(program, stem):
    midi = mido.MidiFile(type=0)
    change = mido.Message("program_change", channel=2, program=program)
    note = mido.Message("note_on", channel=2, note=60)
    drum = mido.Message("note_on", channel=9, note=38)
    midi.tracks.append(mido.MidiTrack([change, note, drum]))
    assert {part.stem for part in grouping.parts(midi)} == {"drums", stem}


def test_a_channel_that_changes_program_is_split():
    def note(kind: str, pitch: int, time: int = 0) -> mido.Message:
        return mido.Message(kind, note=pitch, time=time)

    track = mido.MidiTrack([note("note_on", 60), mido.Message("program_change", program=33, time=10)])
    track += [note("note_off", 60, 5), note("note_on", 40), note("note_off", 40, 10)]
    midi = mido.MidiFile(type=0, tracks=[track])
    found = {part.stem: part for part in grouping.parts(midi)}
    assert {stem: [message.note for _, message in part.notes()] for stem, part in found.items()} == {
        "keys": [60],
        "bass": [40],
    }
    assert any(message.type == "note_off" and message.note == 60 for _, message in found["keys"].events)


def test_a_part_in_another_key():
    bend = mido.Message("pitchwheel", pitch=100)
    keys = part([(0, 60), (1, 126), (2, 0)], bend)
    moved = keys.transposed(2)
    assert [message.note for _, message in moved.notes()] == [62, 116, 2]
    assert [(tick, m) for tick, m in moved.events if m.type == "pitchwheel"] == [(0, bend)]
    assert [tick for tick, _ in moved.events] == [tick for tick, _ in keys.events]
    assert sum(getattr(message, "note", 0) == 116 for _, message in moved.events) == 2, "released as struck"
    assert [message.note for _, message in part([(0, 1)]).transposed(-2).notes()] == [11]
    drums = part([(0, 38)], drums=True)
    assert drums.transposed(2) == drums


def test_many_parts_are_packed_without_sharing_channels():
    melodic = [grouping.Part("keys", "piano", False, []) for _ in range(17)]
    kits = [grouping.Part("keys", "kit", True, []) for _ in range(2)]
    groups = grouping.render_groups(melodic + kits)
    assert [(len(group), sum(part.percussion for part in group)) for group in groups] == [(16, 1), (3, 1)]


# Parts to stems.


def test_the_clock_agrees_with_mido():
    for path in sorted(SONGS.glob("*.mid")):
        midi = mido.MidiFile(path, clip=True)
        clock = render.Clock(midi)
        assert clock.samples(clock.end, 48_000) == pytest.approx(midi.length * 48_000, abs=1)


def test_the_clock_is_exact_over_tempo_changes_of_any_track():
    tracks = [
        mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=tempo, time=time)]) for tempo, time in ((7, 3), (9, 1))
    ]
    clock = render.Clock(mido.MidiFile(ticks_per_beat=10, tracks=tracks))
    assert clock.samples(1, 100_000_000) == 5_000_000
    assert clock.samples(2, 100_000_000) - clock.samples(1, 100_000_000) == 90
    assert clock.samples(10**400 + 3, 100_000_000) - clock.samples(3, 100_000_000) == 70 * 10**400
    assert clock.beats_per_minute(0) == 120.0


def test_the_clock_of_a_faster_performance():
    for path in sorted(SONGS.glob("*.mid")):
        midi = mido.MidiFile(path, clip=True)
        faster, written = render.Clock(midi, speed=1.25), render.Clock(midi)
        assert faster.end == written.end
        assert faster.samples(faster.end, 48_000) == pytest.approx(midi.length / 1.25 * 48_000, rel=1e-5)
        assert faster.beats_per_minute(0) == pytest.approx(written.beats_per_minute(0) * 1.25, rel=1e-5)
    silent = mido.MidiFile(ticks_per_beat=10, tracks=[mido.MidiTrack([mido.MetaMessage("end_of_track", time=20)])])
    assert render.Clock(silent, speed=0.5).samples(20, 100) == 200


@every_renderer
def test_stems_are_aligned_across_tempo_changes(tmp_path, renderer):
    write_midi(
        tmp_path / "x.mid",
        {"drums/kit": [(0, 38), (2, 38), (6, 38)], "keys/piano": [(2, 72)]},
        {"drums/kit": 9, "keys/piano": 0},
    )
    stems, clock = song(tmp_path / "x.mid")
    drums, keys = rendered(stems, clock, renderer)
    assert len(keys) == 4 * RATE  # 8 beats in 3 s, and the tail
    for seconds in (0.0, 1.0, 2.5):  # beats 0, 2, 6
        start = max(0, round((seconds - 0.05) * RATE))
        around = np.abs(drums[start : round((seconds + 0.05) * RATE)])
        assert (start + np.argmax(around > 0.2 * np.abs(drums).max())) / RATE == pytest.approx(seconds, abs=0.006)
    assert np.argmax(np.abs(keys) > 0.1 * np.abs(keys).max()) / RATE == pytest.approx(1.0, abs=0.02)


@needs_fluidsynth
def test_both_renderers_play_the_same_song():
    stems, clock = song(SONGS / "demo-cc0-one-drop-reggae.mid")
    one, other = rendered(stems, clock, "fluidsynth"), rendered(stems, clock, "midirenderer")
    assert one.shape == other.shape and one.dtype == other.dtype == np.float32
    for a, b in zip(one, other, strict=True):
        assert np.corrcoef(envelope(a), envelope(b))[0, 1] > 0.95


@every_renderer
def test_a_stem_sounds_the_same_whatever_else_plays(renderer):
    stems, clock = song(SONGS / "demo-cc0-ska.mid")
    together = rendered(stems, clock, renderer)
    np.testing.assert_array_equal(
        rendered({"drums": stems["drums"]}, clock, renderer)[0], together[list(stems).index("drums")]
    )


@every_renderer
@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
def test_every_part_of_a_crowded_stem_is_heard(renderer, rate):
    parts = [part([(0.5 * index, 60)], program=index) for index in range(18)]
    parts += [part([(0.5 * index, 38)], drums=True) for index in (18, 19)]
    (samples,) = rendered({"keys": parts}, clock_of(10), renderer, rate)
    assert len(samples) == 11 * rate
    onsets = [np.abs(samples[round(at * rate) : round((at + 0.4) * rate)]).max() for at in np.arange(20) / 2]
    assert min(onsets) > 0.002


@every_renderer
def test_percussion_needs_no_program(renderer):
    held = [(0, mido.Message("note_on", note=38)), (960 * 3, mido.Message("note_off", note=38))]
    snare, piano = rendered(
        {"drums": [Part("drums", "kit", True, held)], "keys": [Part("keys", "piano", False, held)]},
        clock_of(3),
        renderer,
    )
    for samples, rings in ((snare, False), (piano, True)):
        assert (np.abs(samples[RATE : 2 * RATE]).max() > 0.05 * np.abs(samples).max()) == rings


@needs_fluidsynth
def test_a_parts_channel_modes_leave_the_other_parts_alone():
    chord = part([(0.5, 60), (0.5, 64), (0.5, 67)])
    silent = [mido.Message("control_change", control=control, value=1) for control in (124, 125, 126, 127)]
    (alone,) = rendered({"keys": [chord, part([])]}, clock_of(2), "fluidsynth")
    (beside,) = rendered({"keys": [chord, part([], *silent)]}, clock_of(2), "fluidsynth")
    assert np.abs(alone).max() > 0.005
    np.testing.assert_array_equal(alone, beside)


@needs_fluidsynth
def test_a_song_of_hours_streams():
    clock = clock_of(render.MAX_SECONDS["fluidsynth"])
    blocks = render.render({"keys": [part([(0.0, 60), (7_000.0, 60)])]}, clock, RATE, "", "fluidsynth")
    first = next(blocks)
    assert first.shape[0] == 1 and first.shape[1] < 4 * RATE and np.abs(first).max() > 0.005


@every_renderer
def test_what_is_not_rendered(renderer):
    with pytest.raises(UserError, match=f"longer than {render.MAX_SECONDS[renderer]} s"):
        render.render({"keys": [part([])]}, clock_of(render.MAX_SECONDS[renderer] + 1), RATE, "", renderer)
    with pytest.raises(UserError, match="257 instruments in the stem keys"):
        render.render({"keys": [part([])] * 257}, clock_of(1), RATE, "", renderer)


def test_unknown_renderers_are_refused():
    with pytest.raises(UserError, match='unknown renderer "fluid"; did you mean "fluidsynth"'):
        render.render({"keys": [part([])]}, clock_of(1), RATE, "", "fluid")


def test_a_machine_without_the_builds_renderer_stops_the_build(monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    render._library.cache_clear()
    try:
        assert render.renderer() == "midirenderer"
        with pytest.raises(RuntimeError, match="install it"):
            render.render({"keys": [part([])]}, clock_of(1), RATE, "", "fluidsynth")
    finally:
        render._library.cache_clear()


@every_renderer
def test_bad_soundfonts_are_refused(tmp_path, renderer):
    damaged = tmp_path / "damaged.sf2"
    damaged.write_bytes(SOUNDFONT.read_bytes()[:10_000])
    for path, message in ((tmp_path / "none.sf2", "no such SoundFont"), (damaged, "damaged.sf2: ")):
        with pytest.raises(UserError, match=message):
            list(render.render({"keys": [part([(0, 60)])]}, clock_of(1), RATE, str(path), renderer))


def test_songs_share_out_the_soundfonts():
    names = [f"song {number}" for number in range(60)]
    chosen = [render.soundfont_of(name, ("a.sf2", "b.sf2", "c.sf2")) for name in names]
    assert chosen == [render.soundfont_of(name, ("a.sf2", "b.sf2", "c.sf2")) for name in names]
    assert all(chosen.count(soundfont) > 10 for soundfont in ("a.sf2", "b.sf2", "c.sf2"))
    assert render.soundfont_of("song", ()) == ""


def test_a_song_is_rendered_with_its_own_soundfont(tmp_path):
    damaged = tmp_path / "damaged.sf2"
    damaged.write_bytes(SOUNDFONT.read_bytes()[:10_000])
    write_midi(tmp_path / "song.mid", {"keys/Piano": [(0, 60), (4, 62)]}, {"keys/Piano": 0})
    fonts = (str(SOUNDFONT), str(damaged))
    for name in ("song 0", "song 1", "song 2", "song 3"):
        song = Song(name, name, "midi", (("midi", str(tmp_path / "song.mid")),))
        recording = midi_source.load(song, RATE, Tools(soundfonts=fonts))
        with pytest.raises(UserError) if render.soundfont_of(name, fonts) == str(damaged) else contextlib.nullcontext():
            assert np.abs(np.concatenate(list(recording.blocks), axis=1)).max() > 0
    assert {render.soundfont_of(f"song {number}", fonts) for number in range(4)} == set(fonts)


def test_a_remote_soundfont_is_fetched(monkeypatch):
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    FileSystems.set_options(PipelineOptions())
    with moto.mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="soundfonts")
        client.upload_file(str(SOUNDFONT), "soundfonts", "gm.sf2")
        stems, clock = {"keys": [part([(0, 60)])]}, clock_of(1)
        blocks = list(render.render(stems, clock, RATE, "s3://soundfonts/gm.sf2", render.renderer()))
        with pytest.raises(UserError, match="s3://soundfonts/none.sf2: "):
            list(render.render(stems, clock, RATE, "s3://soundfonts/none.sf2", render.renderer()))
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), rendered(stems, clock, render.renderer()))
