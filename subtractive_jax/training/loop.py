"""The training loop, for every stage. Read from top to bottom."""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from subtractive_jax.errors import UserError
from subtractive_jax.training import checkpoint, metrics, partitioning, reader, run_folder, stages
from subtractive_jax.training import state as training_state
from subtractive_jax.training.train_step import Batch, make_eval_step, make_train_step, means
from subtractive_jax.weights import model_folder

_INHERITED_CARD = "Parts that this run takes over unchanged from its parent model. Made by launch.train.\n"


def train(
    config: ml_collections.ConfigDict, data_dir: str | os.PathLike[str], workdir: str | os.PathLike[str]
) -> training_state.State:
    """Trains `config.stage` for `config.train.steps` updates, or until SIGTERM; returns the state.

    The run begins, in this order of preference, from
      1. the newest checkpoint in `workdir`: bit-exactly where it stopped;
      2. the model that `config.init_from` names: its weights only;
      3. fresh parameters.

    Args:
      data_dir: the folder that holds `windows/` and `latents/`.
      workdir: the run folder; shared by all processes.

    Raises:
      UserError: bad config, dataset, parent model or run folder; or a loss that is not finite.
    """
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
    mesh = partitioning.make_mesh(config.mesh.data, config.mesh.fsdp)
    batch_size = config.train.batch_size
    partitioning.check_batch_size(batch_size, mesh)
    batch_sharding = partitioning.batch_sharding(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

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

    # State: born sharded.
    optimizer = training_state.make_optimizer(config)
    init = training_state.make_init(stage.init_params, optimizer, config.seed)
    abstract = jax.eval_shape(init, start)
    state_shardings = partitioning.shardings(abstract, mesh, partitioning.RULES[stage.part])
    if is_main:
        table = parameter_overview.get_parameter_overview(abstract["params"], include_stats=False)
        (workdir / "parameters.txt").write_text(f"{table}\n")

    # Restore, or initialise.
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints)
    if first_step is None:
        first_step = 0
        start = jax.device_put(start, partitioning.shardings(start, mesh, ()))
        state = jax.jit(init, out_shardings=state_shardings)(start)
    else:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            state_shardings,
        )
        state, saved_position = checkpoints.restore(first_step, target)
        for name, now in position.items():
            if saved_position[name] != now:
                raise UserError(
                    f"{workdir} was trained on other data: {name} was {saved_position[name]}, now {now}; "
                    "give the dataset it began with, or another --workdir"
                )
    del start

    # Step.
    train_step = jax.jit(
        make_train_step(stage.loss, optimizer, config.train.ema_decay, config.train.only),
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
    eval_step = jax.jit(
        make_eval_step(stage.loss),
        in_shardings=(state_shardings["ema"], batch_sharding),
        out_shardings=replicated,
    )

    def validate() -> dict[str, float]:
        """Of the EMA parameters, on the same (example, timestep, noise) every time."""
        examples = reader.evaluation_batches(stage.validation, batch_size, rows, config.train.eval_examples)
        sums = jax.device_get([eval_step(state["ema"], put(batch)) for batch in examples])
        return {f"validation/{name}": value for name, value in means(sums).items()} if sums else {}

    # Loop.
    total, every = config.train.steps, config.train
    schedule = training_state.learning_rate(config)
    step, pending = first_step, []
    if is_main:
        _print_header(config, mesh, stage, abstract, first_step)
    with (
        checkpoints,
        _sigterm_flag() as terminated,
        metrics.open_log(workdir, first_step) if is_main else contextlib.nullcontext() as log,
        tqdm(total=total, initial=first_step, unit="step", disable=not (is_main and sys.stderr.isatty())) as bar,
    ):
        since = time.perf_counter()
        for batch in batches.stream(first_step, total):
            state, sums = train_step(state, put(batch))
            pending.append(sums)
            step += 1
            bar.update()
            stop = terminated() if jax.process_count() == 1 else checkpoints.reached_preemption(step)
            last = stop or step == total

            saves = last or step % every.checkpoint_every == 0
            evaluates = step == total or step % every.eval_every == 0
            if saves or evaluates or step % every.log_every == 0:  # no save before the losses were seen to be finite
                scalars = means(jax.device_get(pending))
                seconds = (time.perf_counter() - since) / len(pending)
                _check_finite(scalars, step - len(pending), step, workdir)
                scalars |= dict(learning_rate=float(schedule(step - 1)))
                scalars |= dict(seconds_per_step=seconds, examples_per_second=batch_size / seconds)
                if evaluates:
                    scalars |= validate()
                if log is not None:
                    log(step, scalars)
                    _report(bar, step, total, scalars)
                pending = []
                if saves:
                    checkpoints.save(state, position)
                since = time.perf_counter()
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


def _report(bar: tqdm, step: int, total: int, scalars: dict[str, float]) -> None:
    shown = "  ".join(f"{name} {scalars[name]:.4f}" for name in ("loss", "validation/loss") if name in scalars)
    if not bar.disable:
        bar.set_postfix_str(shown)
        return
    minutes = (total - step) * scalars["seconds_per_step"] / 60
    rate = scalars["examples_per_second"]
    print(f"step {step}/{total}  {shown}  {rate:.1f} examples/s  {minutes:.0f} min left", flush=True)
