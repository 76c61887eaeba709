"""The tables' rows, and the program."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import minimal
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import distances, paper_table, table
from subtractive_jax.evaluation.embedders import Embedding
from subtractive_jax.model import Model
from subtractive_jax.representation.audio import write_audio
from subtractive_jax.training import text_stage
from subtractive_jax.weights import model_folder
from tests import synthetic


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


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
    assert other.count == 11 and "no KL" in other.note and set(other.figures) == {"fd", "fad", "kad"}
    patches = [np.concatenate([item.patches for item in items.values()]) for items in (reference, reference)]
    assert other.figures["fad"].value > 4 * 3.0**2 * 0.5
    assert same.figures["fad"].value == pytest.approx(distances.frechet(*patches))


def test_table_texts(rng):
    reference = embeddings(rng, "abcdef")
    rows = [table.compare("first", reference, reference, 5), table.Row("second", 0, {}, "no model")]
    text = table.to_text(rows)
    assert "second: no model" in text and "first: no FAD-inf, which takes 1000 patches and has 18" in text
    header, first, second = table.to_csv(rows).splitlines()
    assert header.startswith("name,count,fd_value,fd_low,fd_high")
    assert first.startswith("first,6,") and second == "second,0" + "," * (4 * len(table.METRICS) + 1) + "no model"


def windows(rng, groups):
    result = []
    for group in groups:
        context, stem = rng.normal(size=(2, 8_000)).astype(np.float32) * 0.1
        result.append(paper_table.Window(context + stem, context, stem, 16_000, "drums", group, "Add drums", "a song"))
    return result


class FakeModel:
    """Inserts noise of the seed; its codec halves the level, its vocoder halves it twice."""

    def __init__(self, target, *parts):
        self.config = SimpleNamespace(target=target)
        self.parts = parts

    def params(self, part):
        if part not in self.parts:
            raise UserError(part)

    def encode_image(self, audio):
        return audio

    def vocode(self, image):
        return image / 4

    def encode_audio(self, audio):
        return np.stack([audio, np.zeros_like(audio)], axis=-1)

    def decode(self, latents):
        return latents[..., 0] / 2

    def insert(self, audio, sample_rate, text, stem, seed, steps, method="insert"):
        noise = np.random.default_rng(seed).normal(size=(1, len(audio))).astype(np.float32) * 0.1
        assert text == ("a song" if method == "sdedit" else "Add drums") and stem == "drums"
        info = {"estimated": self.config.target == "mix", "figures": {"flags": ["unchanged"] if seed == 0 else []}}
        return SimpleNamespace(mix=audio[None] + noise, stem=noise, info=info)


def test_paper_table_has_every_row(rng):
    measured = paper_table.measure(
        MeanEmbedder(),
        [FakeModel("stem", "denoiser"), FakeModel("mix", "denoiser", "base_denoiser")],
        windows(rng, "aabbc"),
        0,
        5,
    )
    assert [row.name for row in measured] == [
        "true mix through the vocoder",
        "true mix through the codec",
        "context alone",
        "context alone through the codec",
        "context plus another song's stem",
        "context plus the true stem through the codec",
        "SDEdit, base model",
        "ours (mix target)",
        "ours (stem target)",
    ]
    assert all(row.count == 5 and "FAD-inf" in row.note and ";" not in row.note for row in measured)
    for metric in ("onset_f1", "beat_f1", "beat_level_f1", "chroma_agreement", "apa"):
        with_stem = [row.name for row in measured if metric in row.figures]
        assert with_stem == [row.name for row in (*measured[:2], *measured[4:])], metric
    sampled = [row for row in measured if "no_edit" in row.figures]
    assert [row.name for row in sampled] == [row.name for row in measured[6:]]
    assert all(row.figures["no_edit"].value == 0.2 and row.figures["silent_stem"].value == 0.0 for row in sampled)
    sums = [row for row in measured if "sub_fad" in row.figures]
    assert [row.name for row in sums] == [measured[4].name, measured[5].name, "ours (stem target)"]
    assert all(row.figures["sub_fad"] == row.figures["fad"] for row in sums)
    assert all("clap" not in row.figures for row in measured)


class CaptionEmbedder(MeanEmbedder):
    """Texts in the space of its recordings: every caption is the unit vector of the mean."""

    def embed_text(self, texts):
        return np.tile(np.array([[1.0, 0.0]], np.float32), (len(texts), 1))


def test_captions_are_measured_where_the_embedder_reads_them(rng):
    given = windows(rng, "ab")
    row = paper_table.Measure(CaptionEmbedder(), given, 5)("row", [paper_table.Sound(each.mix) for each in given])
    means = [MeanEmbedder().embed(each.mix, 16_000).patches.mean(axis=0) for each in given]
    expected = np.mean([mean[0] / np.linalg.norm(mean) for mean in means])
    assert row.figures["clap"].value == pytest.approx(expected, rel=1e-5)


def test_rows_that_cannot_be_filled_say_so(rng):
    notes = {
        row.name: row.note
        for row in paper_table.measure(MeanEmbedder(), [FakeModel("stem", "denoiser")], windows(rng, "aaa"), None, 5)
    }
    assert "one group" in notes["context plus another song's stem"]
    assert "base denoiser" in notes["SDEdit, base model"]
    assert "target mix" in notes["ours (mix target)"]
    assert "one group" in notes["ours (stem target)"] and "APA" in notes["ours (stem target)"]


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
    windows = list(paper_table.read_windows(tmp_path, "train", "drums", num_windows=2))
    assert [window.stem_name for window in windows] == ["drums", "drums"]
    np.testing.assert_allclose(windows[0].mix, windows[0].context + windows[0].stem, atol=1e-4)

    measured = paper_table.measure(MeanEmbedder(), [model], windows, steps=1, replicates=2)
    assert [row.name for row in measured if not row.figures] == ["SDEdit, base model", "ours (mix target)"]
    assert all(np.isfinite(figure.value) for row in measured for figure in row.figures.values())
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
        (["--reference={real}", "--candidate={real}", "--output={out}", "--embedder=vgish"], "unknown embedder"),
        (
            ["--reference={real}", "--candidate={real}", "--output={out}", "--embedder=clap"],
            "launch.convert --from=clap",
        ),
        (["--paper_table", "--output={out}"], "--data_dir"),
    ],
)
def test_evaluate_refuses(tmp_path, folder, arguments, message):
    filled = [argument.format(real=folder, out=tmp_path / "out") for argument in arguments]
    done = evaluate(*filled)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
