"""`auffusion`: Auffusion fine-tuned to put stems back, at 16 kHz in windows of 10.24 s.

  python -m launch.convert --from=auffusion --input=auffusion-full-no-adapter --output=MODEL
  python -m data_pipeline.build --config=configs/auffusion.py --data_dir=DIR --encoders=MODEL --source=KIND:PATH
  python -m launch.train --config=configs/auffusion.py --data_dir=DIR --workdir=RUN --config.init_from=MODEL

This is the checkpoint without a condition adapter. For `auffusion` and `auffusion-full`, which have one, add
--config.denoiser.condition_dim=768 --config.text_padding=zeros --config.null_text=zeros, as the converted model has it.
Nobody has run this to the end here: the weights are not ours to ship.
"""

import ml_collections
from ml_collections import ConfigDict

from configs import stable_diffusion


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    config = stable_diffusion.get_config(stage)
    with config.unlocked():
        config.name = "auffusion"
        config.representation = ConfigDict(  # Auffusion's converter.py
            dict(
                name="mel",
                sample_rate=16_000,  # Hz
                n_fft=2_048,  # samples
                win_length=1_024,  # samples
                hop_length=160,  # samples
                n_mels=256,
                fmin=0.0,  # Hz
                fmax=8_000.0,  # Hz
                mel_scale="slaney",
                mel_norm="slaney",
                log_floor=1e-5,
                log_ceiling=200.0,
                flip=True,
                window_frames=1_024,  # 10.24 s
            )
        )
        config.data.window_hop_frames = 1_024
        config.vocoder = ConfigDict(
            dict(
                model_type="hifigan",
                num_mels=256,
                upsample_initial_channel=512,
                upsample_rates=(5, 4, 4, 2),
                upsample_kernel_sizes=(11, 8, 8, 4),
                resblock="1",
                resblock_kernel_sizes=(3, 7, 11),
                resblock_dilation_sizes=((1, 3, 5), (1, 3, 5), (1, 3, 5)),
            )
        )
    return config
