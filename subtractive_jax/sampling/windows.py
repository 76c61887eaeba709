"""A song of any length as fixed windows that overlap by half, and back: every window stays as long as in training."""

import dataclasses

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
        """Cuts `audio` [mel.samples(total)] into the windows, counted in frames: [count, mel.window_samples]."""
        starts = range(0, self.count * self.hop * mel.hop_length, self.hop * mel.hop_length)
        return np.stack([audio[start : start + mel.window_samples] for start in starts])

    def weights(self) -> np.ndarray:
        """How much of each item comes from each window, float32 [count, length]: triangles that sum to 1 everywhere."""
        triangle = 1.0 - np.abs((2.0 * np.arange(self.length) + 1.0) / self.length - 1.0)
        weights = np.tile(triangle, (self.count, 1))
        return (weights / self.split(self._sum(weights, axis=-1), axis=-1)).astype(np.float32)

    def blend(self, windows: np.ndarray, axis: int) -> np.ndarray:
        """Cross-fades windows [count, ...], `length` items along the negative `axis`, into one line of `total`."""
        shape = [1] * windows.ndim
        shape[0], shape[axis] = self.count, self.length
        return self._sum(windows * self.weights().reshape(shape), axis)

    def _sum(self, windows: np.ndarray, axis: int) -> np.ndarray:
        windows = np.moveaxis(windows, axis, -1)
        line = np.zeros((*windows.shape[1:-1], self.total), windows.dtype)
        for index, window in enumerate(windows):
            line[..., index * self.hop : index * self.hop + self.length] += window
        return np.moveaxis(line, -1, axis)
