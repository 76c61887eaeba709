"""Duplicates: what people do to files does not hide a song, and songs that differ are not joined."""

import contextlib
import io
import itertools
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

import apache_beam as beam
import midirenderer
import mido
import numpy as np
import pretty_midi
import pytest
import soundfile
import soxr
from apache_beam.testing.util import assert_that, equal_to

from data_pipeline import duplicates
from data_pipeline.duplicates import Finding
from data_pipeline.song import Song

SHIPPED = Path(duplicates.__file__).parent / "songs" / "mid"
RATE = 44_100


def as_song(song_id: str, **paths: Path) -> Song:
    return Song(song_id, song_id, "stems", tuple((stem, str(path)) for stem, path in paths.items()))


def pairs(*ids: tuple[str, str]) -> list[Finding]:
    return [Finding("alike", pair) for pair in ids]


def find_alike(songs: Iterable[Song], check: Callable[[list[Finding]], None]) -> None:
    with beam.Pipeline() as pipeline:
        assert_that(pipeline | beam.Create(list(songs)) | duplicates.FindAlike(), check)


@pytest.fixture(scope="module")
def rendered() -> dict[str, np.ndarray]:
    """Three shipped songs as audio, stereo `[samples, 2]`."""
    soundfont = (Path(pretty_midi.__file__).parent / "TimGM6mb.sf2").read_bytes()
    songs = {}
    for path in sorted(SHIPPED.glob("*.mid"))[:3]:
        wave, rate = soundfile.read(io.BytesIO(midirenderer.render_wave_from(soundfont, path.read_bytes())))
        songs[path.stem] = soxr.resample(wave[: 30 * rate] / np.abs(wave).max(), rate, RATE)
    return songs


def write_mp3(path: Path, samples: np.ndarray, rate: int, level: float) -> None:
    """`level` is soundfile's way to choose the bit rate: 64 kbit/s is 0.88 at 44.1 kHz and 0.64 at 22.05 kHz."""
    soundfile.write(path, samples, rate, bitrate_mode="CONSTANT", compression_level=level)


VERSIONS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "mp3": lambda path, wave: write_mp3(path.with_suffix(".mp3"), wave, RATE, 0.88),
    "ogg": lambda path, wave: soundfile.write(path.with_suffix(".ogg"), wave, RATE),
    "cut": lambda path, wave: soundfile.write(path.with_suffix(".wav"), wave[round(3.7 * RATE) :], RATE),
    "quiet": lambda path, wave: soundfile.write(path.with_suffix(".wav"), wave * 10 ** (-9 / 20), RATE),
    "22k": lambda path, wave: soundfile.write(path.with_suffix(".flac"), soxr.resample(wave, RATE, 22_050), 22_050),
    "all": lambda path, wave: write_mp3(
        path.with_suffix(".mp3"), 0.35 * soxr.resample(wave[round(3.7 * RATE) :], RATE, 22_050), 22_050, 0.64
    ),
}


def test_every_version_of_a_recording_is_found_and_no_other_song(
    rendered: dict[str, np.ndarray], tmp_path: Path
) -> None:
    songs, signatures = [], {}
    for name, wave in rendered.items():
        soundfile.write(tmp_path / f"{name} original.wav", wave, RATE)
        for version, write in VERSIONS.items():
            write(tmp_path / f"{name} {version}.", wave)
    for path in sorted(tmp_path.iterdir()):
        songs.append(as_song(path.stem, mix=path))
        signatures[path.stem] = np.array(duplicates.signature(songs[-1]).minhash)
    assert len(songs) == 3 * 7
    for a, b in itertools.combinations(signatures, 2):
        overlap = duplicates.similarity(signatures[a], signatures[b])
        if a.split()[0] != b.split()[0]:
            assert overlap < duplicates.ALIKE / 2
        elif "original" in (a.split()[1], b.split()[1]):
            assert overlap >= duplicates.ALIKE

    def joined(found: list[Finding]) -> None:
        assert {finding.kind for finding in found} == {"alike"}
        assert all(a.split()[0] == b.split()[0] for a, b in (finding.song_ids for finding in found))
        families = {song.song_id: {song.song_id} for song in songs}
        for a, b in (finding.song_ids for finding in found):
            together = families[a] | families[b]
            families.update(dict.fromkeys(together, together))
        assert len({id(family) for family in families.values()}) == 3

    find_alike(songs, joined)


