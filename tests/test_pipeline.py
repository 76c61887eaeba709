"""Songs to `windows` to `latents`: sources, rendering, triples, texts, encoding, and what happens to bad input."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import mido
import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from configs import minimal
from data_pipeline import pipeline, shards, sources
from data_pipeline.encode import Encoders
from data_pipeline.song import Song
from subtractive_jax import fingerprint, parts, records
from subtractive_jax.errors import UserError
from subtractive_jax.models import autoencoder
from subtractive_jax.representation.audio import read_audio
from subtractive_jax.representation.mel import Mel
from subtractive_jax.text import tokenize
from subtractive_jax.training.text_stage import train_tokenizer
from subtractive_jax.weights import model_folder
from tests.midi import write_midi

RATE = 16_000
SHIPPED = Path(sources.SHIPPED.partition(":")[2])


def shipped() -> dict[str, Song]:
    return {song.song_id: song for song in sources.find_songs([]).songs}


def config_for_tests():
    config = minimal.get_config("autoencoder")
    with config.unlocked():
        config.data.window_hop_frames = 512
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """`windows` of two shipped songs, a renamed held-out one, and a damaged one."""
    source, data_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    (source / "mid").mkdir()
    rows = [json.loads(line) for line in (SHIPPED / "songs.jsonl").read_text().splitlines()]
    wanted = {"demo-cc0-drum-and-bass": "other-stem", "demo-cc0-punk-rock": "punk", "demo-cc0-funk": "renamed"}
    rows = [row | {"id": wanted[row["id"]], "group_id": row["id"]} for row in rows if row["id"] in wanted]
    for row in rows:
        shutil.copy(SHIPPED / row["midi"], source / row["midi"])
    (source / "mid" / "damaged.mid").write_bytes(b"MThd\0\0\0\6damaged")
    rows.append({"id": "damaged", "midi": "mid/damaged.mid"})
    (source / "songs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline.build_windows(config_for_tests(), str(data_dir), [f"midi:{source}"], [])
    return data_dir


@pytest.fixture(scope="module")
def model(data_dir, tmp_path_factory):
    """A model folder with a random autoencoder and text encoder."""
    config = config_for_tests()
    split = records.Split(data_dir, "windows", "train", ("instructions", "caption"))
    texts = [text for i in range(len(split)) for text in (*split[i]["instructions"], split[i]["caption"])]
    params = {part: parts.network(part, config).init(jax.random.key(1)) for part in ("autoencoder", "text_encoder")}
    files = model_folder.ModelFiles(config, params, train_tokenizer(texts, config.text_encoder.vocab_size))
    folder = tmp_path_factory.mktemp("model") / "model"
    model_folder.save(folder, files, dtype="float32", card="random")
    return folder


@pytest.fixture(scope="module")
def encoded_dir(data_dir, model):
    pipeline.build_latents(config_for_tests(), str(data_dir), str(model), [])
    return data_dir


def run_program(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, text=True, check=False)


def integers(flac: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(flac), dtype="int16")[0].astype(np.int64)


# The datasets.


def test_windows_hold_exact_triples(data_dir):
    seen = set()
    for split in records.SPLITS:
        examples = records.Split(data_dir, "windows", split)
        for index in range(len(examples)):
            example = examples[index]
            seen.add((split, example["song_id"], example["stem_name"]))
            mix, context, stem = (integers(example[key]) for key in ("mix", "context", "stem"))
            np.testing.assert_array_equal(mix, context + stem)
            assert len(mix) == 128 * 160 and example["sample_rate"] == RATE
            assert len(example["instructions"]) == 4 and 0 < example["gain"] < 10
            assert (
                json.loads(example["tags"])["genre"] in example["caption"].lower() or example["song_id"] == "other-stem"
            )
    train = {("train", "other-stem", stem) for stem in ("drums", "bass", "keys")}
    train |= {("train", "punk", stem) for stem in ("drums", "bass", "guitar")}
    held_out = {("test", "renamed", stem) for stem in ("drums", "bass", "guitar", "keys")}
    assert seen == train | held_out, "a held-out song is for testing under any name; stem `other` is only mixed in"


def test_tfds_reads_both_datasets(encoded_dir):
    for name in records.SCHEMAS:
        ours = records.Split(encoded_dir, name, "train")
        builder = tfds.builder_from_directory(records.dataset_dir(encoded_dir, name))
        assert builder.info.splits["train"].num_examples == len(ours)
        theirs = list(tfds.as_numpy(builder.as_dataset(split="train[:3]")))
        for index, example in enumerate(theirs):
            assert example.keys() == ours[index].keys()
            for key, value in ours[index].items():
                if isinstance(value, str):
                    assert example[key].decode() == value
                elif isinstance(value, list):
                    assert [text.decode() for text in example[key]] == value
                elif isinstance(value, bytes):
                    assert example[key] == value
                else:
                    np.testing.assert_array_equal(example[key], value)
                    assert example[key].dtype == value.dtype


def test_rejections_and_counts_are_recorded(data_dir):
    folder = records.dataset_dir(data_dir, "windows")
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [item["song_id"] for item in rejected] == ["damaged"]
    assert "not readable as MIDI" in rejected[0]["reason"]
    counts = records.read_metadata(data_dir, "windows")["counts"]
    assert sum(counts["train"].values()) == len(records.Split(data_dir, "windows", "train"))
    assert counts["validation"] == {}
    assert not list(folder.parent.glob(".incomplete-*"))


def test_inspect_counts(data_dir):
    done = run_program("data_pipeline.inspect", f"--data_dir={data_dir}")
    assert done.returncode == 0
    assert re.search(r"train: \d+ examples of 2 songs", done.stdout)
    assert re.search(r"\d+  punk\n", done.stdout) and "rejected: 1" in done.stdout
    done = run_program("data_pipeline.inspect", "--data_dir=nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no dataset here")


def test_rebuilding_gives_the_same_bytes(data_dir, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copy(SHIPPED / "mid" / "demo-cc0-ska.mid", tmp_path / "source" / "ska.mid")
    for name in ("one", "two"):
        pipeline.build_windows(config_for_tests(), str(tmp_path / name), [f"midi:{tmp_path / 'source'}"], [])
    files = [sorted((tmp_path / name / "windows" / "1.0.0").iterdir()) for name in ("one", "two")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


@pytest.mark.slow
def test_worker_processes_give_the_same_bytes(model, tmp_path):
    source, config = tmp_path / "source", Path(minimal.__file__)
    source.mkdir()
    for name in ("demo-cc0-ska", "demo-cc0-rock"):
        shutil.copy(SHIPPED / "mid" / f"{name}.mid", source / f"{name}.mid")
    flags = [
        f"--config={config}",
        "--config.data.window_hop_frames=512",
        f"--source=midi:{source}",
        f"--encoders={model}",
    ]
    workers = "--beam_pipeline_options=direct_running_mode=multi_processing,direct_num_workers=2"
    for name, own in (("one", []), ("two", [workers])):
        done = run_program("data_pipeline.build", *flags, f"--data_dir={tmp_path / name}", *own)
        assert done.returncode == 0, done.stderr
    files = [sorted((tmp_path / name).rglob("*.tfrecord-*-of-?????")) for name in ("one", "two")]
    assert len(files[0]) == 4
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_latents_are_the_networks_outputs(encoded_dir, model):
    files = model_folder.load(model)
    mel = Mel.from_config(files.config.representation)
    network = parts.network("autoencoder", files.config)
    windows_split, latents = (records.Split(encoded_dir, name, "test") for name in ("windows", "latents"))
    assert len(windows_split) == len(latents)
    for index in (0, len(latents) - 1):
        window, latent = windows_split[index], latents[index]
        for key in ("song_id", "stem_name", "start_seconds", "gain", "instructions", "tags"):
            assert window[key] == latent[key]
        for key in ("mix", "context", "stem"):
            audio = read_audio(window[key])[0] * window["gain"]
            expected = network.apply(files.params["autoencoder"], mel.encode(audio), method="encode")[0]
            np.testing.assert_allclose(latent[f"{key}_latent"], expected, atol=2e-3)
        text_encoder = parts.network("text_encoder", files.config)
        texts = [*window["instructions"], window["caption"]]
        ids, mask = tokenize(files.tokenizer, texts, files.config.max_text_tokens)
        states = np.asarray(text_encoder.apply(files.params["text_encoder"], ids, mask))
        ends = np.cumsum(latent["instruction_lengths"])[:-1]
        stored = [*np.split(latent["instruction_states"], ends), latent["caption_states"]]
        for own, row, valid in zip(stored, states, mask, strict=True):
            np.testing.assert_allclose(own, row[valid], atol=5e-3)


def test_latents_metadata(encoded_dir, model):
    files = model_folder.load(model)
    metadata = records.read_metadata(encoded_dir, "latents")
    hashes = [fingerprint.params_hash(files.params[part]) for part in ("autoencoder", "text_encoder")]
    assert metadata["config_hash"] == fingerprint.dataset_hash(
        files.config.representation.to_dict(), *hashes, records.SCHEMA_VERSION
    )
    assert np.shape(metadata["null_text_states"]) == (1, files.config.text_encoder.d_model)
    split = records.Split(encoded_dir, "latents", "train")
    for key, name in (("mix", "latent"), ("context", "context"), ("stem", "stem")):
        moments = np.stack([split[i][f"{key}_latent"] for i in range(len(split))]).astype(np.float64)
        mean, log_variance = np.split(moments, 2, axis=-1)
        variance = mean.var(axis=(0, 1, 2)) + (np.exp(log_variance).mean(axis=(0, 1, 2)) if key != "context" else 0)
        np.testing.assert_allclose(metadata[f"{name}_mean"], mean.mean(axis=(0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(metadata[f"{name}_std"], np.sqrt(variance), rtol=1e-6)


def test_statistics_are_of_samples_or_of_the_mode():
    moments = np.random.default_rng(0).standard_normal((4, 6, 10)).astype(np.float16)
    sums = shards.moment_sums(moments)
    mode_std = moments[..., :5].astype(np.float64).std(axis=(0, 1))
    np.testing.assert_allclose(shards.mean_and_std(sums, sampled=False)[1], mode_std)
    keys = jax.random.split(jax.random.key(0), 400)
    samples = np.concatenate(
        [
            autoencoder.sample_posterior(moments[None].astype(np.float32), jax.random.normal(key, (1, 4, 6, 5)))
            for key in keys
        ]
    )
    np.testing.assert_allclose(shards.mean_and_std(sums, sampled=True)[1], samples.std(axis=(0, 1, 2)), rtol=0.05)


# Bad input.


def test_bad_songs_are_rejected_and_the_others_built(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "empty.mid").touch()
    (source / "damaged.mid").write_bytes((SHIPPED / "mid" / "demo-cc0-ska.mid").read_bytes()[:300])
    (source / "text.mid").write_text("MThd is how a MIDI file begins")
    mido.MidiFile(tracks=[mido.MidiTrack()]).save(source / "silent.mid")
    write_midi(source / "short.mid", {"drums/kit": [(0, 38)]}, {"drums/kit": 9}, beats=5)
    notes = {"drums/kit": [(beat, 38) for beat in range(24)], "keys/piano": [(beat, 60) for beat in range(24)]}
    write_midi(source / "good.mid", notes, {"drums/kit": 9, "keys/piano": 0}, beats=24)
    config = config_for_tests()
    with config.unlocked():
        config.data.validation_fraction = config.data.test_fraction = 0.0
    pipeline.build_windows(config, str(tmp_path / "data"), [f"midi:{source}"], [])
    folder = records.dataset_dir(tmp_path / "data", "windows")
    reasons = {row["song_id"]: row["reason"] for row in map(json.loads, (folder / "rejected.jsonl").open())}
    assert reasons.keys() == {"empty", "damaged", "text", "silent", "short"}
    assert all("not readable as MIDI" in reasons[name] for name in ("empty", "damaged", "text"))
    assert "no notes" in reasons["silent"]
    split = records.Split(tmp_path / "data", "windows", "train")
    assert {split[i]["song_id"] for i in range(len(split))} == {"good"}


def test_bad_stem_files_are_rejected_and_the_others_built(tmp_path):
    def song(name: str, **files: np.ndarray | bytes) -> Path:
        folder = tmp_path / "source" / name
        folder.mkdir(parents=True)
        for stem, content in files.items():
            if isinstance(content, bytes):
                (folder / f"{stem}.wav").write_bytes(content)
            else:
                soundfile.write(folder / f"{stem}.wav", content, 22_050, subtype="FLOAT")
        return folder

    noise = np.random.default_rng(0).standard_normal((22_050 * 4, 2)) * 0.1
    nan = noise.copy()
    nan[1000] = np.nan
    good = song("good", drums=noise, vocals=noise[::-1], mixture=noise)
    (good / "tags.json").write_text(json.dumps({"genre": "soul", "group_id": "album"}))
    song("nan", drums=noise, bass=nan)
    song("text", drums=noise, bass=b"no audio")
    song("empty", drums=noise, bass=b"")
    song("misnamed", drums=noise, basss=noise)
    song("alone", drums=noise, mix=noise)
    config = config_for_tests()
    with config.unlocked():
        config.data.stems = ("drums", "vocals")
        config.data.validation_fraction = config.data.test_fraction = 0.0
    pipeline.build_windows(config, str(tmp_path / "data"), [f"stems:{tmp_path / 'source'}"], [])
    folder = records.dataset_dir(tmp_path / "data", "windows")
    reasons = {row["song_id"]: row["reason"] for row in map(json.loads, (folder / "rejected.jsonl").open())}
    assert "NaN" in reasons["nan"] and "not readable as audio" in reasons["text"] and "is empty" in reasons["empty"]
    assert 'did you mean "bass"' in reasons["misnamed"] and "fewer than two" in reasons["alone"]
    split = records.Split(tmp_path / "data", "windows", "train")
    assert {(split[i]["song_id"], split[i]["group_id"], split[i]["stem_name"]) for i in range(len(split))} == {
        ("good", "album", "drums"),
        ("good", "album", "vocals"),
    }
    np.testing.assert_array_equal(integers(split[0]["mix"]), integers(split[0]["context"]) + integers(split[0]["stem"]))


def test_a_source_without_a_usable_song_leaves_nothing_behind(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "empty.mid").touch()
    with pytest.raises(
        UserError, match=r"no usable song: .*rejected\.jsonl tells why \(most often: not readable as MIDI"
    ):
        pipeline.build_windows(config_for_tests(), str(tmp_path / "data"), [f"midi:{tmp_path / 'source'}"], [])
    assert not list((tmp_path / "data" / "windows").iterdir())


def test_a_dataset_is_never_overwritten(encoded_dir, model):
    with pytest.raises(UserError, match="already there"):
        pipeline.build_windows(config_for_tests(), str(encoded_dir), [], [])
    with pytest.raises(UserError, match="already there"):
        pipeline.build_latents(config_for_tests(), str(encoded_dir), str(model), [])


def test_config_windows_and_model_must_agree(data_dir, model, tmp_path):
    config = config_for_tests()
    config.data.stems = ("drum",)
    with pytest.raises(UserError, match='unknown stem "drum"; did you mean "drums"'):
        pipeline.build_windows(config, str(tmp_path), [], [])
    config = config_for_tests()
    config.representation.n_mels = 80
    with pytest.raises(UserError, match=r"representation\.n_mels is 64 in .* but 80 in the config"):
        pipeline.build_latents(config, str(data_dir), str(model), [])
    files = model_folder.load(model)
    files.config.representation.log_floor = 1e-4
    model_folder.save(tmp_path / "other", files, card="")
    shutil.copytree(data_dir / "windows", tmp_path / "windows")
    with pytest.raises(UserError, match=r"representation\.log_floor is 1e-05 in .* but 0.0001 in model"):
        pipeline.build_latents(config_for_tests(), str(tmp_path), str(tmp_path / "other"), [])
    assert not (tmp_path / "latents" / "1.0.0").exists()
    with pytest.raises(UserError, match='no dataset "windows"'):
        pipeline.build_latents(config_for_tests(), str(tmp_path / "nowhere"), str(model), [])


def test_texts_too_long_for_the_model_are_refused(model):
    encoders = Encoders(str(model))
    with pytest.raises(UserError, match=r"text of \d+ tokens, at most \d+ are read"):
        encoders.encode_texts(["Add drums " * 40])


def test_the_program_fails_with_one_line():
    done = run_program("data_pipeline.build", "--config=configs/minimal.py", "--data_dir=nowhere", "--until=latents")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --until=latents needs --encoders=MODEL, a model with a text encoder and, for audio, an autoencoder"
    ]
