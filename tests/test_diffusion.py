"""Schedules, objectives, guidance and solvers against diffusers and against cases worked by hand."""

import json

import diffusers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from configs import minimal
from subtractive_jax.diffusion import guidance, objective, schedule, solvers, timesteps
from subtractive_jax.errors import UserError
from subtractive_jax.weights import published, schedulers


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
    "trailing": _schedule(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True
    ),
    "linear": _schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0),
}

ZERO_SNR = _schedule(
    prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True, rescale_betas_zero_snr=True
)
FLOW = _schedule(prediction_type="flow_prediction", timestep_spacing="trailing", set_alpha_to_one=True)
PRESERVES_VARIANCE = ("epsilon", "v_prediction")


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


OF_SAMPLES = 1e-4  # diffusers divides by the root of 1 - abar, which float32 holds badly near clean data
OF_DIFFUSERS = ("ddim", "pndm", "dpmsolver++")  # whose schedulers name our timesteps


def _assert_same_steps(plan, reference, seed, names=None, tolerance=1e-5):
    """Equal samples after every step, each on its own way, from the same noise and the same outputs.

    The reference's timesteps are only its names of the steps.
    """
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 8, 6, 3)).astype(np.float32)
    state, expected = solvers.start(plan, x), torch.from_numpy(x)
    for call, t in enumerate(plan.timesteps if names is None else names):
        output = random.standard_normal(x.shape).astype(np.float32)
        expected = reference.step(torch.from_numpy(output), t, expected).prev_sample
        state = solvers.step(plan, call, state, output)
        scale = np.abs(expected.numpy()).max()
        np.testing.assert_allclose(state.x, expected, rtol=0, atol=tolerance * scale, err_msg=f"call {call}")


@pytest.mark.parametrize("solver", OF_DIFFUSERS)
@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("prediction_type", PRESERVES_VARIANCE)
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
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_sampled_as_diffusers_does(solver, steps, prediction_type):
    config = _schedule(**{**ZERO_SNR, "prediction_type": prediction_type})
    reference = _reference(solver, config, steps)
    _assert_same_steps(solvers.plan(config, solver, steps), reference, seed=steps, tolerance=OF_SAMPLES)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])  # diffusers' PNDM and Heun do not know it
@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
def test_predicted_samples_take_the_steps_of_diffusers(solver, config):
    config = _schedule(**{**config, "prediction_type": "sample"})
    for steps in (1, 2, 20, 50):
        plan, reference = solvers.plan(config, solver, steps), _reference(solver, config, steps)
        np.testing.assert_array_equal(plan.timesteps, reference.timesteps)
        _assert_same_steps(plan, reference, seed=steps, tolerance=OF_SAMPLES)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("config", [*SCHEDULES.values(), ZERO_SNR], ids=[*SCHEDULES, "zero terminal SNR"])
def test_a_perfect_prediction_of_the_sample_is_where_every_solver_ends(solver, config):
    config = _schedule(**{**config, "prediction_type": "sample", "set_alpha_to_one": True})
    x, noise = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    plan = solvers.plan(config, solver, 12)
    state = solvers.start(plan, schedule.add_noise(x, noise, plan.timesteps[0], schedule.rates(config)))
    for call in range(len(plan.timesteps)):
        state = solvers.step(plan, call, state, x)
    np.testing.assert_allclose(state.x, x, atol=2e-4)


@pytest.mark.parametrize("prediction_type", PRESERVES_VARIANCE)
def test_dpmsolver_spaces_linearly_as_diffusers_does(prediction_type):
    config = _schedule(timestep_spacing="linspace", prediction_type=prediction_type)
    reference, plan = _reference("dpmsolver++", config, 20), solvers.plan(config, "dpmsolver++", 20)
    np.testing.assert_array_equal(plan.timesteps, reference.timesteps)
    _assert_same_steps(plan, reference, seed=0)