def test_level_does_not_matter(rendered: dict[str, np.ndarray], tmp_path: Path) -> None:
    wave, *_ = rendered.values()
    signatures = []
    for gain in (1.0, 2.0**-10):
        soundfile.write(tmp_path / "song.wav", gain * wave, RATE, subtype="FLOAT")
        signatures.append(duplicates.signature(as_song("song", mix=tmp_path / "song.wav")))
    assert signatures[0].minhash == signatures[1].minhash != ()


def test_stems_are_compared_as_their_sum(rendered: dict[str, np.ndarray], tmp_path: Path) -> None:
    wave, *_ = rendered.values()
    soundfile.write(tmp_path / "mix.wav", wave, RATE)
    low = soxr.resample(soxr.resample(wave, RATE, 2_000), 2_000, RATE)
    soundfile.write(tmp_path / "low.wav", low / 2, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "high.wav", (wave - low) / 2, RATE, subtype="FLOAT")
    mix = as_song("mix", mix=tmp_path / "mix.wav")
    stems = as_song("stems", bass=tmp_path / "low.wav", keys=tmp_path / "high.wav")
    find_alike([mix, stems], equal_to(pairs(("mix", "stems"))))


def test_a_shared_file_joins_songs_unless_it_is_silent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = {name: tmp_path / f"{name}.wav" for name in ("shared", "silent", "a", "b", "c", "d")}
    for name, path in paths.items():
        soundfile.write(path, np.zeros(RATE) if name == "silent" else 0.1 * rng.standard_normal(RATE), RATE)
    songs = [
        as_song("a", drums=paths["shared"], bass=paths["a"], vocals=paths["silent"]),
        as_song("b", drums=paths["shared"], bass=paths["b"]),
        as_song("c", bass=paths["c"], vocals=paths["silent"]),
        Song("d", "d", "stems", tuple(("bass", str(paths[name])) for name in ("silent", "d"))),
    ]
    find_alike(songs, equal_to(pairs(("a", "b"))))
    assert len(duplicates.signature(songs[3]).digests) == 1  # though the other file of its stem is heard


def test_notes_without_a_note_join_nothing(tmp_path: Path) -> None:
    mido.MidiFile(tracks=[mido.MidiTrack([mido.Message("note_on", note=60, velocity=0)])]).save(tmp_path / "empty.mid")
    assert duplicates.signature(as_song("empty", midi=tmp_path / "empty.mid")).digests == ()


def test_unreadable_songs_are_told_with_their_reasons(tmp_path: Path) -> None:
    (tmp_path / "damaged.wav").write_bytes(b"RIFF....")
    (tmp_path / "damaged.mid").write_bytes(b"MThd....")
    path = next(SHIPPED.glob("*.mid"))
    songs = [as_song("damaged", mix=tmp_path / "damaged.wav"), as_song("missing", mix=tmp_path / "missing.wav")]
    songs += [as_song("damaged notes", midi=tmp_path / "damaged.mid")]
    songs += [as_song("one", midi=path), as_song("two", midi=path)]

    def told(found: list[Finding]) -> None:
        reasons = {finding.song_ids: finding.reason for finding in found if finding.kind == "unreadable"}
        assert reasons.keys() == {("damaged",), ("missing",), ("damaged notes",)}
        assert "No such file" in reasons["missing",] and "not readable as MIDI" in reasons["damaged notes",]
        assert [finding for finding in found if finding.kind != "unreadable"] == pairs(("one", "two"))

    find_alike(songs, told)


