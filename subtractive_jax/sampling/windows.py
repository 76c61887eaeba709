"""A song of any length as fixed windows that overlap by half, and back: every window stays as long as in training."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from subtractive_jax.representation.mel import Mel


@dataclasses.dataclass(frozen=True)
class Windows:
    """`count` windows of `length` items. The unit is the caller's: frames, latents or steps.

    Attributes:
      at: where they start, the first at 0; half a window apart if not given.
    """

    length: int
    count: int
    at: tuple[int, ...] | None = None

    @classmethod
    def covering(cls, total: int, length: int) -> "Windows":
        """The fewest windows of `length` that hold `total` items; one at least."""
        hop = length // 2
        return cls(length, max(1, 1 - (length - total) // hop))

    @property
    def hop(self) -> int:
        return self.length // 2

    @classmethod
    def from_lines(cls, lines: np.ndarray, total: int, length: int) -> "Windows":
        """Windows that hold `total` items and each start at the last of `lines` that keeps half a window in common.

        Args:
          lines: where windows may start, sorted, the first at 0: bar lines. Where the next is more than half a window
            away, a window starts between them.
        """
        starts = [0]
        while starts[-1] + length < total:
            latest = starts[-1] + length // 2
            line = int(lines[np.searchsorted(lines, latest, side="right") - 1])
            starts.append(line if line > starts[-1] else latest)
        return cls(length, len(starts), tuple(starts))

    @property
    def starts(self) -> Sequence[int]:
        return range(0, self.count * self.hop, self.hop) if self.at is None else self.at

    @property
    def total(self) -> int:
        """Items from the start of the first window to the end of the last."""
        return self.starts[-1] + self.length

    def split(self, line: np.ndarray, axis: int) -> np.ndarray:
        """Cuts `line`, with `total` items along the negative `axis`, into windows: [count, ...]."""
        return np.stack([line.take(range(start, start + self.length), axis) for start in self.starts])

    def split_audio(self, audio: np.ndarray, mel: Mel) -> np.ndarray:
        """`audio` [mel.samples(total)] as the windows, counted in frames: a view [count, mel.window_samples]."""
        every = np.lib.stride_tricks.sliding_window_view(audio, mel.window_samples)
        return every[:: self.hop * mel.hop_length][: self.count]

    def weights(self) -> np.ndarray:
        """How much of each item comes from each window, float32 [count, length]: triangles that sum to 1 everywhere."""
        triangle = 1.0 - np.abs((2.0 * np.arange(self.length) + 1.0) / self.length - 1.0)
        line = np.zeros(self.total)
        for start in self.starts:
            line[start : start + self.length] += triangle
        return (triangle / self.split(line, axis=-1)).astype(np.float32)

    def blend(self, windows: np.ndarray | Iterable[np.ndarray], axis: int) -> np.ndarray:
        """Cross-fades windows, `length` items along the negative `axis` of each, one by one into a line of `total`."""
        weights, line = self.weights(), np.zeros(0, np.float32)
        for index, window in enumerate(windows):
            window = np.moveaxis(window, axis, -1)
            if not index:
                line = np.zeros((*window.shape[:-1], self.total), window.dtype)
            start = self.starts[index]
            line[..., start : start + self.length] += window * weights[index]
        return np.moveaxis(line, -1, axis)
