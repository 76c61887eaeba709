"""Discriminators against PyTorch, both players' losses and gradients, and that the audio stages train with them."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import minimal
from subtractive_jax.errors import UserError
from subtractive_jax.training import audio_stages, loop, stages, text_stage
from subtractive_jax.vocoder import discriminators, losses
from subtractive_jax.weights import model_folder
from subtractive_jax.weights.torch_layout import from_torch
from tests import synthetic

torch = pytest.importorskip("torch")

TOLERANCE = 1e-5  # of the largest absolute value of the reference
_SAMPLES = 2600


class _TorchPeriod(torch.nn.Module):
    """Kong et al. 2020, section 2.3 and appendix A."""

    def __init__(self, period, channels):
        super().__init__()
        widths = [1, *(channels * factor for factor in (1, 4, 16, 32))]
        layers = [torch.nn.Conv2d(i, o, (5, 1), (3, 1), (2, 0)) for i, o in itertools.pairwise(widths)]
        layers.append(torch.nn.Conv2d(widths[-1], widths[-1], (5, 1), 1, (2, 0)))
        self.convs = torch.nn.ModuleList(layers)
        self.conv_post = torch.nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0))
        self.period = period

    def forward(self, audio):
        audio = torch.nn.functional.pad(audio[:, None], (0, -audio.shape[-1] % self.period), "reflect")
        x = audio.reshape(len(audio), 1, -1, self.period)
        features = []
        for conv in self.convs:
            x = torch.nn.functional.leaky_relu(conv(x), 0.1)
            features.append(x)
        return [y.permute(0, 3, 2, 1) for y in [*features, self.conv_post(x)]]  # [B, period, T, C]


class _TorchResolution(torch.nn.Module):
    """Jang et al. 2021, figure 3 and section 2.2, on Hann-windowed magnitudes."""

    def __init__(self, resolution, channels):
        super().__init__()
        layers = [torch.nn.Conv2d(1, channels, (3, 9), padding=(1, 4))]
        layers += [torch.nn.Conv2d(channels, channels, (3, 9), (1, 2), (1, 4)) for _ in range(3)]
        layers += [torch.nn.Conv2d(channels, channels, (3, 3), padding=1)]
        self.convs = torch.nn.ModuleList(layers)
        self.conv_post = torch.nn.Conv2d(channels, 1, (3, 3), padding=1)
        self.resolution = resolution

    def forward(self, audio):
        n_fft, hop_length, win_length = self.resolution
        audio = torch.nn.functional.pad(audio[:, None], (win_length // 2,) * 2, "reflect")[:, 0]
        audio = torch.nn.functional.pad(audio, ((n_fft - win_length) // 2,) * 2)
        spectrum = torch.stft(
            audio, n_fft, hop_length, win_length, torch.hann_window(win_length), center=False, return_complex=True
        )
        x = spectrum.abs().square().clamp(min=1e-7).sqrt()[:, None]
        features = []
        for conv in self.convs:
            x = torch.nn.functional.leaky_relu(conv(x), 0.2)
            features.append(x)
        return [y.permute(0, 2, 3, 1) for y in [*features, self.conv_post(x)]]


class _TorchAudio(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.mpd, self.mrd = torch.nn.Module(), torch.nn.Module()
        self.mpd.discriminators = torch.nn.ModuleList(_TorchPeriod(period, channels) for period in (2, 3, 5, 7, 11))
        resolutions = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
        self.mrd.discriminators = torch.nn.ModuleList(_TorchResolution(item, channels) for item in resolutions)

    def forward(self, audio):
        return [judge(audio) for judge in (*self.mpd.discriminators, *self.mrd.discriminators)]


class _TorchPatch(torch.nn.Module):
    """Isola et al. 2017, appendix 6.1.2, with group norm."""

    def __init__(self, channels):
        super().__init__()

        def conv(i, o, stride):
            return torch.nn.Conv2d(i * channels, o * channels, 4, stride, 1)

        slope = torch.nn.LeakyReLU(0.2)
        layers = [torch.nn.Conv2d(1, channels, 4, 2, 1), slope]
        for i, stride in ((1, 2), (2, 2), (4, 1)):
            layers += [conv(i, 2 * i, stride), torch.nn.GroupNorm(2 * i, 2 * i * channels), slope]
        self.main = torch.nn.Sequential(*layers, torch.nn.Conv2d(8 * channels, 1, 4, 1, 1))

    def forward(self, image):
        features, x = [], image.permute(0, 3, 1, 2)
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, torch.nn.LeakyReLU):
                features.append(x)
        return [[y.permute(0, 2, 3, 1) for y in [*features, x]]]


@pytest.mark.parametrize(
    ("reference", "network", "shape"),
    [
        (_TorchAudio(3), discriminators.audio(3), (2, _SAMPLES)),
        (_TorchPatch(5), discriminators.patch(5), (2, 64, 48, 1)),
    ],
    ids=["audio", "patch"],
)
def test_every_layer_equals_the_reference(reference, network, shape):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    one_dimensional = {name: x[..., 0] if name.startswith("mpd") and x.ndim == 4 else x for name, x in tensors.items()}
    params = from_torch(one_dimensional, network.shapes())
    x = np.random.default_rng(0).standard_normal(shape, np.float32)

    ours = jax.jit(network.apply)(params, x)

    theirs = reference(torch.tensor(x))
    assert [len(features) for features in ours] == [len(features) for features in theirs]
    for one, other in zip(jax.tree.leaves(ours), [y for features in theirs for y in features], strict=True):
        other = other.detach().numpy()
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.abs(other).max())


def test_published_widths():
    shapes = discriminators.audio(32).shapes()
    kernels = [layer["kernel"].shape for layer in shapes["mpd"]["discriminators"]["0"]["convs"].values()]
    assert kernels == [(5, 1, 32), (5, 32, 128), (5, 128, 512), (5, 512, 1024), (5, 1024, 1024)]
    assert set(shapes["mpd"]["discriminators"]) == set("01234") and set(shapes["mrd"]["discriminators"]) == set("012")
    assert discriminators.patch(64).shapes()["main"]["8"]["kernel"].shape == (4, 4, 256, 512)


def _features(*scores: float) -> list[list[jax.Array]]:
    """Of two examples and as many discriminators as scores: one hidden layer, then the scores."""
    return [[jnp.full((2, 3, 4), 10.0 * score), jnp.full((2, 5, 1), score)] for score in scores]


def test_losses_by_hand():
    def discriminate(params, x):
        return _features(0.5, -2.0) if x is real else _features(0.25, 3.0)

    real, generated = jnp.ones((2, 7)), jnp.zeros((2, 7))
    generator, discriminator, features = losses.adversarial(losses.LEAST_SQUARES, discriminate, {}, generated, real)
    assert generator.tolist() == [0.75**2 + 2.0**2] * 2
    assert discriminator.tolist() == [0.5**2 + 0.25**2 + 3.0**2 + 3.0**2] * 2
    assert features.tolist() == [11 * 0.25 + 11 * 5.0] * 2
    generator, discriminator, _ = losses.adversarial(losses.HINGE, discriminate, {}, generated, real)
    assert generator.tolist() == [-3.25] * 2
    assert discriminator.tolist() == [(0.5 + 1.25 + 3.0 + 4.0) / 2] * 2


def _config(stage: str, weight: float) -> Any:
    config = minimal.get_config(stage)
    config.adversarial.update(dict(weight=weight, channels=2))
    config.autoencoder.update(dict(block_out_channels=(8, 8)))
    config.vocoder.update(dict(upsample_rates=(16, 10), upsample_kernel_sizes=(32, 20)))
    config.crop_frames = 32 if stage == "autoencoder" else 16
    return config


@pytest.fixture
def few(monkeypatch):
    """Two discriminators of audio instead of eight, which compile faster."""
    monkeypatch.setattr(discriminators, "PERIODS", discriminators.PERIODS[1:2])
    monkeypatch.setattr(discriminators, "RESOLUTIONS", discriminators.RESOLUTIONS[2:])


def _batch(config: Any, size: int = 2) -> dict[str, jax.Array]:
    samples = config.crop_frames * config.representation.hop_length
    time = np.arange(samples) / config.representation.sample_rate
    noise = np.random.default_rng(0).standard_normal((size, samples))
    tones = np.sin(2.0 * np.pi * 220.0 * np.arange(1, size + 1)[:, None] * time)
    audio = (0.3 * tones + 0.05 * noise).astype(np.float32)
    return dict(audio=audio, row=np.arange(size, dtype=np.int32), valid=np.ones(size, bool))


_STEP = jnp.zeros((), jnp.int32)


@pytest.mark.parametrize("stage", ["autoencoder", "vocoder"])
def test_each_player_has_its_own_gradient_and_discriminators_learn(few, stage):
    config = _config(stage, weight=0.5)
    config.adversarial.feature_weight = 2.0
    task, batch = audio_stages.task(config), _batch(config)
    params = jax.device_get(jax.jit(task.init_params)(jax.random.key(0), {}))

    @jax.jit
    def weighted(params, generator_weight, discriminator_weight):
        """The gradient of the weighted sum of both players' losses, how far the total is from their sum, and both."""

        def losses_of(params):
            loss, figures = task.loss(params, batch, _STEP, True)
            generator, discriminator = (figures[name][0] for name in ("generator", "discriminator"))
            error = jnp.abs(loss - generator - discriminator).max()
            players = (generator.mean(), discriminator.mean())
            return generator_weight * players[0] + discriminator_weight * players[1], (error, players)

        gradient, figures = jax.grad(losses_of, has_aux=True)(params)
        return gradient, *figures

    def largest(tree):
        return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))

    both, error, before = weighted(params, 1.0, 1.0)
    assert error < 1e-5
    for entry, weights in ((stage, (1.0, 0.0)), ("discriminators", (0.0, 1.0))):
        alone, *_ = weighted(params, *weights)
        jax.tree.map(np.testing.assert_array_equal, both[entry], alone[entry])
        others = {name: tree for name, tree in alone.items() if name != entry}
        assert largest(alone[entry]) > 0.0 and largest(others) == 0.0

    def descend(params, weights, rate, steps):
        for _ in range(steps):
            gradient, *_ = jax.device_get(weighted(params, *weights))
            params = jax.tree.map(lambda leaf, slope: leaf - rate * np.sign(slope), params, gradient)
        *_, players = weighted(params, *weights)
        return params, players

    params, (_, after) = descend(params, (0.0, 1.0), np.float32(5e-3), 12)  # against a generator that stays as it is
    assert after < 0.5 * before[1]
    _, (fooling, _) = descend(params, (1.0, 0.0), np.float32(3e-4), 4)  # and the other way round
    assert fooling < weighted(params, 1.0, 0.0)[2][0]