@pytest.mark.parametrize("solver", OF_DIFFUSERS)
@pytest.mark.parametrize("prediction_type", PRESERVES_VARIANCE)
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


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_under_flow_is_the_euler_step(spacing, steps):
    config = _schedule(**{**FLOW, "timestep_spacing": spacing})
    plan = solvers.plan(config, "ddim", steps)
    shares = np.append((plan.timesteps + 1) / 1000, 0.0)
    np.testing.assert_array_equal(plan.read, np.tile(np.float32([0, 1]), (steps, 1)))
    np.testing.assert_array_equal(plan.keep, np.ones(steps, np.float32))
    np.testing.assert_array_equal(plan.weights[:, 0], np.float32(np.diff(shares)))


@pytest.mark.parametrize("steps", [2, 4, 10, 28, 38])  # those that divide the timesteps as evenly as diffusers does
def test_flow_takes_the_euler_steps_of_diffusers(steps):
    config = _schedule(**{**FLOW, "timestep_spacing": "linspace"})
    reference, plan = diffusers.FlowMatchEulerDiscreteScheduler(), solvers.plan(config, "ddim", steps)
    reference.set_timesteps(steps)
    np.testing.assert_allclose(plan.timesteps + 1, reference.timesteps, rtol=1e-6)
    _assert_same_steps(plan, reference, seed=steps, names=reference.timesteps)


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_flow_takes_the_dpmsolver_steps_of_diffusers(spacing, steps):
    """At our timesteps below pure noise, which is where diffusers' own begin."""
    config = _schedule(**{**FLOW, "timestep_spacing": spacing})
    plan = solvers.plan(config, "dpmsolver++", steps, begin=int(spacing != "leading"))
    reference = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    reference.set_timesteps(len(plan.timesteps))
    reference.timesteps = torch.from_numpy(plan.timesteps)
    reference.sigmas = torch.tensor(np.append((plan.timesteps + 1) / 1000, 0.0))
    _assert_same_steps(plan, reference, seed=steps)


@pytest.mark.parametrize("prediction_type", PRESERVES_VARIANCE)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_heun_takes_the_steps_of_diffusers(prediction_type, steps):
    """diffusers' sample is ours over the rate of the signal."""
    config = _schedule(prediction_type=prediction_type, set_alpha_to_one=True)
    plan, rates = solvers.plan(config, "heun", steps), schedule.rates(config)
    reference = diffusers.HeunDiscreteScheduler(prediction_type=prediction_type)
    reference.set_timesteps(steps)
    sigmas = np.append(rates[plan.timesteps, 1] / rates[plan.timesteps, 0], 0.0)
    reference.timesteps, reference.sigmas = torch.from_numpy(plan.timesteps), torch.from_numpy(sigmas)
    signal = np.append(rates[plan.timesteps, 0], 1.0)
    random = np.random.default_rng(steps)
    x = random.standard_normal((2, 8, 6, 3)).astype(np.float32)
    state, expected = solvers.start(plan, x), torch.from_numpy(x / signal[0])
    for call, t in enumerate(plan.timesteps):
        output = random.standard_normal(x.shape).astype(np.float32)
        expected = reference.step(torch.from_numpy(output), int(t), expected).prev_sample
        state = solvers.step(plan, call, state, output)
        scale = np.abs(expected.numpy()).max()
        np.testing.assert_allclose(state.x / signal[call + 1], expected, rtol=0, atol=2e-5 * scale, err_msg=f"{call}")


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_heun_of_flow_takes_the_steps_of_diffusers(steps):
    plan = solvers.plan(FLOW, "heun", steps)
    reference = diffusers.FlowMatchHeunDiscreteScheduler()
    reference.set_timesteps(steps)
    reference.timesteps = torch.from_numpy(plan.timesteps).float()
    reference.sigmas = torch.tensor(np.append((plan.timesteps + 1) / 1000, 0.0))
    _assert_same_steps(plan, reference, seed=steps, names=reference.timesteps)


@pytest.mark.parametrize("solver", ["ddim", "pndm"])
@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_each_step_ends_where_the_next_begins(solver, spacing, prediction_type):
    """A denoiser that knows the answer keeps the sample on the forward process: the noise level is that of `t`."""
    config = _schedule(timestep_spacing=spacing, set_alpha_to_one=True, prediction_type=prediction_type)
    rates, plan = schedule.rates(config), solvers.plan(config, solver, 30)  # does not divide 1000
    x, noise = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    state = solvers.start(plan, schedule.add_noise(x, noise, plan.timesteps[0], rates))
    for call, t in enumerate(plan.timesteps):
        np.testing.assert_allclose(state.x, schedule.add_noise(x, noise, t, rates), atol=1e-4)
        state = solvers.step(plan, call, state, objective.target(prediction_type, x, noise, t, rates))
    np.testing.assert_allclose(state.x, x, atol=1e-4)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_trailing_begins_at_the_noisiest_timestep(solver):
    assert solvers.plan(_schedule(timestep_spacing="trailing"), solver, 30).timesteps[0] == 999


