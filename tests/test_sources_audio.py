"""Collections of audio stems, each as a miniature of its layout: what is found, what is refused, what adds up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import grouping, sources
from data_pipeline.song import Rejected, Song, Tools
from data_pipeline.sources import moisesdb, musdb18hq, slakh2100, stems
from subtractive_jax.errors import UserError
from subtractive_jax.representation.audio import read_audio, resample, to_mono

RATE = 16_000


def tone(seed, seconds=0.5, rate=44_100, channels=2):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((int(seconds * rate), channels))).astype(np.float32)


def write(path: Path, samples, rate=44_100):
    path.parent.mkdir(parents=True, exist_ok=True)
    subtype = {".wav": "FLOAT", ".flac": "PCM_24"}.get(path.suffix.lower())
    soundfile.write(path, samples, rate, format=path.suffix[1:].upper(), subtype=subtype)


def find(module, folder) -> tuple[dict[str, Song], dict[str, str]]:
    """(songs, reasons), both by id."""
    found = list(module.find(str(folder)))
    songs = {item.song_id: item for item in found if isinstance(item, Song)}
    rejected = {item.song_id: item.reason for item in found if isinstance(item, Rejected)}
    assert len(songs) + len(rejected) == len(found)
    assert all("\n" not in reason for reason in rejected.values())
    return songs, rejected


def load(song: Song):
    """({stem: samples}, recording)."""
    recording = sources.load(song, RATE, Tools())
    whole = np.concatenate(list(recording.blocks), axis=1)
    return dict(zip(recording.stems, whole, strict=True)), recording


def assert_adds_up(music, mix: Path):
    samples, rate = read_audio(mix)
    expected = resample(to_mono(samples), rate, RATE)
    np.testing.assert_allclose(sum(music.values()), expected, rtol=0, atol=1e-5)


# stems


def write_stems(folder: Path, names, **tags):
    parts = [tone(seed) for seed in range(len(names))]
    for name, samples in zip(names, parts, strict=True):
        write(folder / name, samples)
    write(folder / "mixture.wav", sum(parts))
    if tags:
        (folder / "tags.json").write_text(json.dumps(tags))


@pytest.mark.parametrize("name", ("Song", "two words", "a [live] *?", "süß – 音楽", 'it\'s "so" {n}', "100%", "-x"))
def test_stems_of_songs_with_any_name(tmp_path, name):
    write_stems(tmp_path / name, ("drums.wav", "Bass.FLAC", "keys.flac"))
    songs, rejected = find(stems, tmp_path)
    assert list(songs) == [name] and not rejected
    song = songs[name]
    assert (song.group_id, song.title, song.split) == (name, "", "")
    music, recording = load(song)
    assert set(music) == {"drums", "bass", "keys"} and recording.notes == [] and not recording.separated
    assert recording.tags == {"stems": {"bass": {}, "drums": {}, "keys": {}}}
    assert_adds_up(music, tmp_path / name / "mixture.wav")


def test_stems_take_tags_and_nothing_else_from_tags_json(tmp_path):
    given = {"genre": "ska", "tempo": 120, "stems": {"drums": {"vel_mean": 90}}, "mood": None}
    write_stems(tmp_path / "a", ("drums.wav", "bass.wav"), **given, title="Two Rooms", group_id="album", artist="X")
    (tmp_path / "a" / "._drums.wav").write_bytes(b"left by another system")
    (tmp_path / "a" / "cover.jpg").write_bytes(b"a picture")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "drums.wav").write_bytes(b"")
    songs, rejected = find(stems, tmp_path)
    song = songs["a"]
    assert (song.group_id, song.title) == ("album", "Two Rooms") and not rejected
    assert song.tags == {"genre": "ska", "tempo": 120, "stems": {"drums": {"vel_mean": 90}}}
    tags = load(song)[1].tags
    tags["stems"]["drums"]["vel_mean"] = 0
    assert song.tags["stems"]["drums"]["vel_mean"] == 90


def test_bad_folders_of_stems_are_refused_and_the_rest_goes_on(tmp_path):
    write_stems(tmp_path / "good", ("drums.wav", "bass.wav"))
    write_stems(tmp_path / "alone", ("drums.wav",))
    write_stems(tmp_path / "twice", ("drums.wav", "Drums.flac", "bass.wav"))
    write_stems(tmp_path / "odd", ("drums.wav", "gitar.wav"))
    for name, text in {"text": "{", "list": "[]", "deep": "[" * 100_000, "title": '{"title": 7}'}.items():
        write_stems(tmp_path / name, ("drums.wav", "bass.wav"))
        (tmp_path / name / "tags.json").write_text(text)
    songs, rejected = find(stems, tmp_path)
    assert list(songs) == ["good"]
    assert rejected["alone"] == "fewer than two stem files"
    assert 'two files for the stem "drums"' in rejected["twice"]
    assert 'did you mean "guitar"' in rejected["odd"]
    assert "not JSON" in rejected["text"] and "not JSON" in rejected["deep"]
    assert "not a JSON object" in rejected["list"]
    assert '"title" in tags.json is not a text' in rejected["title"]


def test_stems_of_different_length_and_damaged_stems_are_refused_on_reading(tmp_path):
    write(tmp_path / "lengths" / "drums.wav", tone(0, seconds=0.5))
    write(tmp_path / "lengths" / "bass.wav", tone(1, seconds=0.6))
    write_stems(tmp_path / "cut", ("drums.wav", "bass.wav"))
    cut = tmp_path / "cut" / "bass.wav"
    cut.write_bytes(cut.read_bytes()[:10_000])
    songs, _ = find(stems, tmp_path)
    with pytest.raises(UserError, match=r"drums lasts 0\.50 s and bass 0\.60 s"):
        load(songs["lengths"])
    with pytest.raises(UserError, match=r"bass\.wav: cut short"):
        load(songs["cut"])


def test_stems_of_different_rates_are_brought_to_one(tmp_path):
    write(tmp_path / "a" / "drums.wav", tone(0, rate=48_000), 48_000)
    write(tmp_path / "a" / "bass.ogg", tone(1, rate=8_000, channels=1), 8_000)
    music, recording = load(find(stems, tmp_path)[0]["a"])
    assert {len(samples) for samples in music.values()} == {8_000}
    assert recording.notes == ["bass.ogg: resampled from 8000 Hz"]


# MUSDB18-HQ


def write_musdb(folder: Path, without=()):
    parts = {stem: tone(seed) for seed, stem in enumerate(("drums", "bass", "vocals", "other"))}
    for stem, samples in (parts | {"mixture": sum(parts.values())}).items():
        if stem not in without:
            write(folder / f"{stem}.wav", samples)


def test_musdb18hq(tmp_path):
    songs_of = {"train": ("A - One", "Leaf - Summerghost", "A - B - Two"), "test": ("A - Three", "No Dash")}
    for split, names in songs_of.items():
        for name in names:
            write_musdb(tmp_path / split / name)
    write_musdb(tmp_path / "train" / "B - Incomplete", without=("bass", "other"))
    songs, rejected = find(musdb18hq, tmp_path)
    assert rejected == {"musdb18hq/B - Incomplete": "no bass.wav, other.wav"}
    assert {song.song_id: (song.title, song.split) for song in songs.values()} == {
        "musdb18hq/A - One": ("One", "train"),
        "musdb18hq/Leaf - Summerghost": ("Summerghost", "validation"),
        "musdb18hq/A - B - Two": ("B - Two", "train"),
        "musdb18hq/A - Three": ("Three", "test"),
        "musdb18hq/No Dash": ("No Dash", "test"),
    }
    assert len({song.group_id for song in songs.values()}) == 5
    music, _ = load(songs["musdb18hq/A - Three"])
    assert list(music) == ["drums", "bass", "vocals", "other"]
    assert_adds_up(music, tmp_path / "test" / "A - Three" / "mixture.wav")


# MoisesDB

TRACKS = (  # stem, kind of track, bleed, ours
    ("drums", "kick_drum", False, "drums"),
    ("drums", "overheads", True, "drums"),
    ("percussion", "a-tonal_percussion_(claps,_shakers,_congas,_cowbell_etc)", False, "drums"),
    ("percussion", "pitched_percussion_(mallets,_glockenspiel,_...)", False, "keys"),
    ("guitar", "distorted_electric_guitar", False, "guitar"),
    ("other_plucked", "banjo,_mandolin,_ukulele,_harp_etc", False, "guitar"),
    ("wind", "flutes", False, "other"),
)


def write_moises(folder: Path, change=lambda data: None):
    """Returns the sum of all tracks."""
    data: dict[str, Any] = {"song": "Blue Door", "artist": "Some Band", "genre": "Bossa Nova", "stems": []}
    parts = []
    for number, (stem, kind, bleed, _) in enumerate(TRACKS):
        if not data["stems"] or data["stems"][-1]["stemName"] != stem:
            data["stems"].append({"id": f"s{number}", "stemName": stem, "tracks": []})
        track = {"id": f"t{number}", "extension": "wav", "trackType": kind, "has_bleed": bleed}
        data["stems"][-1]["tracks"].append(track)
        parts.append(tone(number))
        write(folder / stem / f"t{number}.wav", parts[-1])
    change(data)
    (folder / "data.json").write_text(json.dumps(data))
    return sum(parts)


def test_moisesdb(tmp_path):
    folder = tmp_path / "moisesdb_v0.1" / "0a1b"
    write(tmp_path / "mix.wav", write_moises(folder))
    songs, rejected = find(moisesdb, tmp_path)
    assert list(songs) == ["moisesdb/0a1b"] and not rejected
    song = songs["moisesdb/0a1b"]
    assert (song.group_id, song.title, song.split) == ("moisesdb/Some Band", "Blue Door", "")
    assert [stem for stem, _ in song.files] == [ours for *_, ours in TRACKS]
    assert song.tags["genre"] == "latin"
    assert song.tags["stems"]["guitar"]["instruments"][1] == "Distorted Electric Guitar"
    music, recording = load(song)
    assert list(music) == ["drums", "keys", "guitar", "other"]
    assert recording.notes == ["drums: has bleed, says the collection"]
    assert_adds_up(music, tmp_path / "mix.wav")
    assert find(moisesdb, tmp_path / "moisesdb_v0.1")[0]["moisesdb/0a1b"].files == song.files


def test_a_moisesdb_stem_that_ends_early_is_silent_from_there(tmp_path):
    write_moises(tmp_path / "a")
    write(tmp_path / "a" / "wind" / "t6.wav", tone(6, seconds=0.3))
    music, recording = load(find(moisesdb, tmp_path)[0]["moisesdb/a"])
    assert {len(samples) for samples in music.values()} == {8_000}
    assert music["other"][:4_800].any() and not music["other"][4_800:].any()
    assert "other lasts 0.30 s and drums 0.50 s: padded" in recording.notes


def without(key):
    return lambda data: data.pop(key)


def first_track(**change):
    return lambda data: data["stems"][0]["tracks"][0].update(change)


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (without("stems"), "not as MoisesDB writes it"),
        (lambda data: data.update(stems=7), "not as MoisesDB writes it"),
        (lambda data: data.update(stems=[["drums"]]), "not as MoisesDB writes it"),
        (lambda data: data["stems"][0].pop("tracks"), "not as MoisesDB writes it"),
        (lambda data: data["stems"][0]["tracks"][0].pop("id"), "not as MoisesDB writes it"),
        (lambda data: data.update(stems=data["stems"][:1]), "fewer than two stems"),
        (lambda data: data["stems"][0].update(stemName="drumz"), "no such file: bad/drumz/t0.wav"),
        (first_track(id="lost"), "no such file: bad/drums/lost.wav"),
        (first_track(id="../../good/drums/t0"), "no such file: bad/drums/../../good/drums/t0.wav"),
    ),
)
def test_wrong_metadata_of_moisesdb_is_refused(tmp_path, change, reason):
    write_moises(tmp_path / "bad", change)
    write_moises(tmp_path / "good")
    songs, rejected = find(moisesdb, tmp_path)
    assert list(songs) == ["moisesdb/good"] and reason in rejected["moisesdb/bad"]


@pytest.mark.parametrize("text", ("", "{", "[]", "null", "[" * 100_000, "\x00"))
def test_damaged_json_of_moisesdb_is_refused(tmp_path, text):
    write_moises(tmp_path / "bad")
    (tmp_path / "bad" / "data.json").write_text(text)
    assert "not as MoisesDB writes it" in find(moisesdb, tmp_path)[1]["moisesdb/bad"]


def test_unknown_stems_of_moisesdb_are_refused():
    with pytest.raises(UserError, match='unknown MoisesDB stem "drumz"; did you mean "drums"'):
        grouping.stem_of_moisesdb("drumz", "kick_drum")


# Slakh2100

SOURCES = {  # class, program, its name, drums, rendered, ours
    "S00": ("Guitar", 30, "Distortion Guitar", False, True, "guitar"),
    "S01": ("Drums", 128, "Drums", True, True, "drums"),
    "S02": ("Piano", 1, "Bright Acoustic Piano", False, True, "keys"),
    "S03": ("Guitar", 25, "Acoustic Guitar (steel)", False, True, "guitar"),
    "S04": ("Sound Effects", 120, "Guitar Fret Noise", False, False, "other"),
    "S05": ("Bass", 33, "Electric Bass (finger)", False, True, "bass"),
}


def write_slakh(folder: Path, uuid, suffix="flac", change=lambda data: None):
    data: dict[str, Any] = {"UUID": uuid, "audio_dir": "stems", "normalized": True, "stems": {}}
    parts = []
    for number, (name, (kind, program, instrument, drums, rendered, _)) in enumerate(SOURCES.items()):
        data["stems"][name] = {
            **{"audio_rendered": rendered, "inst_class": kind, "integrated_loudness": -12.8, "is_drum": drums},
            **{"midi_program_name": instrument, "midi_saved": True, "plugin_name": "x.nkm", "program_num": program},
        }
        if rendered:
            parts.append(tone(number, channels=1))
            write(folder / "stems" / f"{name}.{suffix}", parts[-1])
    write(folder / f"mix.{suffix}", sum(parts))
    change(data)
    (folder / "metadata.yaml").write_text(yaml.safe_dump(data))


def test_slakh2100(tmp_path):
    write_slakh(tmp_path / "train" / "Track00001", "0f1e")
    write_slakh(tmp_path / "validation" / "Track00002", "abcd")
    write_slakh(tmp_path / "test" / "Track00003", "0f1e", suffix="wav")
    write_slakh(tmp_path / "omitted" / "Track00004", "abcd")
    songs, rejected = find(slakh2100, tmp_path)
    assert not rejected
    assert {song.song_id: (song.group_id, song.split) for song in songs.values()} == {
        "slakh2100/Track00001": ("slakh2100/0f1e", "train"),
        "slakh2100/Track00002": ("slakh2100/abcd", "validation"),
        "slakh2100/Track00003": ("slakh2100/0f1e", "test"),
    }
    for name, mix in (("Track00001", "train/Track00001/mix.flac"), ("Track00003", "test/Track00003/mix.wav")):
        music, recording = load(songs[f"slakh2100/{name}"])
        assert list(music) == ["guitar", "drums", "keys", "bass"] and recording.notes == []
        assert_adds_up(music, tmp_path / mix)
    guitars = ["Acoustic Guitar (steel)", "Distortion Guitar"]
    assert recording.tags["stems"]["guitar"] == {"instruments": guitars}


def test_slakh2100_without_splits(tmp_path):
    write_slakh(tmp_path / "Track00001", "0f1e")
    songs, _ = find(slakh2100, tmp_path)
    assert [(song.song_id, song.split) for song in songs.values()] == [("slakh2100/Track00001", "")]


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (without("stems"), "KeyError"),
        (without("UUID"), "KeyError"),
        (lambda data: data.update(stems=["S00"]), "AttributeError"),
        (lambda data: data["stems"]["S00"].pop("program_num"), "KeyError"),
        (lambda data: data["stems"]["S00"].update(program_num="loud"), "ValueError"),
        (lambda data: data["stems"]["S00"].update(program_num=128), "S00 has the program 128"),
        (lambda data: data["stems"]["S04"].update(audio_rendered=True), "no such file: bad/stems/S04.flac"),
        (lambda data: data.update(stems={"../../good/stems/S00": data["stems"]["S00"]}), "no such file: bad/stems/.."),
        (lambda data: data.update(stems={"S00": data["stems"]["S00"]}), "fewer than two stems"),
    ),
)
def test_wrong_metadata_of_slakh2100_is_refused(tmp_path, change, reason):
    write_slakh(tmp_path / "bad", "0f1e", change=change)
    write_slakh(tmp_path / "good", "0f1e")
    songs, rejected = find(slakh2100, tmp_path)
    assert list(songs) == ["slakh2100/good"] and reason in rejected["slakh2100/bad"]


@pytest.mark.parametrize(
    "text", ("", "a: [", "stems: !!timestamp x", "a: !!python/name:os.system", "[" * 2_000, "\x00")
)
def test_damaged_yaml_of_slakh2100_is_refused(tmp_path, text):
    write_slakh(tmp_path / "bad", "0f1e")
    (tmp_path / "bad" / "metadata.yaml").write_text(text)
    assert "not as Slakh writes it" in find(slakh2100, tmp_path)[1]["slakh2100/bad"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def replaced(data, where: list[int], value):
    """The data with one value, at any depth, put in another's place; `where` says which."""
    if not where or not isinstance(data, list | dict) or not data:
        return value
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = keys[where[0] % len(keys)]
    copy: Any = data.copy()
    copy[key] = replaced(data[key], where[1:], value)
    return copy


