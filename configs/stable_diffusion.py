"""The base of `riffusion` and `auffusion`: parts, schedule and recipe of Stable Diffusion 1.5; no model of its own.

The recipe is InstructPix2Pix's (Brooks et al. 2023), as riff-pix2pix trained it for music: the context's latent enters
unscaled, text and context are dropped for 5 % of the examples each and both for another 5 %.
"""

import ml_collections
from ml_collections import ConfigDict

from configs import tiny

STAGES = ("base", "subtractive")  # everything else comes pretrained


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    if stage not in STAGES:
        raise ValueError(f'unknown stage "{stage}" (known: {", ".join(STAGES)}; other parts come from launch.convert)')
    config = tiny.get_config(stage)
    with config.unlocked():
        config.name = "stable_diffusion"
        config.representation.window_frames = 512
        config.data.update(dict(window_hop_frames=512, validation_fraction=0.06, test_fraction=0.06))
        config.max_text_tokens = 77
        config.text_padding = "tokens"
        config.text_encoder = ConfigDict(  # CLIP ViT-L/14
            dict(
                model_type="clip_text_model",
                vocab_size=49_408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
                layer_norm_eps=1e-5,
                bos_token_id=49_406,
                eos_token_id=49_407,
                pad_token_id=49_407,
            )
        )
        config.autoencoder.update(
            dict(
                in_channels=3,
                out_channels=3,
                latent_channels=4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                norm_num_groups=32,
                mid_block_add_attention=True,
            )
        )
        config.denoiser.update(
            dict(
                block_out_channels=(320, 640, 1280, 1280),
                down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                layers_per_block=2,
                attention_head_dim=8,
                cross_attention_dim=768,
                norm_num_groups=32,
            )
        )
        config.schedule.update(
            dict(
                prediction_type="epsilon",
                timestep_spacing="leading",
                steps_offset=1,
                set_alpha_to_one=False,
                rescale_betas_zero_snr=False,
            )
        )
        config.latent_shift = (0.0,) * 4
        config.latent_scale = (0.18215,) * 4
        config.context_scale = (1.0,) * 4
        config.target = "mix"
        config.mel_matching = 0  # vocoders as published
        config.compute_dtype = "bfloat16"
        config.remat = "attention"  # 16 examples fit a TPU v5e, see launch/TPU.md
        config.train.update(
            dict(
                steps=100_000,
                batch_size=64,
                learning_rate=1e-4,
                warmup_steps=500,
                schedule="constant",
                betas=(0.9, 0.999),
                ema_decay=0.9999,
                eval_every=5_000,
                checkpoint_every=2_000,
            )
        )
        config.sampling.update(
            dict(
                solver="pndm",
                steps=50,
                text_guidance=7.5,
                context_guidance=1.5,
                guidance_rescale=0.0,
                sdedit_strength=0.7,
            )
        )
    return config
