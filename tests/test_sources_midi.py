"""Folders of MIDI files to songs, songs to recordings, and what is refused."""

import json
import shutil
from pathlib import Path

import mido
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from data_pipeline import sources
from data_pipeline.augment import Performance
from data_pipeline.song import Recording, Rejected, Song, Tools
from data_pipeline.sources import midi
from subtractive_jax.errors import UserError
from tests.midi import mutated, note, saved, track, write_midi

RATE = 16_000
SHIPPED = Path(sources.SHIPPED.partition(":")[2])
MD5 = "0123456789abcdef0123456789abcdef"


def load(path: Path, **known) -> Recording:
    return midi.load(Song("id", "id", "midi", (("midi", str(path)),), **known), RATE, Tools())


def write_manifest(folder: Path, *lines: object) -> None:
    shutil.copy(SHIPPED / "mid" / "demo-cc0-ska.mid", folder / "inside.mid")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "songs.jsonl").write_text(text)


def songs(folder: Path) -> list[Song]:
    found = list(midi.find(str(folder)))
    return [song for song in found if isinstance(song, Song)]


# Finding.


def test_the_shipped_songs():
    assert len(songs(SHIPPED)) == len(list(midi.find(str(SHIPPED)))) == 15
    ska = next(song for song in songs(SHIPPED) if song.song_id == "demo-cc0-ska")
    assert ska.files == (("midi", str(SHIPPED / "mid" / "demo-cc0-ska.mid")),)
    assert ska.tags["genre"] == "ska" and ska.group_id and not ska.title and not ska.caption


def test_a_folder_as_lakh_is_unpacked(tmp_path):
    """Without a manifest; no music is read, so these files need not be music."""
    for path in (
        f"lmd_full/0/{MD5}.mid",
        f"lmd_matched/A/TRA/{MD5}.mid",
        "own/b/Song [1].MIDI",
        "own/a.mid",
        "own/a.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"?")
    assert [(song.song_id, song.group_id) for song in songs(tmp_path)] == [
        (f"lmd_full/0/{MD5}", MD5),
        (f"lmd_matched/A/TRA/{MD5}", MD5),
        ("own/a", "own/a"),
        ("own/b/Song [1]", "own/b/Song [1]"),
    ]


def test_what_a_manifest_says(tmp_path):
    row = {"id": "a", "midi": "./inside.mid", "group_id": "album", "title": "Sun", "caption": "Slow ska", "year": 3}
    write_manifest(tmp_path, row | {"genre": "ska", "key": None}, {"id": "b", "midi": "inside.mid", "title": None})
    music = (("midi", str(tmp_path / "inside.mid")),)
    assert list(midi.find(str(tmp_path))) == [
        Song("a", "album", "midi", music, {"genre": "ska"}, "Sun", "Slow ska"),
        Song("b", "b", "midi", music),
    ]


def test_manifest_entries_cannot_leave_the_folder(tmp_path):
    folder, outside = tmp_path / "source", tmp_path / "outside.mid"
    folder.mkdir()
    outside.write_bytes(b"?")
    (folder / "link.mid").symlink_to(outside)
    paths = ("../outside.mid", str(outside), "link.mid", "../source/../outside.mid", "inside.mid")
    write_manifest(folder, *({"id": path, "midi": path} for path in paths))
    *rejected, good = midi.find(str(folder))
    assert isinstance(good, Song) and good.song_id == "inside.mid"
    reasons = [item.reason for item in rejected if isinstance(item, Rejected)]
    assert ["leads out of the source folder" in reason for reason in reasons] == [True] * 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ('{"id": ' + "9" * 10_000 + "}", "integer string"),
        ("[]", "is a JSON object"),
        ({"midi": "inside.mid"}, 'the key "id" of a manifest line is a text'),
        ({"id": 3, "midi": "inside.mid"}, 'the key "id"'),
        ({"id": "a", "midi": ["inside.mid"]}, 'the key "midi"'),
        ({"id": "a", "midi": "inside.mid", "caption": 1}, 'the key "caption"'),
        ({"id": "a", "midi": "missing.mid"}, 'no such file "missing.mid"'),
        ({"id": "a", "midi": "in\0side.mid"}, "null"),
        ({"id": "a", "midi": "a" * 10_000}, "no such file"),
    ],
)
def test_bad_manifest_lines_are_rejected_and_the_others_kept(tmp_path, line, reason):
    write_manifest(tmp_path, line, {"id": "good", "midi": "inside.mid"})
    rejected, good = midi.find(str(tmp_path))
    assert isinstance(rejected, Rejected) and rejected.source == "songs.jsonl:1" and reason in rejected.reason
    assert isinstance(good, Song) and good.song_id == "good"


