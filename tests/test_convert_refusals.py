"""What is wrong with a published folder is told all at once, and nothing is written."""

import json
import shutil
import sys

import numpy as np
import pytest

from launch import pickles
from subtractive_jax.errors import UserError
from subtractive_jax.weights import diffusers_layout, model_folder, replace
from subtractive_jax.weights.published import Published

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tests import published  # noqa: E402  needs the three above

WEIGHTS = "diffusion_pytorch_model.safetensors"


def read(folder, part="base_denoiser", name="riffusion"):
    return diffusers_layout.read(Published(folder, pickles.read), published.config(name), part)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    published.stable_diffusion(folder / "sd")
    published.auffusion_with_adapter(folder / "auffusion")
    return folder


@pytest.fixture
def folder(tmp_path, originals):
    return shutil.copytree(originals / "sd", tmp_path / "sd")


@pytest.fixture
def auffusion(tmp_path, originals):
    return shutil.copytree(originals / "auffusion", tmp_path / "auffusion")


def truncate(file, by=100):
    file.write_bytes(file.read_bytes()[:-by])


def test_every_mismatch_of_every_part_in_one_message(folder):
    shutil.rmtree(folder / "tokenizer")
    published.edit(folder / "unet" / "config.json", act_fn="gelu", class_embed_type="timestep", new_trick=7)
    published.edit(folder / "scheduler" / "scheduler_config.json", skip_prk_steps=False, beta_schedule="cosine")
    published.edit(folder / "vae" / "config.json", use_quant_conv=False, down_block_types=["Odd", "DownEncoderBlock2D"])

    def change(tensors):
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3]
        tensors["conv_out.bias"] = tensors["conv_out.bias"].to(torch.int64)
        del tensors["time_embedding.linear_1.bias"]
        return tensors | {"add_embedding.weight": torch.zeros(2)}

    published.edit_tensors(folder / "unet" / WEIGHTS, change)
    truncate(folder / "vae" / WEIGHTS)
    (folder / "text_encoder" / "model.safetensors").unlink()

    with pytest.raises(UserError) as error:
        read(folder)
    message = str(error.value)
    for problem in (
        "tokenizer: no tokenizer (looked for tokenizer.json; vocab.json and merges.txt)",
        "text_encoder: no weights (looked for model, pytorch_model",
        "another architecture: act_fn is 'gelu'",
        "class_embed_type is 'timestep'",
        "new_trick is 7",
        "skip_prk_steps is False",
        'another noise schedule: beta_schedule is "cosine"',
        "use_quant_conv is False",
        "down_block_types is ['Odd', 'DownEncoderBlock2D']",
        f"vae/{WEIGHTS}: damaged",
        "conv_in.weight is (16, 3, 3, 3), the config says (16, 4, 3, 3)",
        "conv_out.bias holds int64",
        "missing time_embedding.linear_1.bias",
        "unexpected add_embedding.weight",
    ):
        assert problem in message
    assert "\n" not in message


def _latents_of_eight_channels(folder):
    published.edit(folder / "vae" / "config.json", latent_channels=8)


