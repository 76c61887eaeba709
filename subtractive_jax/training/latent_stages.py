"""Stages `base` and `subtractive`: diffusion in latent space.

`base` is text-to-audio on full mixes with captions (Rombach et al. 2022). `subtractive` reads the context's latents
beside the noisy ones, as InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800) reads the image to edit, and an
instruction; text, context or both are dropped for classifier-free guidance.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from subtractive_jax import fingerprint, parts, records
from subtractive_jax.diffusion import objective, schedule, timesteps
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.models import autoencoder, unet
from subtractive_jax.models.network import Params
from subtractive_jax.representation.piano_roll import PianoRoll
from subtractive_jax.training.stage import Stage, Task, example_keys, example_noise
from subtractive_jax.training.train_step import Batch, Figures, LossFn

TARGETS = ("stem", "mix")
_MEMORY_LIMIT = 2 << 30  # bytes of records that a host keeps decoded
_TIMESTEP_BUCKETS = 4  # the loss is reported for each quarter of the schedule
_STEM_EMBEDDING_STD = 0.02


class LatentSource:
    """Posterior moments or piano rolls, text states and stem of windows; kept in memory if they fit.

    Args:
      target_key: the latent to be generated, such as `stem_latent`.
      stems: the model's stems; empty for a source of captions without context.
      max_tokens: text states are padded to this length.
      roll: of a dataset of piano rolls, whose targets are single parts: the stem, or without context any that plays.
    """

    def __init__(
        self,
        split: records.Split,
        target_key: str,
        stems: Sequence[str],
        max_tokens: int,
        roll: PianoRoll | None = None,
    ) -> None:
        self.fingerprint, self._roll = split.fingerprint, roll
        self._split, self._target_key, self._stems, self._max_tokens = split, target_key, stems, max_tokens
        nbytes = len(split) * sum(map(_nbytes, self._select(split[0]).values())) if len(split) else 0
        self._examples = list(map(self._select, split)) if nbytes < _MEMORY_LIMIT else None

    def __len__(self) -> int:
        return len(self._split)

    def _select(self, raw: dict[str, Any]) -> dict[str, Any]:
        if not self._stems:
            return dict(targets=self._targets(raw), texts=[raw["caption_states"]])
        if raw["stem_name"] not in self._stems:
            raise unknown_name("stem in the dataset (see config.data.stems)", raw["stem_name"], self._stems)
        ends = np.cumsum(raw["instruction_lengths"])[:-1]
        return dict(
            targets=self._targets(raw),
            context=raw["context_latent"],
            texts=np.split(raw["instruction_states"], ends),
            stem=np.int32(self._stems.index(raw["stem_name"])),
        )

    def _targets(self, raw: dict[str, Any]) -> list[np.ndarray]:
        target = raw[self._target_key]
        if self._roll is None:
            return [target]
        parts = [raw["stem_name"]] if self._stems else self._roll.parts
        found = [np.array(target[..., self._roll.channels_of(part)]) for part in parts]
        return [part for part in found if part.any()] or found

    def batch(self, examples: np.ndarray, draws: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """`target`, `context` [B, F, T, channels], `text_states` [B, L, D] float16; `text_mask` [B, L]; `stem` [B]."""
        if self._examples:
            chosen = [self._examples[i] for i in examples]
        else:
            chosen = list(map(self._select, self._split.read(examples)))
        texts = [
            example["texts"][draw.integers(len(example["texts"]))] for example, draw in zip(chosen, draws, strict=True)
        ]
        targets = [
            example["targets"][draw.integers(len(example["targets"]))]
            for example, draw in zip(chosen, draws, strict=True)
        ]
        states, mask = pad_texts(texts, self._max_tokens)
        keys = [key for key in ("context", "stem") if key in chosen[0]]
        return {key: np.stack([example[key] for example in chosen]) for key in keys} | dict(
            target=np.stack(targets), text_states=states, text_mask=mask
        )


def _nbytes(value: Any) -> int:
    return sum(map(_nbytes, value)) if isinstance(value, list) else value.nbytes


def pad_texts(texts: Sequence[np.ndarray], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """States [L_i, D] of texts to (states [B, max_tokens, D], mask [B, max_tokens])."""
    states = np.zeros((len(texts), max_tokens, texts[0].shape[1]), texts[0].dtype)
    mask = np.zeros((len(texts), max_tokens), bool)
    for i, text in enumerate(texts):
        if len(text) > max_tokens:
            raise UserError(f"a text of {len(text)} tokens in the dataset, but config.max_text_tokens={max_tokens}")
        states[i, : len(text)], mask[i, : len(text)] = text, True
    return states, mask


def check_dataset(config: ml_collections.ConfigDict, data_dir: str, parent: dict[str, Params]) -> None:
    """Raises UserError if the latents or text states were not made by the parent's encoders."""
    expected = fingerprint.dataset_hash(
        config.representation.to_dict(),
        fingerprint.params_hash(parent["autoencoder"]) if "autoencoder" in parent else "",
        fingerprint.params_hash(parent["text_encoder"]),
        records.SCHEMA_VERSION,
    )
    metadata, where = records.read_metadata(data_dir, "latents"), records.dataset_dir(data_dir, "latents")
    again = "build it again with --encoders=<the model named by config.init_from>"
    if metadata["config_hash"] != expected:
        raise UserError(
            f"{where} has config_hash {metadata['config_hash']}, but the parent model's encoders and the config's "
            f"representation give {expected}: {again}"
        )
    if metadata["text_padding"] != config.text_padding:
        raise UserError(
            f"the texts of {where} were padded by text_padding={metadata['text_padding']}, this run has "
            f"config.text_padding={config.text_padding}: {again}"
        )


