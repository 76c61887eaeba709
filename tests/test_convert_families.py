"""Folders of the Stable Diffusion family to a model and back: the same outputs, then the same bits."""

import json
import shutil

import jax
import numpy as np
import pytest

import subtractive_jax
from launch import pickles
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.text import special_tokens, tokenize
from subtractive_jax.weights import diffusers_layout, export, model_folder
from subtractive_jax.weights.published import Published

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from tests import published  # noqa: E402  needs the three above

TOLERANCE = 1e-5  # of the largest absolute value of the reference


def read(folder, config=None, part="base_denoiser"):
    return diffusers_layout.read(Published(folder, pickles.read), config or published.config(), part)


def compute(files, part, *inputs, method="__call__", **more):
    network = parts.network(part, files.config)
    return np.asarray(jax.jit(lambda p, *x: network.apply(p, *x, method=method, **more))(files.params[part], *inputs))


def assert_close(ours, reference):
    reference = reference.detach().numpy()
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * np.abs(reference).max())


def assert_same_params(ours, theirs):
    assert ours.keys() == theirs.keys()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), ours, theirs)


def random(*shape):
    return np.random.default_rng().standard_normal(shape, np.float32)


def channels_first(x):
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def assert_same_unet(files, part, model, adapter=None, stem=None):
    """`part` computes what diffusers' UNet does, given what comes between the text states and it."""
    x = random(2, 8, 16, model.config.in_channels)
    text, timestep = random(2, 7, files.config.denoiser.condition_dim or published.WIDTH), np.array([3, 901])
    more = {} if stem is None else {"stem": np.array([stem, stem])}
    with torch.no_grad():
        states = torch.tensor(text) if adapter is None else adapter(torch.tensor(text))
        if stem is not None:
            row = np.asarray(files.params[part]["stem_embedding"]["embedding"])[stem]
            states = torch.cat([states, torch.tensor(row).expand(2, 1, -1)], 1)
        reference = model(channels_first(x), torch.tensor(timestep), states).sample.permute(0, 2, 3, 1)
    assert_close(compute(files, part, x, timestep, text, np.ones((2, 7), bool), **more), reference)


def assert_same_vae(files, model):
    image, latent = random(2, 16, 32, 3), random(2, 8, 16, 4)
    with torch.no_grad():
        moments = model.encode(channels_first(image)).latent_dist.parameters.permute(0, 2, 3, 1)
        decoded = model.decode(channels_first(latent)).sample.permute(0, 2, 3, 1)
    assert_close(compute(files, "autoencoder", image, method="encode"), moments)
    assert_close(compute(files, "autoencoder", latent, method="decode"), decoded)


def assert_same_text(files, model, tokenizer):
    """States of texts: padded with tokens up to `max_text_tokens`, as StableDiffusionPipeline does."""
    texts = list(published.TEXTS[:2])
    special = special_tokens(files.config.text_encoder)
    ids, mask = tokenize(files.tokenizer, texts, files.config.max_text_tokens, special)
    theirs = tokenizer(texts, padding="max_length", max_length=files.config.max_text_tokens, return_tensors="pt")
    np.testing.assert_array_equal(ids, theirs.input_ids)
    with torch.no_grad():
        states = model(theirs.input_ids).last_hidden_state
    assert_close(compute(files, "text_encoder", ids, mask), states)


def assert_same_vocoder(files, model):
    log_mel = random(2, 12, 16)
    with torch.no_grad():
        assert_close(compute(files, "vocoder", log_mel), model(torch.tensor(log_mel)))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "sd"
    return folder, published.stable_diffusion(folder)


@pytest.fixture(scope="module")
def auffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "auffusion-full"
    return folder, published.auffusion_with_adapter(folder)


