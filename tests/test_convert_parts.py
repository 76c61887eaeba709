"""Parts that are published alone: text encoders with their tokenizers, and vocoders, put into a model."""

import json

import jax
import numpy as np
import pytest

from configs import minimal
from launch import pickles
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.text import special_tokens, tokenize
from subtractive_jax.weights import diffusers_layout, export, model_folder, replace, tokenizer_files
from subtractive_jax.weights.published import Published

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tests import published  # noqa: E402  needs the three above

TOLERANCE = 1e-5  # of the largest absolute value of the reference
INSTRUCTIONS = ("Add reggae beats", "", "add slow jazz drums to the guitar")


def source(folder):
    return Published(folder, pickles.read)


def assert_close(ours, reference):
    reference = reference.detach().numpy()
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * np.abs(reference).max())


def assert_same_params(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, theirs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A converted model with a base denoiser and a denoiser."""
    folder = tmp_path_factory.mktemp("published") / "sd"
    published.stable_diffusion(folder)
    return diffusers_layout.widen(diffusers_layout.read(source(folder), published.config(), "base_denoiser"))


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spiece")
    published.spiece(folder)
    return folder


def put_tokenizer(folder, sentencepiece_folder):
    (folder / "spiece.model").write_bytes((sentencepiece_folder / "spiece.model").read_bytes())


def test_clip_tokenizer_is_transformers(tmp_path):
    published.clip_tokenizer(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_files.read(source(tmp_path), ".", "clip_text_model")
    draw = np.random.default_rng()
    alphabet = [*"adegitbrezj ADEZ'’\t\n.,!0123459éÉßø½ﬁ鼓加🥁\u0301\u200b", "'s", "n't", "beats ", "reggae", " add"]
    texts = [*published.TEXTS, *("".join(draw.choice(alphabet, 30)) for _ in range(500))]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text
    ids = tokenizer_files.special_ids(source(tmp_path), ".", ours, "clip_text_model")
    assert list(ids.values()) == [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]


def test_clip_padding_token_of_stable_diffusion_2(tmp_path):
    published.clip_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    published.edit(tmp_path / "tokenizer_config.json", pad_token={"content": "!", "lstrip": False})
    ours = tokenizer_files.read(source(tmp_path), ".", "clip_text_model")
    assert tokenizer_files.special_ids(source(tmp_path), ".", ours, "clip_text_model")["pad_token_id"] == 0


def test_t5_tokenizer_is_sentencepiece(sentencepiece_folder):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "spiece.model"))
    ours = tokenizer_files.read(source(sentencepiece_folder), ".", "t5")
    draw = np.random.default_rng()
    alphabet = [*"adegitbrez ADEZ'’\t.,!012éßø½ﬁ鼓", "drums ", "reggae", " add", "  "]
    for text in [*published.TEXTS, *("".join(draw.choice(alphabet, 30)) for _ in range(500))]:
        own, expected = ours.encode(text, add_special_tokens=False).ids, theirs.encode(text)
        if own != expected:  # two ways to cut the text are as likely, up to float32: "dd" and "d", "d" and "dd"
            scores = [sum(map(theirs.GetScore, ids)) for ids in (own, expected)]
            assert theirs.decode(own) == theirs.decode(expected) and abs(scores[0] - scores[1]) < 1e-4, text


def test_saved_truncation_and_padding_are_dropped(tmp_path, model):
    copy = type(model.tokenizer).from_str(model.tokenizer.to_str())
    copy.enable_truncation(3)
    copy.enable_padding(length=9)
    copy.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer_files.read(source(tmp_path), ".", "clip_text_model")
    text = "add reggae beats to jazz"
    expected = model.tokenizer.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False).ids == expected


T5_KINDS = {
    "v1.0": dict(feed_forward_proj="relu"),
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


@pytest.mark.parametrize("kind", T5_KINDS)
@pytest.mark.parametrize("cls", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_t5(tmp_path, model, sentencepiece_folder, kind, cls):
    theirs = published.randomise(getattr(transformers, cls)(published.t5_config(**T5_KINDS[kind])))
    theirs.save_pretrained(tmp_path / "t5")
    put_tokenizer(tmp_path / "t5", sentencepiece_folder)
    files = replace.text_encoder(model, source(tmp_path / "t5"), "t5")

    ids, mask = tokenize(files.tokenizer, INSTRUCTIONS, 16)
    states = theirs.get_encoder()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    apply = jax.jit(parts.network("text_encoder", files.config).apply)
    assert_close(apply(files.params["text_encoder"], ids, mask)[mask], states[torch.tensor(mask)])

    config = files.config
    assert (config.text_padding, config.null_text, config.max_text_tokens) == ("masked", "empty", 16)
    assert config.denoiser.condition_dim == 24 and model.config.denoiser.condition_dim == 0
    adapters = [files.params[part]["condition_adapter"] for part in ("base_denoiser", "denoiser")]
    assert_same_params(*adapters)
    assert adapters[0]["proj"]["kernel"].shape == (24, published.WIDTH)
    assert np.std(adapters[0]["proj"]["kernel"]) == pytest.approx(24**-0.5, rel=0.15)
    np.testing.assert_array_equal(adapters[0]["norm"]["scale"], 1.0)
    for part in ("base_denoiser", "denoiser"):
        shapes = jax.tree.map(np.shape, files.params[part])
        assert shapes == jax.tree.map(np.shape, parts.network(part, config).shapes())
        rest = {key: value for key, value in files.params[part].items() if key != "condition_adapter"}
        assert_same_params(rest, model.params[part])


def test_t5_model_round_trip(tmp_path, model, sentencepiece_folder):
    theirs = published.randomise(transformers.T5EncoderModel(published.t5_config(**T5_KINDS["v1.1"])))
    theirs.save_pretrained(tmp_path / "t5")
    put_tokenizer(tmp_path / "t5", sentencepiece_folder)
    files = replace.text_encoder(model, source(tmp_path / "t5"), "t5")
    out = tmp_path / "out"
    export.save(out, files)

    loaded = transformers.T5EncoderModel.from_pretrained(out / "text_encoder")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
    ids, mask = tokenize(files.tokenizer, INSTRUCTIONS, 16)
    batch = tokenizer(list(INSTRUCTIONS), padding="max_length", max_length=16)
    np.testing.assert_array_equal(batch["input_ids"], ids)
    np.testing.assert_array_equal(batch["attention_mask"], mask)

    own = model_folder.read_config(out / diffusers_layout.OWN_CONFIG)
    for config in (own, published.config()):  # the folder's text rules hold whatever config it is converted with
        back = diffusers_layout.read(source(out), config, "denoiser")
        assert back.params.keys() == files.params.keys()
        assert_same_params(back.params, files.params)
        assert (back.config.text_padding, back.config.null_text) == ("masked", "empty")


@pytest.mark.parametrize("cls", ["CLIPTextModel", "CLIPModel", "with text_model prefix"])
def test_clip_text(tmp_path, model, cls):
    size = published.clip_tokenizer(tmp_path / "clip")
    text_model = published.clip(size, hidden_act="gelu", hidden_size=40)
    if cls == "CLIPModel":
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
        config = transformers.CLIPConfig(text_config=text_model.config.to_dict(), vision_config=vision)
        whole = published.randomise(transformers.CLIPModel(config))
        text_model = whole.text_model
        whole.save_pretrained(tmp_path / "clip")
    else:
        text_model.save_pretrained(tmp_path / "clip")
    if cls == "with text_model prefix":
        positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        published.edit_tensors(
            tmp_path / "clip" / "model.safetensors",
            lambda tensors: positions | {f"text_model.{name}": tensor for name, tensor in tensors.items()},
        )
    files = replace.text_encoder(model, source(tmp_path / "clip"), "clip_text_model")

    ids, mask = tokenize(files.tokenizer, INSTRUCTIONS[:2], 16, special_tokens(files.config.text_encoder))
    apply = jax.jit(parts.network("text_encoder", files.config).apply)
    states = text_model(input_ids=torch.tensor(ids)).last_hidden_state
    assert_close(apply(files.params["text_encoder"], ids, mask), states)
    assert (files.config.text_padding, files.config.denoiser.condition_dim) == ("tokens", 40)
    assert files.config.text_encoder.hidden_act == "gelu"


def test_a_text_encoder_for_a_model_without_denoisers_needs_no_adapter(tmp_path, sentencepiece_folder):
    config = minimal.get_config()
    params = {"autoencoder": jax.jit(parts.network("autoencoder", config).init)(jax.random.key(0))}
    transformers.T5EncoderModel(published.t5_config()).save_pretrained(tmp_path)
    put_tokenizer(tmp_path, sentencepiece_folder)
    files = replace.text_encoder(model_folder.ModelFiles(config, params), source(tmp_path), "t5")
    assert files.params.keys() == {"autoencoder", "text_encoder"} and files.config.denoiser.condition_dim == 0


def _auffusion(folder, theirs):
    published.write_hifigan(folder, theirs)


def _generator_checkpoint(folder, theirs):
    published.write_hifigan(folder, theirs)
    (folder / "vocoder.pt").rename(folder / "g_02500000")


def _new_weight_norm(folder, theirs):
    published.write_hifigan(folder, theirs)
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    state = torch.load(folder / "vocoder.pt", weights_only=True)["generator"]
    for old, new in names.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    torch.save(state, folder / "vocoder.pt")


def _released_checkpoint(folder, theirs):
    published.write_hifigan(folder, theirs)
    (folder / "vocoder.pt").rename(folder / "generator_v1")


def _speecht5(folder, theirs):
    theirs.save_pretrained(folder)


def _speecht5_of_transformers_4(folder, theirs):
    theirs.save_pretrained(folder)
    published.edit(folder / "config.json", model_type="hifigan")


_STORES = [
    _auffusion,
    _generator_checkpoint,
    _released_checkpoint,
    _new_weight_norm,
    _speecht5,
    _speecht5_of_transformers_4,
]


@pytest.mark.parametrize("store", _STORES)
def test_hifigan(tmp_path, model, store):
    theirs = published.hifigan()
    store(tmp_path / "hifigan", theirs)
    at_16_khz = model_folder.ModelFiles(published.config("auffusion"), {})
    files = replace.vocoder(at_16_khz, source(tmp_path / "hifigan"))
    log_mel = np.random.default_rng().standard_normal((2, 12, 16), np.float32)
    apply = jax.jit(parts.network("vocoder", files.config).apply)
    assert_close(apply(files.params["vocoder"], log_mel), theirs(torch.tensor(log_mel)))

    with pytest.raises(UserError) as error:  # Riffusion's representation
        replace.vocoder(model, source(tmp_path / "hifigan"))
    assert "sample_rate 16000, but the model's representation has 44100" in str(error.value)


def test_hifigan_of_another_representation(tmp_path):
    published.write_hifigan(tmp_path, published.hifigan())
    config = published.config("auffusion")
    config.representation.update(dict(n_mels=32, hop_length=128, fmin=20.0))
    with pytest.raises(UserError) as error:
        replace.vocoder(model_folder.ModelFiles(config, {}), source(tmp_path))
    for mismatch in ("n_mels 16, but", "hop_length 160, but", "fmin 0, but"):
        assert mismatch in str(error.value)


def test_speecht5_with_its_own_normalisation(tmp_path):
    theirs = published.hifigan(normalize_before=True)
    theirs.mean.fill_(0.5)
    theirs.save_pretrained(tmp_path)
    files = model_folder.ModelFiles(published.config("auffusion"), {})
    with pytest.raises(UserError, match="normalize_before with a mean and scale of its own"):
        replace.vocoder(files, source(tmp_path))


_RESBLOCK_2 = dict(published.HIFIGAN, resblock="2", resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 2),))
_OURS_ALONE = {  # vocoders that transformers does not know
    "hifigan": {key: _RESBLOCK_2[key] for key in minimal.get_config().vocoder if key in _RESBLOCK_2},
    "vocos": dict(num_mels=16, dim=8, intermediate_dim=12, num_layers=2, n_fft=640, hop_length=160),
}


@pytest.mark.parametrize("kind", _OURS_ALONE)
def test_exported_vocoders_come_back(tmp_path, model, kind):
    config = model.config.copy_and_resolve_references()
    config.representation = published.config("auffusion").representation
    config.vocoder = {"model_type": kind, **_OURS_ALONE[kind]}
    params = jax.jit(parts.network("vocoder", config).init)(jax.random.key(0))
    export.save(tmp_path / "out", model_folder.ModelFiles(config, {**model.params, "vocoder": params}, model.tokenizer))
    written = json.loads((tmp_path / "out" / "vocoder" / "config.json").read_text())
    assert written["hop_size" if kind == "hifigan" else "hop_length"] == 160
    own = model_folder.read_config(tmp_path / "out" / diffusers_layout.OWN_CONFIG)
    back = diffusers_layout.read(source(tmp_path / "out"), own, "denoiser")
    assert_same_params(back.params["vocoder"], params)
    assert back.config.vocoder.to_dict() == own.vocoder.to_dict()
    told = own.copy_and_resolve_references()
    told.vocoder = {"model_type": "vocos" if kind == "hifigan" else "hifigan"}
    assert diffusers_layout.read(source(tmp_path / "out"), told, "denoiser").config.vocoder == back.config.vocoder
    if kind == "vocos":
        published.edit(tmp_path / "out" / "vocoder" / "config.json", n_fft="640", num_mels=17)
        with pytest.raises(UserError, match="n_fft is '640'.*num_mels 17, but the model's representation has 16"):
            diffusers_layout.read(source(tmp_path / "out"), own, "denoiser")
