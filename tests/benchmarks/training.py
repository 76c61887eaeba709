"""What the training loop adds to its compiled step, and how near the step comes to the device's peak.

python -m tests.benchmarks.training [--cases=loop,peak] [--rounds=3] [--steps=10] [--batch_size=32]

- `loop`: `tiny`, stage `subtractive`, on a dataset of noise of real size. In turn, in one process: the loop as
  `launch.train` runs it, and the compiled step alone, on a batch that is on the device already. Printed are medians
  over the rounds: the loop's time a step over that of the step alone; the share of it that waits for input; how long a
  checkpoint holds the loop up, and how much its writing slows the steps after it, as shares of the time from one
  checkpoint to the next at the default interval. CPU seconds count all threads; other processes disturb them less.
- `peak`: `riffusion`, which is Stable Diffusion 1.5, stage `subtractive`, in bfloat16 on one GPU: model FLOPs a second
  of the compiled step as a share of what the datasheet promises.

PyTorch and diffusers do the same step in `tests/benchmarks/against_pytorch.py`, case `step`.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import app, flags

from configs import riffusion, tiny
from subtractive_jax import chips
from subtractive_jax.training import flops, latent_stages, loop, metrics, partitioning
from subtractive_jax.training import steps as compiled
from subtractive_jax.weights import model_folder
from tests import synthetic

Clocks = np.ndarray  # [2]: wall and CPU seconds
_PARENT = "tiny"
_EXAMPLES = 512
_WARM_UP = 2  # steps

_CASES = flags.DEFINE_list("cases", ["loop", "peak"], "What to measure.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each program runs.", 1)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps of each measurement.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples of a step.", 1)


def _clocks() -> Clocks:
    return np.array([time.perf_counter(), time.process_time()])


class _Alone:
    """The compiled step, and nothing around it, of fresh parameters and noise."""

    def __init__(self, config: Any) -> None:
        task = latent_stages.task(config)
        self._steps = compiled.build(config, task, partitioning.make_mesh(-1), {})
        self.flops = flops.of_step(task.loss, self._steps.abstract["params"], self._steps.batch, config.train)
        self._state = self._steps.init({})
        draw = np.random.default_rng(0)
        self._batch = {
            name: jax.device_put((draw.random(leaf.shape) < 0.5).astype(leaf.dtype), leaf.sharding)
            for name, leaf in self._steps.batch.items()
        }
        self.measure(_WARM_UP)

    def measure(self, count: int) -> Clocks:
        """A step's."""
        jax.block_until_ready(self._state)
        since = _clocks()
        for _ in range(count):
            self._state, sums = self._steps.train(self._state, self._batch)
        jax.block_until_ready((self._state, sums))
        return (_clocks() - since) / count


def _in_the_loop(config: Any, data_dir: str, count: int) -> tuple[Clocks, dict[str, float]]:
    """A step's clocks in the loop, and its figures: of `count` steps before a checkpoint, and as many after it."""
    config.train.update(dict(steps=3 * count, log_every=count, checkpoint_every=2 * count))
    at_log: list[Clocks] = []
    open_log = metrics.open_log

    @contextlib.contextmanager
    def clocked(*arguments: Any) -> Iterator[Any]:
        with open_log(*arguments) as log:

            def write(*figures: Any) -> None:
                at_log.append(_clocks())
                log(*figures)

            yield write

    with tempfile.TemporaryDirectory() as run, mock.patch.object(metrics, "open_log", clocked):
        loop.train(config, data_dir, run)
        _, quiet, saving = map(json.loads, (Path(run) / metrics.FILE_NAME).read_text().splitlines())
    beside = sum(value for name, value in saving.items() if name.endswith("_share"))
    elapsed = saving["seconds_per_step"] * count / (1.0 - beside)
    return (at_log[1] - at_log[0]) / count, dict(
        wait=quiet["data_wait"],
        blocked=saving["checkpoint_share"] * elapsed,
        slowed=(saving["seconds_per_step"] - quiet["seconds_per_step"]) * count,
    )


def _loop() -> None:
    config = tiny.get_config()
    config.init_from = _PARENT
    config.train.update(
        dict(warmup_steps=1, batch_size=_BATCH_SIZE.value, eval_examples=_BATCH_SIZE.value, preview_examples=0)
    )
    interval, count = config.train.checkpoint_every, _STEPS.value
    with tempfile.TemporaryDirectory() as data_dir:
        synthetic.write_latents(Path(data_dir), config, Path(model_folder.resolve(_PARENT)), train=_EXAMPLES)
        alone = _Alone(config)
        _, first = _in_the_loop(config, data_dir, 1)
        rounds = [(*_in_the_loop(config, data_dir, count), alone.measure(count)) for _ in range(_ROUNDS.value)]
    ours, bare = (np.median([clocks[side] for clocks in rounds], axis=0) for side in (0, 2))
    ratio = np.median([clocks[0] / clocks[2] for clocks in rounds], axis=0)
    figures = {name: statistics.median(each[1][name] for each in rounds) for name in first}
    between = interval * ours[0]
    print(
        f"tiny, batch {_BATCH_SIZE.value}, a step: {ours[0]:.3f} s in the loop, {bare[0]:.3f} s alone, ratio "
        f"{ratio[0]:.3f} ({ours[1]:.2f} and {bare[1]:.2f} CPU s, ratio {ratio[1]:.3f})\n"
        f"  waits for input: {figures['wait']:.2%}\n"
        f"  a checkpoint: holds the loop up for {figures['blocked']:.2f} s ({first['blocked']:.2f} s the first of a "
        f"process), slows the next {count} steps by {figures['slowed']:.2f} s in all; every {interval} steps "
        f"{figures['blocked'] / between:.3%} and {figures['slowed'] / between:.3%}",
        flush=True,
    )


def _peak() -> None:
    (device, *_) = jax.devices()
    promised = chips.peak(device.device_kind)
    if device.platform != "gpu" or promised is None:
        print(f"riffusion: not measured, since {device.device_kind} is no GPU whose peak is known")
        return
    config = riffusion.get_config()
    config.train.batch_size = _BATCH_SIZE.value
    alone = _Alone(config)
    seconds = statistics.median(alone.measure(_STEPS.value)[0] for _ in range(_ROUNDS.value))
    print(
        f"riffusion, bfloat16, batch {_BATCH_SIZE.value} on {device.device_kind}: {seconds:.3f} s a step, "
        f"{alone.flops / seconds / 1e12:.0f} TFLOP/s, {alone.flops / seconds / promised:.1%} of its peak"
    )


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # each round would compile the same step
        for case in _CASES.value:
            {"loop": _loop, "peak": _peak}[case]()


if __name__ == "__main__":
    app.run(main)
