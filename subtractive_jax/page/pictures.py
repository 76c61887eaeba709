"""Mel spectrograms as PNG pictures, in colours that read the same in print and to colour-blind eyes."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from subtractive_jax.representation.audio import resample, to_mono
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.sampling.gates import spectrogram

_SAMPLE_RATE = 16_000  # Hz
_N_FFT = 1024  # 64 ms at that rate
_N_MELS = 80
_RANGE_DB = 70.0
_MAX_WIDTH = 900  # pixels
_VIRIDIS = np.array(  # every eighth of matplotlib's viridis
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ]
)


def mel_db(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in dB of `[channels, samples]` on a mel scale to 8 kHz: float32 [80, frames], 900 frames at most."""
    spectrum = spectrogram(resample(to_mono(audio), sample_rate, _SAMPLE_RATE), _SAMPLE_RATE)
    power = np.square(spectrum) @ mel_filters(_SAMPLE_RATE, _N_FFT, _N_MELS, 0.0, _SAMPLE_RATE / 2).T
    edges = np.linspace(0, len(power), min(len(power), _MAX_WIDTH) + 1).astype(int)
    averaged = np.add.reduceat(power, edges[:-1]) / np.diff(edges)[:, None]
    return 10.0 * np.log10(averaged.T + 1e-10)


def pngs(images: Sequence[np.ndarray]) -> list[bytes]:
    """`mel_db` images as PNG files, with one scale of colours for all, so that they can be compared."""
    loudest = max((image.max() for image in images), default=0.0)
    return [_png(np.clip((image - loudest) / _RANGE_DB + 1.0, 0.0, 1.0)) for image in images]


def data_uris(images: Sequence[np.ndarray]) -> list[str]:
    """The same as data URIs."""
    return ["data:image/png;base64," + base64.b64encode(png).decode() for png in pngs(images)]


def _png(image: np.ndarray) -> bytes:
    """An image [rows, columns] in [0, 1], low frequencies first, as a PNG file."""
    stops = np.linspace(0.0, 1.0, len(_VIRIDIS))
    pixels = np.stack([np.interp(image[::-1], stops, _VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
