"""`midi_tiny`: the model of notes that ships with the code; it writes piano rolls, without autoencoder and vocoder.

Stages, in order; the text encoder is `tiny`'s, as it is:

  python -m launch.train --config=configs/midi_tiny.py:base --data_dir=DIR --workdir=RUN --config.init_from=tiny
  python -m launch.train --config=configs/midi_tiny.py      --data_dir=DIR --workdir=RUN2 --config.init_from=RUN

Minutes and results of the shipped run: subtractive_jax/shipped/midi_tiny/MODEL_CARD.md.
"""

import ml_collections
from ml_collections import ConfigDict

from configs import tiny

STAGES = ("base", "subtractive")


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    if stage not in STAGES:
        raise ValueError(f'unknown stage "{stage}" (known: {", ".join(STAGES)})')
    config = tiny.get_config(stage)
    with config.unlocked():
        config.name = "midi_tiny"
        config.representation = ConfigDict(
            dict(
                name="piano_roll",
                parts=("drums", "bass", "guitar", "keys"),
                steps_per_beat=4,
                window_steps=64,  # four bars of 4/4
                lowest_pitch=16,
                octaves=8,
            )
        )
        config.data = ConfigDict(
            dict(
                stems=("drums", "bass", "guitar", "keys"),  # what the model learns to put back
                window_hop_bars=4,  # distance between the starts of training windows
                min_onsets=4,  # of a stem, and of its context, in a window
                instructions_per_window=4,
                validation_fraction=0.12,  # of the groups
                test_fraction=0.12,  # of the groups
                songs_per_shard=64,
                augmentation=dict(  # of the training split
                    copies=1,  # of every song
                    pitch_semitones=6,  # transposed by at most; drums stay
                    seed=0,
                ),
            )
        )
        config.autoencoder = None
        config.vocoder = None
        config.mel_matching = 0
        config.denoiser.update(dict(block_out_channels=(48, 80, 128)))
        del config.denoiser.down_block_types, config.denoiser.up_block_types
        # No attention over the 512 cells of the first level: it would cost half the step.
        config.denoiser.down_block_types = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
        config.denoiser.up_block_types = ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        config.schedule.prediction_type = "sample"
        config.latent_shift = (0.0,)
        config.latent_scale = (4.0,)  # of what is 1 in a roll, against noise of 1
        config.context_scale = (4.0,)
        config.dropout.parts = 0.35  # of each part of a context, so that every set of parts is played to
        config.train.update(dict(batch_size=16, learning_rate=2e-3, warmup_steps=100, ema_decay=0.998))
        config.sampling.update(dict(steps=12, text_guidance=2.0, context_guidance=3.5, guidance_rescale=0.0))
        config.train.steps = 400 if stage == "base" else 9_600
    return config
