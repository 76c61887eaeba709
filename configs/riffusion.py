"""`riffusion`: Riffusion v1 fine-tuned to put stems back, at 44.1 kHz in windows of 5.11 s.

  python -m launch.convert --from=riffusion --input=riffusion-model-v1 --output=MODEL
  python -m data_pipeline.build --config=configs/riffusion.py --data_dir=DIR --encoders=MODEL --source=KIND:PATH
  python -m launch.train --config=configs/riffusion.py --data_dir=DIR --workdir=RUN --config.init_from=MODEL

Nobody has run this to the end here: the weights are not ours to ship. The authors' predecessor, riff-pix2pix, trained
300,000 steps of batch 4 on one A10G in 72 hours; 100,000 of batch 64 are a job for a TPU slice.
"""

import ml_collections
from ml_collections import ConfigDict

from configs import stable_diffusion

INT16 = 32_768.0  # Riffusion's magnitudes are of samples in this range, ours of samples in [-1, 1]


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    config = stable_diffusion.get_config(stage)
    with config.unlocked():
        config.name = "riffusion"
        config.representation = ConfigDict(  # riffusion's SpectrogramParams and image_util
            dict(
                name="mel",
                sample_rate=44_100,  # Hz
                n_fft=17_640,  # samples, 400 ms
                win_length=4_410,  # samples, 100 ms
                hop_length=441,  # samples, 10 ms
                n_mels=512,
                fmin=0.0,  # Hz
                fmax=10_000.0,  # Hz
                mel_scale="htk",
                mel_norm="none",
                framing="centered",
                power_exponent=0.25,
                power_ceiling=30e6 / INT16,
                inverted=True,
                flip=True,
                window_frames=512,  # 5.11 s
            )
        )
        config.vocoder = ConfigDict(dict(model_type="griffin_lim", iterations=32, momentum=0.99))
    return config
