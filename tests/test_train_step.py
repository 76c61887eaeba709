"""What an update is made of, by hand: random keys, learning rates, clipping, decay, EMA, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subtractive_jax import rng
from subtractive_jax.training import latent_stages, partitioning, state, steps
from subtractive_jax.training.train_step import make_train_step
from tests import worlds


def test_a_key_is_a_function_of_seed_name_and_step():
    def bits(*arguments):
        return jax.random.key_data(rng.stream(*arguments)).tolist()

    others = [(1, "noise", 3), (0, "timestep", 3), (0, "noise", 4)]
    assert len({tuple(bits(*each)) for each in [(0, "noise", 3), *others]}) == 4
    traced = jax.jit(lambda step: jax.random.key_data(rng.stream(0, "noise", step)))(jnp.int32(3))
    assert bits(0, "noise", 3) == traced.tolist()


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 10, {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("constant", 10, {0: 0.0, 5: 0.5, 10: 1.0, 1000: 1.0}),
        ("constant", 0, {0: 1.0, 1000: 1.0}),
    ],
)
def test_learning_rates(schedule, warmup, expected):
    config = worlds.small_config()
    config.train.update(dict(schedule=schedule, warmup_steps=warmup, steps=110, learning_rate=1.0))
    rate = state.learning_rate(config)
    np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), atol=1e-6)


def test_each_entry_is_clipped_by_its_own_norm():
    gradients = {"model": {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, "discriminators": jnp.array([0.5])}
    clipped, _ = state.clip_each(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose([clipped["model"]["a"][0], clipped["model"]["b"][0]], [0.6, 0.8], rtol=1e-6)
    assert clipped["discriminators"].tolist() == [0.5]


def test_kernels_decay_and_biases_do_not():
    config = worlds.small_config()
    config.train.update(dict(schedule="constant", warmup_steps=0, learning_rate=0.1, weight_decay=0.5))
    optimizer = state.make_optimizer(config)
    params = {"part": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["part"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["part"]["bias"], 0.0)


def test_the_ema_follows_the_parameters_faster_at_first():
    """Each step takes 1 off the parameter, which begins at 0."""
    step = make_train_step(
        lambda params, batch, *_: (params["x"] * jnp.ones(4), {}), optax.sgd(1.0), ema_decay=2.5 / 12.0
    )
    carried = dict(params={"x": jnp.zeros(())}, ema={"x": jnp.zeros(())}, opt_state=optax.sgd(1.0).init({}), step=0)
    expected = 0.0
    for number, decay in enumerate([1 / 10, 2 / 11, 2.5 / 12, 2.5 / 12]):
        carried, sums = step(carried, dict(valid=jnp.array([True, True, True, False])))
        expected = decay * expected + (1 - decay) * -(number + 1)
        assert float(carried["ema"]["x"]) == pytest.approx(expected, rel=1e-6)
        assert float(carried["params"]["x"]) == -(number + 1) and int(carried["step"]) == number + 1
        assert [float(part) for part in sums["loss"]] == [-3.0 * number, 3.0]  # of the three that are valid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_computes_in_one_precision_and_keeps_float32(dtype):
    config = worlds.small_config()
    config.compute_dtype = dtype
    built = steps.build(config, latent_stages.task(config), partitioning.make_mesh(4, 2), {})
    lowered = built.train.lower(built.abstract, built.batch)
    kept = [leaf.dtype for leaf in jax.tree.leaves(lowered.out_info[0]) if leaf.ndim]
    assert kept and set(kept) == {np.dtype("float32")}
    convolutions = [line for line in lowered.as_text().splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all(("bf16" in line) == (dtype == "bfloat16") for line in convolutions)
