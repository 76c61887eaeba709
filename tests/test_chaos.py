"""A training run that is killed again and again ends as one that nobody disturbed, bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from subtractive_jax.training import checkpoint, metrics, run_folder

_ROOT = Path(__file__).parents[1]
_CHECKPOINT_EVERY, _KEPT = 3, 2
_FIGURES = ("step", "loss", "grad_norm", "learning_rate", "validation")  # beside them are times and memory


class _Run:
    """A run folder, and beside it the log of all processes that worked in it."""

    def __init__(self, world, folder, steps):
        self.folder, self.checkpoints, self._log = folder, folder / checkpoint.DIRECTORY, folder.with_suffix(".log")
        self._last = self.checkpoints / str(steps)
        self._command = [
            *(sys.executable, "-m", "launch.train", "--config=configs/minimal.py"),
            "--config.denoiser.block_out_channels=(32,)",  # as in worlds.small_config
            "--config.denoiser.down_block_types=('DownBlock2D',)",
            "--config.denoiser.up_block_types=('UpBlock2D',)",
            f"--config.init_from={world.parent}",
            "--config.mesh.fsdp=2",
            f"--config.train.steps={steps}",
            f"--config.train.checkpoint_every={_CHECKPOINT_EVERY}",
            f"--config.train.keep_checkpoints={_KEPT}",
            "--config.train.eval_every=10",
            "--config.train.preview_examples=0",
            *(f"--data_dir={world.data_dir}", f"--workdir={folder}"),
        ]
        compiled = folder.with_name("compiled")  # empty at first, so that kills find the compiler at work
        self._environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_COMPILATION_CACHE_DIR": str(compiled)}

    @contextlib.contextmanager
    def process(self):
        """A process that trains, until the context ends: then it is killed."""
        with open(self._log, "ab") as log:
            process = subprocess.Popen(self._command, cwd=_ROOT, env=self._environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def finish(self):
        with self.process() as process:
            assert process.wait(timeout=600) == 0, self.log()

    def log(self):
        return self._log.read_text()

    def steps(self):
        """How many the metrics tell of."""
        path = self.folder / metrics.FILE_NAME
        return path.read_text().count("\n") if path.exists() else 0

    def kept(self):
        return sorted(int(path.name) for path in self.checkpoints.glob("*") if path.name.isdigit())

    def unfinished(self):
        return list(self.checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def arrays(self):
        with ocp.PyTreeCheckpointer() as reader:
            return [reader.restore(self._last / item) for item in ("train", "ema")]

    def figures(self):
        lines = map(json.loads, (self.folder / metrics.FILE_NAME).read_text().splitlines())
        return [{name: value for name, value in line.items() if name.startswith(_FIGURES)} for line in lines]


def _wait_until(condition, process, run):
    while not condition():
        assert process.poll() is None, run.log()
        time.sleep(0.002)


def _wait_for_the_loop(process, run, until=np.inf):
    before = run.steps()  # it begins with dropping those that no checkpoint holds
    _wait_until(lambda: run.steps() != before or time.monotonic() > until, process, run)


def _kill_at_random(run, draw):
    """After some steps, or before: while it imports, restores or compiles."""
    steps, seconds = draw.integers(1, 6 * _CHECKPOINT_EVERY), draw.choice([np.inf, draw.uniform(0.0, 20.0)])
    until = time.monotonic() + seconds
    with run.process() as process:
        _wait_for_the_loop(process, run, until)
        since = run.steps()
        _wait_until(lambda: run.steps() >= since + steps or time.monotonic() > until, process, run)
    assert process.returncode == -signal.SIGKILL, run.log()


def _kill_while_saving(run):
    """Between the first byte of a checkpoint and its commit, when there are others before it."""
    with run.process() as process:
        _wait_for_the_loop(process, run)  # what kills left unfinished is gone by then
        while len(run.kept()) < _KEPT or not run.unfinished():
            process.send_signal(signal.SIGCONT)
            _wait_until(lambda: len(run.kept()) >= _KEPT and run.unfinished(), process, run)
            process.send_signal(signal.SIGSTOP)  # to look whether it came in time
            time.sleep(0.05)
    assert process.returncode == -signal.SIGKILL and run.unfinished(), run.log()


def _damage_newest(run):
    """As after a power failure: a file is there, but its end is not."""
    files = [path for path in (run.checkpoints / str(run.kept()[-1])).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.slow  # one kill: test_training.py
def test_killed_at_random_moments(world, tmp_path):
    kills = 10
    killed, undisturbed = (_Run(world, tmp_path / name, steps=12 * kills) for name in ("killed", "undisturbed"))
    draw = np.random.default_rng(kills)
    saving = draw.integers(1, kills)
    for number in range(kills):
        if number == saving:
            _kill_while_saving(killed)
            _damage_newest(killed)
        else:
            _kill_at_random(killed, draw)
        print(f"kill {number + 1}: {killed.steps()} steps done, checkpoints {killed.kept()}, {killed.unfinished()}")
    killed.finish()
    undisturbed.finish()

    jax.tree.map(np.testing.assert_array_equal, killed.arrays(), undisturbed.arrays())
    assert killed.figures() == undisturbed.figures()
    assert [line["step"] for line in killed.figures()] == [*range(1, 12 * kills + 1)]
    assert killed.kept() == undisturbed.kept() and not killed.unfinished()
    assert killed.log().count("is damaged") == 1


def test_killed_before_its_config_was_whole(tmp_path):
    (tmp_path / f".{run_folder.CONFIG}").write_text('{"stage": "sub')
    assert run_folder.read_config(tmp_path) is None
