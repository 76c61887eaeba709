import numpy as np
import pytest
import soundfile
import soxr

from data_pipeline.song import Rejected, Song, Tools
from data_pipeline.sources import songs
from subtractive_jax.errors import UserError

TOOLS = Tools(separator="demucs_unittest")


def write(path, seconds=1.5, rate=22_050, channels=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (int(seconds * rate), channels)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(shape), rate)
    return path


def names_only(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


def test_every_audio_file_is_a_song(tmp_path):
    names_only(
        tmp_path, "Solo.WAV", "A/B/02 - Second_One.mp3", "A/B/01. First.flac", "A/x.ogg", "A/cover.jpg", "A/._x.ogg"
    )
    found = list(songs.find(str(tmp_path)))
    assert [(song.song_id, song.group_id, song.title) for song in found] == [
        ("A/B/01. First", "A/B", "First"),
        ("A/B/02 - Second_One", "A/B", "Second One"),
        ("A/x", "A", "x"),
        ("Solo", "Solo", "Solo"),
    ]
    assert found[1].files == (("mix", str(tmp_path / "A/B/02 - Second_One.mp3")),)
    assert {song.kind for song in found} == {"songs"}


@pytest.mark.parametrize(("count", "groups"), [(40, 1), (41, 41)])
def test_a_large_folder_is_a_library_and_no_album(tmp_path, count, groups):
    names_only(tmp_path, *(f"all/{index}.mp3" for index in range(count)), "all/0.wav", "all/album/a.mp3")
    found = [song for song in songs.find(str(tmp_path)) if isinstance(song, Song)]
    assert len(found) == count + 1
    assert len({song.group_id for song in found}) == groups + 1


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("1-03 Tune", "Tune"),
        ("1979", "1979"),
        ("07", "07"),
        ("12) Tune", "Tune"),
        ("2Step", "2Step"),
        ("3.14 Pi", "Pi"),
    ],
)
def test_title(tmp_path, name, title):
    names_only(tmp_path, f"{name}.wav")
    assert next(iter(songs.find(str(tmp_path)))).title == title


def test_of_two_files_with_one_id_the_better_counts(tmp_path):
    names_only(tmp_path, "a.mp3", "a.wav", "b.wav")
    song, rejected, other = songs.find(str(tmp_path))
    assert isinstance(song, Song) and song.files[0][1].endswith("a.wav")
    assert rejected == Rejected("a", str(tmp_path / "a.mp3"), "another file has the same name but for its suffix")
    assert other.song_id == "b"


@pytest.mark.parametrize(("rate", "channels"), [(22_050, 2), (44_100, 1), (48_000, 6)])
def test_stems_add_up_to_the_song(tmp_path, rate, channels):
    path = write(tmp_path / "a.wav", rate=rate, channels=channels)
    (song,) = songs.find(str(tmp_path))
    recording = songs.load(song, 16_000, TOOLS)
    blocks = list(recording.blocks)
    stems = np.concatenate(blocks, axis=1)
    assert recording.stems == ("drums", "bass", "vocals", "other")
    assert recording.separated
    assert recording.tags["stems"].keys() == set(recording.stems)
    assert stems.dtype == np.float32 and stems.shape == (4, 24_000)
    assert len(recording.notes) == (channels > 2)  # though the file is read twice
    mono = soundfile.read(path)[0].reshape(-1, channels).mean(axis=1)
    expected = soxr.resample(mono, rate, 16_000)
    # Twice resampled: what is near half the rate differs.
    error = np.mean((stems.sum(axis=0) - expected)[1_000:-1_000] ** 2) / np.mean(expected**2)
    assert 10 * np.log10(error) < -20.0


def test_a_file_that_is_no_audio(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF of nothing")
    (song,) = songs.find(str(tmp_path))
    with pytest.raises(UserError, match="a.wav"):
        list(songs.load(song, 16_000, TOOLS).blocks)
