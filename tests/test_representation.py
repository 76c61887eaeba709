"""Mel images, audio files and the level rule, against librosa, soundfile and pyloudnorm."""

import dataclasses

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch

from configs import auffusion, riffusion, tiny
from subtractive_jax.errors import UserError
from subtractive_jax.representation import audio
from subtractive_jax.representation.level import LoudnessMeter, context_gain
from subtractive_jax.representation.mel import Mel, mel_filters

TINY, AUFFUSION, RIFFUSION = (Mel.from_config(c.get_config().representation) for c in (tiny, auffusion, riffusion))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


def assert_relative(found, expected, tolerance=1e-4):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", "none"])
@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels", "fmin", "fmax"), [(16_000, 2048, 256, 0, 8000), (44_100, 1024, 80, 60, 9000)]
)
def test_filter_bank_is_librosas(scale, norm, rate, n_fft, n_mels, fmin, fmax):
    expected = librosa.filters.mel(
        sr=rate,
        n_fft=n_fft,
        n_mels=n_mels,
        fmin=fmin,
        fmax=fmax,
        htk=scale == "htk",
        norm=None if norm == "none" else norm,
    )
    np.testing.assert_allclose(mel_filters(rate, n_fft, n_mels, fmin, fmax, scale, norm), expected, atol=1e-6)


