"""Miniature models in published layouts, written by diffusers and transformers themselves: random weights."""

import json
import random
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import tokenizers
import torch
import transformers
from ml_collections import ConfigDict

from configs import auffusion, riffusion

WIDTH = 32  # of the text states
TEXTS = (
    "Add reggae beats",
    "",
    "don't  STOP: 24 bars of\tJazz (slow)!",
    "Schöne Gitarre, 鼓を加える, naïve ½ ﬁne",
    "it's we've I'll 's xyz <|endoftext|> tail",
    "   leading and trailing   ",
)


SMALL_WINDOWS = {  # what makes a config of the family fit the miniature networks
    "max_text_tokens": 16,
    "compute_dtype": "float32",
    "representation.n_mels": 16,
    "representation.n_fft": 1024,
    "representation.win_length": 1024,
    "representation.hop_length": 160,
    "representation.window_frames": 32,
    "data.window_hop_frames": 32,
}


def config(name: str = "riffusion") -> ConfigDict:
    """A config of the family with `SMALL_WINDOWS`."""
    config = {"riffusion": riffusion, "auffusion": auffusion}[name].get_config()
    config.update_from_flattened_dict(SMALL_WINDOWS)
    return config


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random parameters, the same whatever other tests drew before."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(
                0.0, 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5, generator=generator
            )
    return model


def unet(in_channels: int = 4, **changes: Any) -> diffusers.UNet2DConditionModel:
    fields: dict[str, Any] = dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        sample_size=8,
    )
    return randomise(diffusers.UNet2DConditionModel(in_channels=in_channels, **(fields | changes)))


def vae(**changes: Any) -> diffusers.AutoencoderKL:
    fields: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    return randomise(diffusers.AutoencoderKL(**(fields | changes)))


def clip(vocab_size: int, **changes: Any) -> transformers.CLIPTextModel:
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=2,  # wrong, as in what was published
    )
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**(fields | changes))))


def t5_config(**changes: Any) -> transformers.T5Config:
    fields: dict[str, Any] = dict(vocab_size=300, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
    return transformers.T5Config(**(fields | changes))


def clip_tokenizer(folder: Path) -> int:
    """CLIP's vocab.json and merges.txt with a few merges; returns the size of the vocabulary."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [
        "a d",
        "ad d</w>",
        "r e",
        "g g",
        "re gg",
        "b e",
        "a t",
        "be at",
        "beat s</w>",
        "j a",
        "z z</w>",
        "i t</w>",
    ]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    special: dict[str, Any] = dict(names, pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    special |= dict(tokenizer_class="CLIPTokenizer", model_max_length=16)
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return len(vocab)


def spiece(folder: Path, vocab_size: int = 300) -> bytes:
    """T5's spiece.model, trained by SentencePiece."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["add", "drums", "bass", "guitar", "reggae", "beats", "jazz", "slow", "soft", "warm", "loud", "the", "of"]
    sentences = [" ".join(draw.choices(words, k=8)) for _ in range(300)] + list(TEXTS) * 20
    (folder / "corpus.txt").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "corpus.txt").unlink()
    (folder / "spiece.vocab").unlink()
    return (folder / "spiece.model").read_bytes()


class Adapter(torch.nn.Module):
    """Auffusion's ConditionAdapter."""

    def __init__(self, condition_dim: int = WIDTH):
        super().__init__()
        self.proj = torch.nn.Linear(condition_dim, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(states))


HIFIGAN = dict(
    resblock="1",
    num_mels=16,
    upsample_initial_channel=16,
    upsample_rates=[5, 4, 4, 2],
    upsample_kernel_sizes=[11, 8, 8, 4],
    resblock_kernel_sizes=[3, 7],
    resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
    sampling_rate=16_000,
    hop_size=160,
    n_fft=1024,
    win_size=1024,
    fmin=0,
    fmax=None,
)


def hifigan(**changes: Any) -> transformers.SpeechT5HifiGan:
    own = ("resblock", "num_mels", "sampling_rate", "hop_size", "n_fft", "win_size", "fmin", "fmax")
    fields = {key: value for key, value in HIFIGAN.items() if key not in own}
    fields |= dict(model_in_dim=HIFIGAN["num_mels"], normalize_before=False)
    return randomise(transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**(fields | changes))))


def write_hifigan(folder: Path, model: transformers.SpeechT5HifiGan, config: dict[str, Any] = HIFIGAN) -> None:
    """As github.com/jik876/hifi-gan stores it: weight norm in two tensors a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("upsampler.", "ups.")
        if name.endswith(".weight"):
            axes = tuple(range(1, tensor.ndim))
            scale = torch.rand(len(tensor)).reshape(-1, *(1,) * len(axes)) + 0.5
            state[f"{name}_g"] = tensor.square().sum(axes, keepdim=True).sqrt()
            state[f"{name}_v"] = tensor * scale
        elif name not in ("mean", "scale"):
            state[name] = tensor
    torch.save({"generator": state}, folder / "vocoder.pt")
    (folder / "config.json").write_text(json.dumps(config))


def scheduler(folder: Path, name: str = "PNDMScheduler", **changes: Any) -> None:
    fields: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    if name == "PNDMScheduler":
        fields |= dict(skip_prk_steps=True)
    if name == "DDIMScheduler":
        fields |= dict(clip_sample=False, set_alpha_to_one=False)
    getattr(diffusers, name)(**(fields | changes)).save_pretrained(folder)


def stable_diffusion(folder: Path, in_channels: int = 4, max_text_tokens: int = 16) -> dict[str, Any]:
    """The folder of a StableDiffusionPipeline; returns its models."""
    size = clip_tokenizer(folder / "tokenizer")
    models = dict(unet=unet(in_channels), vae=vae(), text_encoder=clip(size, max_position_embeddings=max_text_tokens))
    for name, model in models.items():
        model.save_pretrained(folder / name)
    scheduler(folder / "scheduler")
    return models


def auffusion_with_adapter(folder: Path) -> dict[str, Any]:
    """The layout of auffusion/auffusion-full: pickles, an adapter, and a vocoder."""
    size = clip_tokenizer(folder / "text_encoder_0")
    models = dict(unet=unet(), vae=vae(), text_encoder=clip(size), adapter=randomise(Adapter()), vocoder=hifigan())
    for name, where in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "text_encoder_0")):
        models[name].save_pretrained(folder / where)
        pickled(folder / where)
    adapter = folder / "condition_adapter_0"
    adapter.mkdir()
    entry = dict(
        text_encoder_name="text_encoder_0",
        condition_adapter_name="condition_adapter_0",
        condition_type="clip-vit-large-patch14_text",
        condition_max_length=16,
        condition_dim=WIDTH,
        cross_attention_dim=WIDTH,
    )
    (adapter / "config.json").write_text(json.dumps(entry))
    (folder / "condition_config.json").write_text(json.dumps([entry]))
    torch.save(models["adapter"].state_dict(), adapter / "condition_adapter.pt")
    write_hifigan(folder / "vocoder", models["vocoder"])
    scheduler(folder / "scheduler")
    return models


def pickled(folder: Path) -> None:
    """Turns a component's safetensors into the pickle it used to be."""
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
    torch.save(tensors, folder / name)
    file.unlink()


def edit(file: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(file: Path, change: Any) -> None:
    """Replaces the tensors of a safetensors file by `change(tensors)`."""
    tensors = change(safetensors.torch.load_file(file))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def load(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)
