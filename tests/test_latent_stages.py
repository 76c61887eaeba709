"""What the diffusion stages learn, apart from the loop: shapes without a dataset, weights, timesteps, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import auffusion_t5, midi_tiny, minimal, riffusion
from subtractive_jax.diffusion import objective, schedule, timesteps
from subtractive_jax.errors import UserError
from subtractive_jax.training import latent_stages
from subtractive_jax.training.stage import example_keys
from tests import synthetic, worlds

_STEP, _EXAMPLES = 7, 16


def _config(prediction_type="v_prediction", zero_snr=False, **loss):
    config = worlds.small_config()
    config.representation.window_frames = 64
    config.schedule.update(dict(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr))
    config.loss.update(loss)
    return config


def _batch(task):
    """Latents of noise and empty texts."""
    random = np.random.default_rng(0)
    batch = {name: np.zeros((_EXAMPLES, *leaf.shape), leaf.dtype) for name, leaf in task.example.items()}
    for name in [name for name in ("target", "context") if name in batch]:
        batch[name] = random.standard_normal(batch[name].shape).astype(np.float16)
    batch["text_mask"][:, 0] = True
    return batch | dict(row=np.arange(_EXAMPLES, dtype=np.int32), valid=np.ones(_EXAMPLES, bool))


def _params(task):
    return synthetic.random_params(jax.eval_shape(task.init_params, jax.random.key(0), {}))


def _losses(config, train):
    """(loss [B], the examples' plain squared error [B], in which quarter they count [B, 4])"""
    task = latent_stages.task(config)
    loss, figures = jax.jit(lambda params, batch: task.loss(params, batch, jnp.int32(_STEP if train else 0), train))(
        _params(task), _batch(task)
    )
    errors, quarters = zip(*(figures[f"loss_quarter_{i}"] for i in (1, 2, 3, 4)), strict=True)
    for error in errors:
        np.testing.assert_array_equal(error, errors[0])
    return np.asarray(loss), np.asarray(errors[0]), np.stack(quarters, axis=-1)


@pytest.mark.parametrize(
    ("config", "latent", "text"),
    [
        (minimal.get_config(), (8, 16, 16), (64, 32)),
        (minimal.get_config("base"), (8, 16, 16), (64, 32)),
        (riffusion.get_config(), (64, 64, 8), (77, 768)),
        (auffusion_t5.get_config(), (32, 128, 8), (77, 768)),
        (midi_tiny.get_config(), (8, 64, 48), (64, 256)),
        (midi_tiny.get_config("base"), (8, 64, 48), (64, 256)),
    ],
    ids=["minimal", "minimal base", "riffusion", "auffusion_t5", "midi_tiny", "midi_tiny base"],
)
def test_a_task_needs_no_dataset(config, latent, text):
    task = latent_stages.task(config)
    assert task.part == ("denoiser" if config.stage == "subtractive" else "base_denoiser")
    assert (task.example["target"].shape, task.example["text_states"].shape) == (latent, text)
    assert ("context" in task.example) == ("stem" in task.example) == (config.stage == "subtractive")
    params = jax.eval_shape(task.init_params, jax.random.key(0), {})
    batch = {name: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype) for name, leaf in task.example.items()}
    batch |= dict(row=jax.ShapeDtypeStruct((2,), np.int32), valid=jax.ShapeDtypeStruct((2,), np.bool_))
    loss, _ = jax.eval_shape(lambda *arguments: task.loss(*arguments, True), params, batch, jnp.int32(0))
    assert loss.shape == (2,) and loss.dtype == np.float32


@pytest.mark.parametrize("stage", ["base", "subtractive"])
def test_a_datasets_batches_are_those_of_the_task(world, stage):
    config = world.config(stage)
    for name, value in (("latent_shift", 0.5), ("latent_scale", 0.5), ("context_scale", 0.25)):
        config[name] = (value,) * 8
    built = latent_stages.build(config, world.data_dir)
    batch = built.train.batch(np.arange(3), [np.random.default_rng(i) for i in range(3)])
    assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in built.task.example.items()
    }


