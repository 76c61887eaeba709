import numpy as np
import pytest
import scipy.signal

from data_pipeline import sources
from data_pipeline.bleed import Bleed
from data_pipeline.song import Tools

RATE = 16_000


def measured(stem, context, block=100_000):
    bleed = Bleed(RATE)
    for start in range(0, stem.shape[-1], block):
        bleed.add(stem[..., start : start + block], context[..., start : start + block])
    return bleed.db()


def music(seed, seconds=60):
    """Independent of other seeds: notes of random pitch, length and level, of some harmonics and a little noise."""
    rng = np.random.default_rng(seed)
    song = 0.002 * rng.standard_normal(seconds * RATE)
    for start in np.arange(0, seconds * RATE, RATE // 4):
        time = np.arange(min(int(RATE * rng.uniform(0.2, 0.8)), len(song) - start)) / RATE
        pitch = 440.0 * 2 ** ((rng.integers(40, 80) - 69) / 12)
        note = sum(np.sin(2 * np.pi * k * pitch * time + rng.uniform(0, 6)) / k for k in range(1, 8))
        song[start : start + len(time)] += rng.uniform(0.02, 0.2) * note * np.exp(-3 * time)
    return song.astype(np.float32)


def power(samples):
    return np.mean(np.square(samples, dtype=np.float64))


@pytest.fixture(scope="module")
def stem():
    return music(0)


@pytest.fixture(scope="module")
def others():
    return music(1)


@pytest.mark.parametrize("level_db", [-6.0, -10.0, -20.0])
@pytest.mark.parametrize(
    "leak",
    [
        pytest.param(lambda stem: stem, id="plain"),
        pytest.param(lambda stem: -np.roll(stem, RATE // 500), id="inverted and 2 ms late"),
        pytest.param(lambda stem: scipy.signal.lfilter(*scipy.signal.butter(2, 2_000, fs=RATE), stem), id="low-pass"),
        pytest.param(lambda stem: scipy.signal.lfilter([1.0, -0.7], 1.0, stem), id="treble"),
    ],
)
def test_a_known_leak_is_measured(stem, others, leak, level_db):
    leaked = leak(stem)
    leaked = leaked * np.sqrt(10 ** (level_db / 10) * power(stem) / power(leaked))
    assert measured(stem, (others + leaked).astype(np.float32)) == pytest.approx(level_db, abs=1.5)


def test_independent_music_has_no_bleed(others):
    for seed in range(2, 7):
        assert measured(music(seed, 30), others[: 30 * RATE]) < -20.0


def test_true_stems_of_a_song_have_little_bleed():
    """The shipped songs are the hardest case: the same samples start at the same moments, bar after bar."""
    songs = sources.find_songs([]).songs
    recording = sources.load(next(song for song in songs if song.song_id == "demo-cc0-ska"), RATE, Tools())
    stems = dict(zip(recording.stems, np.concatenate(list(recording.blocks), axis=1), strict=True))
    mix = sum(stems.values())
    for name in ("drums", "bass", "guitar"):
        context = mix - stems[name]
        assert measured(stems[name], context) < -15.0
        assert measured(stems[name], context + 10**-0.4 * stems[name]) == pytest.approx(-8.0, abs=1.5)


def test_several_stems_at_once_are_measured_as_one_by_one(stem, others):
    both = measured(np.stack([stem, others]), np.stack([others + 0.3 * stem, stem]))
    np.testing.assert_allclose(both, [measured(stem, others + 0.3 * stem), measured(others, stem)], rtol=1e-6)


@pytest.mark.parametrize("block", [777, 48_000, 10**9])
def test_blocks_may_have_any_length(stem, others, block):
    context = others + 0.5 * stem
    np.testing.assert_allclose(measured(stem, context, block), measured(stem, context), rtol=1e-6)


def test_level_of_the_song_does_not_matter(stem, others):
    context = others + 0.3 * stem
    assert measured(stem / 30, context / 30) == pytest.approx(measured(stem, context), abs=0.3)


def test_a_stem_that_is_a_trace_of_its_context_is_all_bleed(others):
    assert measured(0.01 * others, others) == pytest.approx(0.0, abs=0.01)


def test_what_cannot_be_measured_is_nan(stem, others):
    assert np.isnan(measured(np.zeros_like(stem), others))
    assert np.isnan(measured(stem[: 5 * RATE], others[: 5 * RATE]))
    assert np.isnan(measured(stem[:100], others[:100]))
    assert measured(stem, np.zeros_like(stem)) == -60.0
