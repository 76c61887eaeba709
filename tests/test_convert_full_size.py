"""Stable Diffusion 1.5 as it is: every name and shape without allocating, and one real forward pass (slow)."""

import gc

import jax
import numpy as np
import pytest

from configs import auffusion, riffusion
from subtractive_jax import parts
from subtractive_jax.weights.torch_layout import from_torch, torch_shapes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)
CLIP = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
AUFFUSION_VOCODER = dict(
    model_in_dim=256,
    upsample_initial_channel=512,
    upsample_rates=[5, 4, 4, 2],
    upsample_kernel_sizes=[11, 8, 8, 4],
)


MODELS = {
    "base_denoiser": lambda: diffusers.UNet2DConditionModel(**UNET),
    "autoencoder": lambda: diffusers.AutoencoderKL(**VAE),
    "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "vocoder": lambda: transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**AUFFUSION_VOCODER)),
}
PARAMETERS = {"base_denoiser": 859_520_964, "autoencoder": 83_653_863, "text_encoder": 123_060_480}


def _published_names(part, shapes):
    if part == "text_encoder":  # transformers 5 leaves this prefix out
        return {f"text_model.{name}": shape for name, shape in shapes.items() if "position_ids" not in name}
    own = ("mean", "scale")
    return {name.replace("upsampler.", "ups."): shape for name, shape in shapes.items() if name not in own}


@pytest.mark.parametrize("part", MODELS)
def test_names_and_shapes_without_allocating(part):
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in MODELS[part]().state_dict().items()}
    config = (auffusion if part == "vocoder" else riffusion).get_config()
    ours = torch_shapes(parts.network(part, config).shapes())
    assert ours == _published_names(part, theirs)
    if part in PARAMETERS:
        assert sum(np.prod(shape, dtype=np.int64) for shape in ours.values()) == PARAMETERS[part]


@pytest.mark.slow
def test_one_real_forward_pass():
    """Under 16 GB: PyTorch's model is gone before JAX computes."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    x, text = draw.standard_normal((1, 64, 64, 4), np.float32), draw.standard_normal((1, 77, 768), np.float32)
    model = diffusers.UNet2DConditionModel(**UNET).eval()
    with torch.no_grad():
        reference = model(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor([601]), torch.tensor(text)).sample
    reference = reference.permute(0, 2, 3, 1).numpy()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    config = riffusion.get_config()
    config.compute_dtype = "float32"
    network = parts.network("base_denoiser", config)
    params = from_torch(tensors, network.shapes())
    del model, tensors
    gc.collect()
    ours = jax.jit(network.apply)(params, x, np.array([601]), text, np.ones((1, 77), bool))
    error = np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()
    print(f"largest error {error:.2e} of the largest output")
    assert error <= 1e-4
