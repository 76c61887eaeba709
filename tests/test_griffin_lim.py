"""Griffin-Lim against librosa and PyTorch, and what it keeps of music."""

import dataclasses

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import torch

from configs import auffusion, minimal, riffusion
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.model import Model
from subtractive_jax.representation.mel import Mel
from subtractive_jax.sampling.windows import Windows
from subtractive_jax.training import text_stage
from subtractive_jax.vocoder.griffin_lim import GriffinLim, griffin_lim
from subtractive_jax.weights import model_folder
from tests import synthetic

AUFFUSION, RIFFUSION = (Mel.from_config(c.get_config().representation) for c in (auffusion, riffusion))
SMALL = Mel(
    sample_rate=8_000,
    n_fft=512,
    win_length=256,
    hop_length=64,
    n_mels=40,
    fmin=0.0,
    fmax=4_000.0,
    mel_scale="htk",
    mel_norm="none",
    window_frames=64,
    framing="centered",
    power_exponent=0.25,
    power_ceiling=100.0,
    inverted=True,
)


def chirps(seconds: float, rate: int) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    signal = 0.1 * np.sin(2 * np.pi * 440 * time) + 0.05 * np.sin(2 * np.pi * (300 * time + 100 * time**2))
    return signal.astype(np.float32)


def _from_sample_0_of_n_fft(mel: Mel, phasors: np.ndarray) -> np.ndarray:
    """Phases that count from the first of `n_fft` samples, as torch and librosa have them, to ours."""
    return phasors * np.exp(2j * np.pi * np.arange(phasors.shape[-1]) * ((mel.n_fft - mel.win_length) // 2) / mel.n_fft)


def _run(mel, magnitude, phasors, iterations, momentum):
    phasors = _from_sample_0_of_n_fft(mel, phasors).astype(np.complex64)
    return jax.jit(griffin_lim, static_argnums=(0, 3))(mel, magnitude, phasors, iterations, momentum)


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_iterations_are_librosas(momentum):
    magnitude = np.abs(np.random.default_rng(0).standard_normal((64, 257))).astype(np.float32)
    expected = librosa.griffinlim(
        magnitude.T,
        n_iter=16,
        hop_length=64,
        win_length=256,
        n_fft=512,
        momentum=momentum,
        init=None,
        pad_mode="reflect",
    )
    found = _run(SMALL, magnitude, np.ones((64, 257)), 16, momentum)
    assert found.shape == expected.shape == (63 * 64,)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_iterations_are_torchs_from_any_phases():
    random = np.random.default_rng(1)
    audio = torch.tensor(random.standard_normal(63 * 64))
    stft = dict(n_fft=512, hop_length=64, win_length=256, window=torch.hann_window(256, dtype=torch.float64))
    magnitude = torch.stft(audio, **stft, return_complex=True).abs()
    phasors = torch.exp(2j * np.pi * torch.tensor(random.uniform(size=magnitude.shape)))
    angles, before = phasors, 0.0
    for _ in range(16):
        rebuilt = torch.stft(torch.istft(magnitude * angles, **stft), **stft, return_complex=True)
        angles = rebuilt - 0.99 / 1.99 * before
        angles, before = angles / (angles.abs() + 1e-16), rebuilt
    expected = torch.istft(magnitude * angles, **stft).numpy()
    found = _run(SMALL, magnitude.T.float().numpy(), phasors.T.numpy(), 16, 0.99)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("mel", [SMALL, AUFFUSION])
def test_linear_magnitudes_are_the_least_squares_solution_of_least_norm(mel):
    magnitude = np.random.default_rng(0).uniform(0, 5, (mel.n_mels, 9)).astype(np.float32)
    filters = librosa.filters.mel(
        sr=mel.sample_rate,
        n_fft=mel.n_fft,
        n_mels=mel.n_mels,
        fmin=mel.fmin,
        fmax=mel.fmax,
        htk=mel.mel_scale == "htk",
        norm=None if mel.mel_norm == "none" else mel.mel_norm,
    )
    expected = np.maximum(np.linalg.lstsq(filters.astype(np.float64), magnitude, rcond=None)[0], 0.0).T
    found = GriffinLim(mel, 1, 0.0).linear_magnitude(magnitude)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize("mel, tolerance_db", [(RIFFUSION, 1.5), (AUFFUSION, 2.0)])
def test_the_mel_spectrum_of_music_is_kept(mel, tolerance_db):
    """Mean distance in dB where the music is within 40 dB of its loudest."""
    image = mel.encode(chirps(2.0, mel.sample_rate))
    audio = jax.jit(GriffinLim(mel, 32, 0.99).audio)(image)
    assert audio.shape == (mel.samples(image.shape[1]),) and audio.dtype == jnp.float32
    expected, found = (np.asarray(mel.log_magnitude(x)) * 20 / np.log(10) for x in (image, mel.encode(audio)))
    heard = expected > expected.max() - 40
    assert np.abs(found - expected)[heard].mean() < tolerance_db


def test_a_song_is_rendered_without_seams():
    """The level of a steady tone, and its phase from one period to the next, at and between the borders of chunks."""
    mel = dataclasses.replace(RIFFUSION, window_frames=128)
    time = np.arange(5 * mel.sample_rate) / mel.sample_rate
    tone = (0.1 * np.sin(2 * np.pi * 441 * time)).astype(np.float32)
    song = GriffinLim(mel, 32, 0.99).song(np.asarray(mel.encode(tone)))
    assert len(song) == len(tone)
    periods = song[4_400:-4_400].reshape(-1, 100)
    analytic = 2 * (periods @ np.exp(-2j * np.pi * np.arange(100) / 100)) / 100
    np.testing.assert_allclose(20 * np.log10(np.abs(analytic) / 0.1), 0.0, atol=0.5)
    assert np.abs(np.angle(analytic[1:] / analytic[:-1])).max() < 0.1
    steepest = np.abs(np.diff(song[4_400:-4_400])).max()
    assert steepest < 1.1 * np.abs(np.diff(tone)).max(), "no clicks"


@pytest.mark.parametrize("mel", [dataclasses.replace(RIFFUSION, window_frames=128), AUFFUSION])
def test_impulses_stay_where_they_are(mel):
    """In a song that is no multiple of anything, across the borders of chunks."""
    song = np.zeros(round(3.3217 * mel.sample_rate), np.float32)
    impulses = (np.array([0.5, 0.9, 1.23, 2.0, 3.1]) * mel.sample_rate).astype(int)
    song[impulses] = 0.9
    found = GriffinLim(mel, 32, 0.99).song(np.asarray(mel.encode(song)))
    assert 0 <= len(song) - len(found) < mel.hop_length
    reach = round(0.1 * mel.sample_rate)
    for impulse in impulses:
        energy = np.square(found[impulse - reach : impulse + reach])
        assert abs((energy * np.arange(-reach, reach)).sum() / energy.sum()) < mel.hop_length
        assert abs(np.argmax(energy) - reach) < mel.hop_length


def test_the_same_image_sounds_the_same():
    image = np.random.default_rng(0).uniform(-1, 1, (40, 150, 1)).astype(np.float32)
    songs = [GriffinLim(SMALL, 4, 0.5).song(image) for _ in range(2)]
    np.testing.assert_array_equal(*songs)


def test_silence_is_silent():
    assert not GriffinLim(SMALL, 4, 0.5).song(np.full((40, 150, 1), SMALL.silence, np.float32)).any()


@pytest.mark.parametrize("iterations, momentum", [(0, 0.5), (32, 1.0), (32, -0.1)])
def test_impossible_settings(iterations, momentum):
    with pytest.raises(UserError, match="iterations >= 1 and 0 <= momentum < 1"):
        GriffinLim(SMALL, iterations, momentum)


# In a model


@pytest.fixture(scope="module")
def riffusion_like(tmp_path_factory):
    """Centred frames, a power law, pictures of three channels and no vocoder, as Riffusion, but small."""
    config = minimal.get_config()
    with config.unlocked():
        channels = config.autoencoder.latent_channels
        config.update(latent_shift=(0.0,) * channels, latent_scale=(1.0,) * channels, context_scale=(1.0,) * channels)
        del config.representation.log_floor, config.representation.log_ceiling
        config.representation.update(
            dict(sample_rate=44_100, n_fft=4_096, win_length=2_048, hop_length=441, fmax=10_000.0, flip=True)
            | dict(framing="centered", power_exponent=0.25, power_ceiling=900.0, inverted=True)
        )
        config.autoencoder.update(dict(in_channels=3, out_channels=3))
        config.vocoder = dict(model_type="griffin_lim", iterations=8, momentum=0.99)
    path = tmp_path_factory.mktemp("models") / "riffusion"
    tokenizer = text_stage.train_tokenizer(["Add rock drums", "Add reggae beats"], 256)
    synthetic.write_model(path, config, parts.needed(parts.PARTS, config), tokenizer)
    return Model(model_folder.load(path))


def test_a_model_without_a_vocoder_inserts_by_griffin_lim(riffusion_like):
    audio = np.round(np.stack([chirps(3.17, 22_050)] * 2) * 2**15) / 2**15
    result = riffusion_like.insert(audio, 22_050, "Add rock drums", steps=2, stem_gain_db=-40.0)
    assert result.info["windows"] == 4 and np.abs(result.stem).max() > 1e-4
    np.testing.assert_array_equal(result.mix - result.stem, audio)


def test_grey_images_are_repeated_to_three_channels_and_the_first_comes_back(riffusion_like):
    model, network = riffusion_like, parts.network("autoencoder", riffusion_like.config)
    audio = np.stack(np.split(chirps(2 * model.mel.window_samples / 44_100, 44_100), 2))
    apply = jax.jit(network.apply, static_argnames="method")
    images = np.repeat(model.encode_image(audio), 3, axis=-1)
    moments = apply(model.params("autoencoder"), images, method="encode")
    np.testing.assert_allclose(model.encode_audio(audio), moments, atol=1e-4)
    latents = moments[..., : moments.shape[-1] // 2]
    decoded = apply(model.params("autoencoder"), latents, method="decode")
    assert decoded.shape == images.shape
    np.testing.assert_allclose(model.decode_image(latents), decoded[..., :1], atol=1e-4)


def test_windows_of_centred_frames_are_decoded_one_by_one(riffusion_like):
    latents = np.random.default_rng(0).standard_normal((3, 8, 16, 8)).astype(np.float32)
    audio = riffusion_like.decode(latents)
    assert audio.shape == (3, riffusion_like.mel.window_samples) == (3, 127 * 441)
    alone = riffusion_like.decode(latents[1:2])[0]
    np.testing.assert_allclose(alone, audio[1], atol=1e-2 * np.abs(alone).max())


def test_a_song_cut_into_windows_of_centred_frames_stays_in_place(riffusion_like):
    mel = riffusion_like.mel
    song = np.zeros(150_001, np.float32)
    impulses = [20_000, 56_000, 56_800, 90_123, 149_000]  # 56,007 is the end of the first window
    song[impulses] = 0.9
    windows = Windows.covering(mel.frames(len(song) + mel.hop_length - 1), mel.window_frames)
    contexts = windows.split_audio(np.pad(song, (0, mel.samples(windows.total) - len(song))), mel)
    assert contexts.shape == (windows.count, mel.window_samples)
    found = riffusion_like.vocode(windows.blend(riffusion_like.encode_image(contexts), -2))
    assert len(found) >= len(song)
    for impulse in impulses:
        assert abs(np.abs(found[impulse - 400 : impulse + 401]).argmax() - 400) < 300
        assert np.abs(found[impulse - 300 : impulse + 301]).max() > 0.05
