"""The five stages: what each trains, what it needs of its parent, and what it hands on."""

import dataclasses
from typing import Any

import ml_collections

from subtractive_jax import parts
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models.network import Params
from subtractive_jax.training import audio_stages, latent_stages, run_folder, text_stage
from subtractive_jax.training.stage import Stage
from subtractive_jax.weights import model_folder

PART_OF_STAGE = {
    "text_encoder": "text_encoder",
    "autoencoder": "autoencoder",
    "vocoder": "vocoder",
    "base": "base_denoiser",
    "subtractive": "denoiser",
}
_ENCODERS = ("text_encoder", "autoencoder")
_NEEDS = {  # parts that the parent must have
    "text_encoder": (),
    "autoencoder": ("text_encoder",),
    "vocoder": _ENCODERS,
    "base": (*_ENCODERS, "vocoder"),
    "subtractive": (*_ENCODERS, "vocoder"),
}
_KEEPS = {  # parts that stay valid when the stage's own part changes
    "text_encoder": (),
    "autoencoder": ("text_encoder",),
    "vocoder": (*_ENCODERS, "base_denoiser", "denoiser"),
    "base": (*_ENCODERS, "vocoder"),
    "subtractive": (*_ENCODERS, "vocoder", "base_denoiser"),
}
_FIELDS_OF_PART = {  # what must not differ between a part's config and the config of the run that uses it
    "text_encoder": ("text_encoder", "max_text_tokens", "text_padding", "null_text"),
    "autoencoder": ("autoencoder", "representation"),
    "vocoder": ("vocoder", "representation"),
    "base_denoiser": ("denoiser", "schedule"),
    "denoiser": ("denoiser", "schedule"),
}
_OF_THE_SOLVER = ("schedule.timestep_spacing", "schedule.steps_offset", "schedule.set_alpha_to_one")


def load_parent(config: ml_collections.ConfigDict) -> model_folder.ModelFiles:
    """The model that `config.init_from` names; for the text encoder, which has none, an empty one.

    Raises:
      UserError: `init_from` is missing, needless, lacks a part, or has a part built by another config.
    """
    if config.stage not in PART_OF_STAGE:
        raise unknown_name("stage", config.stage, PART_OF_STAGE)
    needs = parts.needed(_NEEDS[config.stage], config)
    if not needs:
        if config.init_from:
            raise UserError(f"stage {config.stage} starts from nothing; leave config.init_from empty")
        return model_folder.ModelFiles(config, {}, None)
    if not config.init_from:
        raise UserError(
            f"stage {config.stage} needs config.init_from: a run folder, model folder or shipped model "
            f"with {', '.join(needs)}"
        )
    parent = model_folder.load(model_folder.resolve(config.init_from))
    if parent.config.representation.name != config.representation.name:  # texts are the same for audio and notes
        texts = {part: params for part, params in parent.params.items() if part == "text_encoder"}
        parent = dataclasses.replace(parent, params=texts)
    missing = [part for part in needs if part not in parent.params]
    if missing:
        raise UserError(f"{config.init_from} has no {' and no '.join(missing)}, which stage {config.stage} needs")
    for part in parent.params:
        if part in (*_KEEPS[config.stage], PART_OF_STAGE[config.stage]):
            for field in _FIELDS_OF_PART[part]:
                for name, (theirs, ours) in run_folder.differences(
                    {field: _plain(parent.config[field])}, {field: _plain(config[field])}
                ).items():
                    if name in _OF_THE_SOLVER:
                        continue
                    raise UserError(f"the {part} of {config.init_from} has config.{name}={theirs}, this run {ours}")
    return parent


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def prepare(config: ml_collections.ConfigDict, data_dir: str) -> tuple[Params, model_folder.ModelFiles]:
    """Begins a run: checks parent and dataset, and fills in what the config leaves to them.

    Returns:
      (the parent's parameters that training starts from, or empty;
       what the run takes over for good: the parts that stay valid, and the tokenizer).

    Raises:
      UserError: parent or dataset is missing, or they do not belong together.
    """
    parent = load_parent(config)
    tokenizer, start = parent.tokenizer, {}
    if config.stage == "text_encoder":
        tokenizer = text_stage.make_tokenizer(config, data_dir)
    elif config.stage in ("autoencoder", "vocoder"):
        names = (config.stage, *audio_stages.frozen(config))
        start = {name: parent.params[name] for name in names if name in parent.params}
    else:
        latent_stages.check_dataset(config, data_dir, parent.params)
        latent_stages.set_scales(config, data_dir, parent.config)
        start = latent_stages.starting_point(config, parent.params, parent.config)
    kept = {part: parent.params[part] for part in _KEEPS[config.stage] if part in parent.params}
    return start, model_folder.ModelFiles(config, kept, tokenizer)


def build(config: ml_collections.ConfigDict, data_dir: str, inherited: model_folder.ModelFiles) -> Stage:
    """The stage of a resolved config.

    Raises:
      UserError: the dataset is missing, empty, or was not made for this model.
    """
    if config.stage == "text_encoder":
        assert inherited.tokenizer is not None  # `prepare` made it
        stage = text_stage.build(config, data_dir, inherited.tokenizer)
    elif config.stage in ("autoencoder", "vocoder"):
        stage = audio_stages.build(config, data_dir)
    else:
        latent_stages.check_dataset(config, data_dir, inherited.params)
        stage = latent_stages.build(config, data_dir)
    if not len(stage.train):
        raise UserError(f"{data_dir}: the training split is empty; give data_pipeline.build more songs")
    return stage
