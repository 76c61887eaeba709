"""From a song to a stem: windows, the reverse process, what is promised of the output, and what is refused."""

import copy
import dataclasses
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import subtractive_jax
from configs import minimal, tiny
from subtractive_jax import parts
from subtractive_jax.diffusion import guidance, objective, schedule, solvers
from subtractive_jax.errors import UserError
from subtractive_jax.model import Model
from subtractive_jax.sampling import candidates, gates, insert, insertion, rhythm
from subtractive_jax.sampling.sampler import Known, Sampler
from subtractive_jax.sampling.song import Recording
from subtractive_jax.sampling.windows import Windows
from subtractive_jax.training import text_stage
from subtractive_jax.vocoder import mel_matching
from subtractive_jax.weights import model_folder
from tests import synthetic

RATE = 16_000
TEXTS = ["Add rock drums", "Add reggae beats", "Add jazzy drums", "a lively Latin flair with cymbal crashes"]


def _config(**changes):
    config = minimal.get_config()
    with config.unlocked():
        channels = config.autoencoder.latent_channels
        config.latent_shift = (0.1,) * channels
        config.latent_scale = (1.5,) * channels
        config.context_scale = (0.5,) * channels
        config.update(changes)
    return config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "noise"
    synthetic.write_model(path, _config(), parts.PARTS, text_stage.train_tokenizer(TEXTS, 256))
    return model_folder.load(path)


@pytest.fixture(scope="module")
def model(files):
    return Model(files, "noise")


def _variant(model, without="", windows_per_device=8, **changes):
    """The same model, with what it has compiled so far, but for these differences."""
    variant = copy.copy(model)
    variant.config = _config(**changes)
    variant._params = {part: value for part, value in model._params.items() if part != without}
    variant._windows_per_device = windows_per_device
    return variant


def _music(samples, channels=1, rate=RATE, seed=0):
    """16-bit music: decaying tones twice a second."""
    time = np.arange(samples) / rate
    random = np.random.default_rng(seed)
    notes = [
        np.exp(-6 * (time % 0.5)) * np.sin(2 * np.pi * f * time) for f in random.uniform(80, 2000, (channels, 3)).T[0]
    ]
    audio = 0.2 * np.stack(notes) + 0.01 * random.standard_normal((channels, samples))
    return (np.round(audio * 2**15) / 2**15).astype(np.float32)


def _clicks(times, seconds=8.0):
    audio = np.zeros(int(seconds * RATE), np.float32)
    for time in times:
        start = int(time * RATE)
        audio[start : start + 800] += 0.5 * np.exp(-np.arange(800) / 100) * np.sin(np.arange(800))
    return audio[None]


# Windows


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(total=st.integers(1, 5000), length=st.integers(2, 300))
def test_every_item_is_covered_with_weights_that_sum_to_one(total, length):
    windows = Windows.covering(total, length)
    assert windows.total >= total
    assert windows.count == 1 or Windows(length, windows.count - 1).total < total
    blended = windows.blend(np.ones((windows.count, 3, length, 2), np.float32), axis=-2)
    assert blended.shape == (3, windows.total, 2)
    np.testing.assert_allclose(blended, 1.0, rtol=1e-5)
    assert (windows.weights() > 0).all()


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(count=st.integers(1, 9), length=st.integers(2, 40), axis=st.sampled_from([-1, -2, -3]))
def test_blending_windows_that_agree_gives_the_line_back(count, length, axis):
    windows = Windows(length, count)
    shape = [2, 3, 4]
    shape[axis] = windows.total
    line = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    split = windows.split(line, axis)
    assert split.shape[0] == count and split.shape[axis] == length
    np.testing.assert_allclose(windows.blend(split, axis), line, atol=1e-5)