def test_a_fault_of_the_machine_is_no_unreadable_song(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 1, limit[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(path, os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            list(duplicates._Sign().process(as_song("song", mix=path)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for descriptor in held:
            os.close(descriptor)


def edited(midi: mido.MidiFile, change: Callable[[mido.Message], None], tick: Callable[[int], int]) -> mido.MidiFile:
    """A copy with every message changed and every time moved."""
    copy = mido.MidiFile(type=midi.type, ticks_per_beat=midi.ticks_per_beat)
    for track in midi.tracks:
        now = last = 0
        copy.tracks.append(mido.MidiTrack())
        for message in track:
            now += message.time
            copy.tracks[-1].append(message.copy(time=tick(now) - last))
            change(copy.tracks[-1][-1])
            last = tick(now)
    return copy


def transpose(message: mido.Message) -> None:
    if hasattr(message, "note") and message.channel != 9:
        message.note += 3


def soften(message: mido.Message) -> None:
    if message.type == "note_on" and message.velocity:
        message.velocity = max(1, message.velocity // 2)


def hasten(message: mido.Message) -> None:
    if message.type == "set_tempo":
        message.tempo = message.tempo * 3 // 4


def keep(thing: object) -> None:
    pass


@pytest.mark.parametrize(
    "change, tick", [(transpose, int), (soften, int), (hasten, int), (keep, lambda tick: tick * 2)]
)
def test_edited_notes_are_found(
    change: Callable[[mido.Message], None], tick: Callable[[int], int], tmp_path: Path
) -> None:
    songs = []
    for path in sorted(SHIPPED.glob("*.mid")):
        edited(mido.MidiFile(path), change, tick).save(tmp_path / path.name)
        songs += [as_song(path.stem, midi=path), as_song(f"{path.stem} edited", midi=tmp_path / path.name)]
    originals = [song.song_id for song in songs[::2]]
    assert len(originals) > 5
    find_alike(songs, equal_to(pairs(*((name, f"{name} edited") for name in originals))))


def test_notes_saved_in_one_track_are_found(tmp_path: Path) -> None:
    path = next(SHIPPED.glob("*.mid"))
    midi = mido.MidiFile(path)
    mido.MidiFile(type=0, ticks_per_beat=midi.ticks_per_beat, tracks=[mido.merge_tracks(midi.tracks)]).save(
        tmp_path / "one track.mid"
    )
    signatures = [duplicates.signature(as_song("a", midi=p)) for p in (path, tmp_path / "one track.mid")]
    assert signatures[0].minhash == signatures[1].minhash
    assert signatures[0].digests != signatures[1].digests


def test_times_beyond_any_integer_are_survived(tmp_path: Path) -> None:
    late = mido.MidiTrack([mido.Message("note_on", note=n, time=2**200 if n == 60 else 10) for n in range(40, 80)])
    mido.MidiFile(tracks=[late]).save(tmp_path / "late.mid")
    assert duplicates.signature(as_song("late", midi=tmp_path / "late.mid")).digests


def test_a_few_notes_or_silence_are_like_nothing(tmp_path: Path) -> None:
    short = mido.MidiTrack([mido.Message("note_on", note=n, time=10) for n in range(40, 60)])
    mido.MidiFile(tracks=[short]).save(tmp_path / "short.mid")
    soundfile.write(tmp_path / "silent.wav", np.zeros(10 * RATE), RATE)
    assert duplicates.signature(as_song("short", midi=tmp_path / "short.mid")).minhash == ()
    assert duplicates.signature(as_song("silent", mix=tmp_path / "silent.wav")).minhash == ()


def test_similarity_estimates_the_overlap_of_sets() -> None:
    rng = np.random.default_rng(0)
    for overlap in (0.0, 0.2, 0.5, 0.9):
        estimates = []
        for _ in range(20):
            values = rng.integers(2**64, size=2000, dtype=np.uint64)
            shared = round(2000 * overlap)
            only = (2000 - shared) // 2
            a, b = values[: shared + only], np.concatenate([values[:shared], values[shared + only :]])
            estimates.append(duplicates.similarity(*(np.array(duplicates._minhash(x)) for x in (a, b))))
        assert np.mean(estimates) == pytest.approx(overlap, abs=0.03)


def test_peaks_do_not_depend_on_the_blocks() -> None:
    wave = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    whole = [np.concatenate(found) for found in zip(*duplicates._peaks([wave]), strict=True)]
    cut = [np.concatenate(found) for found in zip(*duplicates._peaks(np.array_split(wave, 17)), strict=True)]
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(whole[0]) > 50 and whole[0].max() <= len(wave) // 256


def test_a_group_of_any_size_is_joined_at_bounded_cost() -> None:
    low = bytes(range(128))
    members = [(f"{i:05}", low) for i in range(3000)]
    other = ("99999", bytes(128))
    groups = [(b"band", [other, *reversed(members)]), (b"another", members)]
    with beam.Pipeline() as pipeline:
        found = pipeline | beam.Create(groups) | beam.ParDo(duplicates._Compare()).with_outputs("crowded", main="pairs")
        expected = {("00000", song_id) for song_id, _ in members[1:]}
        assert_that(found.pairs | beam.Distinct(), equal_to(expected), label="pairs")
        assert_that(found.crowded, equal_to(["00000", "00000"]), label="crowded")


def test_a_group_is_joined_through_songs_between() -> None:
    start, end = np.zeros(128, np.uint8), np.ones(128, np.uint8)
    between = np.where(np.arange(128) < 64, start, end)
    members = [("a", start.tobytes()), ("b", end.tobytes()), ("c", between.tobytes())]
    assert list(duplicates._Compare().process((b"band", members))) == [("a", "c"), ("b", "c")]
