"""Every network against its PyTorch original: random weights, float32, tolerance 1e-5 of the largest output."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from subtractive_jax.models import autoencoder, cached_attention, clip_text, layers, t5, unet
from subtractive_jax.models.network import Network, Params
from subtractive_jax.vocoder import hifigan, losses, vocos
from subtractive_jax.weights.torch_layout import from_torch, to_torch

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest absolute value of the reference


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _imported(model: Any, network: Network, prefix: str = "") -> Params:
    """Random weights put into `model` and read from it; they must come back bit for bit.

    `prefix` is what published names have before the names of `model`.
    """
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    tensors = {prefix + name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = from_torch(tensors, network.shapes())
    for name, tensor in to_torch(params).items():
        np.testing.assert_array_equal(tensor, tensors[name], strict=True)
    return params


def _assert_close(ours: jax.Array, reference: Any) -> None:
    reference = reference.detach().numpy()
    scale = np.abs(reference).max()
    assert scale > 1e-2
    np.testing.assert_allclose(np.asarray(ours), reference, rtol=0, atol=TOLERANCE * scale)


def _channels_first(x: np.ndarray) -> Any:
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape, np.float32)


@pytest.mark.parametrize("feed_forward_proj", ["gated-gelu", "relu"])
def test_t5_encoder(feed_forward_proj):
    fields = dict(
        vocab_size=120,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-6,
        feed_forward_proj=feed_forward_proj,
    )
    model = transformers.T5EncoderModel(transformers.T5Config(**fields, dropout_rate=0.0))
    network = t5.encoder(ConfigDict(fields))
    params = _imported(model, network)
    ids = np.random.default_rng().integers(1, 120, (2, 40))
    mask = np.ones((2, 40), np.int64)
    mask[1, 25:] = 0

    reference = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    states = jax.jit(network.apply)(params, jnp.asarray(ids), jnp.asarray(mask))

    valid = mask.astype(bool)
    _assert_close(states[valid], reference[torch.tensor(valid)])


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_clip_text_encoder(hidden_act):
    fields = dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act=hidden_act,
        layer_norm_eps=1e-5,
    )
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))
    network = clip_text.encoder(ConfigDict(fields))
    params = _imported(model, network, prefix="text_model.")  # transformers 5 leaves it out
    ids = np.random.default_rng().integers(0, 99, (2, 12))

    reference = model(input_ids=torch.tensor(ids)).last_hidden_state
    states = jax.jit(network.apply)(params, jnp.asarray(ids), jnp.ones((2, 12)))
    _assert_close(states, reference)

    alone = jax.jit(network.apply)(params, jnp.asarray(ids[:, :7]), jnp.ones((2, 7)))
    _assert_close(alone, reference[:, :7])  # whatever comes later


UNETS = {
    "stable_diffusion_1": dict(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=4,
        use_linear_projection=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        transformer_layers_per_block=1,
    ),
    "heads_per_block_linear_projection": dict(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 8),
        use_linear_projection=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        transformer_layers_per_block=(1, 2),
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    fields = dict(UNETS[name], cross_attention_dim=24, norm_num_groups=8, norm_eps=1e-5)
    ours = ConfigDict(dict(fields, condition_dim=0))
    model = diffusers.UNet2DConditionModel(in_channels=6, out_channels=3, sample_size=16, **fields)
    network = unet.denoiser(ours, in_channels=6, out_channels=3)
    params = _imported(model, network)
    x, text = _random(2, 8, 16, 6), _random(2, 7, 24)
    timestep = np.array([3, 901])
    mask = np.ones((2, 7), bool)
    mask[1, 4:] = False

    reference = model(
        _channels_first(x), torch.tensor(timestep), torch.tensor(text), encoder_attention_mask=torch.tensor(mask)
    ).sample
    output = jax.jit(network.apply)(params, x, timestep, text, mask)

    _assert_close(output, reference.permute(0, 2, 3, 1))


def test_unet_behind_auffusions_condition_adapter():
    fields = dict(
        UNETS["stable_diffusion_1"], cross_attention_dim=24, norm_num_groups=8, norm_eps=1e-5, condition_dim=20
    )
    unet_fields = {name: value for name, value in fields.items() if name != "condition_dim"}
    model = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, sample_size=16, **unet_fields)
    adapter = model.condition_adapter = torch.nn.Module()
    adapter.proj, adapter.norm = torch.nn.Linear(20, 24), torch.nn.LayerNorm(24)
    network = unet.denoiser(ConfigDict(fields), in_channels=4, out_channels=4)
    params = _imported(model, network)
    x, text, timestep = _random(2, 8, 16, 4), _random(2, 7, 20), np.array([3, 901])
    text[0, 4:] = 0.0  # a text padded with zeros
    text[1] = 0.0  # the null text

    adapted = adapter.norm(adapter.proj(torch.tensor(text)))
    adapted[1] = 0.0
    reference = model(_channels_first(x), torch.tensor(timestep), adapted).sample
    output = jax.jit(network.apply)(params, x, timestep, text, np.ones((2, 7), bool))

    _assert_close(output, reference.permute(0, 2, 3, 1))


@pytest.mark.parametrize("attention", [True, False])
def test_autoencoder(attention):
    fields = dict(
        in_channels=2,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        mid_block_add_attention=attention,
    )
    model = diffusers.AutoencoderKL(
        **fields, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
    )
    network = autoencoder.kl(ConfigDict(fields))
    params = _imported(model, network)
    x, z = _random(2, 16, 24, 2), _random(2, 4, 6, 4)

    posterior = model.encode(_channels_first(x)).latent_dist
    moments = jax.jit(lambda p, x: network.apply(p, x, method="encode"))(params, x)
    _assert_close(autoencoder.mode(moments), posterior.mean.permute(0, 2, 3, 1))
    _assert_close(moments[..., 4:], posterior.logvar.permute(0, 2, 3, 1))
    _assert_close(autoencoder.kl_divergence(moments), posterior.kl())

    decoded = jax.jit(lambda p, z: network.apply(p, z, method="decode"))(params, z)
    _assert_close(decoded, model.decode(_channels_first(z)).sample.permute(0, 2, 3, 1))


VOCODER = dict(
    num_mels=10,
    upsample_initial_channel=32,
    upsample_rates=(5, 4, 2),
    upsample_kernel_sizes=(11, 8, 4),
    resblock="1",
    resblock_kernel_sizes=(3, 7),
    resblock_dilation_sizes=((1, 3, 5), (1, 2, 4)),
)


def test_hifigan_resblock1():
    fields = {key: value for key, value in VOCODER.items() if key not in ("num_mels", "resblock")}
    model = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(**fields, model_in_dim=10, leaky_relu_slope=0.1, normalize_before=False)
    )
    del model.mean, model.scale  # SpeechT5's input normalisation, not HiFi-GAN's
    model.ups = model.upsampler  # HiFi-GAN's own name
    del model.upsampler
    network = hifigan.generator(ConfigDict(VOCODER))
    params = _imported(model, network)
    model.upsampler = model.ups
    log_mel = _random(2, 21, 10)

    audio = jax.jit(network.apply)(params, log_mel)

    assert audio.shape == (2, 21 * 40)
    _assert_close(audio, model(torch.tensor(log_mel)))


class _TorchResBlock2(torch.nn.Module):
    """ResBlock2 of github.com/jik876/hifi-gan `models.py`, without weight norm."""

    def __init__(self, channels, kernel_size, dilation):
        super().__init__()
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv1d(channels, channels, kernel_size, 1, dilation=d, padding=(kernel_size * d - d) // 2)
            for d in dilation
        )

    def forward(self, x):
        for conv in self.convs:
            x = conv(torch.nn.functional.leaky_relu(x, 0.1)) + x
        return x


class _TorchGenerator2(torch.nn.Module):
    """Generator of the same file, with ResBlock2."""

    def __init__(self, c):
        super().__init__()
        channels = c["upsample_initial_channel"]
        self.conv_pre = torch.nn.Conv1d(c["num_mels"], channels, 7, 1, padding=3)
        self.ups, self.resblocks = torch.nn.ModuleList(), torch.nn.ModuleList()
        for u, k in zip(c["upsample_rates"], c["upsample_kernel_sizes"], strict=True):
            self.ups.append(torch.nn.ConvTranspose1d(channels, channels // 2, k, u, padding=(k - u) // 2))
            channels //= 2
            for size, dilation in zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"], strict=True):
                self.resblocks.append(_TorchResBlock2(channels, size, dilation))
        self.conv_post = torch.nn.Conv1d(channels, 1, 7, 1, padding=3)
        self.num_kernels = len(c["resblock_kernel_sizes"])

    def forward(self, x):
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(torch.nn.functional.leaky_relu(x, 0.1))
            blocks = self.resblocks[i * self.num_kernels : (i + 1) * self.num_kernels]
            x = sum(block(x) for block in blocks) / self.num_kernels
        return torch.tanh(self.conv_post(torch.nn.functional.leaky_relu(x)))


def test_hifigan_resblock2():
    fields = dict(VOCODER, resblock="2", resblock_dilation_sizes=((1, 2), (2, 6)))
    model = _TorchGenerator2(fields)
    network = hifigan.generator(ConfigDict(fields))
    params = _imported(model, network)
    log_mel = _random(2, 21, 10)

    _assert_close(jax.jit(network.apply)(params, log_mel), model(_channels_first(log_mel))[:, 0])


class _TorchConvNeXtBlock(torch.nn.Module):
    """ConvNeXtBlock of github.com/gemelo-ai/vocos `modules.py`."""

    def __init__(self, c):
        super().__init__()
        self.dwconv = torch.nn.Conv1d(c["dim"], c["dim"], 7, padding=3, groups=c["dim"])
        self.norm = torch.nn.LayerNorm(c["dim"], eps=1e-6)
        self.pwconv1 = torch.nn.Linear(c["dim"], c["intermediate_dim"])
        self.pwconv2 = torch.nn.Linear(c["intermediate_dim"], c["dim"])
        self.gamma = torch.nn.Parameter(torch.ones(c["dim"]))

    def forward(self, x):
        y = self.pwconv1(self.norm(self.dwconv(x).transpose(1, 2)))
        return x + (self.gamma * self.pwconv2(torch.nn.functional.gelu(y))).transpose(1, 2)


class _TorchVocos(torch.nn.Module):
    """VocosBackbone and ISTFTHead of the same repository, `models.py` and `heads.py`, with padding "same"."""

    def __init__(self, c):
        super().__init__()
        self.backbone, self.head = torch.nn.Module(), torch.nn.Module()
        self.backbone.embed = torch.nn.Conv1d(c["num_mels"], c["dim"], 7, padding=3)
        self.backbone.norm = torch.nn.LayerNorm(c["dim"], eps=1e-6)
        self.backbone.convnext = torch.nn.ModuleList(_TorchConvNeXtBlock(c) for _ in range(c["num_layers"]))
        self.backbone.final_layer_norm = torch.nn.LayerNorm(c["dim"], eps=1e-6)
        self.head.out = torch.nn.Linear(c["dim"], c["n_fft"] + 2)
        self.n_fft, self.hop = c["n_fft"], c["hop_length"]

    def forward(self, x):
        x = self.backbone.norm(self.backbone.embed(x).transpose(1, 2)).transpose(1, 2)
        for block in self.backbone.convnext:
            x = block(x)
        log_magnitude, phase = self.head.out(self.backbone.final_layer_norm(x.transpose(1, 2))).chunk(2, dim=2)
        spectrum = torch.polar(torch.exp(log_magnitude).clip(max=1e2), phase).transpose(1, 2)
        window = torch.hann_window(self.n_fft)
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window[:, None]
        weights = (window**2)[:, None].expand(-1, frames.shape[2])[None]
        size = dict(output_size=(1, (frames.shape[2] - 1) * self.hop + self.n_fft), kernel_size=(1, self.n_fft))
        audio, weight = (torch.nn.functional.fold(y, stride=(1, self.hop), **size)[:, 0, 0] for y in (frames, weights))
        trimmed = slice((self.n_fft - self.hop) // 2, -(self.n_fft - self.hop) // 2)
        return audio[:, trimmed] / weight[:, trimmed]


VOCOS = dict(num_mels=10, dim=16, intermediate_dim=24, num_layers=3, n_fft=64, hop_length=20)


def test_vocos():
    model = _TorchVocos(VOCOS)
    network = vocos.generator(ConfigDict(VOCOS))
    params = _imported(model, network)
    log_mel = _random(2, 21, 10)

    audio = jax.jit(network.apply)(params, log_mel)

    assert audio.shape == (2, 21 * 20)
    _assert_close(audio, model(_channels_first(log_mel)))
    loud = params | {"head": {"out": {**params["head"]["out"], "bias": np.full(66, 100.0, np.float32)}}}
    gradient = jax.jit(jax.grad(lambda p: jnp.square(network.apply(p, log_mel)).mean()))(loud)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))  # e^100 overflows
    reach = vocos.reach(ConfigDict(VOCOS))
    changed = log_mel.copy()
    changed[:, 0] += 1.0
    difference = np.abs(jax.jit(network.apply)(params, changed) - audio)
    assert difference[:, reach * 20 + 1 :].max() == 0 < difference[:, (reach - 1) * 20 : reach * 20].max()


def _networks(dtype: Any) -> dict[str, tuple[Network, tuple[np.ndarray, ...], str]]:
    """Each network that takes a compute dtype, with inputs and the method to call."""
    small = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    image = dict(small, in_channels=1, out_channels=1, latent_channels=4, mid_block_add_attention=True)
    unet_fields = dict(UNETS["heads_per_block_linear_projection"], **small, norm_eps=1e-5, cross_attention_dim=24)
    unet_fields["condition_dim"] = 0
    text, mask, stem = np.ones((2, 5, 24), np.float32), np.ones((2, 5), bool), np.array([0, 1])
    denoiser = unet.denoiser(ConfigDict(unet_fields), 6, 3, num_stems=2, dtype=dtype)
    inputs = np.random.default_rng(0)
    log_mel, latent = inputs.standard_normal((2, 8, 10), np.float32), inputs.standard_normal((2, 4, 8, 6), np.float32)
    return {
        "hifigan": (hifigan.generator(ConfigDict(VOCODER), dtype), (log_mel,), "__call__"),
        "vocos": (vocos.generator(ConfigDict(VOCOS), dtype), (log_mel,), "__call__"),
        "autoencoder": (autoencoder.kl(ConfigDict(image), dtype), (log_mel[..., None],), "encode"),
        "denoiser": (denoiser, (latent, np.array([3, 400]), text, mask, stem), "__call__"),
    }


@pytest.mark.parametrize(
    "part", ["hifigan", "vocos", *(pytest.param(part, marks=pytest.mark.slow) for part in ("autoencoder", "denoiser"))]
)
def test_bfloat16_compute_stays_close_to_float32(part):
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        network, inputs, method = _networks(dtype)[part]
        params = jax.jit(network.init)(jax.random.key(0))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        outputs.append(jax.jit(functools.partial(network.apply, method=method))(params, *inputs))
    full, half = outputs
    assert full.dtype == half.dtype == jnp.float32
    assert 0 < jnp.abs(full - half).max() < 0.05 * jnp.abs(full).max()


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, padding: Any) -> jax.Array:
    space = "HW"[-len(padding) :]
    names = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * len(space), padding, None, (dilation,) * len(space), names
    )


@pytest.mark.parametrize(
    ("shape", "size", "stride", "dilation", "padding"),
    [
        ((4, 60, 67, 3), (3, 3), 1, 1, ((1, 1), (1, 1))),
        ((4, 60, 66, 3), (3, 3), 2, 1, ((0, 1), (0, 1))),
        ((2, 500, 3), (5,), 1, 3, ((6, 6),)),
        ((2, 5, 3), (2,), 1, 1, ((1, 1),)),
    ],
)
def test_convolution_gradients_in_slices(monkeypatch, shape, size, stride, dilation, padding):
    monkeypatch.setattr(layers, "_MAX_POSITIONS", 100)
    x, kernel = _random(*shape), _random(*size, 3, 5)
    y, gradients = jax.vjp(lambda x, kernel: layers.convolve(x, kernel, stride, dilation, padding), x, kernel)
    reference, reference_gradients = jax.vjp(lambda x, k: _convolution(x, k, stride, dilation, padding), x, kernel)
    np.testing.assert_array_equal(y, reference)
    dy = _random(*y.shape)
    for ours, theirs in zip(gradients(dy), reference_gradients(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("length", [192, 512, 100])  # blocks of 64, of 256, and of none
def test_attention_in_blocks_and_its_gradient(length):
    q, k, v = (_random(2, length, 2, 8) for _ in range(3))
    output, gradients = jax.vjp(jax.jit(cached_attention.attend_in_blocks), q, k, v)
    reference, reference_gradients = jax.vjp(jax.jit(jax.nn.dot_product_attention), q, k, v)
    dy = _random(*output.shape)
    for ours, theirs in zip((output, *gradients(dy)), (reference, *reference_gradients(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def test_stft_magnitude_and_loss():
    audio, target = 0.1 * _random(2, 4000), 0.1 * _random(2, 4000)
    convergence, log_l1 = jax.jit(losses.multi_resolution_stft)(audio, target)
    expected = np.zeros((2, 2))
    for n_fft, hop, win in losses.RESOLUTIONS:
        ours, theirs = (
            torch.stft(torch.tensor(x), n_fft, hop, win, torch.hann_window(win), return_complex=True).abs().numpy()
            for x in (audio, target)
        )
        # torch centres the window in the FFT frame and pads by half an FFT: the same frames, seen from their middle.
        power = np.square(theirs).sum((1, 2)).mean()
        expected[0] += np.sqrt(np.square(ours - theirs).sum((1, 2)) / power) / 3
        expected[1] += np.abs(np.log(ours / theirs)).mean((1, 2)) / 3
    np.testing.assert_allclose(np.stack([convergence, log_l1]), expected, rtol=1e-3)

    target[0] = 0.0  # met exactly by an output below the floor
    quiet = np.stack([np.full(4000, 1e-9, np.float32), audio[1]])
    gradient = jax.jit(jax.grad(lambda x: sum(term.sum() for term in losses.multi_resolution_stft(x, target))))(quiet)
    assert np.isfinite(gradient).all()
