"""MIDI files to notes and back: against mido, byte for byte, and whatever the bytes are."""

import io
import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import mido
import numpy as np
import pytest
from hypothesis import given, settings

from data_pipeline import grouping, sources
from subtractive_jax.errors import UserError
from subtractive_jax.representation import notes
from subtractive_jax.representation.notes import NOTE, read_score
from tests.midi import mutated, note, saved, track

SONGS = sorted(Path(sources.SHIPPED.partition(":")[2]).glob("mid/*.mid"))
SKA = next(path for path in SONGS if path.stem == "demo-cc0-ska")


def tracks_of(content: bytes) -> list[bytes]:
    found, at = [], 14
    while at < len(content):
        end = at + 8 + int.from_bytes(content[at + 4 : at + 8], "big")
        found.append(content[at:end])
        at = end
    return found


def pairs(events: Iterable[tuple[int, mido.Message]]) -> list[tuple[int, int, int, int, int]]:
    """(channel, start, end, pitch, velocity) of every note; those without length last a tick."""
    found, sounding = [], {}
    for tick, message in events:
        if message.type in ("note_on", "note_off"):
            key = message.channel, message.note
            if key in sounding:
                start, velocity = sounding.pop(key)
                found.append((message.channel, start, max(tick, start + 1), message.note, velocity))
            if message.type == "note_on" and message.velocity:
                sounding[key] = tick, message.velocity
    return sorted(found)


def notes_by_mido(content: bytes) -> list[tuple[int, int, int, int, int]]:
    found = []
    for own in mido.MidiFile(file=io.BytesIO(content)).tracks:
        ticks = itertools.accumulate(message.time for message in own)
        found += pairs(zip(ticks, own, strict=True))
    return sorted(found)


def test_the_shipped_songs_are_read_as_mido_reads_them():
    for path in SONGS:
        score, midi = read_score(path), mido.MidiFile(path)
        expected: dict[str, dict[tuple[int, int], tuple[int, int]]] = {}
        for part in grouping.parts(midi):
            own = expected.setdefault(part.stem, {})
            for _, start, end, pitch, velocity in pairs(part.events):  # of notes together the longest
                own[pitch, start] = max(own.get((pitch, start), (0, 0)), (end, velocity))
        assert score.parts.keys() == expected.keys()
        for stem, own in expected.items():
            starts = sorted(own)
            rows = []
            for (pitch, start), after in itertools.zip_longest(starts, starts[1:]):
                end, velocity = own[pitch, start]
                rows.append((start, min(end, after[1]) if after and after[0] == pitch else end, pitch, velocity))
            assert score.parts[stem].tolist() == sorted(rows, key=lambda row: (row[0], row[2]))
        assert float(score.seconds(score.end)) == pytest.approx(midi.length, abs=1e-3)
        assert score.remarks == ()


def test_programs_make_stems_where_no_track_is_named():
    change = mido.Message("program_change", program=33, time=10)
    late = [mido.Message("program_change", program=30), *note()]
    drum = note(channel=9)
    score = read_score(saved(type=0, tracks=[track(*note(), change, *note(), *late, *drum)]))
    assert {stem: len(part) for stem, part in score.parts.items()} == {"drums": 1, "bass": 1, "guitar": 1, "keys": 1}
    assert score.programs == {"drums": 0, "bass": 33, "guitar": 30, "keys": 0}
    assert score.instruments["bass"] == ("bass",) and score.instruments["drums"] == ("Drum kit 0",)


def test_all_drums_are_one_part_of_keys_of_a_kit():
    taiko = track(mido.Message("program_change", program=116), *note())
    score = read_score(saved(tracks=[taiko, track(*note(channel=9)), track(*note(channel=9), *note(channel=9))]))
    assert score.parts["drums"]["pitch"].tolist() == [41, 60, 60] and score.programs == {"drums": 0}
    assert read_score(saved(tracks=[taiko])).programs == {"drums": 0}


def test_where_notes_end():
    on, off = (lambda time, v=64: mido.Message("note_on", note=60, velocity=v, time=time)), 0
    for messages, expected in (
        ([on(0), on(480, off)], [(0, 480)]),
        ([on(0), on(480), on(480, off)], [(0, 480), (480, 960)]),  # struck again
        ([on(0), on(480), on(0, off), on(480, off)], [(0, 480), (480, 960)]),  # released after the next onset
        ([on(0), on(0, off), on(480), on(0, off)], [(0, 1), (480, 481)]),  # without length
        ([on(0), on(480, off), on(480)], [(0, 480), (960, 1440)]),  # without end
    ):
        score = read_score(saved(tracks=[track(*messages, mido.MetaMessage("end_of_track", time=480))]))
        assert [(n["start"], n["end"]) for n in score.parts["keys"]] == expected
    assert score.remarks == ("notes without end: 1; they last to the end of the song",)


