"""Solvers of the probability-flow ODE: DDIM (which is Euler's method), Heun, PNDM and DPM-Solver++ 2M.

Timesteps and steps are those of diffusers. The next sample is a linear combination of the sample and of the denoiser's
latest outputs, with coefficients that follow from the noise schedule alone. So a solver is a table of coefficients,
worked out once in float64, and one `step` serves all. A new solver is a function that fills the table, entered in
`SOLVERS`.

    plan = solvers.plan(config.schedule, "pndm", steps=50)
    state = solvers.start(plan, noise)
    for call, t in enumerate(plan.timesteps):
        state = solvers.step(plan, call, state, denoiser(state.x, t))
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subtractive_jax.diffusion import objective
from subtractive_jax.diffusion.schedule import CLEAN, FLOW, Array, rates
from subtractive_jax.errors import UserError, unknown_name

SPACINGS = ("leading", "trailing", "linspace")
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_SMALLEST_SIGNAL = 2.0**-12  # diffusers' stand-in for a terminal SNR of zero, whose logarithm DPM-Solver++ takes


class Plan(NamedTuple):
    """What a solver does with each call of the denoiser, in order.

    A call at `x` is kept as the reading `read[0] x + read[1] output`; the next sample is `keep x` plus the `weights` of
    this and earlier readings, the latest first.

    Attributes:
      timesteps: int32 [calls].
      read: float32 [calls, 2].
      keep: float32 [calls].
      weights: float32 [calls, depth].
    """

    timesteps: np.ndarray
    read: np.ndarray
    keep: np.ndarray
    weights: np.ndarray


class State(NamedTuple):
    """A sample of any shape, and the latest readings [depth, *x.shape]."""

    x: Array
    readings: Array


def plan(schedule: Any, solver: str, steps: int, begin: int = 0) -> Plan:
    """The way of a sample from the noise of the first timestep to clean data.

    "leading" timesteps are what Stable Diffusion was sampled with; "trailing" ones start at the last timestep, which
    v-prediction wants (Lin et al. 2024, "Common Diffusion Noise Schedules"). A step goes exactly where the next one
    begins. In diffusers, DDIM and PNDM go to `t - num_train_timesteps // steps`, which is another place for "linspace",
    and for "trailing" when `steps` does not divide the timesteps.

    Args:
      schedule: `config.schedule`, with the names of diffusers' scheduler configs.
      solver: one of `SOLVERS`.
      steps: of the whole way; PNDM calls the denoiser once more, Heun twice a step but for the last.
      begin: how many of the first steps to leave out (SDEdit). Every solver then starts as at the top, without history.

    Raises:
      UserError: a number of steps that cannot be, or an unknown name.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    count, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    if not 1 <= steps <= count:
        raise UserError(f"{steps} sampling steps: choose between 1 and the schedule's {count} timesteps")
    # diffusers spaces DPM-Solver++ over one timestep more and leaves out the cleanest.
    rungs = steps + 1 if solver == "dpmsolver++" else steps
    if spacing == "leading":
        timesteps = np.arange(rungs)[::-1] * (count // rungs) + schedule.steps_offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(count, 0, -count / steps)) - 1
    elif spacing == "linspace":
        timesteps = np.round(np.linspace(0, count - 1, rungs))[::-1]
    else:
        raise unknown_name("timestep spacing", spacing, SPACINGS)
    timesteps = timesteps[:steps].astype(np.int32)
    if timesteps[0] >= count or (np.diff(timesteps) >= 0).any():
        raise UserError(
            f'{steps} sampling steps do not fit into {count} timesteps of spacing "{spacing}": choose fewer'
        )
    at = rates(schedule)
    levels = np.concatenate([at[timesteps], [CLEAN if schedule.set_alpha_to_one else at[0]]])
    return SOLVERS[solver](timesteps[begin:], levels[begin:], schedule.prediction_type)


def start(plan: Plan, x: Array) -> State:
    """Before the first call: `x` of any shape, at the noise of the first timestep."""
    return State(x, jnp.zeros((plan.weights.shape[1], *x.shape), x.dtype))


@jax.jit
def step(plan: Plan, call: int | Array, state: State, output: Array) -> State:
    """The next sample, from the denoiser's `output` at `state.x` and `plan.timesteps[call]`."""
    read, keep, weights = (jnp.asarray(table)[call] for table in (plan.read, plan.keep, plan.weights))
    reading = read[0] * state.x + read[1] * output
    readings = jnp.concatenate([reading[None], state.readings[:-1]])
    return State(keep * state.x + jnp.tensordot(weights, readings, axes=1, precision="highest"), readings)


def _table(timesteps: np.ndarray, read: Any, keep: np.ndarray, weights: np.ndarray) -> Plan:
    read = np.broadcast_to(read, (len(timesteps), 2))
    return Plan(timesteps, *(np.asarray(table, np.float32) for table in (read, keep, weights)))


def _transfer(levels: np.ndarray, prediction_type: str) -> np.ndarray:
    """DDIM's factors of sample and output from each of `levels` [rungs + 1, 2] to the next, [rungs, 2]."""
    return np.einsum("ti,tij->tj", levels[1:], objective.reading(prediction_type, levels[:-1]))


def _ddim(timesteps: np.ndarray, levels: np.ndarray, prediction_type: str) -> Plan:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12): Euler's step of x / signal, and of x itself for rectified flow."""
    transfer = _transfer(levels, prediction_type)
    return _table(timesteps, (0.0, 1.0), transfer[:, 0], transfer[:, 1:])