@pytest.mark.parametrize("mel", [TINY, AUFFUSION])
def test_image_is_that_of_auffusions_front_end(mel):
    x = torch.tensor(noise(2, 3 * mel.sample_rate + 123))
    padding = (mel.n_fft - mel.hop_length) // 2
    padded = torch.nn.functional.pad(x[:, None], (padding, padding), mode="reflect")[:, 0]
    window = torch.hann_window(mel.win_length)
    spectrum = torch.view_as_real(
        torch.stft(padded, mel.n_fft, mel.hop_length, mel.win_length, window, center=False, return_complex=True)
    )
    magnitude = torch.sqrt(spectrum.pow(2).sum(-1) + 1e-9)
    filters = librosa.filters.mel(sr=mel.sample_rate, n_fft=mel.n_fft, n_mels=mel.n_mels, fmin=mel.fmin, fmax=mel.fmax)
    log = torch.log(torch.clamp(torch.tensor(filters) @ magnitude, min=mel.log_floor))
    low, high = np.log(mel.log_floor), np.log(mel.log_ceiling)
    expected = torch.clamp((log - low) / (high - low), 0.0, 1.0)
    if mel.flip:
        expected = expected.flip(1)
    image = np.asarray(mel.encode(x.numpy()))
    assert image.shape == (2, mel.n_mels, x.shape[1] // mel.hop_length, 1)
    assert_relative(image[..., 0], 2.0 * expected.numpy() - 1.0)


def test_image_is_that_of_riffusions_front_end():
    mel = RIFFUSION
    x = torch.tensor(noise(2, 3 * mel.sample_rate + 123))
    window = torch.hann_window(4_410)
    spectrum = torch.stft(
        x, 17_640, 441, 4_410, window, center=True, pad_mode="reflect", normalized=False, return_complex=True
    )
    filters = librosa.filters.mel(sr=44_100, n_fft=17_640, n_mels=512, fmin=0, fmax=10_000, htk=True, norm=None)
    magnitude = torch.tensor(filters) @ spectrum.abs()
    assert magnitude.max() < mel.power_ceiling, "nothing to clip in this comparison"
    grey = 255.0 - 255.0 * (magnitude / mel.power_ceiling).pow(0.25)
    expected = 2.0 * grey.flip(1).numpy() / 255.0 - 1.0
    image = np.asarray(mel.encode(x.numpy()))
    assert image.shape == (2, 512, x.shape[1] // 441 + 1, 1)
    assert_relative(image[..., 0], expected)


@pytest.mark.parametrize("mel", [TINY, AUFFUSION, RIFFUSION])
def test_image_and_magnitude_are_inverses(mel):
    loudest = max(mel.log_ceiling, mel.power_ceiling)
    magnitude = np.exp(np.random.default_rng(1).uniform(np.log(1e-5), np.log(loudest), (3, mel.n_mels, 7)))
    image = mel.image(jnp.asarray(magnitude, jnp.float32))
    np.testing.assert_allclose(mel.magnitude(image), magnitude, rtol=1e-3 if mel.power_exponent else 1e-4, atol=1e-7)
    np.testing.assert_allclose(mel.log_magnitude(image), np.log(magnitude), atol=1e-3 if mel.power_exponent else 1e-4)
    values = np.random.default_rng(2).uniform(-0.99, 0.99, (3, mel.n_mels, 7, 1)).astype(np.float32)
    np.testing.assert_allclose(mel.image(mel.magnitude(values)), values, atol=1e-5)


@pytest.mark.parametrize("mel", [TINY, AUFFUSION, RIFFUSION])
def test_silence_and_ceiling_are_the_ends_of_the_range(mel):
    loudest = max(mel.log_ceiling, mel.power_ceiling)
    magnitude = jnp.array([[0.0], [mel.log_floor], [loudest], [10 * loudest]])
    image = mel.image(magnitude)
    rows = np.asarray(image)[::-1, 0, 0] if mel.flip else np.asarray(image)[:, 0, 0]
    np.testing.assert_allclose(rows, np.array([1, 1, -1, -1]) * mel.silence, atol=1e-6)
    assert mel.silence == (1.0 if mel is RIFFUSION else -1.0)
    np.testing.assert_allclose(mel.encode(np.zeros(3 * mel.n_fft, np.float32)).mean(), mel.silence, atol=0.3)
    beyond = mel.magnitude(jnp.array([[[-1.5]], [[1.5]]]) * mel.silence)
    np.testing.assert_allclose(np.sort(np.ravel(beyond)), [mel.log_floor, loudest], rtol=1e-4)


@pytest.mark.parametrize("mel, seconds", [(TINY, 10.24), (AUFFUSION, 10.24), (RIFFUSION, 5.11)])
def test_lengths(mel, seconds):
    assert mel.window_samples == mel.samples(mel.window_frames) == round(seconds * mel.sample_rate)
    for more in (0, mel.hop_length - 1):
        assert mel.frames(mel.window_samples + more) == mel.window_frames
        audio = jax.ShapeDtypeStruct((3, mel.window_samples + more), jnp.float32)
        assert jax.eval_shape(mel.encode, audio).shape == (3, mel.n_mels, mel.window_frames, 1)


@pytest.mark.parametrize("mel", [TINY, dataclasses.replace(TINY, framing="centered", win_length=600)])
def test_inverse_stft(mel):
    x = noise(2, 50 * mel.hop_length)
    inverse = mel.istft(mel.stft(x))
    assert inverse.shape == (2, 50 * mel.hop_length)
    np.testing.assert_allclose(inverse, x, atol=1e-6)


def test_gradient_is_finite_in_silence():
    gradient = jax.grad(lambda x: TINY.encode(x).sum())(jnp.zeros(3200))
    assert np.isfinite(gradient).all()


def test_unknown_missing_and_impossible_fields():
    fields = dataclasses.asdict(TINY)
    with pytest.raises(UserError, match='did you mean "hop_length"'):
        Mel.from_config(fields | {"hop_lenght": 160})
    with pytest.raises(UserError, match='"n_mels" is missing'):
        Mel.from_config({key: value for key, value in fields.items() if key != "n_mels"})
    with pytest.raises(UserError, match='did you mean "slaney"'):
        Mel.from_config(fields | {"mel_scale": "slany"})
    with pytest.raises(UserError, match="fmax"):
        Mel.from_config(fields | {"fmax": 9000.0})
    with pytest.raises(UserError, match='did you mean "centered"'):
        Mel.from_config(fields | {"framing": "centred"})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(power_exponent=0.25, power_ceiling=100.0), "give either log_floor and log_ceiling, or"),
        (dict(log_floor=0.0, log_ceiling=0.0), "give either log_floor and log_ceiling, or"),
        (dict(log_floor=0.0), "0 < log_floor < log_ceiling"),
        (dict(log_floor=0.0, log_ceiling=0.0, power_ceiling=100.0), "power_exponent > 0"),
    ],
)
def test_one_compression_is_given_whole(changes, message):
    with pytest.raises(UserError, match=message) as error:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(error.value)


def test_gain_brings_the_context_to_the_target():
    context = noise(16_000 * 3) * np.linspace(0.1, 1, 16_000 * 3, dtype=np.float32)
    gain = context_gain(context, 16_000, -20.0)
    assert pyloudnorm.Meter(16_000).integrated_loudness(context * gain) == pytest.approx(-20.0, abs=0.01)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("seconds", [0.41, 1.04, 1.06, 7.77])
