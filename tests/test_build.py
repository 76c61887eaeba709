"""The build as people run it: of stems and songs, with a language model, in a bucket, killed and run again."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import apache_beam as beam
import jax
import numpy as np
import pytest
import soundfile
from apache_beam.io.filesystems import FileSystems

from configs import minimal
from data_pipeline import engine, files, pipeline, sources
from data_pipeline.song import Tools
from subtractive_jax import parts, records
from subtractive_jax.errors import UserError
from subtractive_jax.training import latent_stages
from subtractive_jax.training.text_stage import train_tokenizer
from subtractive_jax.weights import model_folder
from tests.servers import answers, bucket_server, chat_server, completion

ROOT = Path(__file__).parents[1]
RATE = 16_000


def write_song(folder: Path, seed: int, seconds: float = 4.0, **tags: object) -> None:
    """Drums, bass and keys, each song its own."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    time_ = np.arange(round(seconds * RATE)) / RATE
    steps = np.repeat(draw.integers(0, 12, 200), round(0.25 * RATE))[: len(time_)]
    pitch = np.cumsum(55.0 * 2.0 ** (steps / 12.0)) / RATE
    hits = draw.standard_normal(len(time_)) * np.exp(-10.0 * (time_ % draw.choice((0.25, 0.5))))
    stems = dict(drums=0.2 * hits, bass=0.3 * np.sin(2 * np.pi * pitch), keys=0.1 * np.sign(np.sin(8 * np.pi * pitch)))
    for name, samples in stems.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE)
    if tags:
        (folder / "tags.json").write_text(json.dumps(tags))


def config_for_tests(**data: object):
    config = minimal.get_config()
    with config.unlocked():
        config.data.update({"validation_fraction": 0.0, "test_fraction": 0.0} | data)
    return config


def examples(data_dir: str | Path, name: str = "windows", split: str = "train") -> list[dict]:
    return list(records.Split(str(data_dir), name, split))