def set_scales(config: ml_collections.ConfigDict, data_dir: str, parent_config: ml_collections.ConfigDict) -> None:
    """Fills in empty scales: the parent's if it has them, else those that whiten the dataset's latents.

    A denoiser sees `(latent - latent_shift) * latent_scale` and `(context mode - latent_shift) * context_scale`.
    """
    names = ("latent_shift", "latent_scale", "context_scale")
    if config.latent_shift:
        return
    with config.unlocked():
        if parent_config.latent_shift:
            config.update({name: tuple(parent_config[name]) for name in names})
        else:
            metadata = records.read_metadata(data_dir, "latents")
            config.latent_shift = tuple(metadata["latent_mean"])
            config.latent_scale = tuple(1.0 / np.asarray(metadata["latent_std"]))
            config.context_scale = tuple(1.0 / np.asarray(metadata["context_std"]))


def starting_point(
    config: ml_collections.ConfigDict, parent: dict[str, Params], parent_config: ml_collections.ConfigDict
) -> Params:
    """The parent's parameters that the stage starts from; empty only for a new base denoiser.

    Raises:
      UserError: the stage is `subtractive`, and the parent has no denoiser to start from.
    """
    same_stems = config.stem_tokens and tuple(parent_config.data.stems) == tuple(config.data.stems)
    fits = same_stems or not parent_config.stem_tokens
    names = ["base_denoiser"]
    if config.stage == "subtractive" and fits:
        names.insert(0, "denoiser")
    for name in names:
        if name in parent:
            return {name: parent[name]}
    if config.stage == "base":
        return {}
    raise UserError(
        f"{config.init_from} has no base_denoiser, and no denoiser with stems={','.join(config.data.stems)}; "
        "train the base stage first"
    )


def null_text_states(config: ml_collections.ConfigDict, metadata: dict[str, Any]) -> np.ndarray:
    """What stands for no text, [L, D] float16: the states of the empty text that the dataset has, or zeros."""
    states = np.asarray(metadata["null_text_states"], np.float16)
    return np.zeros_like(states) if config.null_text == "zeros" else states