def _pndm(timesteps: np.ndarray, levels: np.ndarray, prediction_type: str) -> Plan:
    """PLMS: DDIM's step with an Adams-Bashforth mean of the outputs (Liu et al. 2022, eq. 9 and 12).

    As Stable Diffusion uses it (diffusers' `skip_prk_steps`): a second call where the first step arrived takes that
    step again with the mean of both outputs, and is then forgotten. With v-prediction it is v that is averaged, as in
    diffusers; since v turns from step to step, that is of first order only, and DPM-Solver++ is the better choice. With
    rectified flow it is Adams-Bashforth proper.
    """
    if len(timesteps) == 1:
        return _ddim(timesteps, levels, prediction_type)
    transfer = _transfer(levels, prediction_type)
    transfer = np.insert(transfer, 1, (1.0, transfer[0, 1]), axis=0)  # what taking the first step again would change
    weights = np.zeros((len(transfer), 5))
    weights[1, :2] = 1 / 2, -1 / 2
    for call in (0, *range(2, len(transfer))):
        lags = [lag for lag in range(5) if call - lag >= 0 and call - lag != 1][:4]
        weights[call, lags] = _ADAMS_BASHFORTH[len(lags) - 1]
    return _table(np.insert(timesteps, 1, timesteps[1]), (0.0, 1.0), transfer[:, 0], transfer[:, 1:] * weights)


def _dpmsolver_pp(timesteps: np.ndarray, levels: np.ndarray, prediction_type: str) -> Plan:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, "DPM-Solver++", algorithm 2): extrapolates the clean data it reads.

    The first step and the last, which ends at clean data whatever `set_alpha_to_one` says, are of first order.
    """
    levels = np.concatenate([np.maximum(levels[:-1], (_SMALLEST_SIGNAL, 0.0)), [CLEAN]])
    signal, noise = levels.T
    toward = signal[1:] - noise[1:] * signal[:-1] / noise[:-1]
    gaps = np.diff(np.log(signal[:-1] / noise[:-1]))  # of lambda, half the log of the signal-to-noise ratio
    beyond = np.zeros(len(timesteps))
    beyond[1:-1] = gaps[1:] / gaps[:-1] / 2
    weights = toward[:, None] * np.stack([1.0 + beyond, -beyond], axis=-1)
    return _table(timesteps, objective.reading(prediction_type, levels[:-1])[:, 0], noise[1:] / noise[:-1], weights)


def _heun(timesteps: np.ndarray, levels: np.ndarray, prediction_type: str) -> Plan:
    """Heun's method (Karras et al. 2022, algorithm 1 without churn): each step again, with the mean slope of both ends.

    Slopes are the noise in x / signal over noise / signal, as in diffusers' HeunDiscreteScheduler; the velocity with
    rectified flow, as in FlowMatchHeunDiscreteScheduler. The last step, to clean data, is Euler's.
    """
    if prediction_type == FLOW:
        read, transfer = np.broadcast_to((0.0, 1.0), levels[:-1].shape), _transfer(levels, FLOW)
    else:
        levels = np.concatenate([np.maximum(levels[:-1], (_SMALLEST_SIGNAL, 0.0)), levels[-1:]])
        read = objective.reading(prediction_type, levels[:-1])[:, 1]
        transfer = _transfer(levels, "epsilon")
    place = np.repeat(np.arange(len(timesteps)), 2)[1:]  # every place but the first is called twice
    corrects = np.arange(len(place)) % 2 == 1
    slope = np.where(corrects, transfer[place - 1, 1] / 2.0, transfer[place, 1])
    keep = np.where(corrects, 1.0, transfer[place, 0])
    return _table(timesteps[place], read[place], keep, np.stack([slope, np.where(corrects, -slope, 0.0)], axis=-1))


SOLVERS = {"ddim": _ddim, "heun": _heun, "pndm": _pndm, "dpmsolver++": _dpmsolver_pp}
