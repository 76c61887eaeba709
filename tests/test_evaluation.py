"""Distances against their definitions, musicnn against its published graph, the table's rows, the program."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import librosa
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from configs import minimal
from launch import convert
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import distances, embedders, paper_table, table
from subtractive_jax.evaluation.embedders import Embedding
from subtractive_jax.model import Model
from subtractive_jax.representation.audio import write_audio
from subtractive_jax.training import text_stage
from subtractive_jax.weights import model_folder
from tests import synthetic


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


@pytest.fixture(scope="module")
def checkpoint():
    return convert.read_musicnn()


def test_frechet_by_hand_uses_sample_covariance():
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])  # means 1 and 3, variances 2 and 8 with ddof 1
    assert distances.frechet(x, y) == pytest.approx(4 + 2 + 8 - 2 * 4, abs=1e-9)


@pytest.mark.parametrize("counts", [(300, 200), (12, 9)])
def test_frechet_equals_the_published_code(rng, counts):
    x, y = (rng.normal(size=(count, 20)) @ rng.normal(size=(20, 20)) + rng.normal(size=20) for count in counts)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings(action="ignore"):  # scipy on singular matrices
        root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)
    assert distances.frechet(x, y) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_one_sample_is_refused():
    with pytest.raises(UserError, match="two samples"):
        distances.frechet(np.zeros((1, 4)), np.zeros((9, 4)))


def test_kl_by_hand():
    target, generated = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    expected = (
        0.5 * np.log(0.5 / (0.25 + 1e-6)) + 0.25 * np.log(0.25 / (0.5 + 1e-6)) + 0.25 * np.log(0.25 / (0.25 + 1e-6))
    )
    np.testing.assert_allclose(distances.kl_softmax(target, generated), [expected], rtol=1e-12)


def test_kl_is_of_target_and_generated_in_this_order(rng):
    target, generated = rng.normal(size=(2, 7, 50)) * 3
    p, q = scipy.special.expit(target), scipy.special.expit(generated)
    expected = (p * (np.log(p) - np.log(q + 1e-6))).sum(-1)
    np.testing.assert_allclose(distances.kl_sigmoid(target, generated), expected, rtol=1e-9)
    assert not np.allclose(distances.kl_softmax(target, generated), distances.kl_softmax(generated, target))


def test_bootstrap_covers_the_mean():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        values = generator.normal(size=40)
        estimate = distances.bootstrap(lambda i, values=values: float(values[i].mean()), [40], 200, seed)
        assert estimate.low < estimate.value < estimate.high
        covered += estimate.low < 0.0 < estimate.high
    assert 0.88 < covered / 200 < 0.99


def published_graph(patches, variables):
    """The graph stored in the wheel, at inference: (penultimate layer, logits)."""
    import tensorflow as tf

    folder = Path(importlib.util.find_spec("musicnn").origin).parent / "MTT_musicnn"
    graph_def = tf.compat.v1.MetaGraphDef.FromString((folder / ".meta").read_bytes()).graph_def
    for node in graph_def.node:  # of the machine it was trained on, and of another TensorFlow
        node.device = ""
        node.attr.pop("_output_shapes", None)
        node.attr.pop("_class", None)
    outputs = ["model/batch_normalization_10/batchnorm/add_1", "model/dense_1/BiasAdd"]
    graph_def = tf.compat.v1.graph_util.extract_sub_graph(graph_def, outputs)
    feed = {"model/Placeholder:0": patches, "model/Placeholder_2:0": False}  # log-mel patches, is_training
    feed |= {f"{node.name}/read:0": variables[node.name] for node in graph_def.node if node.op == "VariableV2"}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph_def, name="")
        return session.run([f"{name}:0" for name in outputs], feed)


def test_musicnn_equals_the_published_graph(rng, checkpoint):
    patches = np.abs(rng.normal(size=(3, 187, 96))).astype(np.float32) * 2
    for ours, theirs in zip(embedders.musicnn(checkpoint, patches), published_graph(patches, checkpoint), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_musicnn_front_end_equals_librosa(rng, checkpoint):
    audio = rng.normal(size=50_000).astype(np.float32) * 0.3
    power = librosa.feature.melspectrogram(y=audio, sr=16_000, n_fft=512, hop_length=256, n_mels=96, pad_mode="reflect")
    np.testing.assert_allclose(
        embedders.MusiCNN(checkpoint).log_mel(audio), np.log10(10_000 * power.T + 1), rtol=1e-4, atol=1e-4
    )


def test_musicnn_patches(rng, checkpoint):
    embedder = embedders.MusiCNN(checkpoint)
    audio = rng.normal(size=16_000 * 25).astype(np.float32) * 0.1
    frames = 1 + len(audio) // 256
    embedding = embedder.embed(audio, 16_000)
    assert embedding.patches.shape == (1 + (frames - 187) // 62, 200)  # two batches, the second one padded
    start = 62 * 20 * 256  # the 20th patch alone, away from the edges
    alone, _ = embedders.musicnn(checkpoint, embedder.log_mel(audio)[None, 62 * 20 : 62 * 20 + 187])
    np.testing.assert_allclose(embedding.patches[20], alone[0], rtol=1e-4, atol=1e-4)
    assert embedder.embed(audio[start : start + 16_000], 16_000).patches.shape == (1, 200)
    with pytest.raises(UserError, match="too short"):
        embedder.embed(audio[:100], 16_000)


def test_unknown_embedder_names_the_known_ones():
    with pytest.raises(UserError, match='did you mean "musicnn"'):
        embedders.load_embedder("musicn")


class MeanEmbedder:
    """An embedder to reason about: two patches a file, the mean and the level."""

    name = "mean"

    def embed(self, audio, sample_rate):
        half = len(audio) // 2
        patches = np.array([[part.mean(), part.std()] for part in (audio[:half], audio[half:])], np.float32)
        return Embedding(patches, patches.mean(0))


def embeddings(rng, names, shift=0.0):
    return {name: Embedding(rng.normal(size=(3, 4)) + shift, rng.normal(size=5)) for name in names}


def test_compare_needs_equal_names_for_kl(rng):
    names = [f"{i}" for i in range(12)]
    reference = embeddings(rng, names)
    same = table.compare("same", reference, reference, replicates=5)
    assert abs(same.figures["fd"].value) < 1e-6 and abs(same.figures["fad"].value) < 1e-6
    assert abs(same.figures["kl_softmax"].value) < 1e-4
    other = table.compare("other", reference, embeddings(rng, names[1:], shift=3.0), replicates=5)
    assert other.count == 11 and "no KL" in other.note and set(other.figures) == {"fd", "fad"}
    patches = [np.concatenate([item.patches for item in items.values()]) for items in (reference, reference)]
    assert other.figures["fad"].value > 4 * 3.0**2 * 0.5
    assert same.figures["fad"].value == pytest.approx(distances.frechet(*patches))


def test_table_texts(rng):
    reference = embeddings(rng, "abcdef")
    rows = [table.compare("first", reference, reference, 5), table.Row("second", 0, {}, "no model")]
    assert "second: no model" in table.to_text(rows)
    header, first, second = table.to_csv(rows).splitlines()
    assert header.startswith("name,count,fd_value,fd_low,fd_high")
    assert first.startswith("first,6,") and second == "second,0" + "," * 16 + "no model"


def windows(rng, groups):
    result = []
    for group in groups:
        context, stem = rng.normal(size=(2, 8_000)).astype(np.float32) * 0.1
        result.append(paper_table.Window(context + stem, context, stem, 16_000, "drums", group, "Add drums", "a song"))
    return result


class FakeModel:
    """Inserts noise of the seed; its codec halves the level."""

    def __init__(self, target, *parts):
        self.config = SimpleNamespace(target=target)
        self.parts = parts

    def params(self, part):
        if part not in self.parts:
            raise UserError(part)

    def encode_audio(self, audio):
        return np.stack([audio, np.zeros_like(audio)], axis=-1)

    def decode(self, latents):
        return latents[..., 0] / 2

    def insert(self, audio, sample_rate, text, stem, seed, steps, method="insert"):
        noise = np.random.default_rng(seed).normal(size=(1, len(audio))).astype(np.float32) * 0.1
        assert text == ("a song" if method == "sdedit" else "Add drums") and stem == "drums"
        return SimpleNamespace(mix=audio[None] + noise, stem=noise)


def test_paper_table_has_every_row(rng):
    measured = paper_table.measure(
        MeanEmbedder(),
        [FakeModel("stem", "denoiser"), FakeModel("mix", "denoiser", "base_denoiser")],
        windows(rng, "aabbc"),
        0,
        5,
    )
    assert [row.name for row in measured] == [
        "true mix through the codec",
        "context alone",
        "context alone through the codec",
        "context plus another song's stem",
        "SDEdit, base model",
        "ours (mix target)",
        "ours (stem target)",
    ]
    assert all(row.count == 5 and not row.note for row in measured)
    with_stem = [row.name for row in measured if "onset_f1" in row.figures]
    assert with_stem == [row.name for row in measured[3:]]


def test_rows_that_cannot_be_filled_say_so(rng):
    notes = {
        row.name: row.note
        for row in paper_table.measure(MeanEmbedder(), [FakeModel("stem", "denoiser")], windows(rng, "aaa"), None, 5)
    }
    assert "one group" in notes["context plus another song's stem"]
    assert "base denoiser" in notes["SDEdit, base model"]
    assert "target mix" in notes["ours (mix target)"]
    assert notes["ours (stem target)"] == ""


def test_other_stems_are_of_other_groups(rng):
    given = windows(rng, "aabbc")
    groups = {id(window.stem): window.group_id for window in given}
    for window, stem in zip(given, paper_table.other_stems(given), strict=True):
        assert groups[id(stem)] != window.group_id


def evaluate(*arguments):
    command = [sys.executable, "-m", "launch.evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_paper_table_of_a_model(tmp_path, rng):
    config = minimal.get_config()
    channels = config.autoencoder.latent_channels
    config.update(dict(latent_shift=(0.0,) * channels, latent_scale=(1.0,) * channels, context_scale=(1.0,) * channels))
    synthetic.write_windows(tmp_path, config, train=6)

    def noise(leaf):
        return rng.normal(scale=0.05, size=leaf.shape).astype(np.float32)

    names = ("text_encoder", "autoencoder", "vocoder", "denoiser")
    params = {part: jax.tree.map(noise, parts.network(part, config).shapes()) for part in names}
    tokenizer = text_stage.make_tokenizer(config, str(tmp_path))
    model = Model(model_folder.ModelFiles(config, params, tokenizer))
    windows = paper_table.read_windows(tmp_path, "train", "drums", num_windows=2)
    assert [window.stem_name for window in windows] == ["drums", "drums"]
    np.testing.assert_allclose(windows[0].mix, windows[0].context + windows[0].stem, atol=1e-4)

    measured = paper_table.measure(MeanEmbedder(), [model], windows, steps=1, replicates=2)
    assert [row.name for row in measured if row.note] == ["SDEdit, base model", "ours (mix target)"]
    assert all(np.isfinite(row.figures[metric].value) for row in measured if not row.note for metric in ("fd", "fad"))
    with pytest.raises(UserError, match="0 windows without vocals"):
        paper_table.read_windows(tmp_path, "train", "vocals", num_windows=2)


@pytest.fixture
def folder(tmp_path, rng):
    path = tmp_path / "real"
    path.mkdir()
    for index in range(3):
        write_audio(path / f"{index}.wav", rng.normal(size=(2, 16_000)).astype(np.float32) * 0.1, 16_000)
    return path


def test_evaluate_two_folders(tmp_path, folder):
    output = tmp_path / "out"
    done = evaluate(f"--reference={folder}", f"--candidate={folder}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    document = json.loads((output / "table.json").read_text())
    (row,) = document["rows"]
    assert document["embedder"] == "musicnn" and row["count"] == document["reference_count"] == 3
    assert abs(row["fd"]["value"]) < 1e-3 and row["kl_softmax"]["low"] <= row["kl_softmax"]["high"]
    assert (output / "table.csv").read_text().count("\n") == 2
    assert "FAD" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference={real}", "--candidate={real}", "--output={real}"], "exists"),
        (["--reference={real}", "--candidate={real}/none", "--output={out}"], "no such folder"),
        (["--reference={real}", "--output={out}"], "--candidate"),
        (["--reference={real}", "--candidate={real}", "--output={out}", "--embedder=vggish"], "unknown embedder"),
        (["--paper_table", "--output={out}"], "--data_dir"),
    ],
)
def test_evaluate_refuses(tmp_path, folder, arguments, message):
    filled = [argument.format(real=folder, out=tmp_path / "out") for argument in arguments]
    done = evaluate(*filled)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