def make_loss(config: ml_collections.ConfigDict, null_states: np.ndarray, part: str) -> LossFn:
    """The denoising loss of `part`: mean squared error of the prediction type's target.

    In training the loss is weighted by `config.loss.min_snr_gamma` and its timesteps are drawn from
    `config.loss.timesteps`; the figures for the quarters of the schedule are never weighted. In evaluation nothing is,
    and timesteps, noise and posterior are fixed for each row, evenly over the schedule, so that validation losses of
    runs that differ in `config.loss` can be compared.

    Args:
      config: empty scales leave latents as they are.
      null_states: text states [L, D] that stand for no text.

    Raises:
      UserError: a negative `min_snr_gamma`, or an impossible `config.schedule`.
    """
    network, about = parts.network(part, config, config.remat), parts.latents(config)
    rates = schedule.rates(config.schedule)
    weights = np.ones(len(rates))
    if config.loss.min_snr_gamma:
        weights = objective.min_snr_weights(config.schedule.prediction_type, rates, config.loss.min_snr_gamma)
    shift, scale, context_scale = (
        np.asarray(config[name] or neutral, np.float32)
        for name, neutral in (("latent_shift", 0.0), ("latent_scale", 1.0), ("context_scale", 1.0))
    )
    null_text, null_mask = pad_texts([null_states], config.max_text_tokens)
    roll = piano_roll(config)
    dropout = config.dropout

    def loss(params: Params, batch: Batch, step: jax.Array, train: bool) -> tuple[jax.Array, Figures]:
        def keys(name: str) -> jax.Array:
            return example_keys(config.seed, name, step, batch["row"])

        latent = batch["target"].astype(jnp.float32)
        if roll is None:
            latent = autoencoder.sample_posterior(latent, example_noise(keys("posterior"), about.shape))
        latent = (latent - shift) * scale
        noise = example_noise(keys("noise"), about.shape)
        if train:
            timestep = timesteps.draw(config.loss.timesteps, keys("timestep"), len(rates))
            draw = jax.vmap(jax.random.uniform)(keys("dropout"))
        else:
            timestep, draw = timesteps.spread(batch["row"], len(rates)), jnp.ones(len(latent))
        inputs = schedule.add_noise(latent, noise, timestep, rates)

        # One draw decides: [0, both) drops both, then text alone, then context alone. Without a context, dropping both
        # is dropping the text.
        drop_text = draw < dropout.both + dropout.text
        states = jnp.where(drop_text[:, None, None], null_text, batch["text_states"]).astype(jnp.float32)
        mask = jnp.where(drop_text[:, None], null_mask, batch["text_mask"])
        if part == "denoiser":
            drop_context = (draw < dropout.both) | (~drop_text & (draw < dropout.both + dropout.text + dropout.context))
            context = batch["context"].astype(jnp.float32)
            if roll is None:
                context = autoencoder.mode(context)
            elif train:
                context = drop_parts(roll, context, dropout.parts, keys("parts"))
            context = (context - shift) * context_scale
            context = jnp.where(drop_context[:, None, None, None], 0.0, context)
            inputs = jnp.concatenate([inputs, context], axis=-1)

        output = network.apply(params[part], inputs, timestep, states, mask, batch.get("stem"))
        target = objective.target(config.schedule.prediction_type, latent, noise, timestep, rates)
        error = jnp.square(output - target).mean(axis=(1, 2, 3))
        bucket = timestep * _TIMESTEP_BUCKETS // len(rates)
        weighted = jnp.asarray(weights, jnp.float32)[timestep] * error if train else error
        return weighted, {
            f"loss_quarter_{i + 1}": (error, (bucket == i).astype(jnp.float32)) for i in range(_TIMESTEP_BUCKETS)
        }

    return loss


def piano_roll(config: ml_collections.ConfigDict) -> PianoRoll | None:
    """The representation of a model without autoencoder; None of a model of latents.

    Raises:
      UserError: a stem that is no part of it.
    """
    if config.autoencoder is not None:
        return None
    roll = PianoRoll.from_config(config.representation)
    for stem in config.data.stems:
        if stem not in roll.parts:
            raise unknown_name("part of the piano roll in config.data.stems", stem, roll.parts)
    return roll