def test_two_manifests_are_refused(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="more than one manifest \\(a.jsonl, b.jsonl\\); keep one"):
        list(midi.find(str(tmp_path)))


# Loading.


def test_a_recording(tmp_path):
    drums = [(0.0, 38), (2.0, 38), (6.0, 38)]
    write_midi(tmp_path / "x.mid", {"keys/piano": [(2, 72)], "drums/kit": drums}, {"drums/kit": 9, "keys/piano": 0})
    recording = load(tmp_path / "x.mid", tags={"genre": "soul"}, title="Sun")
    assert recording.stems == ("drums", "keys") and not recording.separated and recording.notes == []
    assert recording.tags["tempo"] == 120.0 and recording.tags["genre"] == "soul"
    assert recording.tags["stems"]["drums"]["pieces"] == {"snare": 3}
    assert recording.tags["stems"]["keys"]["onsets_per_s"] == pytest.approx(1 / 3, abs=0.01)
    assert "Sun" not in str(recording.tags)
    blocks = np.concatenate(list(recording.blocks), axis=1)
    assert blocks.shape == (2, 4 * RATE) and blocks.dtype == np.float32 and (np.abs(blocks).max(axis=1) > 0).all()


def test_a_recording_played_anew(tmp_path):
    notes = {"drums/kit": [(0, 38), (2, 38)], "keys/piano": [(0, 69), (2, 69)]}
    write_midi(tmp_path / "x.mid", notes, {"drums/kit": 9, "keys/piano": 0})
    song = Song("id", "id", "midi", (("midi", str(tmp_path / "x.mid")),), {"tempo": 100, "key": "A", "genre": "rock"})
    written = midi.load(song, RATE, Tools())
    anew = midi.load(song, RATE, Tools(), Performance(1, semitones=2, speed=1.25))
    expected = {"tempo": 125.0, "genre": "rock", "speed": 1.25, "semitones": 2}
    assert {key: anew.tags[key] for key in expected} == expected
    assert "key" not in anew.tags
    first, second = (np.concatenate(list(one.blocks), axis=1) for one in (written, anew))
    second_hit = round(RATE / 1.25)  # the third beat, at 120 a minute
    hits = np.abs(second[0])
    assert hits[second_hit - 160 : second_hit].max() < 0.1 * hits[second_hit : second_hit + 800].max()

    def pitch(samples: np.ndarray) -> float:
        spectrum = np.abs(np.fft.rfft(samples[1600:6400] * np.hanning(4800), 1 << 16))
        low = round(600 / RATE * (1 << 16))  # below: an octave of the A at 440 Hz
        return float(np.argmax(spectrum[:low])) * RATE / (1 << 16)

    assert 12 * np.log2(pitch(second[1]) / pitch(first[1])) == pytest.approx(2.0, abs=0.2)


def test_the_sources_tags_win_over_the_notes(tmp_path):
    write_midi(tmp_path / "x.mid", {"keys/piano": [(2, 72)]}, {"keys/piano": 0})
    recording = load(tmp_path / "x.mid", tags={"tempo": 90, "stems": {"keys": {"instruments": ["organ"]}}})
    assert recording.tags == {"tempo": 90, "stems": {"keys": {"instruments": ["organ"]}}}