@pytest.mark.parametrize("stage", ["autoencoder", "vocoder"])
def test_validation_is_the_loss_without_discriminators(few, stage):
    with_them, without = (audio_stages.task(_config(stage, weight)) for weight in (0.5, 0.0))
    params, plain = (jax.jit(task.init_params)(jax.random.key(0), {}) for task in (with_them, without))
    assert set(params) == {stage, "discriminators"} and set(plain) == {stage}
    jax.tree.map(np.testing.assert_array_equal, params[stage], plain[stage])
    batch = _batch(_config(stage, 0.5))

    @jax.jit
    def validation(params):
        return [task.loss(params, batch, _STEP, False) for task in (with_them, without)]

    (ours, our_figures), (theirs, their_figures) = validation(params)
    np.testing.assert_array_equal(ours, theirs)
    assert our_figures.keys() - their_figures.keys() == {"generator", "adversarial", "features", "discriminator"}
    for name, figure in their_figures.items():
        np.testing.assert_array_equal(our_figures[name], figure)


def test_an_adversarial_run_goes_on_from_its_parent_resumes_exactly_and_keeps_its_discriminators_to_itself(
    few, tmp_path
):
    config = _config("vocoder", 0.05)
    config.through_autoencoder = True
    data_dir = str(tmp_path / "data")
    synthetic.write_windows(Path(data_dir), config)
    tokenizer = text_stage.make_tokenizer(config, data_dir)
    parent = synthetic.write_model(tmp_path / "parent", config, ("text_encoder", "autoencoder", "vocoder"), tokenizer)
    config.init_from = str(parent)

    start, inherited = stages.prepare(config, data_dir)
    stage = stages.build(config, data_dir, inherited)
    params = stage.task.init_params(jax.random.key(0), start)

    assert set(params) == {"vocoder", "autoencoder", "discriminators"}
    given = model_folder.load(parent).params
    for part in ("vocoder", "autoencoder"):
        jax.tree.map(np.testing.assert_array_equal, params[part], given[part])

    def trained(name: str, updates: int) -> Any:
        config.train.update(dict(steps=updates, schedule="constant", warmup_steps=0, eval_every=100))
        config.train.update(dict(checkpoint_every=2, preview_examples=0))
        return loop.train(config, data_dir, tmp_path / name)

    whole = trained("whole", 3)
    trained("parts", 2)
    jax.tree.map(np.testing.assert_array_equal, whole, trained("parts", 3))
    moved = jax.tree.map(
        lambda before, after: np.abs(before - after).max(), params["vocoder"], whole["params"]["vocoder"]
    )
    assert min(jax.tree.leaves(moved)) > 0.0
    for state in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, whole[state]["autoencoder"], given["autoencoder"])
    plain = audio_stages.task(_config("vocoder", 0.05))
    batch = _batch(config)
    through, direct = (
        jax.jit(task.loss, static_argnums=3)(params, batch, _STEP, False) for task in (stage.task, plain)
    )
    assert np.abs(through[0] - direct[0]).max() > 1e-3  # the vocoder is given other images
    assert set(model_folder.load(tmp_path / "whole").params) == {"text_encoder", "autoencoder", "vocoder"}


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("vocoder", dict(weight=-1.0), "weight >= 0, feature_weight >= 0 and channels >= 1"),
        ("vocoder", dict(feature_weight=-1.0), "weight >= 0, feature_weight >= 0 and channels >= 1"),
        ("vocoder", dict(channels=0), "weight >= 0, feature_weight >= 0 and channels >= 1"),
        ("autoencoder", dict(weight=1.0), "at least 24 x 24, not 64 x 16"),
    ],
)
def test_bad_adversarial_configs(stage, changes, said):
    config = _config(stage, 0.5)
    config.crop_frames = 16
    config.adversarial.update(changes)
    with pytest.raises(UserError, match=f"config.adversarial.*{said}"):
        audio_stages.task(config)


@pytest.mark.parametrize("stage", ["autoencoder", "vocoder"])
def test_crops_that_no_latent_fits_are_refused(stage):
    config = _config(stage, 0.0)
    config.crop_frames = 17
    if stage == "vocoder":
        audio_stages.task(config)
        config.through_autoencoder = True
    with pytest.raises(UserError, match="config.crop_frames=17 is no multiple of 2, the autoencoder's stride"):
        audio_stages.task(config)
