"""Mel images, audio files and the level rule, against librosa, soundfile and pyloudnorm."""

import dataclasses

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pyloudnorm
import pytest
import soundfile

from configs import tiny
from subtractive_jax.errors import UserError
from subtractive_jax.representation import audio
from subtractive_jax.representation.level import context_gain
from subtractive_jax.representation.mel import AUFFUSION, Mel, mel_filters

TINY = Mel.from_config(tiny.get_config().representation)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


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
def test_image_is_that_of_librosas_stft(mel):
    x = noise(2, 16_123)
    padding = (mel.n_fft - mel.hop_length) // 2
    padded = np.pad(x, ((0, 0), (padding, padding)), mode="reflect")
    spectrum = librosa.stft(padded, n_fft=mel.n_fft, hop_length=mel.hop_length, win_length=mel.win_length, center=False)
    filters = librosa.filters.mel(sr=mel.sample_rate, n_fft=mel.n_fft, n_mels=mel.n_mels, fmin=mel.fmin, fmax=mel.fmax)
    log = np.log(np.maximum(filters @ np.sqrt(np.abs(spectrum) ** 2 + 1e-9), mel.log_floor))
    expected = (log - np.log(mel.log_floor)) / (np.log(mel.log_ceiling) - np.log(mel.log_floor)) * 2 - 1
    image = np.asarray(mel.encode(x))
    assert image.shape == (2, mel.n_mels, 16_123 // mel.hop_length, 1)
    np.testing.assert_allclose(image[:, ::-1, :, 0] if mel.flip else image[..., 0], expected, atol=1e-4)


@pytest.mark.parametrize("mel", [TINY, AUFFUSION])
def test_image_and_magnitude_are_inverses(mel):
    magnitude = np.exp(np.random.default_rng(1).uniform(np.log(1e-5), np.log(500.0), (3, mel.n_mels, 7)))
    image = mel.image(jnp.asarray(magnitude, jnp.float32))
    np.testing.assert_allclose(mel.magnitude(image), magnitude, rtol=1e-4)
    np.testing.assert_allclose(mel.log_magnitude(image), np.log(magnitude), atol=1e-4)


def test_floor_and_ceiling_are_the_ends_of_the_range():
    magnitude = jnp.array([[0.0], [TINY.log_floor], [TINY.log_ceiling], [10 * TINY.log_ceiling]])
    image = np.asarray(TINY.image(magnitude))[:, 0, 0]
    np.testing.assert_allclose(image[:3], [-1, -1, 1], atol=1e-6)
    assert image[3] > 1, "loud music is not clipped"


def test_lengths():
    assert TINY.window_samples == 512 * 160 == TINY.samples(512)
    assert TINY.frames(TINY.window_samples + 159) == 512


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


def test_gain_brings_the_context_to_the_target():
    context = noise(16_000 * 3) * np.linspace(0.1, 1, 16_000 * 3, dtype=np.float32)
    gain = context_gain(context, 16_000, -20.0)
    assert pyloudnorm.Meter(16_000).integrated_loudness(context * gain) == pytest.approx(-20.0, abs=0.01)


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
    with pytest.raises(UserError, match="cannot be written as mp3 at 96000 Hz"):
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
