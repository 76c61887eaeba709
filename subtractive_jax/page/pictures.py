"""Mel spectrograms, waveforms and piano rolls as pictures.

Colours read the same in print and to colour-blind eyes.
"""

import base64
import dataclasses
import functools
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

_Colour = tuple[int, int, int]
_WHITE, _INK = (255, 255, 255), (28, 27, 34)
_PART_COLOURS = {  # Okabe and Ito's
    "drums": (90, 90, 90),
    "bass": (0, 114, 178),
    "guitar": (213, 94, 0),
    "keys": (0, 158, 115),
    "vocals": (204, 121, 167),
    "other": (160, 130, 0),
}
_ROLL_WIDTH, _LONGEST_ROLL, _A_SECOND = 1600, 12_000, 60  # pixels
_ROW, _LEGEND, _FONT, _NUMBER_WIDTH = 9, 34, 20, 60  # pixels
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
    length = max(float(score.seconds(score.end)) if seconds is None else seconds, 1e-3)
    roll = _Roll(score, length)
    bottom = roll.drums_floor if "drums" in score.parts else roll.floor
    image = Image.new("RGB", (roll.width, bottom + _LEGEND), _WHITE)
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(_FONT)
    _draw_grid(draw, roll, bottom)
    for name in sorted(score.parts, key=lambda name: name in new):
        _draw_part(draw, roll, name, _PALE if new and name not in new else 1.0, _INK if name in new else None)
    for pitch in range(-(-roll.lowest // 12) * 12, roll.highest + 1, 12):
        text, middle = f"C{pitch // 12 - 1}", int(roll.top(pitch)) + _ROW // 2
        draw.text((4, middle), text, _INK, anchor="lm", stroke_width=3, stroke_fill=_WHITE)
    left = 8
    for name in score.parts:
        text = f"{name} (new)" if name in new else name
        draw.rectangle((left, 9, left + 18, 25), _PART_COLOURS[name], _INK if name in new else None)
        draw.text((left + 26, 5), text, _INK)
        left += 26 + round(draw.textlength(text)) + 28
    return _file(image, "PNG", optimize=True)


@dataclasses.dataclass(frozen=True)
class _Roll:
    """Where things are in the picture of a score, in pixels."""

    score: Score
    seconds: float

    @functools.cached_property
    def width(self) -> int:
        return int(np.clip(self.seconds * _A_SECOND, _ROLL_WIDTH, _LONGEST_ROLL))

    @functools.cached_property
    def _pitches(self) -> np.ndarray:
        return np.concatenate(
            [[48, 72], *(notes["pitch"] for name, notes in self.score.parts.items() if name != "drums")]
        )

    @property
    def lowest(self) -> int:
        return int(self._pitches.min()) - 1

    @property
    def highest(self) -> int:
        return int(self._pitches.max()) + 1

    @property
    def floor(self) -> int:
        """Below the lowest pitch."""
        return _LEGEND + (self.highest - self.lowest + 1) * _ROW

    @property
    def drums_floor(self) -> int:
        """Below the drums, which have a row a class, and one to keep them apart."""
        return self.floor + (1 + len(DRUMS)) * _ROW

    def left(self, ticks: np.ndarray) -> np.ndarray:
        return np.round(self.score.seconds(ticks) / self.seconds * self.width).astype(int)

    def top(self, pitch: np.ndarray | int) -> np.ndarray:
        return self.floor - (np.asarray(pitch, int) - self.lowest + 1) * _ROW

    def drums_top(self, pitch: np.ndarray) -> np.ndarray:
        return self.drums_floor - (DRUM_CLASSES[pitch] + 1) * _ROW


def _draw_grid(draw: ImageDraw.ImageDraw, roll: _Roll, bottom: int) -> None:
    """Rows of black keys, bar lines, and as many of the bars' numbers as there is room for."""
    for pitch in range(roll.lowest, roll.highest + 1):
        if pitch % 12 in (1, 3, 6, 8, 10):
            top = int(roll.top(pitch))
            draw.rectangle((0, top, roll.width, top + _ROW - 1), (243, 243, 246))
    lines = roll.left(roll.score.bars()).tolist()
    apart = 2 ** int(np.ceil(np.log2(max(_NUMBER_WIDTH * len(lines) / roll.width, 1.0))))
    for number, left in enumerate(lines):
        numbered = number % apart == 0
        draw.line((left, _LEGEND, left, bottom), (170, 170, 178) if numbered else (220, 220, 226), 2)
        if numbered:
            draw.text((left + 5, bottom + 4), str(number + 1), (99, 97, 110))
    draw.line((0, roll.floor, roll.width, roll.floor), (170, 170, 178))


def _draw_part(draw: ImageDraw.ImageDraw, roll: _Roll, name: str, strength: float, outline: _Colour | None) -> None:
    notes = roll.score.parts[name]
    left, right = roll.left(notes["start"]), roll.left(notes["end"])
    top = roll.drums_top(notes["pitch"]) if name == "drums" else roll.top(notes["pitch"])
    if name == "drums":
        right = np.minimum(right, left + round(_DRUM_SECONDS / roll.seconds * roll.width))
    right = np.maximum(right, left + 3)
    darkness = strength * (0.5 + 0.5 * notes["velocity"] / 127.0)
    colours = np.round(255 + darkness[:, None] * (np.array(_PART_COLOURS[name]) - 255)).astype(int)
    places = np.stack([left, top, right - 1, top + _ROW - 1], axis=1)
    for place, colour in zip(places.tolist(), colours.tolist(), strict=True):
        draw.rectangle(place, tuple(colour), outline)


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
