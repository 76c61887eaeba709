"""Samples at each evaluation: what is written for every stage, and that the same model makes the same."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from subtractive_jax import parts, records
from subtractive_jax.errors import UserError
from subtractive_jax.models.autoencoder import mode
from subtractive_jax.representation.audio import read_audio
from subtractive_jax.sampling.sampler import Sampler
from subtractive_jax.training import latent_stages, lora, partitioning, preview, stages
from subtractive_jax.weights import model_folder
from tests import synthetic

_FILES = {
    "autoencoder": ["mel.png"],
    "vocoder": ["mel.png", "original.wav", "vocoded.wav"],
    "base": ["mel.png", "mix.wav", "reference.wav"],
    "subtractive": ["context.wav", "mel.png", "mix.wav", "reference.wav", "stem.wav"],
}


def _config(world, stage="subtractive"):
    config = world.config(stage, preview_examples=2)
    if stage in ("base", "subtractive"):
        channels = config.autoencoder.latent_channels
        scales = dict(latent_shift=(0.5,) * channels, latent_scale=(0.5,) * channels, context_scale=(0.25,) * channels)
        with config.unlocked():
            config.update(scales)
    return config


def _inherited(world, config):
    _, inherited = stages.prepare(config, world.data_dir)
    return inherited


def _params(config, seed=0):
    part = stages.PART_OF_STAGE[config.stage]
    return {part: synthetic.random_params(parts.network(part, config).shapes(), seed)}


def _content(folder):
    """Of every file; that of a WAV file is its samples, since libsndfile notes the time."""
    return {
        path.name: read_audio(path)[0].tobytes() if path.suffix == ".wav" else path.read_bytes()
        for path in folder.iterdir()
    }


@pytest.mark.parametrize("stage", _FILES)
def test_every_stage_writes_what_can_be_heard_or_seen(world, tmp_path, stage):
    config = _config(world, stage)
    sample = preview.build(config, world.data_dir, _inherited(world, config), tmp_path)
    shown = sample(20, _params(config))
    folder = tmp_path / "samples" / "20"
    names = [f"{number}_{name}" for number in range(2) for name in _FILES[stage]]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "samples.json"]

    assert list(shown.images) == ["preview_0/mel", "preview_1/mel"]
    with Image.open(io.BytesIO(shown.images["preview_0/mel"])) as picture:
        signals = max(len(_FILES[stage]) - 1, 2)
        assert picture.height >= 60 * signals and picture.width > 30
    for name, sound in shown.sounds.items():
        audio, sample_rate = read_audio(folder / f"{name.removeprefix('preview_').replace('/', '_')}.wav")
        assert sample_rate == sound.sample_rate == config.representation.sample_rate
        np.testing.assert_array_equal(audio[0], np.float32(sound.samples))
        window = config.representation.window_frames * config.representation.hop_length
        assert audio.shape == (1, window) and 0.0 < np.abs(audio).max() < 10.0

    made_by = json.loads((folder / "samples.json").read_text())
    assert [entry["song_id"] for entry in made_by] == ["song-0", "song-1"]
    if stage == "subtractive":
        about = {name: made_by[1][name] for name in ("instruction", "stem_name", "seed", "solver", "steps")}
        assert about == dict(instruction="Add reggae bass", stem_name="bass", seed=1, solver="ddim", steps=4)


def test_the_same_model_gives_the_same_without_compiling_again(world, tmp_path):
    config = _config(world)
    sample = preview.build(config, world.data_dir, _inherited(world, config), tmp_path)
    params, mesh = _params(config), partitioning.make_mesh(2, 4)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

    def backend_compilations():
        count = sum("backend_compile" in event for event in compiled)
        compiled.clear()
        return count

    sample(1, params)
    assert backend_compilations() > 0
    sharded = jax.device_put(params, partitioning.shardings(params, mesh, ()))
    sample(2, sharded)
    assert backend_compilations() == 0
    jax.tree.map(np.testing.assert_array_equal, sharded, params)  # training goes on with them
    sample(1, params)  # over the folder that is there
    one, two = (_content(tmp_path / "samples" / str(step)) for step in (1, 2))
    assert one == two
    audio = {name: read_audio(tmp_path / "samples" / "1" / f"0_{name}.wav")[0] for name in ("context", "stem", "mix")}
    np.testing.assert_allclose(audio["mix"], audio["context"] + audio["stem"], atol=1e-6)

    sample(3, _params(config, seed=1))  # another model changes what it makes and nothing else
    three = _content(tmp_path / "samples" / "3")
    changed = {f"{number}_{name}" for number in range(2) for name in ("stem.wav", "mix.wav", "mel.png")}
    assert {name for name in one if one[name] != three[name]} == changed


def test_the_sampler_comes_to_the_same_latents(world, monkeypatch):
    """`Sampler` reads latents and texts; given what the dataset holds of them, it samples what is previewed."""
    config = _config(world)
    split = records.Split(world.data_dir, "latents", "validation")
    example = split[1]
    model = preview._Model(model_folder.ModelFiles(config, {}))
    instruction = example["instruction_states"][: example["instruction_lengths"][0]]
    states, mask = latent_stages.pad_texts(
        [np.float16(split.metadata["null_text_states"]), instruction], config.max_text_tokens
    )
    monkeypatch.setattr(model, "encode_text", lambda texts: (np.float32(states), mask))
    settings = {
        name: config.sampling[name]
        for name in ("solver", "steps", "text_guidance", "context_guidance", "guidance_rescale")
    }
    stem = model.stems.index(example["stem_name"])
    with model.holding(_params(config)):
        sampler = Sampler(
            model,
            example["instructions"][0],
            stem,
            guidance_interval=(0.0, 1.0),
            strength=None,
            **settings,
        )
        context = np.asarray(mode(jnp.float32(example["context_latent"][None])))
        (expected,) = sampler.latents(context, [7])
        latent = preview._denoised(model, example, 7, split.metadata)
    np.testing.assert_allclose(latent, expected, atol=1e-5)


def test_adapters_are_heard(world, tmp_path):
    config = _config(world)
    config.train.lora.rank = 2
    init = lora.with_adapters(lambda key, start: start, "denoiser", config.train.lora, seed=0)
    params = init(jax.random.key(0), _params(config))
    params[lora.ENTRY] = jax.tree.map(lambda leaf: leaf + 0.1, params[lora.ENTRY])
    merged = lora.merge(params, config.train.lora)
    sample = preview.build(config, world.data_dir, _inherited(world, config), tmp_path)
    sample(1, params)
    config.train.lora.rank = 0
    sample(2, merged)
    sample(3, _params(config))
    adapters, whole, without = (_content(tmp_path / "samples" / str(step)) for step in (1, 2, 3))
    assert adapters == whole != without


def test_nothing_is_made_where_there_is_nothing_to_make(world, tmp_path, capsys):
    for stage, count in (("subtractive", 0), ("text_encoder", 2)):
        config = world.config(stage, preview_examples=count)
        assert preview.build(config, world.data_dir, model_folder.ModelFiles(config, {}), tmp_path)(1, {}) == ({}, {})
    config = _config(world)
    synthetic.write_latents(tmp_path / "data", config, world.parent, validation=0)
    sample = preview.build(config, str(tmp_path / "data"), _inherited(world, config), tmp_path)
    assert sample(1, {}) == sample(2, {}) == ({}, {}) and not (tmp_path / "samples").exists()
    assert capsys.readouterr().out.count("the validation split is empty") == 1


def test_sampling_that_cannot_be_is_refused_before_training(world, tmp_path):
    config = _config(world)
    config.sampling.solver = "euler"
    with pytest.raises(UserError, match='unknown solver "euler"'):
        preview.build(config, world.data_dir, _inherited(world, config), tmp_path)
