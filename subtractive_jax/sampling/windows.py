"""A song of any length as fixed windows that overlap by half, and back: every window stays as long as in training."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from subtractive_jax.representation.mel import Mel


@dataclasses.dataclass(frozen=True)
class Windows:
    """`count` windows of `length` items, half a window apart. The unit is the caller's: frames or latents."""

    length: int
    count: int

    @classmethod
    def covering(cls, total: int, length: int) -> "Windows":
        """The fewest windows of `length` that hold `total` items; one at least."""
        hop = length // 2
        return cls(length, max(1, 1 - (length - total) // hop))

    @property
    def hop(self) -> int:
        return self.length // 2

    @property
    def total(self) -> int:
        """Items from the start of the first window to the end of the last."""
        return (self.count - 1) * self.hop + self.length

    def split(self, line: np.ndarray, axis: int) -> np.ndarray:
        """Cuts `line`, with `total` items along the negative `axis`, into windows: [count, ...]."""
        starts = range(0, self.count * self.hop, self.hop)
        return np.stack([line.take(range(start, start + self.length), axis) for start in starts])

    def split_audio(self, audio: np.ndarray, mel: Mel) -> np.ndarray:
        """`audio` [mel.samples(total)] as the windows, counted in frames: a view [count, mel.window_samples]."""
        every = np.lib.stride_tricks.sliding_window_view(audio, mel.window_samples)
        return every[:: self.hop * mel.hop_length][: self.count]

    def weights(self) -> np.ndarray:
        """How much of each item comes from each window, float32 [count, length]: triangles that sum to 1 everywhere."""
        triangle = 1.0 - np.abs((2.0 * np.arange(self.length) + 1.0) / self.length - 1.0)
        line = np.zeros(self.total)
        for index in range(self.count):
            line[index * self.hop : index * self.hop + self.length] += triangle
        return (triangle / self.split(line, axis=-1)).astype(np.float32)

    def blend(self, windows: np.ndarray | Iterable[np.ndarray], axis: int) -> np.ndarray:
        """Cross-fades windows, `length` items along the negative `axis` of each, one by one into a line of `total`."""
        weights, line = self.weights(), np.zeros(0, np.float32)
        for index, window in enumerate(windows):
            window = np.moveaxis(window, axis, -1)
            if not index:
                line = np.zeros((*window.shape[:-1], self.total), window.dtype)
            line[..., index * self.hop : index * self.hop + self.length] += window * weights[index]
        return np.moveaxis(line, -1, axis)
