"""diffusers' `scheduler_config.json` <-> `config.schedule` and `config.sampling.solver`."""

from typing import Any

from ml_collections import ConfigDict

from subtractive_jax.diffusion import schedule, solvers
from subtractive_jax.errors import UserError
from subtractive_jax.weights.published import Fields, Published

FILE = "scheduler/scheduler_config.json"
_CLASSES = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}
_KNOWN = {
    "beta_schedule": schedule.BETA_SCHEDULES,
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": solvers.SPACINGS,
}
# What the published classes do where a file says nothing.
_DEFAULTS: dict[str | None, dict[str, Any]] = {
    "ddim": dict(set_alpha_to_one=True, timestep_spacing="leading"),
    "pndm": dict(skip_prk_steps=False, set_alpha_to_one=False, timestep_spacing="leading"),
    "dpmsolver++": dict(final_sigmas_type="zero", timestep_spacing="linspace"),
    None: {},
}
_FIXED: dict[str | None, dict[str, Any]] = {
    "ddim": dict(clip_sample=False, thresholding=False),
    "pndm": dict(skip_prk_steps=True),
    "dpmsolver++": dict(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
        thresholding=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
    ),
    None: {},
}


def read(source: Published, config: ConfigDict) -> tuple[dict[str, Any], str]:
    """The noise schedule and the solver that a published folder names.

    A solver that is not ours leaves `config.sampling.solver` as it is, and of the schedule what only a solver reads.
    """
    content = source.config(FILE)
    if content is None:
        return config.schedule.to_dict(), config.sampling.solver
    if str(content.get("_class_name")).startswith("FlowMatch"):
        source.note(FILE, f"{content['_class_name']}: published models of rectified flow are not read")
    solver = next((solver for solver, name in _CLASSES.items() if name == content.get("_class_name")), None)
    # As `StableDiffusionPipeline` does: a file without `steps_offset` means 1, and samples are never clipped.
    content = {"steps_offset": 1, **_DEFAULTS[solver], **content, "clip_sample": False}
    if solver == "dpmsolver++":
        content["set_alpha_to_one"] = content["final_sigmas_type"] == "zero"
    taken = source.fields(
        FILE,
        content,
        Fields(
            taken=dict(
                num_train_timesteps=1000,
                beta_start=0.0001,
                beta_end=0.02,
                beta_schedule="linear",
                prediction_type="epsilon",
                timestep_spacing=config.schedule.timestep_spacing,
                steps_offset=0,
                set_alpha_to_one=config.schedule.set_alpha_to_one,
                rescale_betas_zero_snr=False,
            ),
            fixed=dict(_FIXED[solver], trained_betas=None),
        ),
        strict=False,
    )
    for key, known in _KNOWN.items():
        if taken[key] not in known:
            source.note(FILE, f'another noise schedule: {key} is "{taken[key]}" (known: {", ".join(known)})')
    return taken, solver or config.sampling.solver


def to_json(config: ConfigDict) -> dict[str, Any]:
    """`scheduler_config.json` of the scheduler that takes our solver's steps.

    Raises:
      UserError: the model predicts flow, for whose timesteps diffusers counts from 1; its solver is Heun's, whose
        namesake there takes other timesteps; or PNDM, whose namesake does not know what it predicts.
    """
    if config.schedule.prediction_type == schedule.FLOW:
        raise UserError(
            f'no scheduler of diffusers takes the steps of schedule.prediction_type="{schedule.FLOW}" at the timesteps '
            "the model knows: ship the model folder itself"
        )
    solver = config.sampling.solver
    if solver not in _CLASSES:
        raise UserError(
            f'no scheduler of diffusers takes the steps of sampling.solver="{solver}": {", ".join(_CLASSES)} do'
        )
    if solver == "pndm" and config.schedule.prediction_type == "sample":
        raise UserError('PNDMScheduler of diffusers does not read schedule.prediction_type="sample": take ddim')
    content = {"_class_name": _CLASSES[solver], **config.schedule.to_dict(), **_FIXED[solver], "trained_betas": None}
    if solver == "dpmsolver++":
        content["final_sigmas_type"] = "zero" if content.pop("set_alpha_to_one") else "sigma_min"
    if solver == "pndm" and not content["rescale_betas_zero_snr"]:
        del content["rescale_betas_zero_snr"]  # a field that class does not know
    return content
