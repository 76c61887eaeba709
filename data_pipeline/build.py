"""Songs to the datasets `windows` and `latents`.

  python -m data_pipeline.build --config=configs/tiny.py --data_dir=DIR                    # shipped songs, windows only
  python -m data_pipeline.build --config=configs/tiny.py --data_dir=DIR --encoders=MODEL   # both datasets
  python -m data_pipeline.build ... --source=midi:FOLDER --source=songs:FOLDER             # other songs
  python -m data_pipeline.build --config=configs/midi_tiny.py --data_dir=DIR ...           # of notes, from MIDI

`latents` is made from the `windows` in the same folder: where these exist, nothing is rendered or separated again.
Paths may be on any file system that Beam knows (`gs://`, `s3://`). On more than one machine: data_pipeline/ENGINES.md.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from launch import program
from subtractive_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; its representation and data are used.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that gets the datasets.", required=True)
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "KIND:PATH of songs, stems, musdb18hq, moisesdb, slakh2100 or midi; the shipped songs if not given."
)
_UNTIL = flags.DEFINE_enum("until", None, ("windows", "latents"), "Last dataset; latents if --encoders is given.")
_ENCODERS = flags.DEFINE_string(
    "encoders", None, "Model whose autoencoder and text encoder make latents; of notes the text encoder alone."
)
_SOUNDFONT = flags.DEFINE_multi_string(
    "soundfont", [], "SoundFont that renders MIDI, one of them each song; pretty_midi's if not given."
)
_SEPARATOR = flags.DEFINE_string("separator", "htdemucs", "Demucs model that separates --source=songs:PATH.")
_SEPARATOR_REPO = flags.DEFINE_string("separator_repo", "", "Folder with Demucs models, instead of Demucs' own.")
_SEPARATOR_DEVICE = flags.DEFINE_enum("separator_device", "cpu", ("cpu", "cuda"), "Where Demucs runs.")
_LLM_BASE_URL = flags.DEFINE_string("llm_base_url", None, "OpenAI-compatible server that writes instructions.")
_LLM_MODEL = flags.DEFINE_string("llm_model", "", "The server's name for its model; key in OPENAI_API_KEY.")
_LLM_CACHE = flags.DEFINE_string("llm_cache", None, "Folder that keeps its answers; DATA_DIR/llm_cache if not given.")
_LLM_RATE = flags.DEFINE_float("llm_requests_per_minute", 60.0, "At most, by each worker.", 0.0)
_MAX_REJECTED = flags.DEFINE_float("max_rejected", 0.5, "Largest share of songs that may be refused.", 0.0, 1.0)
_BEAM = flags.DEFINE_list(
    "beam_pipeline_options", [], "Beam's options without dashes; one that holds a comma is quoted as in CSV."
)
_FOR_AUDIO = (_SOUNDFONT, _SEPARATOR, _SEPARATOR_REPO, _SEPARATOR_DEVICE)
_FOR_WINDOWS = (
    *_FOR_AUDIO,
    *(_LLM_BASE_URL, _LLM_MODEL, _LLM_CACHE, _LLM_RATE, _MAX_REJECTED),
)
flags.mark_flag_as_required("config")


def _tools() -> Any:
    from data_pipeline import files, render
    from data_pipeline.song import Tools

    given = [(_SOUNDFONT.name, path) for path in _SOUNDFONT.value] + [(_SEPARATOR_REPO.name, _SEPARATOR_REPO.value)]
    for name, path in given:
        if path and not files.exists(path):
            raise UserError(f"--{name}={path}: no such file or folder")
    *soundfonts, repo = (files.absolute(path) if path else "" for _, path in given)
    # Chosen here for all workers, or the same song would sound otherwise on another machine.
    return Tools(tuple(soundfonts), render.renderer(), _SEPARATOR.value, repo, _SEPARATOR_DEVICE.value)


def _language_model(data_dir: str) -> dict[str, Any] | None:
    if not _LLM_BASE_URL.value:
        if _LLM_MODEL.value:
            raise UserError("--llm_model needs --llm_base_url=URL, the server that has it")
        return None
    from data_pipeline import files, llm

    arguments: dict[str, Any] = dict(
        base_url=_LLM_BASE_URL.value,
        model=_LLM_MODEL.value,
        cache_dir=files.absolute(_LLM_CACHE.value or files.join(data_dir, "llm_cache")),
        requests_per_minute=_LLM_RATE.value,
    )
    llm.Writer(**arguments)  # refuses here what workers could not use
    return arguments


def main() -> None:
    # After the flags are known to be good: TensorFlow takes seconds.
    from data_pipeline import dataset, engine, files, pipeline

    engine.parse_options(_BEAM.value)
    if _CONFIG.value.representation.name == "piano_roll":
        for tool in _FOR_AUDIO:
            if tool.present:
                raise UserError(f"--{tool.name} has no effect: for piano rolls nothing is rendered or separated")
    data_dir, encoders = files.absolute(_DATA_DIR.value), _ENCODERS.value
    if encoders and files.exists(encoders):  # or else it is a shipped model's name
        encoders = files.absolute(encoders)
    until = _UNTIL.value or ("latents" if encoders else "windows")
    if until == "latents" and not encoders:
        raise UserError(
            "--until=latents needs --encoders=MODEL, a model with a text encoder and, for audio, an autoencoder"
        )
    if until == "latents" and encoders:
        pipeline.check_encoders(_CONFIG.value, encoders)  # rather than after the windows are made
    if until == "windows" or not dataset.is_complete(data_dir, "windows"):
        pipeline.build_windows(
            _CONFIG.value,
            data_dir,
            _SOURCE.value,
            _BEAM.value,
            _tools(),
            _language_model(data_dir),
            _MAX_REJECTED.value,
        )
    else:
        for flag in _FOR_WINDOWS:
            if flag.present:
                raise UserError(
                    f"--{flag.name} has no effect: {data_dir} has its windows already; give another --data_dir"
                )
        pipeline.check_windows(_CONFIG.value, data_dir, _SOURCE.value)
    if until == "latents" and encoders:
        pipeline.build_latents(_CONFIG.value, data_dir, encoders, _BEAM.value)


if __name__ == "__main__":
    program.run(main)