def test_the_tempo_is_the_first_notes_where_it_can_be_one(tmp_path):
    for tempo, expected in ((600_000, 100.0), (1, None)):
        change = mido.MetaMessage("set_tempo", tempo=tempo, time=480)
        (tmp_path / "x.mid").write_bytes(
            saved(tracks=[track(change), track(mido.Message("program_change", time=960), *note())])
        )
        assert load(tmp_path / "x.mid").tags.get("tempo") == expected


def test_notes_without_end_are_told(tmp_path):
    drum = mido.Message("note_on", note=38, channel=9)
    messages = [mido.Message("note_on", note=pitch) for pitch in (60, 60, 64)] + [drum]
    end = mido.Message("note_on", note=64, velocity=0, time=480)
    (tmp_path / "x.mid").write_bytes(saved(tracks=[track(*messages, end)]))
    recording = load(tmp_path / "x.mid")
    assert recording.notes == ["notes without end: 1; they sound as long as their instrument does"]
    assert np.isfinite(np.concatenate(list(recording.blocks), axis=1)).all()


def test_ten_thousand_tracks(tmp_path):
    (tmp_path / "x.mid").write_bytes(saved(tracks=[track(*note(channel=index % 9)) for index in range(10_000)]))
    assert load(tmp_path / "x.mid").stems == ("keys",)
    name = mido.MetaMessage("track_name", name="bass/any")
    (tmp_path / "x.mid").write_bytes(saved(tracks=[track(name, *note()) for _ in range(10_000)]))
    with pytest.raises(UserError, match="10000 instruments in the stem bass"):
        load(tmp_path / "x.mid")


GOOD = saved(tracks=[track(*note())])
TEMPO = mido.MetaMessage("set_tempo", tempo=0)
LONG_NUMBER = b"\xff" * 5_000 + b"\x7f"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable as MIDI"),
        (b"MThd is how a MIDI file begins", "not readable as MIDI"),
        (GOOD[:30], "not readable as MIDI"),
        (GOOD[:8] + b"\0\2" + GOOD[10:], "type 2 or with SMPTE"),
        (GOOD[:12] + b"\xe7\x28" + GOOD[14:], "type 2 or with SMPTE"),
        (GOOD[:12] + b"\0\0" + GOOD[14:], "type 2 or with SMPTE"),
        (saved(tracks=[]), "no notes"),
        (saved(tracks=[track(mido.MetaMessage("end_of_track", time=9_000))]), "no notes"),
        (saved(tracks=[track(*note(0))]), "ends where it begins"),
        (saved(tracks=[track(TEMPO, *note())]), "a tempo of 0"),
        (saved(tracks=[track(*note(2**28 - 1))]), "longer than"),
        (saved(tracks=[track(*note(), mido.MetaMessage("end_of_track", time=2**28 - 1))]), "longer than"),
        (GOOD[:22] + LONG_NUMBER[4_500:] + GOOD[23:], "longer than|not readable"),
        (GOOD[:22] + LONG_NUMBER + GOOD[23:], "a number of a thousand bytes"),
        (GOOD + bytes(2 << 20), "more than 2 MB"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, reason):
    (tmp_path / "bad.mid").write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        load(tmp_path / "bad.mid")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_a_file_that_is_gone_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone.mid: cannot be read"):
        load(tmp_path / "gone.mid")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=mutated())
def test_mutated_files_give_finite_music_or_one_line(tmp_path, content):
    (tmp_path / "x.mid").write_bytes(content)
    try:
        recording = load(tmp_path / "x.mid")
        for block, _ in zip(recording.blocks, range(4), strict=False):  # the rest is more of the same
            assert block.shape[0] == len(recording.stems) and np.isfinite(block).all()
    except UserError as error:
        assert "\n" not in str(error)
