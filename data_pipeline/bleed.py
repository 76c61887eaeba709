"""How much of a removed stem is still in the context, from the two alone: no ground truth is needed. Pure NumPy.

What is left of a stem is a filtered copy of it: the part of the context that one fixed, short filter predicts from
the stem. Other instruments have no such relation to it over a whole song. Per frequency the best filter is S_cs / S_ss,
with spectra averaged over the song (Bendat and Piersol, Random Data, chapter 6).

Two things would look like bleed, and are dealt with:

- Averages over few segments find a relation where there is none. So only products of different sections of the song
  count, whose expectation is zero then; this also leaves out what is related within one held note or chord.
- Instruments play the same notes at the same times. So the filter is short, which allows it no choice of single notes,
  and all segments weigh the same, however loud. This reduces the effect without removing it: a stem much softer than
  its context, played sample-exactly in unison with it, measures too high.
"""

import numpy as np

_SEGMENT_SECONDS = 0.024  # the filter is about half as long: of a leak that is 2 ms late, 0.4 dB go unseen
_SECTION_SEGMENTS = 125
_SILENCE = 1e-7  # power under which a segment weighs less
_FLOOR_DB = -60.0


class Bleed:
    """The bleed of one stem, or of several at once, measured over a song block by block in constant memory."""

    def __init__(self, sample_rate: int):
        length = round(_SEGMENT_SECONDS * sample_rate)
        self._window = np.hanning(length + 1)[:-1].astype(np.float32)
        self._silence = np.float32(_SILENCE * 0.375 * length**2 / 2)  # 0.375: mean square of the window
        self._waiting: list[np.ndarray] = []  # float32 [2, ..., samples], less than a section in all
        self._sums: dict[str, np.ndarray] = {}  # name -> [..., frequencies]

    def add(self, stem: np.ndarray, context: np.ndarray) -> None:
        """Takes in the next samples of both: float32 `[..., samples]`, of any length."""
        self._waiting.append(np.stack([stem, context]))
        section = _SECTION_SEGMENTS * len(self._window)
        if sum(block.shape[-1] for block in self._waiting) >= section:
            block = np.concatenate(self._waiting, axis=-1)
            whole = block.shape[-1] // section * section
            for start in range(0, whole, section):
                self._add_section(block[..., start : start + section])
            self._waiting = [block[..., whole:].copy()]

    def _add_section(self, section: np.ndarray) -> None:
        # Segments do not overlap: half the samples are enough to measure, at half the cost.
        segments = section.reshape(*section.shape[:-1], -1, len(self._window))
        s, c = np.fft.rfft(segments * self._window)
        power = s.real**2 + s.imag**2
        energy = power.sum(axis=-1) + (c.real**2 + c.imag**2).sum(axis=-1)
        weights = 1.0 / (energy + self._silence)
        cross = np.einsum("...k,...kf->...f", weights, c * s.conj()).astype(np.complex128)
        own = np.einsum("...k,...kf->...f", weights, power).astype(np.float64)
        sums = {
            "cross": cross,
            "|cross|^2": np.abs(cross) ** 2,
            "own": own,
            "own^2": own**2,
            "power": power.sum(axis=-2, dtype=np.float64),
        }
        self._sums = {name: self._sums.get(name, 0.0) + values for name, values in sums.items()}

    def db(self) -> np.ndarray:
        """Energy of what is left of the stem over the energy of the stem, in dB within [-60, 0]: float64 `[...]`.

        NaN where the stem sounds in fewer than two sections of 3 s.
        """
        if not self._sums:
            return np.full(self._waiting[0].shape[1:-1], np.nan)
        sums = self._sums
        pairs = sums["own"] ** 2 - sums["own^2"]
        known = pairs > 1e-6 * sums["own"] ** 2
        gain = np.divide(np.abs(sums["cross"]) ** 2 - sums["|cross|^2"], pairs, out=np.zeros_like(pairs), where=known)
        power = np.where(known, sums["power"], 0.0)
        with np.errstate(invalid="ignore"):
            # Where the stem is only a trace of the context, the quotient of traces can be any number.
            share = np.sum(np.clip(gain, -1.0, 1.0) * power, axis=-1) / np.sum(power, axis=-1)
        return 10.0 * np.log10(np.maximum(share, 10.0 ** (_FLOOR_DB / 10.0)))