MEAN, SPREAD = 0.5, 1.0


def _gaussian_error(solver, config, steps):
    """How far a solver lands from the exact flow, in spreads, where the data are normal and the denoiser perfect."""
    rates = schedule.rates(config)
    plan = solvers.plan(config, solver, steps)

    def spread_at(t):
        return np.hypot(rates[t, 0] * SPREAD, rates[t, 1])

    quantile = np.linspace(-2, 2, 9)
    state = solvers.start(plan, np.float32(rates[999, 0] * MEAN + spread_at(999) * quantile))
    for call, t in enumerate(plan.timesteps):
        signal, noise_rate = rates[t]
        noise = noise_rate * (np.asarray(state.x) - signal * MEAN) / spread_at(t) ** 2  # its expectation
        x0 = MEAN + signal * SPREAD**2 * (np.asarray(state.x) - signal * MEAN) / spread_at(t) ** 2
        output = objective.target(config.prediction_type, np.float32(x0), np.float32(noise), t, rates)
        state = solvers.step(plan, call, state, output)
    return np.abs((np.asarray(state.x) - MEAN) / SPREAD - quantile).max()  # the flow keeps every quantile


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
def test_more_steps_come_nearer_to_the_data(solver, prediction_type):
    config = _schedule(timestep_spacing="trailing", prediction_type=prediction_type, set_alpha_to_one=True)
    few = 5 if prediction_type == "flow_prediction" else 10  # at 10 DPM-Solver++'s error happens to cross zero
    errors = [_gaussian_error(solver, config, steps) for steps in (few, 40, 200)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02
    if solver in ("dpmsolver++", "heun") or (solver == "pndm" and prediction_type != "v_prediction"):
        assert errors[0] < 0.5 * _gaussian_error("ddim", config, few)


def test_every_solver_starts_from_pure_noise():
    for solver in solvers.SOLVERS:
        assert _gaussian_error(solver, ZERO_SNR, 50) < 0.1
        assert _gaussian_error(solver, FLOW, 50) < 0.1


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
    rates = schedule.rates(config)
    np.testing.assert_allclose(schedule.add_noise(x, noise, t, rates), reference.add_noise(*tensors), atol=1e-5)
    velocity = objective.target("v_prediction", x, noise, t, rates)
    np.testing.assert_allclose(velocity, reference.get_velocity(*tensors), atol=1e-5)


def test_flow_is_noised_as_diffusers_does():
    reference = diffusers.FlowMatchEulerDiscreteScheduler()
    x, noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4, 2)).astype(np.float32)
    t = np.array([0, 400, 998, 999])
    expected = reference.scale_noise(torch.from_numpy(x), torch.from_numpy(t + 1.0), torch.from_numpy(noise))
    rates = schedule.rates(FLOW)
    np.testing.assert_allclose(schedule.add_noise(x, noise, t, rates), expected, atol=1e-6)
    np.testing.assert_allclose(objective.target("flow_prediction", x, noise, t, rates), noise - x, atol=1e-6)
    assert tuple(rates[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
def test_reading_the_target_gives_back_data_and_noise(prediction_type):
    rates = schedule.rates(_schedule(prediction_type=prediction_type))
    random = np.random.default_rng(1)
    x, noise = random.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    t = np.array([3, 500, 900])
    x_t = schedule.add_noise(x, noise, t, rates)
    target = objective.target(prediction_type, x, noise, t, rates)
    reading = objective.reading(prediction_type, rates[t])
    found = np.einsum("bij,jbftc->ibftc", reading, np.stack([x_t, target]))
    np.testing.assert_allclose(found, np.stack([x, noise]), atol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_are_the_published_ones(gamma):
    """Those of diffusers' training scripts: min(SNR, gamma) over SNR, or over SNR + 1 for v."""
    reference = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(reference, torch.arange(1000)).numpy()
    rates = schedule.rates(_schedule())
    for prediction_type, over in (("epsilon", snr), ("v_prediction", snr + 1), ("sample", 1.0)):
        expected = np.minimum(snr, gamma) / over
        np.testing.assert_allclose(objective.min_snr_weights(prediction_type, rates, gamma), expected, rtol=1e-4)
    share = np.arange(1, 1001) / 1000
    expected = np.minimum(np.square((1 - share) / share), gamma) * share**2
    found = objective.min_snr_weights("flow_prediction", schedule.rates(FLOW), gamma)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_pure_noise_has_no_weight():
    """It says nothing of the data, and there is no NaN."""
    for config in (ZERO_SNR, FLOW, _schedule(**{**ZERO_SNR, "prediction_type": "sample"})):
        weights = objective.min_snr_weights(config.prediction_type, schedule.rates(config), 5.0)
        assert (weights[:-1] > 0).all() and weights[-1] == 0


@pytest.mark.parametrize(
    ("distribution", "quantiles"),
    [("uniform", [0.1, 0.25, 0.5, 0.75, 0.9]), ("logit_normal", [0.2173, 0.3375, 0.5, 0.6625, 0.7827])],
)
def test_drawn_timesteps_are_distributed_as_named(distribution, quantiles):
    drawn = np.asarray(timesteps.draw(distribution, jax.random.split(jax.random.key(0), 20_000), 1000))
    assert drawn.min() >= 0 and drawn.max() < 1000 and drawn.dtype == np.int32
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.25, 0.5, 0.75, 0.9]) / 1000, quantiles, atol=0.012)


@pytest.mark.parametrize("start", [0, 2**30])
def test_spread_timesteps_fill_every_quarter_alike(start):
    spread = np.asarray(timesteps.spread(start + jnp.arange(2000), 1000))
    assert spread.min() == 0 and spread.max() == 999
    filled = np.cumsum(np.eye(4)[spread // 250], axis=0)
    assert (np.ptp(filled, axis=1) <= 4).all()
    assert len(set(spread)) > 900
    if not start:
        assert (filled[[3, 7, 15]] == np.array([[1], [2], [4]])).all()


def test_flow_is_not_exchanged_with_diffusers(tmp_path):
    """Its schedulers count the timesteps of rectified flow from 1."""
    config = minimal.get_config()
    (tmp_path / "scheduler").mkdir()
    for content in ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"prediction_type": "flow_prediction"}):
        (tmp_path / schedulers.FILE).write_text(json.dumps(content))
        source = published.Published(tmp_path, read_pickle=lambda _: {})
        schedulers.read(source, config)
        with pytest.raises(UserError, match="FlowMatchEuler.* are not read|flow_prediction"):
            source.check()
    config.schedule.prediction_type = "flow_prediction"
    with pytest.raises(UserError, match="no scheduler of diffusers takes the steps"):
        schedulers.to_json(config)


def test_predicted_samples_are_exchanged_with_the_schedulers_that_know_them():
    config = minimal.get_config()
    config.schedule.prediction_type = "sample"
    for solver in ("ddim", "dpmsolver++"):
        config.sampling.solver = solver
        content = schedulers.to_json(config)
        reference = getattr(diffusers, content["_class_name"]).from_config(content)
        assert reference.config.prediction_type == "sample"
    config.sampling.solver = "pndm"
    with pytest.raises(UserError, match="does not read .*sample.*: take ddim"):
        schedulers.to_json(config)


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
        (lambda: objective.target("epsilom", np.ones(1), 0, 0, np.ones((1, 2))), 'did you mean "epsilon"'),
        (lambda: objective.reading("epsilom", np.ones(2)), 'did you mean "epsilon"'),
        (lambda: objective.min_snr_weights("epsilon", np.ones(2), -1.0), "must be positive, or 0"),
        (lambda: timesteps.draw("logitnormal", jax.random.split(jax.random.key(0), 2), 9), 'did you mean "logit_norm'),
    ],
)
def test_bad_settings_are_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
