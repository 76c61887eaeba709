"""Stems to triples."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline import copies, windows
from data_pipeline.song import Recording
from subtractive_jax.errors import UserError
from subtractive_jax.representation.level import context_gain

RATE = 16_000


def noise(seconds: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(round(seconds * RATE)) * level).astype(np.float32)
        for name, level in (("drums", 0.06), ("keys", 0.015), ("other", 0.025))
    }


def recording(stems: dict[str, np.ndarray], separated: bool = False) -> Recording:
    blocks = iter(np.array_split(np.stack(list(stems.values())), 7, axis=1))
    return Recording(tuple(stems), blocks, {}, separated)


def triples_of(stems: dict[str, np.ndarray], hop: int = RATE, missing: tuple[str, ...] = ("drums", "bass", "keys")):
    with windows.hear(recording(stems), RATE, missing) as song:
        return list(windows.triples(song, missing, 2 * RATE, hop, -30.0, -20.0))


def test_triples_are_exact_and_share_the_songs_gain():
    stems = noise(6.5)
    triples = triples_of(stems)
    assert [(t.start_seconds, t.stem_name) for t in triples[:3]] == [(0.0, "drums"), (0.0, "keys"), (1.0, "drums")]
    assert max(t.start_seconds for t in triples) == 4.0
    scale = triples[0].mix / sum(stem[: 2 * RATE] for stem in stems.values())
    mix = sum(stems.values())
    for triple in triples:
        np.testing.assert_array_equal(triple.mix.astype(int), triple.context.astype(int) + triple.stem)
        whole_context = (mix - stems[triple.stem_name]) * np.median(scale) / 32768
        assert triple.gain == pytest.approx(context_gain(whole_context, RATE, -20.0), rel=1e-3)


def test_stems_may_be_missing_together():
    stems = noise(2.0)
    both, alone = triples_of(stems, missing=("drums+keys", "drums", "bass+drums"))
    assert (both.stem_name, alone.stem_name) == ("drums+keys", "drums")
    np.testing.assert_array_equal(both.mix, alone.mix)
    keys = both.stem.astype(int) - alone.stem
    assert np.corrcoef(keys, stems["keys"])[0, 1] > 0.999
    np.testing.assert_array_equal(both.mix.astype(int), both.context.astype(int) + both.stem)


@pytest.mark.parametrize(("name", "message"), [("drum", "did you mean"), ("drums+bass", r'write "bass\+drums"')])
def test_names_of_sets_are_checked(name, message):
    with pytest.raises(UserError, match=message):
        windows.check_stem_set(name)


def test_windows_without_the_stem_or_the_rest_are_left_out():
    stems = noise(8)
    stems["drums"][2 * RATE : 4 * RATE] /= 200
    stems["keys"][4 * RATE : 6 * RATE] = 0
    stems["other"][4 * RATE : 6 * RATE] = 0
    kept = {(t.start_seconds, t.stem_name) for t in triples_of(stems, hop=2 * RATE)}
    assert kept == {(0.0, "drums"), (0.0, "keys"), (2.0, "keys"), (6.0, "drums"), (6.0, "keys")}


def test_no_sum_clips():
    stems = noise(3)
    stems["keys"] = -stems["drums"] * 3  # the mix is quieter than the mix without keys
    with windows.hear(recording(stems), RATE, ["drums+keys"]) as song:
        triples = list(windows.triples(song, ["drums+keys"], 3 * RATE, RATE, -30.0, -20.0))
    peaks = [np.abs(x.astype(int)).max() for t in triples for x in (t.mix, t.stem, t.context)]
    assert len(peaks) == 3 and max(peaks) < 0.9 * 32767
    assert 0.88 * 32767 < np.abs(triples[0].stem.astype(int)).max() * 1.5 < 0.9 * 32767, "keys alone are the loudest"


def test_no_sum_of_an_augmented_window_clips():
    stems = noise(3)
    stems["other"] = -stems["drums"]
    stems["keys"] = stems["drums"].copy()
    copy = copies.Copy("song", 1, 0, pitch_semitones=0.0, gain_db=12.0)
    with windows.hear(recording(stems), RATE, ["drums+keys"]) as song:
        (triple,) = windows.triples(song, ["drums+keys"], 3 * RATE, RATE, -90.0, -20.0, copy)
    assert np.corrcoef(triple.stem, stems["drums"])[0, 1] > 0.999
    assert np.corrcoef(triple.context, stems["other"])[0, 1] > 0.999


def test_short_and_silent_songs_are_refused():
    with pytest.raises(UserError, match="shorter than one window"):
        triples_of(noise(1.9))
    with pytest.raises(UserError, match="silent"):
        triples_of({"drums": np.zeros(RATE * 3, np.float32), "keys": np.zeros(RATE * 3, np.float32)})


def test_bleed_is_measured_where_stems_were_separated():
    stems = noise(8)
    leaked = stems | {"other": stems["other"] + 0.3 * stems["drums"]}
    with windows.hear(recording(leaked, separated=True), RATE, ["drums", "bass"]) as song:
        assert song.bleed_db.keys() == {"drums"}
        assert song.bleed_db["drums"] == pytest.approx(20 * np.log10(0.3), abs=1.0)
    with windows.hear(recording(leaked), RATE, ["drums"]) as song:
        assert not song.bleed_db


def test_memory_does_not_grow_with_the_song():
    def blocks(seconds: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for _ in range(seconds):
            yield rng.standard_normal((4, RATE), np.float32)

    peaks = []
    for seconds in (20, 400):
        tracemalloc.start()
        with windows.hear(Recording(("a", "b", "c", "drums"), blocks(seconds), {}), RATE, ["drums"]) as song:
            for _ in windows.triples(song, ["drums"], 2 * RATE, 40 * RATE, -30.0, -20.0):
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    audio = 4 * RATE * 400 * np.dtype(np.float32).itemsize
    assert peaks[1] - peaks[0] < 0.02 * audio
