"""Batches as a pure function of the step: resuming needs no iterator state, and hosts read only their rows."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from subtractive_jax.errors import UserError

Array = np.ndarray
_PREFETCH = 4  # batches
_READERS = 2  # threads: one reads while the other decodes; more of them wait for the interpreter
_ROUNDS = 8
_HALF = np.uint64(32)
_MIX = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # SplitMix64's multipliers (Steele et al. 2014)


class Source(Protocol):
    """What batches are drawn from: one split of a dataset, as one stage sees it."""

    fingerprint: str  # of the content and its order

    def __len__(self) -> int: ...

    def batch(self, examples: Array, draws: Sequence[np.random.Generator]) -> dict[str, Array]:
        """Arrays `[len(examples), ...]` for these examples; `draws[i]` makes example i's random choices."""
        ...


def shuffled(positions: Array, size: int, key: Sequence[int]) -> Array:
    """Where a permutation of `range(size)`, drawn by `key`, sends `positions`; its memory does not grow with `size`.

    A generalised Feistel network on pairs of digits, walked until the result is in range (Black & Rogaway 2002).
    """
    low = np.uint64(math.isqrt(size - 1) + 1)
    high = np.uint64(-(-size // int(low)))
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def noise(digits: Array, round_key: np.uint64) -> Array:
        mixed = (digits ^ round_key) * _MIX[0]
        return (mixed ^ mixed >> _HALF) * _MIX[1] >> _HALF

    def permute(values: Array) -> Array:
        left, right = np.divmod(values, low)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + noise(right, even)) % high
            right = (right + noise(left, odd)) % low
        return left * low + right

    values = permute(positions.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = permute(values[outside])
    return values.astype(np.int64)


class Batches:
    """Endless shuffled batches: epochs are permutations by (seed, epoch), joined end to end.

    The global batch at a step is the same for any number of hosts.

    Args:
      source: where examples come from.
      batch_size: examples over all hosts.
      seed: of the shuffling and of the examples' random choices.
      rows: which rows of the global batch this host supplies.

    Raises:
      UserError: the source is empty.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rows: Array) -> None:
        if not len(source):
            raise UserError("the training split has no example; build the dataset from more songs")
        self._source, self._batch_size, self._seed, self._rows = source, batch_size, seed, rows

    def examples(self, step: int) -> Array:
        """The examples of this host's rows of the batch for update `step` (counted from 0)."""
        size = len(self._source)
        epochs, positions = np.divmod(step * self._batch_size + self._rows, size)
        examples = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            examples[own] = shuffled(positions[own], size, (self._seed, epoch))
        return examples

    def batch(self, step: int) -> dict[str, Array]:
        """This host's rows of the batch for update `step`."""
        draws = [np.random.default_rng((self._seed, step, row)) for row in self._rows.tolist()]
        batch = self._source.batch(self.examples(step), draws)
        return batch | dict(row=self._rows.astype(np.int32), valid=np.ones(len(self._rows), bool))

    def stream(self, start: int, stop: int) -> Iterator[dict[str, Array]]:
        """The batches of updates `start` to `stop`, read ahead by threads."""
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
    with ThreadPoolExecutor(_READERS, thread_name_prefix="reader") as pool:
        numbers = iter(range(start, stop))
        pending = collections.deque(pool.submit(read, number) for number in itertools.islice(numbers, _PREFETCH))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(read, number) for number in itertools.islice(numbers, 1))
        finally:
            for future in pending:
                future.cancel()