# The reverse process


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("prediction_type", objective.PREDICTION_TYPES)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_denoiser_that_knows_the_song_arrives_at_it(solver, prediction_type, strength):
    config = _config()
    with config.unlocked():
        config.schedule.prediction_type = prediction_type
        config.schedule.rescale_betas_zero_snr = prediction_type != "epsilon"
    rates = schedule.rates(config.schedule)
    windows = Windows(16, 5)
    random = np.random.default_rng(0)
    truth = random.standard_normal((8, windows.total, 8)).astype(np.float32)
    calls = []

    def denoise(x, *arguments):
        context, t = (arguments[0], arguments[1]) if strength is None else (None, arguments[0])
        if strength is None:
            np.testing.assert_allclose(context, (1.0 - 0.1) * 0.5, rtol=1e-5)
        calls.append(int(t))
        signal, noise = rates[t]
        known = np.tile(windows.split(truth, -2), (2, 1, 1, 1))  # of two seeds
        eps = (x - signal * known) / noise
        return np.asarray(objective.target(prediction_type, known, eps, t, rates))

    fake = types.SimpleNamespace(
        config=config,
        params=lambda part: None,
        encode_text=lambda texts: (np.zeros((len(texts), 4, 8)), np.ones((len(texts), 4), bool)),
        denoise=denoise,
        denoise_base=denoise,
    )
    sampler = _sampler(fake, solver=solver, strength=strength)
    latents = sampler.latents(np.ones((5, 8, 16, 8), np.float32), [0, 7])
    inexact = (solver, prediction_type) == ("pndm", "v_prediction")  # it averages v of different timesteps
    expected = np.stack([truth / 1.5 + 0.1] * 2)
    np.testing.assert_allclose(latents, expected, atol=0.1 if inexact else 2e-3)
    steps = 10 if strength is None else 5
    assert len(calls) == {"pndm": steps + 1, "heun": 2 * steps - 1}.get(solver, steps)
    assert calls == sorted(calls, reverse=True)


def _sampler(model, **changes):
    fields = dict(
        instruction="Add drums",
        stem=0,
        solver="ddim",
        steps=10,
        text_guidance=3.0,
        context_guidance=1.5,
        guidance_rescale=0.0,
        guidance_interval=(0.0, 1.0),
        strength=None,
    )
    return Sampler(model, **(fields | changes))


def test_guided_prediction_is_the_formula_of_three_calls(files, model):
    random = np.random.default_rng(0)
    x, context = random.standard_normal((2, 3, 8, 16, 8)).astype(np.float32)
    states, mask = model.encode_text(["", "Add reggae beats"])
    apply = jax.jit(parts.network("denoiser", files.config).apply)

    def call(context, text):
        return apply(
            files.params["denoiser"],
            jnp.concatenate([x, context], axis=-1),
            jnp.full(3, 700),
            jnp.tile(states[text], (3, 1, 1)),
            jnp.tile(mask[text], (3, 1)),
            jnp.full(3, 2),
        )

    nothing = jnp.zeros_like(context)
    expected = guidance.context_and_text(call(nothing, 0), call(context, 0), call(context, 1), 1.5, 4.0)
    output = model.denoise(x, context, 700, states, mask, 2, 1.5, 4.0)
    np.testing.assert_allclose(output, expected, atol=1e-4)


# The song


@pytest.mark.parametrize(
    "samples, channels, rate",
    [
        (1, 1, RATE),
        (777, 1, RATE),
        (128 * 160, 1, RATE),  # exactly one window
        (128 * 160 + 1, 1, RATE),
        (50_001, 1, RATE),
        (44_100 * 2 + 3, 2, 44_100),
    ],
)
def test_the_input_is_in_the_mix_sample_by_sample(model, samples, channels, rate):
    audio = _music(samples, channels, rate)
    result = model.insert(audio, rate, "Add rock drums")
    assert result.stem.shape == result.mix.shape == audio.shape
    assert result.stem.dtype == result.mix.dtype == np.float32
    assert np.isfinite(result.stem).all() and (samples < 160 or np.abs(result.stem).max() > 1e-4)
    np.testing.assert_array_equal(result.mix - result.stem, audio)
    assert result.info["figures"]["preservation"]["exact"] and not result.estimated


