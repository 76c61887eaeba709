"""Mel spectrograms and waveforms as pictures, in colours that read the same in print and to colour-blind eyes."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from subtractive_jax.representation.audio import resample, to_mono
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.sampling.gates import spectra

SAMPLE_RATE = 16_000  # Hz, of what is drawn
_N_FFT = 1024  # 64 ms at that rate
_N_MELS = 80
_RANGE_DB = 70.0
_MAX_WIDTH = 900  # pixels
_WAVEFORM_COLUMNS = 300
_WEBP_QUALITY = 70
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
    heard = resample(to_mono(audio), sample_rate, SAMPLE_RATE)
    filters = mel_filters(SAMPLE_RATE, _N_FFT, _N_MELS, 0.0, SAMPLE_RATE / 2).T
    power = np.concatenate([np.square(block) @ filters for (block,) in spectra([heard], SAMPLE_RATE)])
    edges = np.linspace(0, len(power), min(len(power), _MAX_WIDTH) + 1).astype(int)
    averaged = np.add.reduceat(power, edges[:-1]) / np.diff(edges)[:, None]
    return 10.0 * np.log10(averaged.T + 1e-10)


def waveform(audio: np.ndarray) -> str:
    """The outline of `[channels, samples]` as the path of an SVG picture that is 300 wide and 100 high."""
    mono = to_mono(audio)
    edges = np.linspace(0, len(mono), min(len(mono), _WAVEFORM_COLUMNS) + 1).astype(int)
    high, low = (limit.reduceat(mono, edges[:-1]) for limit in (np.maximum, np.minimum))
    x = (np.arange(len(high)) + 0.5) * _WAVEFORM_COLUMNS / len(high)
    upper, lower = (np.clip(np.round(50 - 50 * side), 0, 100).astype(int) for side in (high, low))
    there = " ".join(f"{a:g},{b}" for a, b in zip(x, upper, strict=True))
    back = " ".join(f"{a:g},{b}" for a, b in zip(x[::-1], lower[::-1], strict=True))
    return f"M{there} {back}Z"


def pngs(images: Sequence[np.ndarray]) -> list[bytes]:
    """`mel_db` images as PNG files, with one scale of colours for all, so that they can be compared."""
    return [_file(image, "PNG", optimize=True) for image in _coloured(images)]


def data_uris(images: Sequence[np.ndarray]) -> list[str]:
    """The same as data URIs of WebP files, which are a fifth as large."""
    files = [_file(image, "WEBP", quality=_WEBP_QUALITY) for image in _coloured(images)]
    return ["data:image/webp;base64," + base64.b64encode(file).decode() for file in files]


def _coloured(images: Sequence[np.ndarray]) -> list[Image.Image]:
    """Images [rows, columns] in dB, low frequencies first, on one scale."""
    loudest = max((image.max() for image in images), default=0.0)
    stops, coloured = np.linspace(0.0, 1.0, len(_VIRIDIS)), []
    for image in images:
        level = np.clip((image[::-1] - loudest) / _RANGE_DB + 1.0, 0.0, 1.0)
        pixels = np.stack([np.interp(level, stops, _VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
        coloured.append(Image.fromarray(pixels.astype(np.uint8)))
    return coloured


def _file(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image.quantize(64) if format == "PNG" else image).save(buffer, format, **options)
    return buffer.getvalue()
