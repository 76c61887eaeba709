"""A trace of a few training steps: what the devices and the host do when, as XLA saw it.

To look at it, drop the file `RUN/profile/plugins/profile/*/*.trace.json.gz` on https://ui.perfetto.dev, which needs
nothing installed, or run `tensorboard --logdir RUN` with the package xprof, which also sums up by operation.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

_WARM_UP = 10  # steps: the first compiles, the next fill the queues


class Trace:
    """Writes a trace of `steps` steps to `run_dir/profile`, after the first ten of this start; of none for 0.

    In a run of several processes, the first one's devices are traced.
    """

    def __init__(self, run_dir: str | os.PathLike[str], steps: int) -> None:
        self._folder = Path(run_dir) / "profile"
        self._last = _WARM_UP + steps if steps and jax.process_index() == 0 else 0
        self._started = 0
        self._trace, self._step = contextlib.ExitStack(), contextlib.ExitStack()

    def after(self, results: Any) -> None:
        """To be called when a step was started; `results` is any of what it returns."""
        self._started += 1
        if not _WARM_UP <= self._started <= self._last:
            return
        if self._started == _WARM_UP:
            jax.block_until_ready(results)
            jax.profiler.start_trace(self._folder)
            self._trace.callback(jax.profiler.stop_trace)
        self._step.close()
        if self._started < self._last:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=self._started))
            return
        jax.block_until_ready(results)
        self._trace.close()
        print(f"wrote a trace of {self._last - _WARM_UP} steps to {self._folder}", flush=True)

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._step.close()
        self._trace.close()
        if self._started < min(_WARM_UP, self._last):
            print(f"no trace was written: the run ended before its step {_WARM_UP}", flush=True)
