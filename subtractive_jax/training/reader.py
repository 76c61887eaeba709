"""Batches as a pure function of the step: resuming needs no iterator state, and hosts read only their rows."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

Array = np.ndarray
_PREFETCH = 4  # batches


class Source(Protocol):
    """What batches are drawn from: one split of a dataset, as one stage sees it."""

    fingerprint: str  # of the content and its order

    def __len__(self) -> int: ...

    def batch(self, examples: Array, draws: Sequence[np.random.Generator]) -> dict[str, Array]:
        """Arrays `[len(examples), ...]` for these examples; `draws[i]` makes example i's random choices."""
        ...


class Batches:
    """Endless shuffled batches: epochs are permutations by (seed, epoch), joined end to end.

    The global batch at a step is the same for any number of hosts.

    Args:
      source: where examples come from.
      batch_size: examples over all hosts.
      seed: of the shuffling and of the examples' random choices.
      rows: which rows of the global batch this host supplies.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rows: Array) -> None:
        self._source, self._batch_size, self._seed, self._rows = source, batch_size, seed, rows
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def _example(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._source))
        if epoch != self._epoch:
            self._permutation = np.random.default_rng((self._seed, epoch)).permutation(len(self._source))
            self._epoch = epoch
        return int(self._permutation[offset])

    def examples(self, step: int) -> Array:
        """The examples of this host's rows of the batch for update `step` (counted from 0)."""
        start = step * self._batch_size
        return np.array([self._example(start + row) for row in self._rows])

    def batch(self, step: int) -> dict[str, Array]:
        """This host's rows of the batch for update `step`."""
        draws = [np.random.default_rng((self._seed, step, row)) for row in self._rows]
        batch = self._source.batch(self.examples(step), draws)
        return batch | dict(row=self._rows.astype(np.int32), valid=np.ones(len(self._rows), bool))

    def stream(self, start: int, stop: int) -> Iterator[dict[str, Array]]:
        """The batches of updates `start` to `stop`, read ahead by a thread."""
        return _read_ahead(self.batch, start, stop)


def evaluation_batches(source: Source, batch_size: int, rows: Array, limit: int) -> Iterator[dict[str, Array]]:
    """At most `limit` examples, evenly spaced, once and in order, with the same random choices every time.

    The last batch is filled up with invalid copies, so that every host takes the same number of equal steps.
    """
    count = min(limit, len(source))

    def batch(number: int) -> dict[str, Array]:
        positions = number * batch_size + rows
        draws = [np.random.default_rng(position) for position in positions]
        arrays = source.batch(np.minimum(positions, count - 1) * len(source) // count, draws)
        return arrays | dict(row=positions.astype(np.int32), valid=positions < count)

    return _read_ahead(batch, 0, -(-count // batch_size))


def _read_ahead(read: Callable[[int], dict[str, Array]], start: int, stop: int) -> Iterator[dict[str, Array]]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as pool:
        numbers = iter(range(start, stop))
        pending = collections.deque(pool.submit(read, number) for number in itertools.islice(numbers, _PREFETCH))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(read, number) for number in itertools.islice(numbers, 1))
        finally:
            for future in pending:
                future.cancel()
