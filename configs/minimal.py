"""`minimal`: `tiny` with every part as small as it gets, for tests and to try the commands: it makes noise, not music.

python -m launch.train --config=configs/minimal.py:autoencoder --data_dir=DIR --workdir=RUN      (under a minute)
"""

import ml_collections
from ml_collections import ConfigDict

from configs import tiny


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    config = tiny.get_config(stage)
    with config.unlocked():
        config.name = "minimal"
        config.representation.window_frames = 128
        config.data.update(
            dict(window_hop_frames=128, validation_fraction=0.06, test_fraction=0.06, songs_per_shard=1)  # of few songs
        )
        config.text_encoder.update(dict(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2))
        config.autoencoder.update(dict(latent_channels=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
        config.vocoder = ConfigDict(  # the other vocoder: tests run both
            dict(
                model_type="hifigan",
                num_mels=64,
                upsample_initial_channel=16,
                upsample_rates=(5, 4, 4, 2),
                upsample_kernel_sizes=(11, 8, 8, 4),
                resblock="2",
                resblock_kernel_sizes=(3,),
                resblock_dilation_sizes=((1, 2),),
            )
        )
        config.mel_matching = 0  # or the noise would be as loud as its image
        config.denoiser.update(
            dict(block_out_channels=(16, 16, 32), cross_attention_dim=32, norm_num_groups=8, attention_head_dim=2)
        )
        config.train.update(
            dict(steps=20, batch_size=8, warmup_steps=2, log_every=1, eval_every=10, checkpoint_every=5)
        )
        config.sampling.steps = 4
    return config
