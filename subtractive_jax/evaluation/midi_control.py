"""What a part in notes is like: how dense, how loud, how high, and of which genre; see `control.py`."""

from collections.abc import Mapping, Sequence

import numpy as np

from subtractive_jax.evaluation.control import Scale
from subtractive_jax.evaluation.midi_table import FEWEST_NOTES, Window
from subtractive_jax.model import Model
from subtractive_jax.sampling import symbolic

_SIXTEENTHS = 16  # of the bar; longer bars are cut
_TWELFTHS = 12  # of the beat, which both triplets and sixteenths fall on


class NoteListener:
    """Of `midi_table.Window`s; stems are `NOTE`.

    Args:
      stem_name: of all windows.
      steps: of the sampler; the model's own when None.
    """

    definitions: Mapping[str, str] = {
        "density": '"Add busy ..." is obeyed when its part has more onsets (those at once count once) than that of '
        '"Add sparse ..." for the same window and seed',
        "dynamics": '"Add loud ..." is obeyed when its part has a higher mean velocity than that of "Add soft ..."; '
        "not where one of them has no notes",
        "register": '"Add high ..." is obeyed when its part has a higher mean pitch than that of "Add low ..."; '
        "not where one of them has no notes",
        "less, more": "means of what the two texts gave: onsets a beat (quarter note), velocity, MIDI pitch",
    }
    no_genres = ""

    def __init__(self, model: Model, stem_name: str, steps: int | None = None):
        self._model, self._steps, self._drums = model, steps, stem_name == "drums"
        self.scales: Sequence[Scale] = (
            Scale("density", "sparse", "busy", _onsets_a_beat),
            Scale("dynamics", "soft", "loud", lambda notes, _: _mean(notes["velocity"])),
            *(() if self._drums else [Scale("register", "low", "high", lambda notes, _: _mean(notes["pitch"]))]),
        )

    def insert(self, window: Window, text: str, seed: int) -> np.ndarray:
        return self._model.insert_notes(window.context, text, window.stem_name, seed=seed, steps=self._steps).notes

    def features(self, stem: np.ndarray, window: Window) -> np.ndarray | None:
        """Where its onsets are in the bar and in the beat, notes an onset, lengths, pitches, velocities: `[D]`."""
        if len(stem) < FEWEST_NOTES:
            return None
        bars, beat = window.bars, window.context.ticks_per_beat
        profile = symbolic.onset_profile(stem, bars, beat, by_drum=self._drums) / (len(bars) - 1)
        place = np.round(stem["start"] % beat * (_TWELFTHS / beat)).astype(int) % _TWELFTHS
        in_beat = np.bincount(place, minlength=_TWELFTHS) / len(stem)
        onsets = len(np.unique(stem["start"]))
        about = [onsets * beat / window.end, len(stem) / onsets, stem["velocity"].mean(), stem["velocity"].std()]
        if not self._drums:
            length = np.log2((stem["end"] - stem["start"]) / beat)
            about += [length.mean(), length.std(), stem["pitch"].mean(), stem["pitch"].std()]
        width = max(0, _SIXTEENTHS - profile.shape[1])
        return np.concatenate([np.pad(profile, ((0, 0), (0, width)))[:, :_SIXTEENTHS].ravel(), in_beat, about])


def _onsets_a_beat(notes: np.ndarray, window: Window) -> float:
    return len(np.unique(notes["start"])) * window.context.ticks_per_beat / window.end


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan
