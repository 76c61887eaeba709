"""`tiny`: the model that ships with the code, small enough to train and sample on two CPU cores.

Stages, in order (each names its parent model with `--config.init_from`):

  python -m launch.train --config=configs/tiny.py:text_encoder --data_dir=DIR --workdir=RUN
  python -m launch.train --config=configs/tiny.py:autoencoder  --data_dir=DIR --workdir=RUN --config.init_from=...
  python -m launch.train --config=configs/tiny.py:vocoder      ...
  python -m launch.train --config=configs/tiny.py:base         ...
  python -m launch.train --config=configs/tiny.py              ...   # subtractive

Adversarial training comes last, as runs that go on from the others with fresh discriminators. No other part changes
with a vocoder, nor with an autoencoder's decoder, as long as its encoder stays as it is:

  python -m launch.train --config=configs/tiny.py:vocoder      ...   --config.init_from=RUN
      --config.adversarial.weight=0.022 --config.train.learning_rate=2e-4 --config.train.betas="(0.8, 0.99)"
  python -m launch.train --config=configs/tiny.py:autoencoder  ...   --config.init_from=RUN
      --config.adversarial.weight=0.02  --config.train.learning_rate=3e-4 --config.train.betas="(0.5, 0.9)"
      --config.train.only="('decoder','post_quant_conv','main')"

Hours and expected results of the shipped run: subtractive_jax/shipped/tiny/MODEL_CARD.md.
"""

import ml_collections
from ml_collections import ConfigDict

