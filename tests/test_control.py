"""Instructions that are followed, and some that are not; drum patterns told apart by their genre."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from subtractive_jax.evaluation import control
from subtractive_jax.evaluation.drum_genre import GenreClassifier, features
from subtractive_jax.evaluation.paper_table import Window

RATE = 16_000
SECONDS = 8.0
PATTERNS = {  # sixteenths of two beats: kick, snare, hi-hat
    "dance": ("x...x...", "....x...", "..x...x."),
    "rock": ("x.......", "....x...", "x.x.x.x."),
    "funk": ("x..x..x.", "....x..x", "xxxxxxxx"),
}


def hit(kind, generator):
    """A quarter of a second of a drum."""
    time = np.arange(RATE // 4) / RATE
    if kind == 0:
        return np.sin(2 * np.pi * 60.0 * time) * np.exp(-12.0 * time)
    noise = generator.normal(size=len(time))
    if kind == 1:
        return 0.2 * np.convolve(noise, np.ones(6) / 6, "same") * np.exp(-25.0 * time)
    return 0.05 * np.diff(noise, prepend=0.0) * np.exp(-60.0 * time)


def drums(genre, seed, thinning=1):
    """Mono `[samples]` of a genre's pattern at a tempo of the seed's; only every `thinning`-th hit is played."""
    generator = np.random.default_rng(seed)
    sixteenth = 60.0 / generator.uniform(95.0, 125.0) / 4.0
    audio = np.zeros(round(SECONDS * RATE) + RATE, np.float32)
    for kind, pattern in enumerate(PATTERNS[genre]):
        steps = [step for step in range(int(SECONDS / sixteenth)) if pattern[step % 8] == "x"][::thinning]
        for step in steps:
            start = round(step * sixteenth * RATE)
            audio[start : start + RATE // 4] += hit(kind, generator) * generator.uniform(0.7, 1.0)
    return audio[: round(SECONDS * RATE)] * 0.3


def window(genre, seed):
    stem = drums(genre, seed)
    time = np.arange(len(stem)) / RATE
    context = (0.05 * np.sin(2 * np.pi * 220.0 * time)).astype(np.float32)
    return Window(context + stem, context, stem, RATE, "drums", f"group {seed}", "Add drums", "a song", genre)


def windows(seeds, genres=tuple(PATTERNS)):
    return [window(genre, 100 * index + seed) for seed in seeds for index, genre in enumerate(genres)]


class Obedient:
    """Plays what the text asks for; sparse is every third hit, soft a quarter of the level."""

    def insert(self, audio, sample_rate, text, stem, seed, steps):
        word = text.removeprefix("Add ").removesuffix(" drums").lower()
        played = drums(word if word in PATTERNS else "rock", seed, 3 if word == "sparse" else 1)
        return SimpleNamespace(stem=(played * (0.25 if word == "soft" else 1.0))[None])


class Deaf(Obedient):
    """Plays the same whatever the text says."""

    def insert(self, audio, sample_rate, text, stem, seed, steps):
        return super().insert(audio, sample_rate, "Add rock drums", stem, seed, steps)


def listener(model):
    return control.AudioListener(model, "drums")


@pytest.fixture(scope="module")
def examples():
    return windows(range(10, 18))


def test_patterns_are_told_apart(examples):
    classifier = GenreClassifier.fitted(
        np.stack([features(each.stem, each.mix, RATE) for each in examples]), [each.genre for each in examples]
    )
    assert classifier.genres == ("dance", "funk", "rock")
    unheard = windows(range(30, 36))
    taken = classifier.predict(np.stack([features(each.stem, each.mix, RATE) for each in unheard]))
    assert np.mean([genre == each.genre for genre, each in zip(taken, unheard, strict=True)]) > 0.85


def test_features_do_not_depend_on_level(examples):
    stem, mix = examples[0].stem, examples[0].mix
    np.testing.assert_allclose(features(0.1 * stem, 0.1 * mix, RATE), features(stem, mix, RATE), atol=0.05)


def test_features_of_silence_are_finite():
    silence = np.zeros(4 * RATE, np.float32)
    assert np.all(np.isfinite(features(silence, silence, RATE)))


def test_who_obeys_and_who_does_not(examples):
    asked = windows(range(3))
    obedient, note = control.measure(listener(Obedient()), asked, examples)
    figures = {trial.name: trial for trial in obedient}
    assert not note and list(figures) == [
        "density: busy over sparse",
        "dynamics: loud over soft",
        "genre: all",
        "genre: dance",
        "genre: funk",
        "genre: rock",
    ]
    assert figures["density: busy over sparse"].obeyed.value == 1.0
    assert figures["density: busy over sparse"].more.value > 1.5 * figures["density: busy over sparse"].less.value
    loud = figures["dynamics: loud over soft"]
    assert loud.obeyed.value == 1.0 and loud.more.value - loud.less.value == pytest.approx(12.0, abs=0.1)
    everything = figures["genre: all"]
    assert everything.obeyed.value > 0.8 and everything.ceiling.value > 0.8 and everything.ceiling.count == 9
    assert everything.chance == pytest.approx(1 / 3) and everything.count == 9
    assert figures["genre: rock"].unasked.value < 0.2

    deaf = {trial.name: trial for trial in control.measure(listener(Deaf()), asked, examples)[0]}
    assert deaf["density: busy over sparse"].obeyed.value == 0.0 == deaf["density: busy over sparse"].chance
    assert deaf["genre: all"].obeyed.value < 0.5
    assert deaf["genre: rock"].obeyed.value == deaf["genre: rock"].unasked.value


def test_a_genre_of_few_groups_is_none(examples):
    """Many windows of one song do not make a genre."""
    few = [dataclasses.replace(each, group_id="one song") if each.genre == "funk" else each for each in examples]
    trials, _ = control.measure(listener(Obedient()), windows(range(1)), few)
    assert [trial.name for trial in trials[3:]] == ["genre: dance", "genre: rock"]


def test_what_cannot_be_asked_for_is_said():
    silent = windows(range(2), ("rock",))
    trials, note = control.measure(listener(Obedient()), silent, windows(range(6), ("rock",)))
    assert len(trials) == 2 and "two of them" in note
    assert "no genres" in control.to_text(trials, note)
    header, first, _ = control.to_csv(trials).splitlines()
    assert header.count(",") == first.count(",")
    definitions = control.as_json(listener(Obedient()), trials, note)["definitions"]
    assert {"density", "genre"} <= definitions.keys()
