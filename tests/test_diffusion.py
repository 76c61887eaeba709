"""Schedules, objectives, guidance and DDIM against diffusers and against cases worked by hand."""

import diffusers
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch

from subtractive_jax.diffusion import guidance, objective, schedule, solvers
from subtractive_jax.errors import UserError


def _schedule(**changes):
    fields = dict(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    return ml_collections.ConfigDict(fields | changes)


SCHEDULES = {
    "stable diffusion": _schedule(),
    "tiny": _schedule(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True
    ),
    "linear": _schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0),
}


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_ddim_takes_the_steps_of_diffusers(config, steps):
    reference = diffusers.DDIMScheduler(clip_sample=False, **config)
    reference.set_timesteps(steps)
    abar = schedule.alphas_cumprod(config)
    ladder = solvers.ddim_ladder(config, steps)
    np.testing.assert_array_equal(ladder.timesteps, reference.timesteps)
    random = np.random.default_rng(steps)
    x = random.standard_normal((2, 8, 6, 3)).astype(np.float32)
    for t, next_abar in zip(ladder.timesteps, ladder.next_abar, strict=True):
        output = random.standard_normal(x.shape).astype(np.float32)
        expected = reference.step(torch.from_numpy(output), int(t), torch.from_numpy(x)).prev_sample.numpy()
        x0, eps = objective.to_x0_eps(config.prediction_type, output, x, t, abar)
        x = np.array(solvers.ddim_step(x0, eps, next_abar))
        np.testing.assert_allclose(x, expected, rtol=2e-4, atol=2e-4)  # eps -> x0 divides by sqrt(0.005) at the start


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
def test_each_step_ends_where_the_next_begins(spacing):
    config = _schedule(timestep_spacing=spacing)
    ladder = solvers.ddim_ladder(config, 30)  # does not divide 1000
    np.testing.assert_array_equal(ladder.next_abar[:-1], schedule.alphas_cumprod(config)[ladder.timesteps[1:]])
    assert (np.diff(ladder.timesteps) < 0).all() and ladder.timesteps[0] <= 999 and ladder.timesteps[-1] >= 0


def test_trailing_begins_at_the_noisiest_timestep():
    assert solvers.ddim_ladder(_schedule(timestep_spacing="trailing"), 30).timesteps[0] == 999


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
def test_noise_and_targets_are_those_of_diffusers(config):
    reference = diffusers.DDPMScheduler(
        **{k: v for k, v in config.items() if k not in ("set_alpha_to_one", "timestep_spacing", "steps_offset")}
    )
    abar = schedule.alphas_cumprod(config)
    np.testing.assert_allclose(abar, reference.alphas_cumprod, rtol=1e-4)
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((2, 5, 4, 4, 2)).astype(np.float32)
    t = np.array([0, 1, 400, 998, 999])
    tensors = torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(t)
    np.testing.assert_allclose(schedule.add_noise(x, noise, t, abar), reference.add_noise(*tensors), atol=1e-5)
    velocity = objective.target("v_prediction", x, noise, t, abar)
    np.testing.assert_allclose(velocity, reference.get_velocity(*tensors), atol=1e-5)


@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
def test_reading_the_target_gives_back_data_and_noise(prediction_type):
    abar = schedule.alphas_cumprod(_schedule())
    random = np.random.default_rng(1)
    x, noise = random.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    t = np.array([3, 500, 900])
    x_t = schedule.add_noise(x, noise, t, abar)
    x0, eps = objective.to_x0_eps(prediction_type, objective.target(prediction_type, x, noise, t, abar), x_t, t, abar)
    np.testing.assert_allclose(x0, x, atol=1e-4)
    np.testing.assert_allclose(eps, noise, atol=1e-4)


def test_guidance_worked_by_hand():
    null, context, both = jnp.array([1.0, 0.0]), jnp.array([3.0, -2.0]), jnp.array([4.0, 2.0])
    # 1 + 1.5 * (3 - 1) + 7 * (4 - 3) = 11 and 0 + 1.5 * (-2 - 0) + 7 * (2 + 2) = 25
    np.testing.assert_array_equal(guidance.context_and_text(null, context, both, 1.5, 7.0), [11.0, 25.0])
    np.testing.assert_array_equal(guidance.context_and_text(null, context, both, 1.0, 1.0), both)
    np.testing.assert_array_equal(guidance.text(null, both, 3.0), [10.0, 6.0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: solvers.ddim_ladder(_schedule(), 0), "0 sampling steps"),
        (lambda: solvers.ddim_ladder(_schedule(), 1001), "1001 sampling steps"),
        (lambda: solvers.ddim_ladder(_schedule(timestep_spacing="trialing"), 10), 'did you mean "trailing"'),
        (lambda: schedule.alphas_cumprod(_schedule(beta_schedule="liner")), 'did you mean "linear"'),
        (lambda: objective.target("epsilom", 0, 0, 0, 0), 'did you mean "epsilon"'),
    ],
)
def test_bad_settings_are_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