def build(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipeline.build", f"--config={ROOT}/configs/minimal.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def only_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    return line


def test_finished_songs_are_separated(tmp_path):
    write_song(tmp_path / "stems", 0, seconds=6.0)
    mix = sum(soundfile.read(path)[0] for path in sorted((tmp_path / "stems").iterdir()))
    (tmp_path / "songs").mkdir()
    soundfile.write(tmp_path / "songs" / "01 My Song.flac", np.stack([mix, mix], axis=1), RATE)
    (tmp_path / "songs" / "captions.csv").write_text('song_id,caption\n01 My Song,"A short, square piece."\n')
    config = config_for_tests(max_bleed_db=0.0, min_stem_level_db=-60.0)
    tools = Tools(separator="demucs_unittest")
    pipeline.build_windows(config, str(tmp_path / "data"), [f"songs:{tmp_path / 'songs'}"], [], tools)
    found = examples(tmp_path / "data")
    assert {example["stem_name"] for example in found} <= {"drums", "bass"} and found
    for example in found:
        assert example["song_id"] == "01 My Song" and example["caption"] == "A short, square piece."
        assert -60.0 <= json.loads(example["tags"])["bleed_db"] <= 0.0
        assert not any("My" in text or "Song" in text for text in example["instructions"])

    config = config_for_tests(max_bleed_db=-59.0)
    with pytest.raises(UserError, match=r"no usable song: .* dB of it in the rest, over data\.max_bleed_db"):
        pipeline.build_windows(config, str(tmp_path / "strict"), [f"songs:{tmp_path / 'songs'}"], [], tools)


def test_a_separator_that_is_not_there_ends_the_build_in_one_line(tmp_path):
    write_song(tmp_path / "songs", 0)
    done = build(f"--data_dir={tmp_path / 'data'}", f"--source=songs:{tmp_path / 'songs'}", "--separator=htdemux")
    assert "htdemux" in only_error(done)
    done = build(f"--data_dir={tmp_path / 'data'}", f"--source=songs:{tmp_path}", "--separator_repo=nowhere")
    assert only_error(done) == "error: --separator_repo=nowhere: no such file or folder"
    assert not files.list_files(str(tmp_path / "data"))


def test_copies_vary_the_training_songs_and_nothing_else(tmp_path):
    for index in range(3):
        write_song(tmp_path / "songs" / f"take {index}", index, group_id="one piece", tempo=120, key="A minor")
    augmentation = dict(copies=2, pitch_semitones=2.0, gain_db=6.0, remix=True, seed=3)
    folders = [f"stems:{tmp_path / 'songs'}"]
    for name, seed in (("plain", None), ("one", 3), ("two", 3), ("other", 4)):
        config = config_for_tests(stems=("drums", "bass+drums"), songs_per_shard=2)
        if seed:
            config.data.augmentation.update({**augmentation, "seed": seed})
        pipeline.build_windows(config, str(tmp_path / name), folders, [])
    plain, one, two, other = (examples(tmp_path / name) for name in ("plain", "one", "two", "other"))
    assert len(one) == 3 * len(plain)
    assert [bytes(example["mix"]) for example in one] == [bytes(example["mix"]) for example in two]
    copies = [example for example in one if "semitones" in json.loads(example["tags"])]
    assert len(copies) == 2 * len(plain)
    assert all("key" not in json.loads(example["tags"]) for example in copies)
    mixes = Counter(bytes(example["mix"]) for example in one)
    assert {bytes(example["mix"]) for example in plain} <= mixes.keys(), "the songs themselves are there as they are"
    assert sum(bytes(example["mix"]) in mixes for example in other) == len(plain), "copies depend on the seed"
    for example in one:
        mix, context, stem = (audio(example[key]).astype(int) for key in ("mix", "context", "stem"))
        np.testing.assert_array_equal(mix, context + stem)
        # The level rule holds for the window's own balance: about -20 LUFS whatever the gains.
        level = 10 * np.log10(np.mean((context / 32768.0 * example["gain"]) ** 2))
        assert -30 < level < -10


def test_copies_of_notes_are_played_anew(tmp_path):
    songs = tmp_path / "songs"
    shutil.copytree(Path(sources.SHIPPED.partition(":")[2]) / "mid", songs / "mid")
    row = {"id": "a", "midi": "mid/demo-cc0-ska.mid", "tempo": 150, "key": "C major", "caption": "Ska at 150 BPM"}
    (songs / "songs.jsonl").write_text(json.dumps(row))
    config = config_for_tests(stems=("drums",))
    config.data.augmentation.update(dict(copies=1, pitch_semitones=2.0, tempo=0.1))
    pipeline.build_windows(config, str(tmp_path / "data"), [f"midi:{songs}"], [])
    plain, copies = [], []
    for example in examples(tmp_path / "data"):
        (copies if "speed" in json.loads(example["tags"]) else plain).append(example)
    (speed,) = {json.loads(example["tags"])["speed"] for example in copies}
    assert 1 / 1.1 <= speed <= 1.1 and speed != 1.0
    assert len(copies) == pytest.approx(len(plain) / speed, abs=2)
    for example in copies:
        tags = json.loads(example["tags"])
        assert tags["tempo"] == pytest.approx(150 * speed, abs=0.1) and "key" not in tags
        assert tags["semitones"] in (-2, -1, 1, 2)
        assert example["caption"] != row["caption"] and "150 BPM" not in " ".join(example["instructions"])
        mix, context, stem = (audio(example[key]).astype(int) for key in ("mix", "context", "stem"))
        np.testing.assert_array_equal(mix, context + stem)
    assert {example["caption"] for example in plain} == {row["caption"]}


@pytest.mark.parametrize("damage", ["short", "cut"])
def test_another_take_that_does_not_fit_is_left_out(tmp_path, damage):
    for index in range(2):
        seconds = 2.5 if damage == "short" and index else 4.0
        write_song(tmp_path / "songs" / f"take {index}", index, seconds, group_id="piece", tempo=120, key="A minor")
    if damage == "cut":
        path = tmp_path / "songs" / "take 1" / "bass.wav"
        path.write_bytes(path.read_bytes()[:9_000])
    config = config_for_tests()
    config.data.augmentation.copies = 1
    pipeline.build_windows(config, str(tmp_path / "data"), [f"stems:{tmp_path / 'songs'}"], [])
    whole = [example for example in examples(tmp_path / "data") if example["song_id"] == "take 0"]
    assert sum("semitones" in json.loads(example["tags"]) for example in whole) == len(whole) / 2 > 0
    folder = records.dataset_dir(tmp_path / "data", "windows")
    rejected = {json.loads(row)["song_id"] for row in (folder / "rejected.jsonl").read_text().splitlines()}
    assert rejected == ({"take 1"} if damage == "cut" else set())
    assert ("not mixed with another take" in (folder / "notes.jsonl").read_text()) == (damage == "short")
    copies = records.read_metadata(str(tmp_path / "data"), "windows")["copies"]
    assert copies == {"of the song alone": 1 if damage == "cut" else 2}


def audio(flac: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(flac), dtype="int16")[0]


def test_a_language_model_writes_the_instructions_once(tmp_path):
    write_song(tmp_path / "songs" / "a", 0, genre="funk", title="Electric Avenue")
    said = {
        "drums": [f"Add tight funk drums number {word}" for word in ("one", "two", "three", "four", "five", "six")],
        "bass": ["Add drums", "Play a round bass", "Add a bass for Electric Avenue"],
        "keys": [],
    }
    arguments = [f"--source=stems:{tmp_path / 'songs'}", "--llm_model=m", "--max_rejected=0"]
    arguments += ["--config.data.validation_fraction=0.0", "--config.data.test_fraction=0.0"]
    with chat_server(answers(completion(said))) as (url, requests):
        for name in ("one", "two"):
            cache = f"--llm_cache={tmp_path / 'cache'}"
            done = build(f"--data_dir={tmp_path / name}", f"--llm_base_url={url}", cache, *arguments)
            assert done.returncode == 0, done.stderr
            assert len(requests) == 1, "the second build asks nothing"
    one, two = examples(tmp_path / "one"), examples(tmp_path / "two")
    assert [example["instructions"] for example in one] == [example["instructions"] for example in two]
    drums = {text for example in one if example["stem_name"] == "drums" for text in example["instructions"]}
    assert drums & set(said["drums"])
    assert not any("Avenue" in text for example in one for text in example["instructions"])
    counts = records.read_metadata(str(tmp_path / "one"), "windows")["texts"]
    assert counts["from the model"] == 7 and counts["refused: title"] == 1 and counts["refused: wrong stem"] == 1
    assert counts["from templates"] > 0
    assert "7 from the cache" in done.stdout


def test_a_build_of_mostly_rubbish_is_stopped(tmp_path):
    write_song(tmp_path / "songs" / "good", 0)
    for index in range(3):
        folder = tmp_path / "songs" / f"bad {index}"
        folder.mkdir()
        for stem in ("drums", "bass"):
            (folder / f"{stem}.wav").write_bytes(b"RIFF")
    arguments = [f"--data_dir={tmp_path / 'data'}", f"--source=stems:{tmp_path / 'songs'}"]
    line = only_error(build(*arguments))
    assert "3 of 4 songs refused" in line and "--max_rejected" in line and "not readable as audio" in line
    assert not (tmp_path / "data" / "windows" / "1.0.0").exists()
    told = [json.loads(row) for row in (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()]
    assert {row["song_id"] for row in told} == {"bad 0", "bad 1", "bad 2"}
    done = build(*arguments, "--max_rejected=0.8")
    assert done.returncode == 0 and "3 rejected" in done.stdout, done.stderr


def test_what_is_refused_of_a_used_song_does_not_count_against_it(tmp_path):
    for index in range(3):
        write_song(tmp_path / "songs" / f"{index}", index)
    (tmp_path / "songs" / "tags.jsonl").write_text("not JSON\n" * 9)
    pipeline.build_windows(
        config_for_tests(), str(tmp_path / "data"), [f"stems:{tmp_path / 'songs'}"], [], max_rejected=0.0
    )
    rows = (records.dataset_dir(tmp_path / "data", "windows") / "rejected.jsonl").read_text().splitlines()
    assert len(rows) == 9 and all("tags.jsonl" in row for row in rows)


def test_windows_made_otherwise_than_asked_for_are_refused(tmp_path):
    write_song(tmp_path / "songs" / "good", 0)
    data_dir, source = str(tmp_path / "data"), [f"stems:{tmp_path / 'songs'}"]
    pipeline.build_windows(config_for_tests(), data_dir, source, [])
    pipeline.check_windows(config_for_tests(), data_dir, source)
    with pytest.raises(UserError, match=r"was made from stems:.*give another --data_dir"):
        pipeline.check_windows(config_for_tests(), data_dir, ["stems:elsewhere"])
    with pytest.raises(UserError, match=r"data\.stems is .* but \['keys'\] in the config"):
        pipeline.check_windows(config_for_tests(stems=("keys",)), data_dir, source)
    config = config_for_tests()
    config.data.augmentation.gain_db = 1.0
    pipeline.check_windows(config, data_dir, source)  # without copies it makes no difference
    config.data.augmentation.copies = 1
    with pytest.raises(
        UserError, match=r"data\.augmentation is \{'copies': 0\} .* but \{'copies': 1, .* in the config"
    ):
        pipeline.check_windows(config, data_dir, source)
    line = only_error(build(f"--data_dir={data_dir}", "--encoders=tiny", "--config=configs/tiny.py", "--separator=x"))
    assert line.startswith("error: --separator has no effect")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window_hop_frames", 0, "it must be 1 or more"),
        ("validation_fraction", 2.0, "at most 1 in sum"),
        ("instructions_per_window", 0, "it must be 1 or more"),
        ("loudness_lufs", 100.0, "between -70 and 0"),
        ("stems", (), "at least one"),
        ("stems", ("drums+bass",), r'write "bass\+drums"'),
    ],
)
def test_values_that_cannot_be_meant_are_refused(tmp_path, field, value, message):
    with pytest.raises(UserError, match=message):
        pipeline.build_windows(config_for_tests(**{field: value}), str(tmp_path / "data"), [], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("direct_num_wrkers=2", "no option direct_num_wrkers"),
        ("direct_num_workers=x", "invalid int"),
        ("runner=X", "X"),
    ],
)
def test_bad_options_of_beam_are_refused(tmp_path, option, message):
    with pytest.raises(UserError, match=f"--beam_pipeline_options: .*{message}"):
        engine.run(beam.Map(str), [], str(tmp_path), [option])