@pytest.mark.parametrize(
    ("module", "file", "make"),
    (
        (stems, "tags.json", lambda folder: write_stems(folder, ("drums.wav", "bass.wav"), genre="ska", title="One")),
        (moisesdb, "data.json", write_moises),
        (slakh2100, "metadata.yaml", lambda folder: write_slakh(folder, "0f1e")),
    ),
)
def test_damaged_metadata_gives_a_song_or_a_reason(tmp_path, module, file, make):
    make(tmp_path / "song")
    path = tmp_path / "song" / file
    good = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        songs, rejected = find(module, tmp_path)
        assert len(songs) + len(rejected) == 1

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 9), max_size=6), JSON)
    def other_values(where, value):
        check(json.dumps(replaced(yaml.safe_load(good), where, value)).encode())

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, len(good)), st.integers(0, 20), st.binary(max_size=5))
    def other_bytes(at, length, inserted):
        check(good[:at] + inserted + good[at + length :])

    other_values()
    other_bytes()


def test_find_songs_takes_several_sources(tmp_path):
    write_stems(tmp_path / "mine" / "one", ("drums.wav", "bass.wav"))
    write_musdb(tmp_path / "musdb" / "test" / "A - Three")
    write_slakh(tmp_path / "slakh" / "Track00001", "0f1e", change=without("UUID"))
    given = [f"stems:{tmp_path}/mine", f"musdb18hq:{tmp_path}/musdb", f"slakh2100:{tmp_path}/slakh"]
    found = sources.find_songs(given)
    songs, rejected = found.songs, found.rejected
    assert [song.song_id for song in songs] == ["musdb18hq/A - Three", "one"]
    assert [item.song_id for item in rejected] == ["slakh2100/Track00001"]
