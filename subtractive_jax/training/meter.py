"""Where a training's time goes, how fast it is, and what it tells of that while it runs."""

import contextlib
import datetime
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax
from tqdm import tqdm

from subtractive_jax.chips import peak

T = TypeVar("T")
_SHOWN = ("loss", "validation/loss")


class Meter:
    """Times the steps between two logs.

    Steps run asynchronously, so they are timed together: from one log, where their losses are fetched, to the next,
    less what was spent beside them.

    The first interval begins where the meter is made.

    Args:
      batch_size: examples of a step over all devices.
      step_flops: model FLOPs of a step over all devices.
      devices: that share a step.
    """

    def __init__(self, batch_size: int, step_flops: int, devices: Sequence[jax.Device]) -> None:
        self._batch_size, self._step_flops = batch_size, step_flops
        known = [rate for rate in (peak(device.device_kind) for device in devices) if rate]
        self._peak = sum(known) if len(known) == len(devices) else None
        self._steps, self._beside_total = 0, 0.0
        self._seconds_per_step = 0.0
        self.begin()

    def begin(self) -> None:
        """Begins an interval; called after the first step was started, it keeps its compilation out of the figures."""
        self._since, self._waited, self._beside = time.perf_counter(), 0.0, dict[str, float]()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time that each takes to come is counted."""
        iterator = iter(batches)
        while True:
            since = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - since
            yield batch

    @contextlib.contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Time that is no step's, such as `evaluation`; the steps before must be done."""
        since = time.perf_counter()
        yield
        seconds = time.perf_counter() - since
        self._beside[what] = self._beside.get(what, 0.0) + seconds
        self._beside_total += seconds

    def figures(self, steps: int) -> dict[str, float]:
        """What the `steps` since the last call cost, all of them done, and what was done beside them.

        `data_wait` is the share of the steps' time in which no batch was ready for the host; devices that still had
        steps to do did not notice. `utilisation` is left out for devices whose peak is not known, and where the backend
        does not count its memory that of the process stands in.
        """
        elapsed = time.perf_counter() - self._since
        stepping = elapsed - sum(self._beside.values())
        self._steps += steps
        self._seconds_per_step = stepping / steps
        rate = self._step_flops * steps / stepping
        figures = dict(
            seconds_per_step=self._seconds_per_step,
            examples_per_second=self._batch_size * steps / stepping,
            data_wait=self._waited / stepping,
            flops_per_second=rate,
        )
        if self._peak:
            figures["utilisation"] = rate / self._peak
        figures |= {f"{what}_share": seconds / elapsed for what, seconds in self._beside.items()}
        self.begin()
        return figures | _memory()

    def seconds_left(self, steps: int) -> float:
        """For so many more steps, at the latest pace and with as much beside them as so far."""
        return steps * (self._seconds_per_step + self._beside_total / max(self._steps, 1))


def _memory() -> dict[str, float]:
    """The most that any of this process's devices, or the process, ever held, in bytes."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return dict(device_memory_bytes=max(each["peak_bytes_in_use"] for each in stats))
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(host_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def report(bar: tqdm, step: int, total: int, scalars: dict[str, float], seconds_left: float) -> None:
    """Progress for people: beside the bar on a terminal, as a line elsewhere."""
    shown = [f"{name} {scalars[name]:.4f}" for name in _SHOWN if name in scalars]
    costs = [f"data wait {scalars['data_wait']:.1%}"]
    if "utilisation" in scalars:
        costs.append(f"utilisation {scalars['utilisation']:.1%}")
    if not bar.disable:
        bar.set_postfix_str("  ".join(shown + costs))
        return
    rate = f"{scalars['examples_per_second']:.1f} examples/s"
    left = f"{datetime.timedelta(seconds=round(seconds_left))} left"
    print("  ".join([f"step {step}/{total}", *shown, rate, *costs, left]), flush=True)