def test_a_pitch_of_a_part_sounds_once_at_a_time():
    """Two guitars as one part, which is the same when it has been written and read again."""
    rows = [(0, 480, 60, 80), (0, 960, 60, 90), (240, 300, 62, 70), (600, 700, 60, 50)]
    content = notes.write(480, {"guitar": np.array(rows[:1], NOTE)}, {}, [(0, 500_000)], [(0, 4, 4)], 1920)
    more = notes.write(480, {"guitar": np.array(rows[1:], NOTE)}, {}, [(0, 500_000)], [(0, 4, 4)], 1920)
    both = read_score(content[:10] + b"\0\3" + content[12:] + more[14 + len(tracks_of(more)[0]) :])
    assert both.parts["guitar"].tolist() == [(0, 600, 60, 90), (240, 300, 62, 70), (600, 700, 60, 50)]
    again = read_score(notes.parts_alone(both, both.parts, both.programs))
    np.testing.assert_array_equal(again.parts["guitar"], both.parts["guitar"])


def test_seconds_obey_tempo_changes_and_a_tempo_of_zero_is_passed_over():
    tempos = [mido.MetaMessage("set_tempo", tempo=tempo, time=480) for tempo in (250_000, 0)]
    score = read_score(saved(ticks_per_beat=480, tracks=[track(*tempos), track(*note(1440))]))
    np.testing.assert_allclose(score.seconds(np.array([0, 480, 960, 1440])), [0.0, 0.5, 0.75, 1.0])
    assert score.remarks == ("impossible tempos or metres: 1; passed over",)


def test_bars_of_every_metre():
    def metre(numerator, denominator, time=0):
        return mido.MetaMessage("time_signature", numerator=numerator, denominator=denominator, time=time)

    changes = track(metre(3, 4), metre(6, 8, 2 * 1440), metre(4, 4, 1440 + 240))
    score = read_score(saved(ticks_per_beat=480, tracks=[changes, track(*note(8000))]))
    assert score.bars().tolist() == [0, 1440, 2880, 4320, 4560, 6480]  # a new metre cuts the bar before it
    ticks, is_bar = score.beats()
    assert ticks[:10].tolist() == [0, 480, 960, 1440, 1920, 2400, 2880, 3600, 4320, 4560]
    assert is_bar[:10].tolist() == [True, False, False, True, False, False, True, False, True, True]
    assert score.bars(9000)[-1] == 8400


@pytest.mark.parametrize("path", SONGS, ids=lambda path: path.stem)
def test_added_parts_leave_all_tracks_byte_for_byte(path):
    content = path.read_bytes()
    score = read_score(content)
    added = np.array([(0, 480, 40, 100), (480, 960, 43, 90)], NOTE)
    new = notes.with_parts(score, {"vocals": added, "drums": added}, {"vocals": 54})
    assert tracks_of(new)[:-2] == tracks_of(content)
    again = read_score(new)
    np.testing.assert_array_equal(again.parts["vocals"], added)
    assert len(again.parts["drums"]) == len(score.parts.get("drums", ())) + 2 and again.programs["vocals"] == 54
    assert (again.tempos, again.metres, again.end) == (score.tempos, score.metres, score.end)
    others = set(score.parts) - {"drums"}
    assert all(np.array_equal(again.parts[stem], score.parts[stem]) for stem in others)
    mido.MidiFile(file=io.BytesIO(new))
    alone = read_score(notes.parts_alone(score, {"vocals": added}, {}))
    assert (alone.tempos, alone.metres, alone.end) == (score.tempos, score.metres, score.end)
    np.testing.assert_array_equal(alone.parts["vocals"], added)


def test_a_new_part_takes_a_free_channel_of_a_song_without_named_tracks():
    taken = [channel for channel in range(16) if channel not in (6, 9)]
    content = saved(type=0, tracks=[track(*(message for channel in taken for message in note(channel=channel)))])
    added = np.array([(0, 480, 40, 100)], NOTE)
    new = notes.with_parts(read_score(content), {"bass": added}, {})
    assert tracks_of(new)[:-1] == tracks_of(content) and new[8:12] == b"\0\1\0\2"
    assert {row[0] for row in notes_by_mido(new)} == {*taken, 6}
    assert {stem: len(part) for stem, part in read_score(new).parts.items()} == {"keys": 14, "bass": 1}
    with pytest.raises(UserError, match="all 16 MIDI channels"):
        notes.with_parts(read_score(new), {"guitar": added}, {})