def drop_parts(roll: PianoRoll, contexts: jax.Array, chance: float, keys: jax.Array) -> jax.Array:
    """Contexts [B, F, T, C] of which each part is taken out with this chance; one part of each is left.

    So the model learns to play to every non-empty set of parts.

    Args:
      keys: one for each context [B].
    """
    count = len(roll.parts)
    rolls, missing, metre = jnp.split(contexts, (roll.channels, roll.channels + count), axis=-1)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (1, 1, count)))(keys)
    draw = jnp.where(missing[:, :1, :1] > 0, 0.0, draw)
    gone = (draw < chance) & (draw < draw.max(axis=-1, keepdims=True))
    rolls = jnp.where(gone.repeat(roll.channels // count, axis=-1), 0.0, rolls)
    return jnp.concatenate([rolls, jnp.where(gone, 1.0, missing), metre], axis=-1)


def task(config: ml_collections.ConfigDict, null_states: np.ndarray | None = None) -> Task:
    """What the stage `base` or `subtractive` learns.

    Args:
      config: empty scales leave latents as they are.
      null_states: text states [L, D] that stand for no text; None: one of zeros.

    Raises:
      UserError: unknown target, or see `make_loss`.
    """
    if config.target not in TARGETS:
        raise unknown_name("target", config.target, TARGETS)
    part = "denoiser" if config.stage == "subtractive" else "base_denoiser"
    network, about, roll = parts.network(part, config), parts.latents(config), piano_roll(config)

    def init_params(key: jax.Array, start: Params) -> Params:
        if not start:
            fresh = network.init(key)
            if roll is not None:
                fresh = unet.soft_threshold(fresh, about.shape[-1], float(np.mean(config.latent_scale)))
            return {part: fresh}
        (pretrained,) = start.values()
        shapes = network.shapes()
        tokens = jax.tree.map(
            lambda leaf: _STEM_EMBEDDING_STD * jax.random.normal(key, leaf.shape),
            {name: shapes[name] for name in ("stem_embedding",) if name in shapes},
        )
        return {part: tokens | unet.widen_input(pretrained, shapes["conv_in"]["kernel"].shape[2])}

    text = config.max_text_tokens, config.denoiser.condition_dim or config.denoiser.cross_attention_dim
    example = dict(
        target=jax.ShapeDtypeStruct(about.stored, np.float16),
        text_states=jax.ShapeDtypeStruct(text, np.float16),
        text_mask=jax.ShapeDtypeStruct(text[:1], np.bool_),
    )
    if part == "denoiser":
        example |= dict(
            context=jax.ShapeDtypeStruct(about.stored_context, np.float16), stem=jax.ShapeDtypeStruct((), np.int32)
        )
    if null_states is None:
        null_states = np.zeros((1, text[1]), np.float16)
    return Task(part, init_params, make_loss(config, null_states, part), example)


def build(config: ml_collections.ConfigDict, data_dir: str) -> Stage:
    """The stage `base` or `subtractive`. `config` has its scales.

    Raises:
      UserError: a dataset with other stems, or see `task`.
    """
    learnt = task(config, null_text_states(config, records.read_metadata(data_dir, "latents")))
    subtractive = config.stage == "subtractive"
    target_key = f"{config.target}_latent" if subtractive else "mix_latent"
    keys = (
        ("context_latent", "instruction_states", "instruction_lengths", "stem_name")
        if subtractive
        else ("caption_states",)
    )
    splits = [records.Split(data_dir, "latents", split, {target_key, *keys}) for split in ("train", "validation")]
    stems = tuple(config.data.stems) if subtractive else ()
    sources = (LatentSource(split, target_key, stems, config.max_text_tokens, piano_roll(config)) for split in splits)
    return Stage(learnt, *sources)
