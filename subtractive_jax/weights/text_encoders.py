"""Text encoders as transformers stores them: `CLIPTextModel`, alone or in a `CLIPModel`, and T5's encoder."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from subtractive_jax.models.network import Params
from subtractive_jax.weights import tokenizer_files
from subtractive_jax.weights.published import Fields, Published, Tensors
from subtractive_jax.weights.torch_layout import to_torch

_CLIP = Fields(
    taken=dict(
        vocab_size=49_408,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
)
_T5 = Fields(
    taken=dict(
        vocab_size=32_128,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="relu",
    )
)
_T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}
_NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "decoder.", "lm_head.")
_POSITIONS = "embeddings.position_ids"  # a buffer in older files: 0, 1, 2, ...
_CLIP_PREFIX = "text_model."  # left out by transformers 5


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A published text encoder: its folder, `config.text_encoder`, tensors, tokenizer, and the most tokens it reads."""

    folder: str
    config: dict[str, Any]
    tensors: Tensors | None
    tokenizer: Tokenizer | None
    max_tokens: int | None

    @property
    def features(self) -> int:
        return self.config["d_model" if self.config["model_type"] == "t5" else "hidden_size"]


def read(source: Published, folder: str, tokenizer_folder: str, model_types: tuple[str, ...]) -> TextEncoder | None:
    """The encoder in `folder`; None, and notes, where there is none of these `model_types` (ours)."""
    file = f"{folder}/config.json"
    content = source.config(file)
    if content is None:
        return None
    if content.get("model_type") == "clip":
        text_config = content.get("text_config")
        content = {"model_type": "clip_text_model", **(text_config if isinstance(text_config, dict) else {})}
    model_type = content.get("model_type")
    if model_type not in model_types:
        source.note(file, f"another architecture: model_type is {model_type!r} (expected {' or '.join(model_types)})")
        return None
    config = source.fields(file, content, _T5 if model_type == "t5" else _CLIP, strict=False)
    if model_type == "t5":
        kind = config["feed_forward_proj"]
        if kind not in _T5_ACTIVATIONS:
            source.note(file, f"another architecture: feed_forward_proj is {kind!r}")
        elif content.get("dense_act_fn", _T5_ACTIVATIONS[kind]) != _T5_ACTIVATIONS[kind]:
            source.note(file, f"another architecture: {kind} with dense_act_fn {content['dense_act_fn']!r}")

    tokenizer = tokenizer_files.read(source, tokenizer_folder, model_type)
    if tokenizer is not None:
        config |= tokenizer_files.special_ids(source, tokenizer_folder, tokenizer, model_type)
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= config["vocab_size"]:
            source.note(tokenizer_folder, f"token ids up to {largest}, but the encoder has {config['vocab_size']}")
    config["model_type"] = model_type
    tensors = _tensors(source, folder, model_type)
    return TextEncoder(folder, config, tensors, tokenizer, config.get("max_position_embeddings"))


def _tensors(source: Published, folder: str, model_type: str) -> Tensors | None:
    published = source.tensors(folder, ("model", "pytorch_model"))
    if published is None:
        return None
    tensors = {
        name: tensor
        for name, tensor in published.items()
        if not name.startswith(_NOT_TEXT) and not name.endswith(_POSITIONS)
    }
    if model_type == "t5":
        if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
            tensors["shared.weight"] = tensors.pop("encoder.embed_tokens.weight")
        return tensors
    if any(name.startswith(_CLIP_PREFIX) for name in tensors):
        return tensors
    return {f"{_CLIP_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def to_published(config: ConfigDict, params: Params) -> tuple[dict[str, Any], Tensors]:
    """The config and tensors that transformers' `T5EncoderModel` or `CLIPTextModel` loads."""
    content = config.text_encoder.to_dict()
    if content["model_type"] == "t5":
        content |= dict(architectures=["T5EncoderModel"], is_encoder_decoder=False, dropout_rate=0.0, eos_token_id=1)
        content |= dict(pad_token_id=0, use_cache=False)
    else:
        content |= dict(architectures=["CLIPTextModel"], attention_dropout=0.0)
    return content, to_torch(params)