CONFIGS = {
    "another kind": (
        lambda d: published.edit(d / "unet" / "config.json", in_channels=8),
        "reads 8 channels, not 4; convert it with --from=instruct-pix2pix",
    ),
    "inpainting": (lambda d: published.edit(d / "unet" / "config.json", in_channels=9), "reads 9 channels, not 4"),
    "latents": (_latents_of_eight_channels, "writes 4 channels, but the autoencoder's latents have 8"),
    "SDXL": (
        lambda d: published.edit(d / "unet" / "config.json", addition_embed_type="text_time"),
        "addition_embed_type is 'text_time'",
    ),
    "blocks": (
        lambda d: published.edit(d / "unet" / "config.json", down_block_types=["DownBlock2D", "AttnDownBlock2D"]),
        'unknown denoiser block type "AttnDownBlock2D"',
    ),
    "no list": (
        lambda d: published.edit(d / "unet" / "config.json", down_block_types=5),
        "another architecture: down_block_types is 5",
    ),
    "layers": (lambda d: published.edit(d / "unet" / "config.json", layers_per_block=[1, 2]), "layers_per_block is [1"),
    "type": (lambda d: published.edit(d / "unet" / "config.json", norm_num_groups="8"), "norm_num_groups is '8'"),
    "negative": (lambda d: published.edit(d / "vae" / "config.json", norm_num_groups=-4), "norm_num_groups is -4"),
    "scale": (lambda d: published.edit(d / "vae" / "config.json", scaling_factor=0), "scaling_factor is 0"),
    "no number": (
        lambda d: published.edit(d / "vae" / "config.json", scaling_factor=float("nan")),
        "scaling_factor is nan",
    ),
    "means": (
        lambda d: published.edit(d / "vae" / "config.json", latents_mean=[0.5]),
        "latents_mean and latents_std are not of 4 channels",
    ),
    "width": (
        lambda d: published.edit(d / "unet" / "config.json", cross_attention_dim=48),
        "cross_attention_dim 48, but the text encoder's states have 32",
    ),
    "encoder": (
        lambda d: published.edit(d / "text_encoder" / "config.json", model_type="bert"),
        "model_type is 'bert' (expected clip_text_model or t5)",
    ),
    "activation": (
        lambda d: published.edit(d / "text_encoder" / "config.json", hidden_act="relu"),
        'unknown text_encoder.hidden_act "relu"',
    ),
    "positions": (
        lambda d: published.edit(d / "text_encoder" / "config.json", max_position_embeddings=12),
        "reads at most 12 tokens, max_text_tokens is 16",
    ),
    "vocabulary": (
        lambda d: published.edit(d / "text_encoder" / "config.json", vocab_size=500),
        "token ids up to 525, but the encoder has 500",
    ),
    "special token": (
        lambda d: published.edit(d / "tokenizer" / "special_tokens_map.json", pad_token="<pad>"),
        "the pad_token '<pad>' is not in the tokenizer's vocabulary",
    ),
    "merges": (lambda d: (d / "tokenizer" / "merges.txt").unlink(), "vocab.json, merges.txt: damaged"),
    "no scheduler": (lambda d: shutil.rmtree(d / "scheduler"), "scheduler/scheduler_config.json: missing"),
    "no unet": (lambda d: shutil.rmtree(d / "unet"), "unet/config.json: missing"),
    "not JSON": (lambda d: (d / "vae" / "config.json").write_text("{"), "vae/config.json: not valid JSON"),
    "not an object": (lambda d: (d / "vae" / "config.json").write_text("[]"), "vae/config.json: not a JSON object"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(folder, case):
    damage, message = CONFIGS[case]
    damage(folder)
    with pytest.raises(UserError) as error:
        read(folder)
    assert message in str(error.value) and str(error.value).startswith(f"{folder} cannot be converted: ")


def test_four_channels_are_not_instruct_pix2pix(folder):
    with pytest.raises(UserError, match="reads 4 channels, not 8; convert it with --from=stable-diffusion"):
        read(folder, "denoiser")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "none")


def _sharded(folder, weight_map):
    (folder / "unet" / WEIGHTS).rename(folder / "secret.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "gone.safetensors", ".."])
def test_shards_stay_in_their_folder(folder, shard):
    _sharded(folder, {"conv_in.weight": shard})
    with pytest.raises(UserError) as error:
        read(folder)
    assert f'{WEIGHTS}.index.json: no file "{shard}" beside it' in str(error.value)


@pytest.mark.parametrize("weight_map", [None, {"conv_in.weight": 3}])
def test_shards_without_names(folder, weight_map):
    _sharded(folder, weight_map)
    with pytest.raises(UserError, match="no weight_map"):
        read(folder)


class _Other:
    """Stands for any object that a pickle can hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": _Other()}, "never unpickled"),
        ([torch.zeros(2)], "of type list"),
        ({"generator": {}, "steps": 4}, '"steps" is of type int'),
        (torch.zeros(2), "other objects than plain tensors"),
        ({"generator": {"conv_pre.bias": torch.zeros(2).to_sparse()}}, '"generator.conv_pre.bias" is of type Tensor'),
    ],
)
def test_pickles_with_other_objects(auffusion, content, message):
    torch.save(content, auffusion / "vocoder" / "vocoder.pt")
    with pytest.raises(UserError) as error:
        read(auffusion, name="auffusion")
    assert "vocoder/vocoder.pt: " in str(error.value) and message in str(error.value)


def test_truncated_pickle(auffusion):
    truncate(auffusion / "unet" / "diffusion_pytorch_model.bin", 5_000)
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.bin: damaged, or holds other objects"):
        read(auffusion, name="auffusion")


def test_pickles_without_torch(auffusion, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError) as error:
        read(auffusion, name="auffusion")
    message = str(error.value)
    for file in ("unet/diffusion_pytorch_model.bin", "text_encoder_0/pytorch_model.bin", "vocoder/vocoder.pt"):
        assert f"{file}: a pickle, which needs the extra `convert`" in message


AUFFUSION = {
    "two encoders": (
        lambda d: (d / "condition_config.json").write_text("[{}, {}]"),
        "not a list with one text encoder",
    ),
    "outside": (
        lambda d: (d / "condition_config.json").write_text('[{"text_encoder_name": "../x"}]'),
        'text_encoder_name "../x" is not the name of a folder',
    ),
    "above": (
        lambda d: (d / "condition_config.json").write_text('[{"condition_adapter_name": ".."}]'),
        'condition_adapter_name ".." is not the name of a folder',
    ),
    "no adapter": (lambda d: shutil.rmtree(d / "condition_adapter_0"), "condition_adapter_0: no weights"),
    "no vocoder": (lambda d: shutil.rmtree(d / "vocoder"), "vocoder/config.json: missing"),
    "another rate": (
        lambda d: published.edit(d / "vocoder" / "config.json", sampling_rate=22_050, num_mels=80),
        "sample_rate 22050, but the model's representation has 16000; vocoder/config.json: n_mels 80, but",
    ),
    "rates": (
        lambda d: published.edit(d / "vocoder" / "config.json", upsample_rates=[5, 4, 8]),
        "upsample_rates and upsample_kernel_sizes differ in length",
    ),
}


@pytest.mark.parametrize("case", AUFFUSION)
def test_auffusion_configs(auffusion, case):
    damage, message = AUFFUSION[case]
    damage(auffusion)
    with pytest.raises(UserError) as error:
        read(auffusion, name="auffusion")
    assert message in str(error.value)


def test_weight_norm_of_another_shape(auffusion):
    file = auffusion / "vocoder" / "vocoder.pt"
    state = torch.load(file, weights_only=True)
    state["generator"]["conv_pre.weight_g"] = torch.ones(3, 1, 1)
    torch.save(state, file)
    with pytest.raises(
        UserError, match=r"vocoder: weights do not fit the config: missing conv_pre\.weight; unexpected"
    ):
        read(auffusion, name="auffusion")


def test_attention_convolutions_of_another_size(folder):
    def change(tensors):
        name = "encoder.mid_block.attentions.0.to_q.weight"
        return tensors | {name: tensors[name][:, :, None, None].repeat(1, 1, 3, 3)}

    published.edit_tensors(folder / "vae" / WEIGHTS, change)
    with pytest.raises(UserError, match=r"to_q\.weight is \(16, 16, 3, 3\), the config says \(16, 16\)"):
        read(folder)


def test_adapter_of_another_width(auffusion):
    file = auffusion / "condition_adapter_0" / "condition_adapter.pt"
    torch.save(published.Adapter(24).state_dict(), file)
    with pytest.raises(UserError, match=r"condition_adapter\.proj\.weight is \(32, 24\), the config says \(32, 32\)"):
        read(auffusion, name="auffusion")


def test_t5_refusals(tmp_path, originals):
    model = read(originals / "sd")
    config = published.t5_config(feed_forward_proj="gated-silu")
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        replace.text_encoder(model, Published(tmp_path, pickles.read), "t5")
    for problem in ("feed_forward_proj is 'gated-silu'", "no tokenizer (looked for tokenizer.json; spiece.model)"):
        assert problem in str(error.value)
    with pytest.raises(UserError, match=r"model_type is 't5' \(expected clip_text_model\)"):
        replace.text_encoder(model, Published(tmp_path, pickles.read), "clip_text_model")


@pytest.mark.parametrize("cut", [10, 1_000, 5_000])
def test_damaged_sentencepiece_model(tmp_path, originals, cut):
    pytest.importorskip("sentencepiece")
    model = model_folder.ModelFiles(published.config(), {})
    transformers.T5EncoderModel(published.t5_config()).save_pretrained(tmp_path)
    whole = published.spiece(tmp_path)
    (tmp_path / "spiece.model").write_bytes(whole[:-cut])
    with pytest.raises(UserError, match=r"spiece\.model: damaged"):
        replace.text_encoder(model, Published(tmp_path, pickles.read), "t5")


def test_nan_weights_are_not_written(tmp_path, originals):
    files = read(originals / "sd")
    files.params["autoencoder"]["quant_conv"]["bias"] = np.full(8, np.nan, np.float32)
    with pytest.raises(UserError, match=r"quant_conv\.bias has values that float32 cannot hold"):
        model_folder.save(tmp_path / "model", files, "float32", card="")
    assert not list(tmp_path.iterdir())