@pytest.mark.parametrize(
    ("prediction_type", "distribution"), [("v_prediction", "uniform"), ("flow_prediction", "logit_normal")]
)
def test_the_loss_of_training_is_weighted_and_its_figures_are_not(prediction_type, distribution):
    config = _config(prediction_type, min_snr_gamma=2.0, timesteps=distribution)
    loss, error, quarters = _losses(config, train=True)
    drawn = np.asarray(timesteps.draw(distribution, example_keys(0, "timestep", _STEP, np.arange(_EXAMPLES)), 1000))
    np.testing.assert_array_equal(quarters, np.eye(4)[drawn // 250])
    weights = objective.min_snr_weights(prediction_type, schedule.rates(config.schedule), 2.0)
    np.testing.assert_allclose(loss, weights[drawn] * error, rtol=1e-6)
    assert (weights[drawn] < 1).all()


def test_evaluation_is_the_same_whatever_training_draws_and_weighs():
    loss, error, quarters = _losses(_config("flow_prediction"), train=False)
    np.testing.assert_array_equal(loss, error)
    np.testing.assert_array_equal(quarters.sum(axis=0), [4, 4, 4, 4])
    other, _, _ = _losses(_config("flow_prediction", min_snr_gamma=2.0, timesteps="logit_normal"), train=False)
    np.testing.assert_array_equal(loss, other)


def test_text_context_or_both_are_dropped_by_one_draw():
    config, whole = _config(), _config()
    config.dropout.update(dict(text=0.25, both=0.25, context=0.25))
    whole.dropout.update(dict(text=0.0, both=0.0, context=0.0))
    null = np.full((2, config.text_encoder.d_model), 0.5, np.float16)
    tasks, random = [latent_stages.task(each, null) for each in (config, whole)], np.random.default_rng(1)
    dropping, keeping = (
        jax.jit(lambda params, batch, task=task: task.loss(params, batch, _STEP, True)[0]) for task in tasks
    )
    params, batch = _params(tasks[0]), _batch(tasks[0])
    batch["text_states"] = random.standard_normal(batch["text_states"].shape).astype(np.float16)
    batch["text_mask"][:, :5] = True

    drawn = np.asarray(jax.vmap(jax.random.uniform)(example_keys(0, "dropout", _STEP, batch["row"])))
    both, text, context, neither = (np.floor(4 * drawn) == quarter for quarter in range(4))
    assert min(group.sum() for group in (both, text, context, neither)) > 0
    dropped = {name: array.copy() for name, array in batch.items()}
    states, mask = latent_stages.pad_texts([null], config.max_text_tokens)
    dropped["text_states"][both | text], dropped["text_mask"][both | text] = states, mask
    dropped["context"][both | context] = 0.0

    losses, plain = dropping(params, batch), keeping(params, batch)
    np.testing.assert_allclose(losses, keeping(params, dropped), rtol=1e-5)
    np.testing.assert_array_equal(np.abs(losses / plain - 1.0) < 1e-5, neither)


def test_noise_without_data_gives_finite_gradients():
    """Zero terminal SNR under min-SNR weights; a schedule of few timesteps, so that the last is drawn."""
    config = _config(zero_snr=True, min_snr_gamma=5.0)
    config.schedule.num_train_timesteps = 4
    task = latent_stages.task(config)
    batch = _batch(task)
    drawn = timesteps.draw("uniform", example_keys(0, "timestep", _STEP, batch["row"]), 4)
    assert 3 in np.asarray(drawn) and schedule.rates(config.schedule)[3, 0] == 0
    gradients = jax.jit(jax.grad(lambda params: task.loss(params, batch, _STEP, True)[0].mean()))(_params(task))
    norms = np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradients)])
    assert np.isfinite(norms).all() and norms.max() > 0


def test_a_denoiser_of_notes_begins_as_a_threshold():
    """Before any training it tells cells that stand out of the noise, and writes zeros where none does."""
    config = worlds.notes_config("base")
    config.denoiser.block_out_channels = (48,)
    task = latent_stages.task(config)
    params = jax.jit(lambda key: task.init_params(key, {}))(jax.random.key(0))
    batch, random = _batch(task), np.random.default_rng(0)
    batch["target"] = (random.random(batch["target"].shape) < 0.006).astype(np.float16)
    _, figures = jax.jit(lambda params: task.loss(params, batch, jnp.int32(0), False))(params)
    nothing = np.square(config.latent_scale[0] * batch["target"].astype(np.float32)).mean()
    errors = [float((error * weight).sum() / weight.sum()) / nothing for error, weight in figures.values()]
    assert errors[0] < 0.6 and errors[0] == min(errors) and max(errors) < 1.3


def _context(playing):
    """A context [1, F, T, C] of `midi_tiny` in which these parts have notes, and one at a bar line."""
    roll = latent_stages.piano_roll(worlds.notes_config())
    context = np.zeros((1, roll.octaves, roll.window_steps, roll.context_channels), np.float32)
    for number, part in enumerate(roll.parts):
        if part in playing:
            context[..., roll.channels_of(part)] = number + 1.0
        else:
            context[..., roll.channels + number] = 1.0
    context[..., ::16, -1] = 1.0
    return roll, context


def test_parts_are_dropped_from_contexts_but_never_all():
    roll, context = _context(("drums", "guitar", "keys"))
    keys = jax.random.split(jax.random.key(0), 400)
    dropped = np.asarray(latent_stages.drop_parts(roll, jnp.asarray(context.repeat(400, axis=0)), 0.35, keys))
    np.testing.assert_array_equal(dropped[..., -1], context[..., -1].repeat(400, axis=0))
    missing = dropped[:, 0, 0, roll.channels : -1] == 1.0
    for number, part in enumerate(roll.parts):
        gone = missing[:, number]
        channels = dropped[..., roll.channels_of(part)]
        assert (channels[gone] == 0.0).all() and (channels[~gone] == number + 1.0).all()
    assert missing[:, roll.parts.index("bass")].all()
    assert (~missing).any(axis=1).all()
    shares = missing.mean(axis=0)[[0, 2, 3]]
    assert (np.abs(shares - (0.35 - 0.35**3 / 3)) < 0.08).all()  # three at once would leave one
    assert len({tuple(row) for row in missing.tolist()}) == 7


def test_a_stem_that_is_no_part_of_the_roll_is_refused():
    config = worlds.notes_config()
    config.data.stems = ("drums", "bass+drums")
    with pytest.raises(UserError, match=r'unknown part of the piano roll in config.data.stems "bass\+drums"'):
        latent_stages.task(config)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match='unknown target "stam"'):
        config = _config()
        config.target = "stam"
        latent_stages.task(config)
    with pytest.raises(UserError, match=r"min_snr_gamma=-5\.0.*must be positive, or 0"):
        latent_stages.task(_config(min_snr_gamma=-5.0))
    with pytest.raises(UserError, match='did you mean "logit_normal"'):
        _losses(_config(timesteps="logit-normal"), train=True)