def test_stable_diffusion(stable_diffusion):
    folder, models = stable_diffusion
    files = read(folder)
    assert_same_unet(files, "base_denoiser", models["unet"])
    assert_same_vae(files, models["vae"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert_same_text(files, models["text_encoder"], tokenizer)
    config = files.config
    assert files.params.keys() == {"base_denoiser", "autoencoder", "text_encoder"}
    assert (config.text_padding, config.null_text, config.target, config.stage) == ("tokens", "empty", "mix", "base")
    assert (config.latent_scale, config.latent_shift, config.context_scale) == ((0.18215,) * 4, (0.0,) * 4, (1.0,) * 4)
    assert config.text_encoder.eos_token_id == tokenizer.eos_token_id != 2
    assert config.sampling.solver == "pndm" and config.schedule.steps_offset == 1


def test_auffusion_with_adapter(auffusion):
    folder, models = auffusion
    files = read(folder, published.config("auffusion"))
    assert_same_unet(files, "base_denoiser", models["unet"], models["adapter"])
    assert_same_vae(files, models["vae"])
    assert_same_vocoder(files, models["vocoder"])
    assert_same_text(
        files, models["text_encoder"], transformers.CLIPTokenizer.from_pretrained(folder / "text_encoder_0")
    )
    assert (files.config.text_padding, files.config.null_text) == ("zeros", "zeros")
    assert files.config.denoiser.condition_dim == published.WIDTH


def test_auffusion_without_adapter(tmp_path):
    models = published.stable_diffusion(tmp_path)
    models["vocoder"] = published.hifigan()
    published.write_hifigan(tmp_path / "vocoder", models["vocoder"])
    files = read(tmp_path, published.config("auffusion"))
    assert_same_unet(files, "base_denoiser", models["unet"])
    assert_same_vocoder(files, models["vocoder"])
    assert (files.config.text_padding, files.config.null_text) == ("tokens", "empty")
    assert files.config.denoiser.condition_dim == 0


def test_old_scheduler_files_mean_what_the_pipeline_makes_of_them(tmp_path, stable_diffusion):
    export.save(tmp_path / "sd", read(stable_diffusion[0]))
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    file.unlink()
    published.scheduler(file.parent, "DDIMScheduler")
    published.edit(file, steps_offset=None, clip_sample=None)
    published.edit(tmp_path / "sd" / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    assert (pipeline.scheduler.config.steps_offset, pipeline.scheduler.config.clip_sample) == (1, False)
    config = read(tmp_path / "sd").config
    assert (config.sampling.solver, config.schedule.steps_offset) == ("ddim", 1)


def test_unet_saved_by_an_average(tmp_path, stable_diffusion):
    from diffusers.training_utils import EMAModel  # published UNets were saved by it

    folder = shutil.copytree(stable_diffusion[0], tmp_path / "sd")
    shutil.rmtree(folder / "unet")
    unet = published.unet()
    EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config).save_pretrained(folder / "unet")
    assert "optimization_step" in json.loads((folder / "unet" / "config.json").read_text())
    assert_same_unet(read(folder), "base_denoiser", unet)


def test_instruct_pix2pix(tmp_path):
    models = published.stable_diffusion(tmp_path / "ip2p", in_channels=8)
    files = read(tmp_path / "ip2p", part="denoiser")
    assert_same_unet(files, "denoiser", models["unet"])
    assert (files.config.stem_tokens, files.config.target, files.config.stage) == (False, "mix", "subtractive")


def test_widened_denoiser_ignores_the_context(auffusion):
    folder, _ = auffusion
    files = diffusers_layout.widen(read(folder, published.config("auffusion")))
    x, text, mask = random(2, 8, 16, 4), random(2, 7, published.WIDTH), np.ones((2, 7), bool)
    before = compute(files, "base_denoiser", x, np.array([3, 901]), text, mask)
    for context in (random(2, 8, 16, 4), 100 * random(2, 8, 16, 4)):
        wide = np.concatenate([x, context], -1)
        np.testing.assert_allclose(compute(files, "denoiser", wide, np.array([3, 901]), text, mask), before, atol=1e-6)
    base, wide = files.params["base_denoiser"]["conv_in"], files.params["denoiser"]["conv_in"]
    np.testing.assert_array_equal(wide["bias"], base["bias"])
    assert wide["kernel"].shape[2] == 8 and not wide["kernel"][:, :, 4:].any()
    assert files.config.stem_tokens is False


def _old_attention_names(tensors, convolutions):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            if ".attentions." in name and f".{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
                tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names(tmp_path, stable_diffusion, convolutions):
    _, models = stable_diffusion
    models["vae"].save_pretrained(tmp_path / "vae")
    new = Published(tmp_path, pickles.read).tensors("vae", (diffusers_layout.WEIGHTS,))
    published.edit_tensors(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
        lambda tensors: _old_attention_names(tensors, convolutions),
    )
    old = Published(tmp_path, pickles.read).tensors("vae", (diffusers_layout.WEIGHTS,))
    assert old.keys() != new.keys()
    renamed = diffusers_layout._new_attention_names(old)
    assert renamed.keys() == new.keys()
    for name, tensor in renamed.items():
        np.testing.assert_array_equal(tensor, new[name], strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", ["safetensors", "variant", "pickle", "shards", "pickled shards"])
def test_ways_to_store_weights(tmp_path, storage, dtype):
    model = published.unet().to(dtype)
    folder = tmp_path / "unet"
    options = {"variant": "fp16"} if storage == "variant" else {"max_shard_size": "40KB"} if "shards" in storage else {}
    model.save_pretrained(folder, safe_serialization="pickle" not in storage, **options)
    assert (len(list(folder.iterdir())) > 3) == ("shards" in storage)
    tensors = Published(tmp_path, pickles.read).tensors("unet", (diffusers_layout.WEIGHTS,))
    assert tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensors[name].astype(np.float32), tensor.float().numpy())


def test_export_loads_everywhere_and_computes_the_same(tmp_path, stable_diffusion):
    files = read(stable_diffusion[0])
    export.save(tmp_path / "out", files)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_same_unet(files, "base_denoiser", pipeline.unet)
    assert_same_vae(files, pipeline.vae)
    assert_same_text(files, pipeline.text_encoder, pipeline.tokenizer)
    assert isinstance(pipeline.scheduler, diffusers.PNDMScheduler) and pipeline.scheduler.config.skip_prk_steps
    assert pipeline.vae.config.scaling_factor == 0.18215


def test_export_of_instruct_pix2pix(tmp_path):
    published.stable_diffusion(tmp_path / "ip2p", in_channels=8)
    files = read(tmp_path / "ip2p", part="denoiser")
    export.save(tmp_path / "out", files)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "out")
    assert_same_unet(files, "denoiser", pipeline.unet)


def test_export_of_all_that_diffusers_lacks(tmp_path, auffusion):
    config = published.config("auffusion")
    files = read(auffusion[0], config)
    files.config.update(stem_tokens=True, stage="subtractive", latent_scale=(0.1, 0.2, 0.3, 0.4))
    init = jax.jit(parts.network("denoiser", files.config).init)
    files.params["denoiser"] = init(jax.random.key(0))
    out = tmp_path / "out"
    export.save(out, files)

    assert not (out / "model_index.json").exists()
    for lack in ("condition adapter", "stem token", 'null text "zeros"', "scale for each"):
        assert lack in (out / "README.md").read_text()
    for part, name, adapter in (
        ("denoiser", "unet", "condition_adapter_0"),
        ("base_denoiser", "base_unet", "base_condition_adapter_0"),
    ):
        model = diffusers.UNet2DConditionModel.from_pretrained(out / name)
        module = published.Adapter()
        module.load_state_dict(published.load(out / adapter / "condition_adapter.safetensors"))
        assert_same_unet(files, part, model, module, stem=2 if part == "denoiser" else None)
    assert_same_vocoder(files, transformers.SpeechT5HifiGan.from_pretrained(out / "vocoder"))
    stems = json.loads((out / "stem_tokens" / "config.json").read_text())["stems"]
    assert stems == list(files.config.data.stems)

    back = read(out, model_folder.read_config(out / diffusers_layout.OWN_CONFIG), "denoiser")
    assert_same_params(back.params, files.params)
    assert (back.config.stem_tokens, back.config.text_padding, back.config.null_text) == (True, "zeros", "zeros")
    np.testing.assert_allclose(back.config.latent_scale, files.config.latent_scale, rtol=1e-12)
    with pytest.raises(UserError, match="unet: reads the context.*--from=instruct-pix2pix"):
        read(out, config, "base_denoiser")


@pytest.mark.parametrize("kind", ["stable_diffusion", "auffusion", "widened", "instruct-pix2pix"])
def test_round_trips_are_exact(tmp_path, kind, stable_diffusion, auffusion):
    part = "base_denoiser"
    if kind == "instruct-pix2pix":
        published.stable_diffusion(tmp_path / kind, in_channels=8)
        files = read(tmp_path / kind, part="denoiser")
    elif kind == "auffusion":
        files = read(auffusion[0], published.config("auffusion"))
    else:
        files = read(stable_diffusion[0])
    if kind == "widened":
        files = diffusers_layout.widen(files)
    if "denoiser" in files.params:
        part = "denoiser"
    export.save(tmp_path / "out", files)
    back = read(tmp_path / "out", model_folder.read_config(tmp_path / "out" / diffusers_layout.OWN_CONFIG), part)
    assert_same_params(back.params, files.params)
    assert back.config.to_dict() == files.config.to_dict()
    assert back.tokenizer.encode("Add reggae beats!", add_special_tokens=False).ids == (
        files.tokenizer.encode("Add reggae beats!", add_special_tokens=False).ids
    )


@pytest.mark.parametrize("solver", ["ddim", "pndm", "dpmsolver++"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_schedulers_come_back(tmp_path, stable_diffusion, solver, set_alpha_to_one):
    files = read(stable_diffusion[0])
    changes = dict(set_alpha_to_one=set_alpha_to_one, timestep_spacing="trailing", prediction_type="v_prediction")
    files.config.schedule.update(changes, rescale_betas_zero_snr=solver != "pndm")
    files.config.sampling.solver = solver
    export.save(tmp_path / "out", files)
    scheduler = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out").scheduler
    scheduler.save_pretrained(tmp_path / "out" / "scheduler")  # as diffusers understood it
    back = read(tmp_path / "out")
    assert back.config.schedule.to_dict() == files.config.schedule.to_dict()
    assert back.config.sampling.solver == solver


def test_a_solver_that_is_not_ours_leaves_the_configs(tmp_path):
    published.stable_diffusion(tmp_path / "sd")
    published.scheduler(
        tmp_path / "sd" / "scheduler", "EulerAncestralDiscreteScheduler", prediction_type="v_prediction"
    )
    config = read(tmp_path / "sd").config
    assert config.sampling.solver == published.config().sampling.solver
    assert config.schedule.prediction_type == "v_prediction" and config.schedule.set_alpha_to_one is False


@pytest.mark.parametrize("name", ["riffusion", pytest.param("auffusion", marks=pytest.mark.slow)])
def test_a_converted_model_inserts_a_stem(tmp_path, stable_diffusion, auffusion, name):
    folder = (stable_diffusion if name == "riffusion" else auffusion)[0]
    files = diffusers_layout.widen(read(folder, published.config(name)))
    model_folder.save(tmp_path / "model", files, "float32", card="")
    model = subtractive_jax.load(str(tmp_path / "model"))
    rate = model.mel.sample_rate
    audio = 0.1 * random(1, rate // 4)
    result = model.insert(audio, rate, "Add reggae beats", stem="drums", steps=2)
    assert result.mix.shape == audio.shape and np.isfinite(result.mix).all() and result.mix.any()


def test_export_refuses_a_model_without_a_denoiser(tmp_path, stable_diffusion):
    files = read(stable_diffusion[0])
    less = model_folder.ModelFiles(files.config, {"autoencoder": files.params["autoencoder"]})
    with pytest.raises(UserError, match="lacks: text_encoder, base_denoiser or denoiser, tokenizer"):
        export.save(tmp_path / "out", less)
    assert not list(tmp_path.iterdir())
