"""Embedders against their published networks and front ends, with random weights; published files to theirs."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import nn

from launch import convert, pickles
from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import embedders
from subtractive_jax.evaluation.embedders import clap, musicnn, panns, published, vggish
from subtractive_jax.representation.audio import write_audio


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


def random_params(shapes, rng):
    """Of a size that keeps activations of order 1; variances are positive."""
    return {
        name: (rng.random(shape, np.float32) + 0.5 if name.endswith("var") else rng.standard_normal(shape, np.float32))
        * np.float32((np.prod(shape[1:]) / 2) ** (-0.5 if len(shape) > 1 else 0))
        for name, shape in shapes.items()
    }


def load_into(module, params):
    state = {name: torch.from_numpy(value) for name, value in params.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return module.eval()


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@pytest.fixture(scope="module")
def checkpoint():
    return convert.read_musicnn()


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
    for ours, theirs in zip(musicnn.musicnn(checkpoint, patches), published_graph(patches, checkpoint), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_musicnn_front_end_equals_librosa(rng, checkpoint):
    audio = rng.normal(size=50_000).astype(np.float32) * 0.3
    power = librosa.feature.melspectrogram(y=audio, sr=16_000, n_fft=512, hop_length=256, n_mels=96, pad_mode="reflect")
    np.testing.assert_allclose(
        musicnn.MusiCNN(checkpoint).log_mel(audio), np.log10(10_000 * power.T + 1), rtol=1e-4, atol=1e-4
    )


def test_musicnn_patches(rng, checkpoint):
    embedder = musicnn.MusiCNN(checkpoint)
    audio = rng.normal(size=16_000 * 25).astype(np.float32) * 0.1
    frames = 1 + len(audio) // 256
    embedding = embedder.embed(audio, 16_000)
    assert embedding.patches.shape == (1 + (frames - 187) // 62, 200)  # two batches, the second one padded
    start = 62 * 20 * 256  # the 20th patch alone, away from the edges
    alone, _ = musicnn.musicnn(checkpoint, embedder.log_mel(audio)[None, 62 * 20 : 62 * 20 + 187])
    np.testing.assert_allclose(embedding.patches[20], alone[0], rtol=1e-4, atol=1e-4)
    assert embedder.embed(audio[start : start + 16_000], 16_000).patches.shape == (1, 200)
    with pytest.raises(UserError, match="too short"):
        embedder.embed(audio[:100], 16_000)


def test_unknown_embedder_names_the_known_ones():
    with pytest.raises(UserError, match='did you mean "musicnn"'):
        embedders.load_embedder("musicn")


class TorchVGGish(nn.Module):
    """harritaylor/torchvggish without its last ReLU."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        sizes = (512 * 4 * 6, 4096, 4096, 128)
        dense = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.embeddings = nn.Sequential(*dense[:-1])

    def forward(self, x):
        return self.embeddings(self.features(x[:, None]).permute(0, 2, 3, 1).flatten(1))


def test_vggish_equals_pytorchs(rng):
    params = random_params(vggish.shapes(), rng)
    patches = rng.normal(size=(2, 96, 64)).astype(np.float32)
    with torch.no_grad():
        theirs = load_into(TorchVGGish(), params)(torch.from_numpy(patches))
    assert_close(vggish.vggish(params, patches), theirs.numpy())


def test_vggish_filters_are_tensorflows():
    import tensorflow as tf

    theirs = tf.signal.linear_to_mel_weight_matrix(64, 257, 16_000, 125.0, 7_500.0).numpy()
    np.testing.assert_allclose(vggish.mel_filters(512, 16_000, 64, 125.0, 7_500.0), theirs, atol=2e-5)


def test_vggish_front_end_and_patches(rng):
    embedder = vggish.VGGish(random_params(vggish.shapes(), rng))
    audio = rng.normal(size=44_100 * 5).astype(np.float32) * 0.1
    embedding = embedder.embed(audio, 44_100)
    assert embedding.patches.shape == (5, 128) and embedding.logits is None
    audio = rng.normal(size=15_600).astype(np.float32) * 0.1  # one patch
    frames = librosa.util.frame(audio, frame_length=400, hop_length=160).T * librosa.filters.get_window("hann", 400)
    magnitude = np.abs(np.fft.rfft(frames, 512))
    expected = np.log(magnitude @ vggish.mel_filters(512, 16_000, 64, 125.0, 7_500.0) + 0.01)
    assert expected.shape == (96, 64)
    np.testing.assert_allclose(embedder.log_mel(audio), expected, atol=1e-5)
    with pytest.raises(UserError, match="give 15600 at least"):
        embedder.embed(audio[1:], 16_000)