def test_loudness_of_a_sum_heard_in_blocks_is_pyloudnorms(rate, seconds):
    generator = np.random.default_rng(round(rate * seconds))
    fades = np.linspace(0, 1, 9)[:, None] ** 4 * generator.random((9, 3)) + 1e-4
    envelope = np.stack([np.interp(np.linspace(0, 8, round(rate * seconds)), np.arange(9), fade) for fade in fades.T])
    stems = envelope * generator.standard_normal(envelope.shape)
    meter = LoudnessMeter(rate, 3)
    for block in np.array_split(stems, 5, axis=1):
        meter.add(block)
    for weights in ([1, 1, 1], [0, 1, 1], [0.5, 0, 2]):
        expected = pyloudnorm.Meter(rate).integrated_loudness(weights @ stems)
        assert -20 * np.log10(meter.gain(np.array(weights), 0.0)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("context", [np.zeros(48_000, np.float32), noise(6_000), noise(0), noise(48_000) * 1e-6])
def test_gain_of_silence_and_of_snippets_is_one(context):
    assert context_gain(context, 16_000) == 1.0


@pytest.mark.parametrize(("suffix", "tolerance"), [("wav", 1e-7), ("flac", 1e-6), ("ogg", 0.1), ("mp3", 0.1)])
def test_written_audio_reads_back(tmp_path, suffix, tolerance):
    tone = 0.5 * np.sin(np.arange(32_000) / 20, dtype=np.float32)
    stereo = np.stack([tone, -0.3 * tone])
    audio.write_audio(tmp_path / f"x.{suffix}", stereo, 16_000)
    read, rate = audio.read_audio(tmp_path / f"x.{suffix}")
    assert rate == 16_000 and read.dtype == np.float32 and read.shape[0] == 2
    middle = slice(8_000, 24_000)
    assert np.abs(read[:, middle] - stereo[:, middle]).max() < tolerance
    assert [path.name for path in tmp_path.iterdir()] == [f"x.{suffix}"], "no temporary file is left"


def test_flac_is_exact_on_the_24_bit_grid(tmp_path):
    steps = np.random.default_rng(0).integers(-(2**23), 2**23, 1_000)
    audio.write_audio(tmp_path / "x.flac", (steps / 2**23).astype(np.float32), 48_000)
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "x.flac")[0][0] * 2**23, steps)


def test_long_ogg(tmp_path):
    audio.write_audio(tmp_path / "x.ogg", noise(1, 44_100 * 60), 44_100)
    assert audio.read_audio(tmp_path / "x.ogg")[0].shape[1] == 44_100 * 60


def test_impossible_formats_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match='did you mean "flac"'):
        audio.write_audio(tmp_path / "x.flc", noise(1, 10), 16_000)
    with pytest.raises(UserError, match="mp3 cannot hold 1 channels at 96000 Hz"):
        audio.write_audio(tmp_path / "x.mp3", noise(1, 9600), 96_000)
    assert not list(tmp_path.iterdir())


def test_flac_bytes_are_lossless():
    samples = np.random.default_rng(0).integers(-32768, 32768, 5_000).astype(np.int16)
    read, rate = audio.read_audio(audio.flac_bytes(samples, 16_000))
    assert rate == 16_000
    np.testing.assert_array_equal(read[0] * 32768, samples)


@pytest.mark.parametrize(("from_rate", "to_rate"), [(44_100, 16_000), (16_000, 48_000), (16_000, 16_000)])
def test_resampled_length_and_pitch(from_rate, to_rate):
    seconds = np.arange(from_rate + 7) / from_rate
    tone = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    resampled = audio.resample(np.stack([tone, tone]), from_rate, to_rate)
    assert resampled.shape == (2, round(len(tone) * to_rate / from_rate))
    expected = np.sin(2 * np.pi * 440 * np.arange(resampled.shape[1]) / to_rate)
    middle = slice(to_rate // 4, to_rate // 2)
    np.testing.assert_allclose(resampled[1, middle], expected[middle], atol=1e-3)


def test_unreadable_audio_is_named(tmp_path):
    def written(name: str, samples: np.ndarray) -> str:
        soundfile.write(tmp_path / name, samples, 16_000, subtype="FLOAT")
        return str(tmp_path / name)

    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio")
    nan = noise(100)
    nan[50] = np.nan
    for path, reason in {
        str(tmp_path / "missing.wav"): "no such audio file",
        str(tmp_path): "no such audio file",
        str(tmp_path / "empty.wav"): "the file is empty",
        str(tmp_path / "text.wav"): "not readable as audio",
        written("none.wav", noise(0)): "no audio samples",
        written("nan.wav", nan): "NaN",
    }.items():
        with pytest.raises(UserError, match=reason) as error:
            audio.read_audio(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="audio bytes: not readable"):
        audio.read_audio(b"not audio")