STAGES = ("text_encoder", "autoencoder", "vocoder", "base", "subtractive")


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    if stage not in STAGES:
        raise ValueError(f'unknown stage "{stage}" (known: {", ".join(STAGES)})')
    config = ConfigDict()
    config.name = "tiny"
    config.stage = stage
    config.seed = 0
    config.init_from = ""  # parent model: a run folder, a model folder or the name of a shipped model

    config.representation = ConfigDict(
        dict(
            name="mel",
            sample_rate=16_000,  # Hz
            n_fft=1024,  # samples
            win_length=1024,  # samples
            hop_length=160,  # samples
            n_mels=64,
            fmin=0.0,  # Hz
            fmax=8_000.0,  # Hz
            mel_scale="slaney",
            mel_norm="slaney",
            log_floor=1e-5,  # magnitude that maps to -1
            log_ceiling=100.0,  # magnitude that maps to +1
            window_frames=1024,  # 10.24 s
        )
    )
    config.data = ConfigDict(
        dict(
            stems=("drums", "bass", "guitar", "keys"),  # what the model learns to put back; "bass+drums": both at once
            window_hop_frames=1024,  # distance between the starts of training windows
            min_stem_level_db=-30.0,  # a window is kept when the stem is within this of its own level over the song
            max_bleed_db=-10.0,  # of separated material: how much of a removed stem may be left in its context
            loudness_lufs=-20.0,  # of the context, see representation/level.py
            instructions_per_window=4,
            validation_fraction=0.12,  # of the groups
            test_fraction=0.12,  # of the groups
            songs_per_shard=16,
            augmentation=dict(  # of the training split, see data_pipeline/augment.py
                copies=0,  # of every song
                pitch_semitones=2.0,  # transposed by at most
                tempo=0.08,  # of MIDI, which is played anew: 0.08 is at most 1.08 times faster or slower
                gain_db=3.0,  # change of a stem's level at most
                remix=True,  # stems of another take of the same group, where there is one
                seed=0,
            ),
        )
    )
    config.max_text_tokens = 64
    config.text_padding = (
        "masked"  # how texts fill max_text_tokens, see subtractive_jax/text.py: masked, tokens or zeros
    )
    config.null_text = "empty"  # empty: states of the empty string; zeros: all-zero states

    config.text_encoder = ConfigDict(  # transformers' T5Config names
        dict(
            model_type="t5",  # or clip_text_model, with CLIPTextConfig's names
            vocab_size=2048,
            d_model=256,
            d_kv=64,
            d_ff=512,
            num_layers=4,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            layer_norm_epsilon=1e-6,
            feed_forward_proj="gated-gelu",
        )
    )
    config.autoencoder = ConfigDict(  # diffusers' AutoencoderKL names
        dict(
            in_channels=1,
            out_channels=1,
            latent_channels=16,
            block_out_channels=(16, 32, 64, 96),
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,  # keeps it convolutional along time
        )
    )
    config.vocoder = ConfigDict(  # Vocos' names
        dict(
            model_type="vocos",  # or hifigan, with HiFi-GAN's names, or griffin_lim, with iterations and momentum
            num_mels=64,
            dim=192,
            intermediate_dim=576,
            num_layers=8,
            n_fft=640,  # samples
            hop_length=160,  # samples
        )
    )
    config.mel_matching = 8  # turns that bring the vocoder's audio to its mel image; 0: none
    config.denoiser = ConfigDict(  # diffusers' UNet2DConditionModel names; channels follow from the stage
        dict(
            block_out_channels=(64, 96, 112),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,  # number of heads, as SD-1.x configs (mis)name it
            cross_attention_dim=256,
            norm_num_groups=16,
            norm_eps=1e-5,
            transformer_layers_per_block=1,
            use_linear_projection=False,
            flip_sin_to_cos=True,
            freq_shift=0,
            condition_dim=0,  # width of the text states where an adapter brings them to cross_attention_dim; 0: none
        )
    )
    config.stem_tokens = True  # the denoiser learns a token for each stem; False: only the instruction names it
    config.schedule = ConfigDict(  # diffusers' scheduler names
        dict(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",  # epsilon, v_prediction, sample, or flow_prediction (rectified flow)
            timestep_spacing="trailing",
            steps_offset=0,
            set_alpha_to_one=True,
            rescale_betas_zero_snr=True,  # or a stem takes the mean of a mix: its own leaks through the last step
        )
    )
    # Scales belong to the model. Empty: the first diffusion stage sets them from the dataset's statistics.
    config.latent_shift = ()
    config.latent_scale = ()
    config.context_scale = ()
    config.target = "stem"  # stem: write the stem alone; mix: write the full mix, as the paper does

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: all remaining devices
    config.compute_dtype = "float32"  # bfloat16 on accelerators; parameters are float32 always
    config.remat = "none"  # what of a denoiser is computed again for the gradient, see REMAT in models/unet.py

    config.train = ConfigDict(
        dict(
            steps=10_000,
            batch_size=32,  # over all devices
            learning_rate=3e-4,
            warmup_steps=200,
            schedule="cosine",  # or constant
            betas=(0.9, 0.99),
            weight_decay=0.01,
            clip_norm=1.0,
            accumulation_steps=1,  # parts that a batch is computed in, one after the other
            only=(),  # prefixes of the parameters to train, such as condition_adapter; empty: all
            lora=dict(  # low-rank adapters, trained in the place of all parameters
                rank=0,  # 0: none
                alpha=16.0,  # adapters count alpha / rank times
                layers=("to_q", "to_k", "to_v", "to_out/0"),  # what they are added to
            ),
            ema_decay=0.999,
            log_every=50,
            eval_every=1_000,  # of parameters and EMA; fixed examples, timesteps and noise
            eval_examples=256,  # at most, evenly spaced over the validation split
            preview_examples=2,  # of the validation split, that each evaluation samples into RUN/samples
            checkpoint_every=500,
            keep_checkpoints=2,  # the newest
            keep_every=0,  # checkpoints at multiples of this stay for good; 0: none
        )
    )
    config.dropout = ConfigDict(dict(text=0.05, both=0.05, context=0.05))  # InstructPix2Pix, per example
    config.loss = ConfigDict(
        dict(
            min_snr_gamma=0.0,  # min-SNR weighting (Hang et al. 2023); 0: none
            timesteps="uniform",  # or logit_normal (Esser et al. 2024), for rectified flow
        )
    )
    config.sampling = ConfigDict(
        dict(
            solver="ddim",
            steps=12,
            text_guidance=4.0,
            context_guidance=3.0,
            guidance_rescale=0.7,  # or strong guidance makes stems too loud where they play and too soft elsewhere
            sdedit_strength=0.3,
        )
    )

    if stage == "text_encoder":
        config.train.update(dict(steps=2_000, batch_size=128, learning_rate=5e-4))
    elif stage == "autoencoder":
        config.train.update(dict(steps=4_000, batch_size=16, learning_rate=5e-4))
        config.crop_frames = 128
        config.kl_weight = 1e-6
        config.adversarial = ConfigDict(
            dict(
                weight=0.0,  # of what the discriminator adds to the autoencoder's loss; 0: none
                feature_weight=0.0,  # of feature matching, times weight
                channels=16,  # of the discriminator's first layer; 64 are published
            )
        )
    elif stage == "vocoder":
        config.train.update(dict(steps=6_000, batch_size=8, learning_rate=8e-4))
        config.crop_frames = 64
        config.through_autoencoder = False  # learn from the images that the autoencoder makes of the true ones
        config.adversarial = ConfigDict(
            dict(
                weight=0.0,  # of what discriminators add to the spectral loss; 0: none; HiFi-GAN's is 1 / 45
                feature_weight=2.0,  # of feature matching, times weight
                channels=8,  # of the discriminators' first layers; 32 are published
            )
        )
    return config.lock()
