"""Trains one stage of a model: text_encoder, autoencoder, vocoder, base or subtractive.

  python -m launch.train --config=configs/tiny.py:STAGE --data_dir=DIR --workdir=RUN [--config.init_from=MODEL]

Run the same command again to go on after an interruption. SIGTERM saves a checkpoint and exits with 0.
To look at a run, now or later: tensorboard --logdir RUN
"""

import contextlib
import sys

from absl import flags
from ml_collections import config_flags

from launch import program

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and stage, such as configs/tiny.py:base.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that holds windows/ and latents/.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, new or to go on from.", required=True)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes: TPU pod, SLURM or Open MPI.")
_STOPPED_STATUS = flags.DEFINE_integer("stopped_status", 0, "Exit status after SIGTERM, for what starts the run again.")
_PROFILE = flags.DEFINE_integer("profile", 0, "Write a trace of this many steps to RUN/profile.", lower_bound=0)


def main() -> None:
    from launch import multihost  # after the flags are known to be good: JAX takes seconds

    with multihost.joined() if _DISTRIBUTED.value else contextlib.nullcontext():
        from subtractive_jax.training import loop, run_folder

        with run_folder.written_to(_WORKDIR.value):
            state = loop.train(_CONFIG.value, _DATA_DIR.value, _WORKDIR.value, _PROFILE.value)
    if int(state["step"]) < _CONFIG.value.train.steps:
        sys.exit(_STOPPED_STATUS.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    program.run(main)