def test_texts_longer_than_the_encoder_reads(tmp_path):
    write_song(tmp_path / "songs" / "a", 0)
    (tmp_path / "songs" / "captions.csv").write_text("song_id,caption\na,{}\n".format("A long story. " * 60))
    config = config_for_tests()
    write_encoders(tmp_path / "model", config, max_text_tokens=60)
    write_encoders(tmp_path / "deaf", config, max_text_tokens=2)
    data_dir = str(tmp_path / "data")
    pipeline.build_windows(config, data_dir, [f"stems:{tmp_path / 'songs'}"], [])
    with pytest.raises(UserError, match="every instruction is longer than the text encoder reads"):
        pipeline.build_latents(config, data_dir, str(tmp_path / "deaf"), [])
    pipeline.build_latents(config, data_dir, str(tmp_path / "model"), [])
    windows, latents = examples(data_dir), examples(data_dir, "latents")
    assert len(windows) == len(latents) > 0
    assert all(0 < len(example["caption_states"]) <= 60 for example in latents)
    assert all(len(example["instruction_lengths"]) == len(example["instructions"]) for example in latents)
    notes = (records.dataset_dir(tmp_path / "data", "latents") / "notes.jsonl").read_text()
    assert "caption cut to" in notes


def write_encoders(folder: Path, config, max_text_tokens: int) -> None:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.max_text_tokens = max_text_tokens
    params = {part: parts.network(part, config).init(jax.random.key(1)) for part in ("autoencoder", "text_encoder")}
    tokenizer = train_tokenizer(["Add drums", "Add bass"], config.text_encoder.vocab_size)
    model_folder.save(folder, model_folder.ModelFiles(config, params, tokenizer), dtype="float32", card="random")


