"""FLAN-T5 in place of CLIP, for models of the Stable Diffusion family: shared by `riffusion_t5` and `auffusion_t5`.

An adapter (linear layer and layer norm, as Auffusion's) brings T5's states to the width of the cross-attention. The
base stage trains the adapter alone, on captions, so that it learns to speak to the cross-attention that is there before
anything unlearns it; then subtractive training moves all.
"""

import ml_collections
from ml_collections import ConfigDict


def apply(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Gives a config of the Stable Diffusion family the encoder of FLAN-T5 base."""
    with config.unlocked():
        config.name += "_t5"
        config.text_padding = "masked"
        config.null_text = "empty"
        config.text_encoder = ConfigDict(  # google/flan-t5-base
            dict(
                model_type="t5",
                vocab_size=32_128,
                d_model=768,
                d_kv=64,
                d_ff=2048,
                num_layers=12,
                num_heads=12,
                relative_attention_num_buckets=32,
                relative_attention_max_distance=128,
                layer_norm_epsilon=1e-6,
                feed_forward_proj="gated-gelu",
            )
        )
        config.denoiser.condition_dim = 768
        if config.stage == "base":
            config.train.update(dict(only=("condition_adapter",), steps=20_000))
    return config
