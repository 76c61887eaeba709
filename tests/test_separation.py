import json
import sys
from fractions import Fraction

import numpy as np
import pytest

from data_pipeline import separation
from data_pipeline.song import Tools
from subtractive_jax.errors import UserError

torch = pytest.importorskip("torch")
pytest.importorskip("demucs")

RATE = 44_100


def noise(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal((2, int(seconds * RATE)))).astype(np.float32)


def blocks(samples, size=1 << 17):
    return lambda: (samples[:, start : start + size] for start in range(0, samples.shape[1], size))


def separated(model, samples, size=1 << 17):
    return np.concatenate(list(model.separate(blocks(samples, size))), axis=1)


def tiny(sources=("drums", "bass", "other", "vocals"), segment=Fraction(1, 2), seed=0):
    from demucs.htdemucs import HTDemucs

    torch.manual_seed(seed)
    return HTDemucs(
        list(sources), channels=8, bottom_channels=16, t_layers=1, t_heads=2, depth=4, segment=segment, samplerate=RATE
    )


def write_th(path, model):
    args, kwargs = model._init_args_kwargs
    package = {"klass": type(model), "args": args, "kwargs": kwargs, "state": model.state_dict(), "training_args": {}}
    torch.save(package, path)


def write_safetensors(path, model, klass="demucs.htdemucs.HTDemucs"):
    from safetensors.torch import save_file

    args, kwargs = model._init_args_kwargs
    kwargs = dict(kwargs, segment={"_type": "fraction", "numerator": 1, "denominator": 2})
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()},
        path,
        {"klass": klass, "args": json.dumps(args), "kwargs": json.dumps(kwargs)},
    )


@pytest.fixture
def load(tmp_path):
    def _load(model=None, name="abc"):
        if model is not None:
            write_th(tmp_path / f"{name}.th", model)
        return separation.separator(Tools(separator=name, separator_repo=str(tmp_path)))

    return _load


@pytest.mark.parametrize("seconds", [0.001, 0.3, 0.5, 2.2, 3.0])
def test_stream_is_what_demucs_makes_of_the_whole_song(load, seconds):
    from demucs.apply import apply_model

    model, samples = load(tiny()), noise(seconds) + np.float32(0.02)
    stems = separated(model, samples, size=10_007)
    mono = samples.mean(axis=0)
    level = mono.mean(), mono.std() + 1e-8
    whole = apply_model(model.model, torch.from_numpy((samples - level[0]) / level[1])[None], shifts=0)[0].numpy()
    expected = whole.mean(axis=1) * level[1]
    assert stems.dtype == np.float32
    assert model.stems == ("drums", "bass", "vocals", "other")
    np.testing.assert_allclose(stems[:3], expected[[0, 1, 3]], atol=2e-5)
    np.testing.assert_allclose(stems.sum(axis=0), mono, atol=1e-6)


def test_the_same_bytes_every_time_whatever_the_blocks(load):
    model, samples = load(tiny()), noise(2.0)
    first = separated(model, samples, 10**9)
    np.testing.assert_array_equal(separated(model, samples, 10**9), first)
    np.testing.assert_allclose(separated(model, samples, 5_000), first, atol=1e-6)  # sums for the level differ in order


def test_the_unittest_model_is_the_same_in_every_process():
    samples = noise(1.0)
    first = separated(separation.separator(Tools(separator="demucs_unittest")), samples)
    torch.manual_seed(5)
    again = separation.separator.__wrapped__(Tools(separator="demucs_unittest"))
    np.testing.assert_array_equal(separated(again, samples), first)
    assert np.abs(first[:3]).max() > 0.0


def test_silence(load):
    stems = separated(load(tiny()), np.zeros((2, RATE), np.float32))
    np.testing.assert_allclose(stems.sum(axis=0), 0.0, atol=1e-7)


def test_both_layouts_of_a_bag_give_the_same(tmp_path):
    models = {"one": tiny(), "two": tiny(seed=1)}
    stems = []
    for suffix, write in ((".th", write_th), (".safetensors", write_safetensors)):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "pair.yaml").write_text("models: [one, two]\nweights: [[1, 0, 1, 1], [1, 1, 0, 1]]\n")
        for name, model in models.items():
            write(folder / (f"{name}-12345678.th" if suffix == ".th" else f"{name}.safetensors"), model)
        stems.append(separated(separation.separator(Tools(separator="pair", separator_repo=str(folder))), noise(1.0)))
    np.testing.assert_array_equal(*stems)


def test_six_stems(load):
    model = load(tiny(("drums", "bass", "other", "vocals", "guitar", "piano")))
    assert model.stems == ("drums", "bass", "vocals", "guitar", "keys", "other")
    assert separated(model, noise(0.7)).shape == (6, int(0.7 * RATE))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (dict(separator="htdemuc"), 'unknown Demucs model "htdemuc"; did you mean "htdemucs"'),
        (dict(separator="x", separator_repo="/no/such"), "--separator_repo=/no/such: no such folder"),
        (dict(separator="demucs_unittest", separator_device="tpu"), 'unknown separator device "tpu"'),
    ],
)
def test_refused(tools, message):
    with pytest.raises(UserError, match=message):
        separation.separator(Tools(**tools))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(UserError, match="--separator_device=cuda: PyTorch sees no GPU"):
        separation.separator(Tools(separator="demucs_unittest", separator_device="cuda"))


def test_a_published_model_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--separator=htdemucs_ft: not downloaded .*--separator_repo"):
        separation.separator(Tools(separator="htdemucs_ft"))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_model_file_is_run(tmp_path, load):
    trap = tmp_path / "ran"
    torch.save({"klass": Trap(trap), "args": (), "kwargs": {}, "state": {}}, tmp_path / "evil.th")
    write_safetensors(tmp_path / "class.safetensors", tiny(), klass="subprocess.run")
    (tmp_path / "noise.th").write_bytes(b"not a model")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "absent.yaml").write_text("models: [nowhere]")
    for name in ("evil", "noise", "list", "absent"):
        with pytest.raises(UserError, match=f"{name} is not readable as a Demucs model"):
            load(name=name)
    with pytest.raises(UserError, match="class.safetensors: of class subprocess.run"):
        load(name="class")
    with pytest.raises(UserError, match=r'unknown Demucs model in .* "evli"; did you mean "evil"'):
        load(name="evli")
    assert not trap.exists()


def test_a_source_without_a_stem_name(load):
    with pytest.raises(UserError, match='gives "crowd", which is none of'):
        load(tiny(("crowd", "other")))


def test_without_demucs(monkeypatch):
    monkeypatch.setitem(sys.modules, "demucs.api", None)
    with pytest.raises(UserError, match=r"pip install 'subtractive-jax\[separate\]'"):
        separation.separator(Tools(separator="demucs_unittest", soundfonts=("other key of the cache",)))