def test_a_killed_build_leaves_nothing_that_looks_whole_and_can_be_run_again(tmp_path):
    for index in range(6):
        write_song(tmp_path / "songs" / f"{index}", index, seconds=20.0)
    arguments = [f"--data_dir={tmp_path / 'data'}", f"--source=stems:{tmp_path / 'songs'}"]
    command = [sys.executable, "-m", "data_pipeline.build", f"--config={ROOT}/configs/minimal.py", *arguments]
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(command, stdout=log, stderr=log)
        while not list((tmp_path / "data").rglob("*.tfrecord-*-of-?????")):
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    with pytest.raises(UserError, match='no dataset "windows"'):
        records.Split(str(tmp_path / "data"), "windows", "train")
    done = build(*arguments)
    assert done.returncode == 0, done.stderr
    assert "left by a build that did not end" in done.stdout
    whole = tmp_path / "whole"
    assert build(f"--data_dir={whole}", *arguments[1:]).returncode == 0
    again, once = (records.dataset_dir(folder, "windows") for folder in (tmp_path / "data", whole))
    names = sorted(path.name for path in once.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert all((again / name).read_bytes() == (once / name).read_bytes() for name in names)


def test_in_a_bucket_from_songs_to_batches(tmp_path):
    """Sources, windows, model and latents on a real S3 server, and batches read from there."""
    write_song(tmp_path / "songs" / "Song [live] 1", 0)
    config = config_for_tests()
    write_encoders(tmp_path / "model", config, config.max_text_tokens)
    with bucket_server() as url:
        engine.parse_options([])
        for name in ("songs", "model"):
            for path in (path for path in (tmp_path / name).rglob("*") if path.is_file()):
                files.write_bytes(files.join(url, path.relative_to(tmp_path).as_posix()), path.read_bytes())
        data_dir = files.join(url, "data")
        pipeline.build_windows(config, data_dir, [f"stems:{files.join(url, 'songs')}"], [])
        pipeline.build_latents(config, data_dir, files.join(url, "model"), [])
        assert not [path for path in files.list_files(data_dir) if ".incomplete" in path]
        with pytest.raises(UserError, match="already there"):
            pipeline.build_windows(config, data_dir, [f"stems:{files.join(url, 'songs')}"], [])
        windows, latents = examples(data_dir), examples(data_dir, "latents")
        assert len(windows) == len(latents) > 0
        assert {example["song_id"] for example in latents} == {"Song [live] 1"}
        split = records.Split(data_dir, "latents", "train")
        source = latent_stages.LatentSource(split, "stem_latent", tuple(config.data.stems), config.max_text_tokens)
        batch = source.batch(np.arange(2), [np.random.default_rng(0)] * 2)
        assert batch["context"].shape[0] == 2
    FileSystems.set_options(None)