def test_the_seed_decides(model):
    audio = _music(40_000)
    first, again, other = (model.insert(audio, RATE, "Add rock drums", seed=seed).stem for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_instruction_stem_and_guidance_reach_the_model(model):
    audio = _music(40_000)
    stem = model.insert(audio, RATE, "Add rock drums").stem
    for changed in (
        model.insert(audio, RATE, "Add reggae beats", text_guidance=9.0),
        model.insert(audio, RATE, "Add rock drums", stem="bass"),
        model.insert(audio, RATE, "Add rock drums", context_guidance=5.0),
        model.insert(_music(40_000, seed=1), RATE, "Add rock drums"),
        model.insert(audio, RATE, "Add rock drums", steps=3),
    ):
        assert np.abs(stem - changed.stem).max() > 1e-5


def test_the_solver_is_the_models_own_unless_given(model):
    audio = _music(40_000)
    counts = []

    def result(model, **options):
        return model.insert(
            audio, RATE, "Add rock drums", steps=5, progress=lambda *count: counts.append(count), **options
        )

    own, given = result(_variant(model, sampling={"solver": "pndm"})), result(model, solver="pndm")
    assert own.info["solver"] == given.info["solver"] == "pndm" and counts[-1] == (6, 6)
    np.testing.assert_array_equal(own.stem, given.stem)
    for other in (result(model), result(model, solver="dpmsolver++")):
        assert counts[-1] == (5, 5) and np.abs(other.stem - own.stem).max() > 1e-5


def test_guidance_rescale_is_the_models_own_unless_given(model):
    audio = _music(40_000)
    own = model.insert(audio, RATE, "Add rock drums")
    assert own.info["guidance_rescale"] == model.config.sampling.guidance_rescale > 0.0
    earlier = _variant(model)
    with earlier.config.unlocked():
        del earlier.config.sampling.guidance_rescale
    plain = earlier.insert(audio, RATE, "Add rock drums")
    given = model.insert(audio, RATE, "Add rock drums", guidance_rescale=0.0)
    np.testing.assert_array_equal(plain.stem, given.stem)
    assert np.abs(plain.stem - own.stem).max() > 1e-5


def test_the_batch_of_windows_does_not_matter(model):
    audio = _music(10 * RATE)
    small = _variant(model, windows_per_device=1)
    expected, found = model.insert(audio, RATE, "Add jazzy drums"), small.insert(audio, RATE, "Add jazzy drums")
    assert expected.info["windows"] > small._devices  # so that they were cut into batches differently
    np.testing.assert_allclose(found.stem, expected.stem, atol=1e-4)


def test_songs_of_like_length_are_compiled_for_once(model):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

    def compiled_again(seconds, **settings):
        compiled.clear()
        model.insert(_music(round(seconds * RATE)), RATE, "Add rock drums", steps=3, **settings)
        return [event for event in compiled if "backend_compile" in event]

    compiled_again(3.0)
    assert compiled_again(2.9, text_guidance=5.0, stem="bass", seed=7) == []


def test_the_level_of_the_input_is_the_level_of_the_stem(model):
    audio = _music(3 * RATE)
    loud, quiet = (model.insert(audio * factor, RATE, "Add rock drums") for factor in (0.5, 0.05))
    np.testing.assert_allclose(quiet.stem, 0.1 * loud.stem, atol=1e-3 * np.abs(loud.stem).max())
    louder = model.insert(audio * 0.05, RATE, "Add rock drums", stem_gain_db=6.0)
    np.testing.assert_allclose(louder.stem, 10**0.3 * quiet.stem, atol=1e-6)


def test_the_stem_stays_between_start_and_end(model):
    audio = _music(4 * RATE, channels=2)
    result = model.insert(audio, RATE, "Add rock drums", start=1.0, end=2.5)
    assert np.abs(result.stem[:, RATE : 5 * RATE // 2]).max() > 1e-4
    assert not result.stem[:, :RATE].any() and not result.stem[:, 5 * RATE // 2 :].any()
    np.testing.assert_array_equal(result.mix - result.stem, audio)


@pytest.mark.parametrize(
    "peak, new, lowered", [(0.5, 0.4, 0.0), (0.9, 0.2, 6.0206), (1.0, 1.0, insertion.MAX_LOWERING_DB), (1.5, 0.0, 0.0)]
)
def test_a_stem_that_would_clip_is_turned_down_but_not_away(peak, new, lowered):
    tone = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE).astype(np.float32)
    place = insertion.Place(0, RATE, RATE, RATE)
    song = Recording(peak * tone[None], RATE)
    levels = insertion.levels(insertion.Insertion(song, place, insertion.Line(new * tone, RATE, 0)))
    np.testing.assert_allclose(levels.lowering_db, lowered, atol=0.1)
    np.testing.assert_allclose(levels.true_peak, peak + new, rtol=0.01)


def test_peaks_between_samples_count():
    """A tone at a quarter of the rate whose samples all lie 3 dB below its peaks (EBU Tech 3341, signal 17)."""
    tone = np.sin(np.pi / 2 * np.arange(RATE) + np.pi / 4).astype(np.float32) * np.hanning(RATE).astype(np.float32)
    place = insertion.Place(0, RATE, RATE, RATE)
    silence = insertion.Line(np.zeros(RATE, np.float32), RATE, 0)
    levels = insertion.levels(insertion.Insertion(Recording(tone[None], RATE), place, silence))
    assert np.abs(tone).max() < 0.71 and 0.99 < levels.true_peak < 1.02


# More than one stem


def test_candidates_drawn_together_are_those_drawn_alone(model):
    audio = _music(40_000, channels=2)
    song = Recording(audio, RATE)
    found = candidates.ranked(model, song, "Add rock drums", "drums", insert.Settings(), seed=3, num_candidates=3)
    assert sorted(one.info["seed"] for one in found) == [3, 4, 5]
    scores = [gates.score(one.info["figures"]) for one in found]
    assert scores == sorted(scores, reverse=True)
    for one in found:
        alone = model.insert(audio, RATE, "Add rock drums", seed=one.info["seed"])
        np.testing.assert_allclose(one.stem, alone.stem, atol=1e-5)


def test_bad_candidates_are_drawn_again_up_to_a_limit(model):
    """At -90 dB every stem counts as silent."""
    song = Recording(_music(30_000), RATE)
    settings = insert.Settings(stem_gain_db=-90.0, steps=2)
    found = candidates.ranked(model, song, "Add rock drums", "drums", settings, num_candidates=2, max_redraws=3)
    assert len(found) == 2 and all(one.info["redraws"] == 3 for one in found)
    assert all(one.info["figures"]["flags"] == ["silent_stem"] for one in found)
    good = candidates.ranked(model, song, "Add rock drums", "drums", insert.Settings(steps=2), max_redraws=3)
    assert good[0].info["redraws"] == 0 and good[0].info["figures"]["flags"] == []
    for bad in (dict(num_candidates=0), dict(max_redraws=-1)):
        with pytest.raises(UserError, match="num_candidates 0|max_redraws -1"):
            candidates.ranked(model, song, "Add rock drums", "drums", settings, **bad)


def test_stems_in_turn_hear_those_before_them(model):
    audio = _music(40_000)
    song, settings = Recording(audio, RATE), insert.Settings(steps=3)
    texts = ["Add a bass", "Add rock drums"]
    (bass,), (drums,) = candidates.in_turn(model, song, texts, ["bass", "drums"], settings, seed=1)
    alone = model.insert(audio, RATE, "Add a bass", stem="bass", seed=1, steps=3)
    np.testing.assert_array_equal(bass.stem, alone.stem)
    again = model.insert(bass.mix, RATE, "Add rock drums", seed=1, steps=3)
    np.testing.assert_allclose(drums.stem, again.stem, atol=1e-6)
    np.testing.assert_allclose(drums.mix, audio + bass.stem + drums.stem, atol=1e-6)
    with pytest.raises(UserError, match="3 instructions for 2 stems"):
        candidates.in_turn(model, song, [*texts, "Add more"], ["bass", "drums"], settings)


# A part of a song


def test_outside_of_the_range_the_old_stem_stays(model):
    context, old = _music(6 * RATE, channels=2), _music(6 * RATE, channels=2, seed=1)
    settings = insert.Settings(start=2.0, end=4.0, steps=3)
    song, before = Recording(context, RATE), Recording(old, RATE)
    result = insert.draw(model, song, "Add rock drums", "drums", [0], settings, old_stem=before)[0]
    outside = np.r_[0 : 2 * RATE, 4 * RATE : 6 * RATE]
    np.testing.assert_array_equal(result.stem[:, outside], old[:, outside])
    np.testing.assert_array_equal(result.mix - result.stem, context)
    inside = slice(2 * RATE + 200, 4 * RATE - 200)
    assert np.abs(result.stem[:, inside] - old[:, inside]).max() > 1e-3
    without = insert.draw(model, song, "Add rock drums", "drums", [0], settings)[0]
    assert not without.stem[:, outside].any()
    assert np.abs(without.stem[:, inside] - result.stem[:, inside]).max() > 1e-5  # it continues the old one

    mixes = _variant(model, target="mix")
    mixed = insert.draw(mixes, song, "Add rock drums", "drums", [0], settings, old_stem=before)[0]
    np.testing.assert_allclose(mixed.mix[:, outside], (context + old)[:, outside], atol=1e-6)


def test_what_is_known_stays_in_the_latents():
    random = np.random.default_rng(0)
    windows, truth = Windows(16, 3), random.standard_normal((8, 32, 8)).astype(np.float32)
    fake = types.SimpleNamespace(
        config=_config(),
        params=lambda part: None,
        encode_text=lambda texts: (np.zeros((len(texts), 4, 8)), np.ones((len(texts), 4), bool)),
        denoise=lambda x, *arguments: 0.1 * x,
    )
    where = np.arange(32) < 10
    context = random.standard_normal((3, 8, 16, 8)).astype(np.float32)
    found = _sampler(fake).latents(context, [0, 1], Known(truth, where))
    np.testing.assert_allclose(found[:, :, where], np.stack([truth[:, where] / 1.5 + 0.1] * 2), atol=1e-6)
    assert np.abs(found[0] - found[1])[:, ~where].max() > 1e-3 and windows.total == 32


@pytest.mark.slow
def test_window_borders_are_no_seams():
    """What the shipped model draws is no louder and begins no more notes where windows meet than elsewhere.

    The share of other offsets at which level and flux are lower is uniform where borders are nothing special.
    """
    model = subtractive_jax.load("tiny")
    half, shares = model.mel.window_frames // 2, []
    for seed in range(4):
        stem = model.insert(_music(30 * RATE, seed=seed), RATE, "Add rock drums", seed=seed, steps=10).stem[0]
        frames = stem[: len(stem) // 160 * 160].reshape(-1, 160)
        for curve in (rhythm.onset_strength(stem, RATE), np.sqrt(np.mean(np.square(frames), axis=1))):
            curve = np.pad(curve, (0, -len(curve) % half)).reshape(-1, half)[1:-1].mean(axis=0)
            shares.append((curve[1:] < curve[0]).mean())
    assert 0.2 < np.mean(shares) < 0.8, shares


# Guidance


def test_guidance_of_one_asks_once(model):
    random = np.random.default_rng(0)
    x, context = random.standard_normal((2, 3, 8, 16, 8)).astype(np.float32)
    states, mask = model.encode_text(["", "Add reggae beats"])
    once, thrice = (model.denoise(x, context, 700, states, mask, 2, 1.0, scale) for scale in (1.0, 1.0 + 1e-7))
    np.testing.assert_allclose(once, thrice, atol=1e-4)


def test_outside_its_interval_there_is_no_guidance():
    asked = []
    fake = types.SimpleNamespace(
        config=_config(),
        params=lambda part: None,
        encode_text=lambda texts: (np.zeros((len(texts), 4, 8)), np.ones((len(texts), 4), bool)),
        denoise=lambda x, context, t, states, mask, stem, *guidance: asked.append((t, guidance)) or x,
    )
    _sampler(fake, guidance_interval=(0.2, 0.7), guidance_rescale=0.5).latents(np.ones((1, 8, 16, 8)), [0])
    assert {guidance for t, guidance in asked if 200 <= t <= 700} == {(1.5, 3.0, 0.5)}
    assert {guidance for t, guidance in asked if not 200 <= t <= 700} == {(1.0, 1.0, 0.5)}


def test_rescaled_guidance_has_the_spread_of_what_it_guides():
    random = np.random.default_rng(0)
    guided, conditional = 5.0 * random.standard_normal((3, 8, 9, 2)), random.standard_normal((3, 8, 9, 2))
    whole = np.asarray(guidance.rescaled(guided, conditional, 1.0))
    np.testing.assert_allclose(whole.std(axis=(1, 2, 3)), conditional.std(axis=(1, 2, 3)), rtol=1e-5)
    half = np.asarray(guidance.rescaled(guided, conditional, 0.5))
    np.testing.assert_allclose(half, (guided + whole) / 2, rtol=1e-5)
    np.testing.assert_allclose(guidance.rescaled(guided, conditional, 0.0), guided, rtol=1e-6)


def test_a_mix_target_writes_the_mix_and_estimates_the_stem(model):
    result = _variant(model, target="mix").insert(_music(40_000, channels=2), RATE, "Add rock drums")
    assert result.estimated and result.info["estimated"] and result.info["target"] == "mix"
    assert result.mix.shape == result.stem.shape == (2, 40_000)
    assert not result.info["figures"]["preservation"]["exact"]


def test_the_autoencoders_error_on_the_context_is_taken_back(model):
    true = model.encode_image(_music(10_240)[None])[0]
    decoded = true + np.float32(0.1) * np.random.default_rng(0).standard_normal(true.shape).astype(np.float32)
    decoded = np.clip(decoded, -1.0, 1.0)
    np.testing.assert_allclose(insert._corrected(model, decoded, decoded, true), true, atol=1e-5)
    louder = np.minimum(decoded + np.float32(0.5), 1.0)  # 56 times in magnitude: hardly any of it is context
    np.testing.assert_allclose(insert._corrected(model, louder, decoded, true), louder, atol=0.02)
    assert (insert._estimated_stem(model, decoded, decoded) == model.mel.silence).all()


def test_sdedit_redraws_as_much_as_strength_says(model):
    audio = _music(40_000)
    done = []
    results = [
        model.insert(
            audio,
            RATE,
            "Add rock drums",
            method="sdedit",
            strength=strength,
            steps=8,
            progress=lambda step, total: done.append((step, total)),
        )
        for strength in (0.25, 1.0)
    ]
    assert done == [(1, 2), (2, 2)] + [(step, 8) for step in range(1, 9)]
    assert all(result.estimated and result.info["method"] == "sdedit" for result in results)
    assert np.abs(results[0].mix - results[1].mix).max() > 1e-5


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("method", insert.METHODS)
def test_a_model_of_rectified_flow_is_sampled_like_any_other(model, solver, method):
    audio = _music(40_000)
    flow = _variant(model, schedule={"prediction_type": "flow_prediction"})
    result, other = (
        model.insert(audio, RATE, "Add rock drums", method=method, strength=strength, solver=solver, steps=5)
        for model in (flow, model)
        for strength in (1.0 if method == "sdedit" else None,)
    )
    assert np.isfinite(result.mix).all() and np.abs(result.stem).max() > 1e-4
    assert np.abs(result.stem - other.stem).max() > 1e-4


# The codec


def test_vocoders_hear_no_further_than_they_say(files):
    """What lies further off does not change a sample."""
    for config in (tiny.get_config(), files.config):
        network, halo = parts.network("vocoder", config), parts.vocoder_reach(config)
        params = synthetic.random_params(network.shapes())
        mel = np.random.default_rng(0).standard_normal((1, 2 * halo + 8, 64)).astype(np.float32)
        changed = mel.copy()
        changed[:, :1], changed[:, -1:] = 3.0, 3.0
        expected, found = (jax.jit(network.apply)(params, image) for image in (mel, changed))
        inside = slice((halo + 1) * 160, -(halo + 1) * 160)
        np.testing.assert_allclose(found[:, inside], expected[:, inside], atol=1e-7)
        assert np.abs(found - expected).max() > 1e-6


@pytest.mark.parametrize("turns", [0, 2])
@pytest.mark.parametrize("vocoder", ["hifigan", "vocos"])
def test_long_images_are_vocoded_without_seams(files, vocoder, turns):
    config = ConfigDict(files.config.to_dict())
    config.mel_matching = turns
    params = files.params["vocoder"]
    if vocoder != config.vocoder.model_type:
        config.vocoder = ConfigDict(
            dict(model_type="vocos", num_mels=64, dim=16, intermediate_dim=24, num_layers=2, n_fft=640, hop_length=160)
        )
        params = synthetic.random_params(parts.network("vocoder", config).shapes())
    model = Model(dataclasses.replace(files, config=config, params={**files.params, "vocoder": params}))
    image = np.random.default_rng(0).uniform(-1, 0, (64, 300, 1)).astype(np.float32)
    padded = np.pad(image, ((0, 0), (model.vocoder_halo,) * 2, (0, 0)), constant_values=-1.0)
    log_mel = model.mel.log_magnitude(padded[None]).swapaxes(1, 2)
    whole = jax.jit(parts.network("vocoder", config).apply)(params, log_mel)[0]
    whole = mel_matching.match_mel(model.mel, whole, padded, turns)
    halo = model.vocoder_halo * 160
    np.testing.assert_allclose(model.vocode(image), whole[halo:-halo], atol=1e-5)


def test_models_of_earlier_versions_leave_audio_as_it_was_vocoded(files):
    image = np.random.default_rng(0).uniform(-1, 0, (64, 128, 1)).astype(np.float32)

    def vocoded(turns: int | None) -> np.ndarray:
        config = ConfigDict(files.config.to_dict())
        del config.mel_matching
        if turns is not None:
            config.mel_matching = turns
        return Model(dataclasses.replace(files, config=config)).vocode(image)

    np.testing.assert_allclose(vocoded(None), vocoded(0), atol=1e-6)
    assert np.abs(vocoded(1) - vocoded(0)).max() > 1e-4


@pytest.mark.parametrize("change", [dict(mel_matching=-1), dict(mel_matching=2, framing="centered")])
def test_what_cannot_be_matched_is_refused(files, change):
    config = ConfigDict(files.config.to_dict())
    config.mel_matching = change["mel_matching"]
    config.representation.framing = change.get("framing", "hifigan")
    with pytest.raises(UserError, match="config.mel_matching=.*it must be 0 or more"):
        Model(dataclasses.replace(files, config=config))


def test_windows_are_decoded_one_by_one(model):
    latents = np.random.default_rng(0).standard_normal((3, 8, 16, 8)).astype(np.float32)
    audio = model.decode(latents)
    assert audio.shape == (3, model.mel.window_samples)
    np.testing.assert_allclose(audio[1], model.vocode(model.decode_image(latents)[1]), atol=1e-5)
    moments = model.encode_audio(audio)
    assert moments.shape == (3, 8, 16, 16)
    np.testing.assert_allclose(model.encode_audio(audio[1:2])[0], moments[1], atol=1e-4)


def test_text_states_do_not_depend_on_the_batch(model):
    states, mask = model.encode_text(TEXTS[:3])
    alone, _ = model.encode_text([TEXTS[1]])
    np.testing.assert_allclose(alone[0][mask[1]], states[1][mask[1]], atol=1e-5)
    assert states.shape[:2] == mask.shape == (3, model.config.max_text_tokens)
    assert model.encode_text([""])[1].sum() == 1


# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(audio=np.zeros((1, 0), np.float32)), "empty"),
        (dict(audio=np.array([[0.0, np.nan, 0.0]])), "NaN"),
        (dict(audio=np.zeros((3, 2, 2))), r"must be \[channels, samples\]"),
        (dict(audio=np.zeros((500, 2))), r"give \[channels, samples\]"),
        (dict(sample_rate=0), "must be positive"),
        (dict(stem="drum"), 'did you mean "drums"'),
        (dict(method="sdedti"), 'did you mean "sdedit"'),
        (dict(instruction="  "), "instruction is empty"),
        (dict(instruction="Add drums " * 100), "tokens, at most 64"),
        (dict(strength=0.5), "sdedit"),
        (dict(method="sdedit", strength=0.0), "strength 0.0"),
        (dict(method="sdedit", stem_gain_db=1.0), "writes the full mix"),
        (dict(steps=0), "0 sampling steps"),
        (dict(solver="dpm++"), 'unknown solver "dpm\\+\\+"'),
        (dict(text_guidance=float("nan")), "finite"),
        (dict(seed=-1), "seed -1"),
        (dict(guidance_rescale=1.5), "guidance_rescale 1.5"),
        (dict(guidance_interval=(0.9, 0.1)), "guidance_interval 0.9 to 0.1"),
        (dict(start=9.0), "within the song's 1.00 seconds"),
        (dict(start=0.5, end=0.2), "start < end"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(model, changes, message):
    arguments = dict(audio=_music(RATE), sample_rate=RATE, instruction="Add rock drums") | changes
    with pytest.raises(UserError, match=message) as error:
        model.insert(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "method, missing", [("sdedit", "base_denoiser"), ("insert", "denoiser"), ("insert", "vocoder")]
)
def test_a_model_without_a_part_is_refused(model, method, missing):
    with pytest.raises(UserError, match=f"has no {missing}"):
        _variant(model, without=missing).insert(_music(RATE), RATE, "Add rock drums", method=method)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        subtractive_jax.load("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json"):
        subtractive_jax.load(tmp_path / "empty")


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(_config().to_json())
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="checkpoint"):
        subtractive_jax.load(run)