def test_songs_without_a_stem():
    score = read_score(SKA)
    rest = score.without(["drums"])
    assert set(rest.parts) == set(score.parts) - {"drums"} and rest.end == score.end
    assert all(np.array_equal(part, score.parts[stem]) for stem, part in rest.parts.items())
    kept = [chunk for chunk in tracks_of(score.content) if b"drums/" not in chunk]
    assert tracks_of(rest.content) == kept
    with pytest.raises(UserError, match="no notes are left without drums and bass and"):
        score.without(score.parts)
    again = read_score(rest.content)
    assert again.parts.keys() == rest.parts.keys() and again.programs == rest.programs


def test_a_stem_that_shares_a_track():
    """Type 0, running status, notes between those that go: what stays is as it was."""
    messages = [mido.Message("program_change", program=33, channel=1), mido.Message("control_change", control=7)]
    for wait in (0, 100, 50):
        messages += [
            mido.Message("note_on", note=60, channel=0, time=wait),
            mido.Message("note_on", note=40, channel=1),
        ]
        messages += [mido.Message("note_on", note=pitch, channel=c, velocity=0) for pitch, c in ((40, 1), (60, 0))]
    content = saved(type=0, tracks=[track(*messages)])
    rest = read_score(content).without(["bass"])
    before = [row for row in notes_by_mido(content) if row[0] == 0]
    assert notes_by_mido(rest.content) == before
    kinds = [message.type for message in mido.MidiFile(file=io.BytesIO(rest.content)).tracks[0]]
    assert kinds[:2] == ["program_change", "control_change"] and len(kinds) == 2 + 6 + 1


GOOD = saved(tracks=[track(*note())])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a MIDI file"),
        (b"MThd is how a MIDI file begins", "type 2|SMPTE"),
        (GOOD[:30], "cut MIDI file"),
        (GOOD[:8] + b"\0\2" + GOOD[10:], "type 2"),
        (GOOD[:12] + b"\xe7\x28" + GOOD[14:], "SMPTE"),
        (GOOD[:12] + b"\0\0" + GOOD[14:], "SMPTE"),
        (saved(tracks=[]), "no notes"),
        (saved(tracks=[track(mido.MetaMessage("end_of_track", time=9_000))]), "no notes"),
        (saved(tracks=[track(*note(2**28 - 1))]), "more than 40000 beats"),
        (GOOD[:22] + b"\xff" * 4 + b"\0" + GOOD[27:], "damaged MIDI: track 1"),
        (GOOD[:18] + b"\0\0\0\7\0\x3c\x40\0\xff\x2f\0", "damaged MIDI: an event without a status"),
        (GOOD[:22] + b"\0\xf4" + GOOD[24:], "damaged MIDI: track 1"),
        (GOOD + bytes(2 << 20), "more than 2 MB"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason) as refused:
        read_score(content)
    assert "\n" not in str(refused.value)
    (tmp_path / "bad.mid").write_bytes(content)
    with pytest.raises(UserError, match=f"bad.mid: .*({reason})"):
        read_score(tmp_path / "bad.mid")


def test_a_file_that_is_gone_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone.mid: cannot be read"):
        read_score(tmp_path / "gone.mid")


def test_ten_thousand_tracks_take_no_time():
    content = saved(tracks=[track(*note(index, channel=index % 9)) for index in range(1, 10_001)])
    start = time.perf_counter()
    score = read_score(content)
    assert score.parts["keys"].tolist() == [(0, 10_000, 60, 64)]
    new = notes.with_parts(score, {"bass": score.parts["keys"][:1]}, {})
    assert len(tracks_of(new)) == 10_001 and time.perf_counter() - start < 10.0


@settings(max_examples=300, deadline=2_000, derandomize=True)
@given(content=mutated())
def test_mutated_files_are_read_or_refused_in_one_line(content):
    try:
        score = read_score(content)
        for part in score.parts.values():
            assert (
                (part["start"] >= 0).all() and (part["end"] > part["start"]).all() and (part["end"] <= score.end).all()
            )
            assert (part["pitch"] < 128).all() and (part["velocity"] > 0).all() and (part["velocity"] < 128).all()
        assert len(score.bars()) and np.isfinite(score.seconds(score.end))
        new = notes.with_parts(score, {"drums": score.parts[next(iter(score.parts))][:5]}, {})
        assert tracks_of(new)[:-1] == tracks_of(content)[: len(tracks_of(new)) - 1]
        score.without(["drums"])
    except UserError as error:
        assert "\n" not in str(error)
