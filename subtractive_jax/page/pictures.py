"""Mel spectrograms, waveforms and piano rolls as pictures.

Colours read the same in print and to colour-blind eyes.
"""

import base64
import io
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from subtractive_jax.representation.audio import resample, to_mono
from subtractive_jax.representation.mel import mel_filters
from subtractive_jax.representation.notes import DRUM_CLASSES, DRUMS, Score
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

_PART_COLOURS = {  # Okabe and Ito's
    "drums": (90, 90, 90),
    "bass": (0, 114, 178),
    "guitar": (213, 94, 0),
    "keys": (0, 158, 115),
    "vocals": (204, 121, 167),
    "other": (160, 130, 0),
}
_ROLL_WIDTH, _LONGEST_ROLL, _A_SECOND = 1600, 12_000, 60  # pixels
_ROW, _LEGEND, _FONT = 9, 34, 20  # pixels
_PALE = 0.6  # of the colour of what is not new
_DRUM_SECONDS = 0.1  # a stroke, however long its note is


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


def piano_roll(score: Score, new: Collection[str] = (), seconds: float | None = None) -> bytes:
    """A score as a PNG file: pitch upwards, time to the right, drums below by class, bar lines, parts in colours.

    Args:
      score: all of its parts are drawn, louder notes darker.
      new: parts that stand out; the others are pale then.
      seconds: where the picture ends; where the score does if not given.
    """
    seconds = max(float(score.seconds(score.end)) if seconds is None else seconds, 1e-3)
    width = int(np.clip(seconds * _A_SECOND, _ROLL_WIDTH, _LONGEST_ROLL))
    pitches = np.concatenate([np.array([48, 72]), *(notes["pitch"] for name, notes in score.parts.items() if name != "drums")])
    lowest, highest = int(pitches.min()) - 1, int(pitches.max()) + 1
    floor = _LEGEND + (highest - lowest + 1) * _ROW  # below the lowest pitch
    drums = floor + _ROW  # above the first row of the drums
    height = drums + len(DRUMS) * _ROW if "drums" in score.parts else floor
    image = Image.new("RGB", (width, height + _LEGEND), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)

    def x(ticks: np.ndarray) -> np.ndarray:
        return np.round(score.seconds(ticks) / seconds * width).astype(int)

    for pitch in range(lowest, highest + 1):
        if pitch % 12 in (1, 3, 6, 8, 10):
            top = floor - (pitch - lowest + 1) * _ROW
            draw.rectangle((0, top, width, top + _ROW - 1), (243, 243, 246))
    bars = score.bars()
    places = x(bars)
    apart = 2 ** int(np.ceil(np.log2(max(60.0 * len(bars) / width, 1.0))))  # bars from one number to the next
    for number, place in enumerate(places.tolist()):
        draw.line((place, _LEGEND, place, height), (170, 170, 178) if number % apart == 0 else (220, 220, 226), 2)
        if number % apart == 0:
            draw.text((place + 5, height + 4), str(number + 1), (99, 97, 110), font)
    draw.line((0, floor, width, floor), (170, 170, 178))
    for name, notes in sorted(score.parts.items(), key=lambda part: part[0] in new):
        start, end = x(notes["start"]), x(notes["end"])
        if name == "drums":
            top = drums + (len(DRUMS) - 1 - DRUM_CLASSES[notes["pitch"]]) * _ROW
            end = np.minimum(end, start + round(_DRUM_SECONDS / seconds * width))
        else:
            top = floor - (notes["pitch"] - lowest + 1) * _ROW
        end = np.maximum(end, start + 3)
        strength = (0.5 + 0.5 * notes["velocity"] / 127.0) * (_PALE if new and name not in new else 1.0)
        colours = np.round(255 + strength[:, None] * (np.array(_PART_COLOURS[name]) - 255)).astype(int)
        outline = (0, 0, 0) if name in new else None
        for left, right, up, colour in zip(start.tolist(), end.tolist(), top.tolist(), colours.tolist(), strict=True):
            draw.rectangle((left, up, right - 1, up + _ROW - 1), tuple(colour), outline)
    for pitch in range(-(-lowest // 12) * 12, highest + 1, 12):
        middle = floor - (pitch - lowest) * _ROW - _ROW // 2
        draw.text(
            (4, middle), f"C{pitch // 12 - 1}", (28, 27, 34), font, "lm", stroke_width=3, stroke_fill=(255, 255, 255)
        )
    place = 8
    for name in score.parts:
        text = f"{name} (new)" if name in new else name
        draw.rectangle((place, 9, place + 18, 25), _PART_COLOURS[name], (0, 0, 0) if name in new else None)
        draw.text((place + 26, 5), text, (28, 27, 34), font)
        place += 26 + round(draw.textlength(text, font)) + 28
    return _file(image, "PNG", optimize=True)


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
