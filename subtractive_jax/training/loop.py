"""The training loop, for every stage. Read from top to bottom."""

import contextlib
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from tqdm import tqdm

from subtractive_jax.errors import UserError
from subtractive_jax.training import (
    checkpoint,
    flops,
    limits,
    metrics,
    partitioning,
    preview,
    profile,
    reader,
    run_folder,
    stages,
)
from subtractive_jax.training import state as training_state
from subtractive_jax.training import steps as compiled
from subtractive_jax.training.meter import Meter, report
from subtractive_jax.training.train_step import Batch, means
from subtractive_jax.weights import model_folder

_INHERITED_CARD = "Parts that this run takes over unchanged from its parent model. Made by launch.train.\n"


def train(
    config: ml_collections.ConfigDict,
    data_dir: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    profile_steps: int = 0,
) -> training_state.State:
    """Trains `config.stage` for `config.train.steps` updates, or until SIGTERM; returns the state.

    The run begins, in this order of preference, from
      1. the newest checkpoint in `workdir`: bit-exactly where it stopped;
      2. the model that `config.init_from` names: its weights only;
      3. fresh parameters.

    Args:
      data_dir: the folder that holds `windows/` and `latents/`.
      workdir: the run folder; shared by all processes.
      profile_steps: steps to write a trace of, see `profile.Trace`.

    Raises:
      UserError: bad config, dataset, parent model or run folder; a loss that is not finite; a disk that fills up as
        a checkpoint is written.
    """
    limits.check(config)
    workdir = Path(workdir)
    is_main = jax.process_index() == 0

    # Set-up: a run folder with the resolved config and the parent's parts, before the first step.
    saved = run_folder.read_config(workdir)
    first_step = checkpoint.latest(workdir)
    if first_step is None:
        start, inherited = stages.prepare(config, str(data_dir))
    else:
        run_folder.check_unchanged(workdir, saved, config)
        start = {}
        run_folder.adopt_scales(config, saved)

    # Mesh.
    mesh = partitioning.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    batch_size = config.train.batch_size
    partitioning.check_batch_size(batch_size, mesh, config.train.accumulation_steps)
    batch_sharding = partitioning.batch_sharding(mesh)

    _wait_for_all("checked")
    if is_main:
        run_folder.write_config(workdir, config)
        if first_step is None:
            shutil.rmtree(workdir / run_folder.INHERITED, ignore_errors=True)  # of a run killed before it began
            model_folder.save(workdir / run_folder.INHERITED, inherited, dtype="float32", card=_INHERITED_CARD)
    _wait_for_all("written")
    if first_step is not None or jax.process_count() > 1:  # of all processes' new tokenizers, the written one counts
        inherited = model_folder.load(workdir / run_folder.INHERITED)

    # Data: a batch is a function of the step, so the position in the data is the step.
    stage = stages.build(config, str(data_dir), inherited)
    rows = partitioning.local_rows(batch_sharding, batch_size)
    batches = reader.Batches(stage.train, batch_size, config.seed, rows)
    position = {"dataset": stage.train.fingerprint, "batch_size": batch_size}

    def put(batch: dict[str, np.ndarray]) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(batch_sharding, array, (batch_size, *array.shape[1:]))
            for name, array in batch.items()
        }

    # State and steps.
    steps = compiled.build(config, stage.task, mesh, start)
    if is_main:
        table = parameter_overview.get_parameter_overview(steps.abstract["params"], include_stats=False)
        (workdir / "parameters.txt").write_text(f"{table}\n")

    # Restore, or initialise: born sharded.
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, config.train.keep_every)
    if first_step is None:
        start = jax.device_put(start, partitioning.shardings(start, mesh, ()))
        state = steps.init(start)
    else:
        state, saved_position = checkpoints.restore(steps.abstract)
        for name, now in position.items():
            if saved_position[name] != now:
                raise UserError(
                    f"{workdir} was trained on other data: {name} was {saved_position[name]}, now {now}; "
                    "give the dataset it began with, or another --workdir"
                )
    first_step = int(state["step"])
    del start

    def validate() -> dict[str, float]:
        """On the same (example, timestep, noise) every time: `validation` of the EMA, `validation_raw` without it."""
        sums: dict[str, list[Any]] = {"ema": [], "params": []}
        examples = reader.evaluation_batches(stage.validation, batch_size, rows, config.train.eval_examples)
        for batch in map(put, examples):
            for name, results in sums.items():
                results.append(steps.evaluate(state[name], batch))
        return {
            f"{prefix}/{figure}": value
            for prefix, name in (("validation", "ema"), ("validation_raw", "params"))
            for figure, value in means(jax.device_get(sums[name])).items()
        }

    # Loop.
    step_flops = flops.of_step(stage.task.loss, steps.abstract["params"], steps.batch, config.train)
    meter = Meter(batch_size, step_flops, mesh.devices.flatten().tolist())
    samples = preview.build(config, str(data_dir), inherited, workdir)
    total, every = config.train.steps, config.train
    schedule = training_state.learning_rate(config)
    step, pending = first_step, []
    if is_main:
        _print_header(config, mesh, stage, steps.abstract, first_step)
    with (
        checkpoints,
        # Several processes agree on where to stop through JAX, whose handler of SIGTERM must not be replaced.
        _sigterm_flag() if jax.process_count() == 1 else contextlib.nullcontext() as terminated,
        metrics.open_log(workdir, first_step) if is_main else contextlib.nullcontext() as log,
        profile.Trace(workdir, profile_steps) as trace,
        tqdm(total=total, initial=first_step, unit="step", disable=not (is_main and sys.stderr.isatty())) as bar,
    ):
        for batch in meter.waiting(batches.stream(first_step, total)):
            state, sums = steps.train(state, put(batch))
            if step == first_step:
                meter.begin()  # compiled by now
            pending.append(sums)
            step += 1
            bar.update()
            trace.after(sums)
            stop = terminated() if terminated else checkpoints.reached_preemption(step)
            last = stop or step == total

            saves = last or step % every.checkpoint_every == 0
            evaluates = step == total or step % every.eval_every == 0
            if saves or evaluates or step % every.log_every == 0:  # no save before the losses were seen to be finite
                scalars, shown = means(jax.device_get(pending)), preview.Preview({}, {})
                _check_finite(scalars, step - len(pending), step, workdir)
                if evaluates:
                    with meter.beside("evaluation"):
                        scalars |= validate()
                        shown = samples(step, state["ema"])
                scalars |= dict(learning_rate=float(schedule(step - 1))) | meter.figures(len(pending))
                if log is not None:
                    log(step, scalars, shown.images, shown.sounds)
                    report(bar, step, total, scalars, meter.seconds_left(total - step))
                pending = []
                if saves:
                    with meter.beside("checkpoint"):
                        checkpoints.save(state, position)
            if stop:
                break
    return state


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _check_finite(scalars: dict[str, float], after: int, step: int, workdir: Path) -> None:
    bad = [name for name, value in scalars.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{workdir}: {' and '.join(bad)} not finite between steps {after + 1} and {step}; the last checkpoint is "
            "kept. Lower train.learning_rate in a new --workdir, or run again to go on from the checkpoint"
        )


@contextlib.contextmanager
def _sigterm_flag() -> Iterator[Any]:
    """Yields a function that tells whether SIGTERM came, so that the loop can save and leave."""
    came = False

    def handler(*_: Any) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_header(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, stage: Any, abstract: Any, first_step: int
) -> None:
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract["params"]))
    axes = " x ".join(f"{name}={count}" for name, count in mesh.shape.items())
    print(
        f"{config.name}:{config.stage}: {size / 1e6:.2f} M parameters on {mesh.size} {jax.devices()[0].platform} "
        f"device(s) ({axes}), batches of {config.train.batch_size}, {len(stage.train)} training and "
        f"{len(stage.validation)} validation examples, steps {first_step} to {config.train.steps}",
        flush=True,
    )
