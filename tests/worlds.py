"""A small world to train in: a dataset of noise, a parent model of noise, and configs that fit them."""

import dataclasses
from pathlib import Path

import ml_collections

from configs import midi_tiny, minimal
from subtractive_jax.training import text_stage
from tests import synthetic

_PARENT_PARTS = ("text_encoder", "autoencoder", "vocoder", "base_denoiser")


@dataclasses.dataclass(frozen=True)
class World:
    """Attributes: `data_dir` has windows and latents; `parent` is a model folder with what every stage needs."""

    data_dir: str
    parent: str

    def config(self, stage: str = "subtractive", **train: object) -> ml_collections.ConfigDict:
        """`minimal` with a UNet of one block, which compiles faster; fields of `config.train` by name."""
        config = small_config(stage)
        if stage != "text_encoder":
            config.init_from = self.parent
        config.train.update(dict(steps=4, checkpoint_every=100, eval_every=100, preview_examples=0) | train)
        return config


def small_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    config = minimal.get_config(stage)
    config.denoiser.update(
        dict(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    )
    return config


def notes_config(stage: str = "subtractive", window_steps: int = 64) -> ml_collections.ConfigDict:
    """`midi_tiny` with the text encoder of `minimal` and a UNet of one block."""
    config, small = midi_tiny.get_config(stage), small_config()
    config.representation.window_steps = window_steps
    config.text_encoder = small.text_encoder
    denoiser = small.denoiser.to_dict() | dict(block_out_channels=(16,))
    config.denoiser.update(denoiser)
    config.sampling.steps = 2
    return config


def notes_model(folder: Path, window_steps: int = 64) -> Path:
    """A model folder of notes, untrained."""
    tokenizer = text_stage.train_tokenizer(["Add a funk bass", "Add rock drums", "Add guitar", "Add jazz keys"], 256)
    return synthetic.write_model(
        folder, notes_config(window_steps=window_steps), ("text_encoder", "denoiser"), tokenizer
    )


def make(folder: Path) -> World:
    config = small_config()
    synthetic.write_windows(folder, config)
    tokenizer = text_stage.make_tokenizer(config, str(folder))
    parent = synthetic.write_model(folder / "parent", config, _PARENT_PARTS, tokenizer)
    synthetic.write_latents(folder, config, parent)
    return World(str(folder), str(parent))
