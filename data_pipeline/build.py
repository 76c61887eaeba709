"""Songs to the datasets `windows` and `latents`.

  python -m data_pipeline.build --config=configs/tiny.py --data_dir=DIR                    # shipped songs, windows only
  python -m data_pipeline.build --config=configs/tiny.py --data_dir=DIR --encoders=MODEL   # both datasets
  python -m data_pipeline.build ... --source=midi:FOLDER --source=stems:FOLDER             # other songs

`latents` is made from the `windows` in the same folder: where these exist, nothing is rendered again.
"""

from absl import flags
from ml_collections import config_flags

from launch import program
from subtractive_jax import records
from subtractive_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; its representation and data are used.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that gets the datasets.", required=True)
_SOURCE = flags.DEFINE_multi_string("source", [], "KIND:PATH of songs, midi or stems; the shipped songs if not given.")
_UNTIL = flags.DEFINE_enum("until", None, ("windows", "latents"), "Last dataset; latents if --encoders is given.")
_ENCODERS = flags.DEFINE_string("encoders", None, "Model whose autoencoder and text encoder make latents.")
_BEAM = flags.DEFINE_list("beam_pipeline_options", [], "Beam's options without dashes, such as runner=DirectRunner.")
flags.mark_flag_as_required("config")


def main() -> None:
    from data_pipeline import pipeline  # after the flags are known to be good: TensorFlow takes seconds

    encoders = _ENCODERS.value
    until = _UNTIL.value or ("latents" if encoders else "windows")
    if until == "latents" and not encoders:
        raise UserError("--until=latents needs --encoders=MODEL, a model with an autoencoder and a text encoder")
    there = records.dataset_dir(_DATA_DIR.value, "windows").exists()
    if until == "windows" or not there:
        pipeline.build_windows(_CONFIG.value, _DATA_DIR.value, _SOURCE.value, _BEAM.value)
    if until == "latents" and encoders:
        pipeline.build_latents(_CONFIG.value, _DATA_DIR.value, encoders, _BEAM.value)


if __name__ == "__main__":
    program.run(main)