class TorchCnn14(nn.Module):
    """Cnn14 of qiuqiangkong/audioset_tagging_cnn behind its front end."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(64)
        channels = 1
        for block, width in enumerate((64, 128, 256, 512, 1024, 2048), start=1):
            layers = nn.Module()
            layers.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers.bn1, layers.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            setattr(self, f"conv_block{block}", layers)
            channels = width
        self.fc1, self.fc_audioset = nn.Linear(2048, 2048), nn.Linear(2048, 527)

    def forward(self, x):
        x = self.bn0(x[:, None].transpose(1, 3)).transpose(1, 3)
        for block in range(1, 7):
            layers = getattr(self, f"conv_block{block}")
            x = torch.relu(layers.bn1(layers.conv1(x)))
            x = torch.relu(layers.bn2(layers.conv2(x)))
            x = nn.functional.avg_pool2d(x, 2 if block < 6 else 1)
        x = x.mean(dim=3)
        x = torch.relu(self.fc1(x.max(dim=2).values + x.mean(dim=2)))
        return x, self.fc_audioset(x)


def test_cnn14_equals_pytorchs(rng):
    params = random_params(panns.shapes(), rng)
    embedder = panns.Cnn14(params)
    audio = rng.normal(size=40_000).astype(np.float32) * 0.2
    power = librosa.feature.melspectrogram(
        y=audio - audio.mean(), sr=16_000, n_fft=512, hop_length=160, n_mels=64, fmin=50, fmax=8_000, pad_mode="reflect"
    )
    log_mel = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None).T
    np.testing.assert_allclose(embedder.log_mel(audio - audio.mean()), log_mel, atol=1e-3)  # dB
    with torch.no_grad():
        theirs = load_into(TorchCnn14(), params)(torch.from_numpy(log_mel)[None])
    embedding = embedder.embed(audio, 16_000)
    assert_close(embedding.patches, theirs[0].numpy(), 1e-4)
    assert_close(embedding.logits, theirs[1][0].numpy(), 1e-4)
    short = embedder.embed(audio[:8_000], 16_000).patches
    assert_close(short, embedder.embed(np.pad(audio[:8_000] - audio[:8_000].mean(), (0, 24_000)), 16_000).patches, 1e-4)


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    """A miniature of CLAP as transformers writes it, its model, and its front end."""
    config = transformers.ClapConfig(
        audio_config=dict(
            patch_embeds_hidden_size=8,
            hidden_size=64,
            depths=[2, 1, 2, 2],
            num_attention_heads=[2, 4, 4, 8],
            projection_dim=24,
        ),
        text_config=dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=9)
        | dict(projection_dim=24, max_position_embeddings=80),
        projection_dim=24,
    )
    model = transformers.ClapModel(config).eval()
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence().entropy % 2**31))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            centre = 1.0 if "norm" in name.lower() and name.endswith(("weight", "var")) else 0.0
            value.copy_(centre + 0.2 * torch.rand(value.shape, generator=generator) - 0.1)
    folder = tmp_path_factory.mktemp("clap") / "published"
    model.save_pretrained(folder)
    front_end = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")
    front_end.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "add", "busy", "drums", "."])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, model, front_end


@pytest.fixture(scope="module")
def clap_weights(clap_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "clap.safetensors"
    run("convert", "--from=clap", f"--input={clap_folder[0]}", f"--output={path}")
    return path


def run(program, *arguments, expect=0):
    command = [sys.executable, "-m", f"launch.{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr
    return done


def test_clap_equals_transformers(rng, clap_folder, clap_weights):
    _, model, front_end = clap_folder
    embedder = embedders.load_embedder("clap", clap_weights)
    audio = rng.normal(size=48_000 * 11 + 100).astype(np.float32) * 0.1
    embedding = embedder.embed(audio, 48_000)
    pieces = [audio[:480_000], audio[48_000:528_000]]
    features = front_end(pieces, sampling_rate=48_000, return_tensors="pt")
    np.testing.assert_allclose(embedder.log_mel(pieces[0]), features["input_features"][0, 0], atol=1e-3)  # dB
    with torch.no_grad():
        theirs = model.get_audio_features(**features).pooler_output.numpy()
    assert embedding.patches.shape == (2, 24) and embedding.logits is None
    assert_close(embedding.patches, theirs)
    assert np.abs(theirs[0] - theirs[1]).max() > 100 * np.abs(embedding.patches - theirs).max()


def test_clap_repeats_what_is_short(rng, clap_folder, clap_weights):
    _, model, front_end = clap_folder
    audio = rng.normal(size=48_000 * 3).astype(np.float32) * 0.1
    features = front_end(audio, sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        theirs = model.get_audio_features(**features).pooler_output.numpy()
    assert_close(embedders.load_embedder("clap", clap_weights).embed(audio, 48_000).patches, theirs)


def test_clap_texts_equal_transformers(clap_folder, clap_weights):
    _, model, _ = clap_folder
    ours = embedders.load_embedder("clap", clap_weights).embed_text(["add busy drums .", "drums"])
    ids = torch.tensor([[0, 4, 5, 6, 7, 2], [0, 6, 2, 1, 1, 1]])
    with torch.no_grad():
        theirs = model.get_text_features(ids, attention_mask=(ids != 1).long()).pooler_output.numpy()
    assert_close(ours, theirs)
    long = embedders.load_embedder("clap", clap_weights).embed_text(["drums " * 200])
    assert np.all(np.isfinite(long))


def test_evaluate_with_clap(tmp_path, rng, clap_weights):
    (tmp_path / "real").mkdir()
    for index in range(2):
        write_audio(tmp_path / "real" / f"{index}.wav", rng.normal(size=48_000).astype(np.float32) * 0.1, 48_000)
    arguments = (f"--reference={tmp_path / 'real'}", f"--candidate={tmp_path / 'real'}", f"--output={tmp_path / 'out'}")
    done = run("evaluate", *arguments, "--embedder=clap", f"--embedder_weights={clap_weights}")
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert document["embedder"] == "clap" and "knows no classes" in done.stdout


def pickled(shapes):
    """Files of full shape and next to no size."""
    return {name: torch.zeros(1).expand(shape) if shape else torch.zeros(()) for name, shape in shapes.items()}


def test_published_pickles(tmp_path):
    torch.save(pickled(vggish.shapes()), tmp_path / "vggish.pth")
    tensors, _ = published.torchvggish(tmp_path / "vggish.pth", pickles.read)
    assert {name: value.shape for name, value in tensors.items()} == vggish.shapes()

    state = pickled(panns.shapes() | {"bn0.num_batches_tracked": (), "logmel_extractor.melW": (257, 64)})
    trainer = {"iteration": 700_000, "sampler": {"indexes": np.arange(5), "queue": [3]}}
    torch.save({"model": state, **trainer}, tmp_path / "Cnn14_16k_mAP=0.438.pth")
    tensors, _ = published.cnn14(tmp_path / "Cnn14_16k_mAP=0.438.pth", pickles.read)
    assert {name: value.shape for name, value in tensors.items()} == panns.shapes()


def test_what_is_not_the_network_is_refused(tmp_path, clap_folder):
    torch.save(pickled(vggish.shapes() | {"features.0.weight": (64, 3, 3, 3)}), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*features\.0\.weight"):
        published.torchvggish(tmp_path / "other.pth", pickles.read)
    with pytest.raises(UserError, match='holds no "model"'):
        published.cnn14(tmp_path / "other.pth", pickles.read)
    with pytest.raises(UserError, match="no such file"):
        published.cnn14(tmp_path / "none.pth", pickles.read)
    fused = json.loads((clap_folder[0] / "config.json").read_text())
    fused["audio_config"]["enable_fusion"] = True
    with pytest.raises(UserError, match="enable_fusion"):
        clap.read_config(fused, {})


def test_code_in_a_pickle_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": {"weight": torch.zeros(1)}, "sampler": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="never unpickled"):
        published.cnn14(tmp_path / "bomb.pth", pickles.read)
    assert not (tmp_path / "ran").exists()


def test_refusals_are_one_line(tmp_path, clap_weights):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(clap_weights.read_bytes()[:1000])
    folders = (f"--reference={tmp_path}", f"--candidate={tmp_path}", f"--output={tmp_path / 'out'}")
    write_audio(tmp_path / "a.wav", np.zeros(16_000, np.float32), 16_000)
    for name, path, message in (
        ("clap", broken, "damaged"),
        ("clap", tmp_path / "none", "launch.convert --from=clap"),
        ("vggish", clap_weights, "features.0.weight"),
    ):
        done = run("evaluate", *folders, f"--embedder={name}", f"--embedder_weights={path}", expect=2)
        assert message in done.stderr and done.stderr.count("\n") == 1
    done = run("convert", "--from=clap", "--output=x", expect=2)
    assert "--input" in done.stderr
