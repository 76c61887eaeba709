"""Schedules, objectives, guidance and solvers against diffusers and against cases worked by hand."""

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
        rescale_betas_zero_snr=False,
    )
    return ml_collections.ConfigDict(fields | changes)


SCHEDULES = {
    "stable diffusion": _schedule(),
    "tiny": _schedule(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True
    ),
    "linear": _schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0),
}


ZERO_SNR = _schedule(
    prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True, rescale_betas_zero_snr=True
)


def _reference(solver, config, steps):
    """diffusers' scheduler of the same schedule; each takes the settings that it knows."""
    fields = dict(config)
    if solver == "ddim":
        reference = diffusers.DDIMScheduler(clip_sample=False, **fields)
    elif solver == "pndm":
        fields.pop("rescale_betas_zero_snr")
        reference = diffusers.PNDMScheduler(skip_prk_steps=True, **fields)
    else:
        fields.pop("set_alpha_to_one")
        reference = diffusers.DPMSolverMultistepScheduler(**fields)
    reference.set_timesteps(steps)
    return reference


def _assert_same_steps(plan, reference, seed):
    """Equal samples after every step, each on its own way, from the same noise and the same outputs."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 8, 6, 3)).astype(np.float32)
    state, expected = solvers.start(plan, x), torch.from_numpy(x)
    for call, t in enumerate(plan.timesteps):
        output = random.standard_normal(x.shape).astype(np.float32)
        expected = reference.step(torch.from_numpy(output), int(t), expected).prev_sample
        state = solvers.step(plan, call, state, output)
        scale = np.abs(expected.numpy()).max()
        np.testing.assert_allclose(state.x, expected, rtol=0, atol=1e-5 * scale, err_msg=f"call {call}")


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
def test_solvers_take_the_steps_of_diffusers(solver, config, prediction_type):
    config = _schedule(**{**config, "prediction_type": prediction_type})
    for steps in (1, 2, 7, 20, 50):
        reference = _reference(solver, config, steps)
        plan = solvers.plan(config, solver, steps)
        np.testing.assert_array_equal(plan.timesteps, reference.timesteps)
        # When trailing steps do not divide the timesteps, diffusers' DDIM and PNDM do not go where the next begins.
        if solver == "dpmsolver++" or config.timestep_spacing == "leading" or 1000 % steps == 0:
            _assert_same_steps(plan, reference, seed=steps)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_zero_terminal_snr_is_sampled_as_diffusers_does(solver, steps):
    _assert_same_steps(solvers.plan(ZERO_SNR, solver, steps), _reference(solver, ZERO_SNR, steps), seed=steps)


@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
def test_dpmsolver_spaces_linearly_as_diffusers_does(prediction_type):
    config = _schedule(timestep_spacing="linspace", prediction_type=prediction_type)
    reference, plan = _reference("dpmsolver++", config, 20), solvers.plan(config, "dpmsolver++", 20)
    np.testing.assert_array_equal(plan.timesteps, reference.timesteps)
    _assert_same_steps(plan, reference, seed=0)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
@pytest.mark.parametrize("begin", [1, 12, 19])
def test_beginning_in_the_middle(solver, prediction_type, begin):
    """As diffusers from there on, with PNDM's second call where *its* first step arrives.

    diffusers' image-to-image pipeline cuts the list of timesteps and so loses the repeated one: from the third call on,
    PNDM takes the sample to be one step cleaner than it is.
    """
    config = _schedule(prediction_type=prediction_type)
    reference, plan = _reference(solver, config, 20), solvers.plan(config, solver, 20, begin)
    timesteps = [950 - 50 * step + 1 for step in range(begin, 20)]
    if solver == "pndm" and begin < 19:
        timesteps.insert(1, timesteps[1])
    if solver == "dpmsolver++":
        timesteps = list(reference.timesteps[begin:])
        reference.set_begin_index(begin)
    assert list(plan.timesteps) == timesteps
    _assert_same_steps(plan, reference, seed=begin)


@pytest.mark.parametrize("solver", ["ddim", "pndm"])
@pytest.mark.parametrize("spacing", solvers.SPACINGS)
def test_each_step_ends_where_the_next_begins(solver, spacing):
    """A denoiser that knows the noise keeps the sample on the forward process: the noise level is that of `t`."""
    config = _schedule(timestep_spacing=spacing, set_alpha_to_one=True)
    abar, plan = schedule.alphas_cumprod(config), solvers.plan(config, solver, 30)  # does not divide 1000
    x, noise = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    state = solvers.start(plan, schedule.add_noise(x, noise, plan.timesteps[0], abar))
    for call, t in enumerate(plan.timesteps):
        np.testing.assert_allclose(state.x, schedule.add_noise(x, noise, t, abar), atol=1e-4)
        state = solvers.step(plan, call, state, noise)
    np.testing.assert_allclose(state.x, x, atol=1e-4)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_trailing_begins_at_the_noisiest_timestep(solver):
    assert solvers.plan(_schedule(timestep_spacing="trailing"), solver, 30).timesteps[0] == 999


MEAN, SPREAD = 0.5, 1.0


def _gaussian_error(solver, config, steps):
    """How far a solver lands from the exact flow, in spreads, where the data are normal and the denoiser perfect."""
    abar = schedule.alphas_cumprod(config)
    plan = solvers.plan(config, solver, steps)

    def spread_at(t):
        return np.sqrt(abar[t] * SPREAD**2 + 1 - abar[t])

    quantile = np.linspace(-2, 2, 9)
    state = solvers.start(plan, np.float32(np.sqrt(abar[999]) * MEAN + spread_at(999) * quantile))
    for call, t in enumerate(plan.timesteps):
        signal = np.sqrt(abar[t])
        noise = np.sqrt(1 - abar[t]) * (np.asarray(state.x) - signal * MEAN) / spread_at(t) ** 2  # its expectation
        x0 = MEAN + signal * SPREAD**2 * (np.asarray(state.x) - signal * MEAN) / spread_at(t) ** 2
        output = noise if config.prediction_type == "epsilon" else signal * noise - np.sqrt(1 - abar[t]) * x0
        state = solvers.step(plan, call, state, np.float32(output))
    return np.abs((np.asarray(state.x) - MEAN) / SPREAD - quantile).max()  # the flow keeps every quantile


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
def test_more_steps_come_nearer_to_the_data(solver, prediction_type):
    config = _schedule(timestep_spacing="trailing", prediction_type=prediction_type, set_alpha_to_one=True)
    errors = [_gaussian_error(solver, config, steps) for steps in (10, 40, 200)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02
    if solver == "dpmsolver++" or (solver, prediction_type) == ("pndm", "epsilon"):
        assert errors[0] < 0.5 * _gaussian_error("ddim", config, 10)


def test_every_solver_starts_from_pure_noise():
    for solver in solvers.SOLVERS:
        assert _gaussian_error(solver, ZERO_SNR, 50) < 0.1


@pytest.mark.parametrize("config", [*SCHEDULES.values(), ZERO_SNR], ids=[*SCHEDULES, "zero terminal SNR"])
def test_noise_and_targets_are_those_of_diffusers(config):
    reference = diffusers.DDPMScheduler(
        **{k: v for k, v in config.items() if k not in ("set_alpha_to_one", "timestep_spacing", "steps_offset")}
    )
    abar = schedule.alphas_cumprod(config)
    np.testing.assert_allclose(abar, reference.alphas_cumprod, rtol=1e-5, atol=1e-6)
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
    target = objective.target(prediction_type, x, noise, t, abar)
    reading = objective.reading(prediction_type, abar[t])
    found = np.einsum("bij,jbftc->ibftc", reading, np.stack([x_t, target]))
    np.testing.assert_allclose(found, np.stack([x, noise]), atol=1e-4)


def test_guidance_worked_by_hand():
    null, context, both = jnp.array([1.0, 0.0]), jnp.array([3.0, -2.0]), jnp.array([4.0, 2.0])
    # 1 + 1.5 * (3 - 1) + 7 * (4 - 3) = 11 and 0 + 1.5 * (-2 - 0) + 7 * (2 + 2) = 25
    np.testing.assert_array_equal(guidance.context_and_text(null, context, both, 1.5, 7.0), [11.0, 25.0])
    np.testing.assert_array_equal(guidance.context_and_text(null, context, both, 1.0, 1.0), both)
    np.testing.assert_array_equal(guidance.text(null, both, 3.0), [10.0, 6.0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: solvers.plan(_schedule(), "ddim", 0), "0 sampling steps"),
        (lambda: solvers.plan(_schedule(), "ddim", 1001), "1001 sampling steps"),
        (lambda: solvers.plan(_schedule(), "ddim", 1000), "choose fewer"),  # the offset leads beyond the last timestep
        (lambda: solvers.plan(_schedule(steps_offset=0), "dpmsolver++", 1000), "choose fewer"),
        (lambda: solvers.plan(_schedule(), "dpmsolver", 10), r'did you mean "dpmsolver\+\+"'),
        (lambda: solvers.plan(_schedule(timestep_spacing="trialing"), "ddim", 10), 'did you mean "trailing"'),
        (lambda: schedule.alphas_cumprod(_schedule(rescale_betas_zero_snr=True)), "use v_prediction"),
        (lambda: schedule.alphas_cumprod(_schedule(beta_schedule="liner")), 'did you mean "linear"'),
        (lambda: objective.target("epsilom", 0, 0, 0, 0), 'did you mean "epsilon"'),
        (lambda: objective.reading("epsilom", np.ones(1)), 'did you mean "epsilon"'),
    ],
)
def test_bad_settings_are_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
