"""Stage `text_encoder`: texts about the same window agree, and tell its tags.

Symmetric InfoNCE (van den Oord et al. 2018, as in CLIP) between two texts of one window, plus prediction of the
window's tags. The tokenizer is trained first, from the same texts.
"""

import collections
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from subtractive_jax import parts, records
from subtractive_jax.errors import UserError
from subtractive_jax.models.network import Params
from subtractive_jax.text import tokenize
from subtractive_jax.training.stage import Stage, Task
from subtractive_jax.training.train_step import Batch, Figures

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5's vocabularies
_TEMPERATURE = 0.07
_KEYS = ("instructions", "caption", "tags", "stem_name")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-casing Unigram tokenizer (Kudo 2018) that ends every text with `END`.

    Frequent words are one token each, other words are made of pieces. Every printable ASCII character is a token, so
    that no English text holds unknowns.
    """
    texts = sorted(set(texts))
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size // 2,
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
        initial_alphabet=[character for character in map(chr, range(33, 127)) if not character.isupper()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = dict(json.loads(tokenizer.to_str())["model"]["vocab"])

    # The trainer seeds its pieces with what several distinct words share, so whole words are added here.
    counts = collections.Counter(
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    total = counts.total()
    for word, count in counts.most_common(vocab_size - len(pieces)):
        pieces[word] = max(pieces.get(word, -math.inf), math.log(count / total))
    tokenizer.model = models.Unigram(list(pieces.items()), unk_id=list(pieces).index(UNKNOWN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def make_tokenizer(config: ml_collections.ConfigDict, data_dir: str) -> Tokenizer:
    """A tokenizer of at most `config.text_encoder.vocab_size` tokens, from the training split's texts."""
    split = records.Split(data_dir, "windows", "train", ("instructions", "caption"))
    texts = (text for example in split for text in (*example["instructions"], example["caption"]))
    return train_tokenizer(texts, config.text_encoder.vocab_size)


_MEASURED = ("bleed_db", "semitones", "speed")  # in tags, but not what texts speak of


def _labels(value: Any, path: str) -> Iterator[str]:
    """Tags as labels: `genre=reggae` for texts, `pieces/snare` for what has a number."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _labels(item, f"{path}/{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _labels(item, path)
    elif isinstance(value, str):
        yield f"{path}={value}"
    else:
        yield path


def labels(example: dict[str, Any]) -> set[str]:
    """What the texts of a window can tell: the song's tags, and those of the missing stems."""
    tags = {key: value for key, value in json.loads(example["tags"]).items() if key not in _MEASURED}
    missing = {stem: tags.get("stems", {}).get(stem, {}) for stem in example["stem_name"].split("+")}
    return set(_labels(tags | {"stems": missing, "stem": example["stem_name"]}, "tags"))


def tag_vocabulary(examples: Iterable[dict[str, Any]]) -> list[str]:
    """The labels that distinguish: of at least two examples, not of all."""
    examples = list(examples)
    counts = collections.Counter(label for example in examples for label in labels(example))
    return sorted(label for label, count in counts.items() if 2 <= count < len(examples))


class TextSource:
    """Two different texts about a window, and its tags, read into memory at once."""

    def __init__(self, split: records.Split, tokenizer: Tokenizer, tags: Sequence[str], max_tokens: int) -> None:
        self.fingerprint = split.fingerprint
        examples = list(split)
        texts = [list(dict.fromkeys((*example["instructions"], example["caption"]))) for example in examples]
        distinct = sorted({text for own in texts for text in own})
        row_of = {text: row for row, text in enumerate(distinct)}
        self._rows = [np.array([row_of[text] for text in own]) for own in texts]
        ids, mask = tokenize(tokenizer, distinct, max_tokens)
        longest = mask.sum(axis=1).max(initial=1)  # most texts are far shorter than what the model accepts
        self._ids, self._mask = ids[:, :longest], mask[:, :longest]
        self._tags = np.array([[tag in own for tag in tags] for own in map(labels, examples)], np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, examples: np.ndarray, draws: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """`ids` and `mask` [B, 2, L], `tags` [B, number of tags]."""
        pairs = [
            draw.choice(self._rows[example], 2, replace=len(self._rows[example]) < 2)
            for example, draw in zip(examples, draws, strict=True)
        ]
        return dict(ids=self._ids[pairs], mask=self._mask[pairs], tags=self._tags[examples])


def _contrast(one: jax.Array, other: jax.Array, negatives: jax.Array) -> jax.Array:
    """InfoNCE [B] of unit vectors [B, D]; `negatives` [B, B] bool: which pairs are told apart."""
    logits = one @ other.T / _TEMPERATURE
    logits = jnp.where(negatives | jnp.eye(len(one), dtype=bool), logits, -jnp.inf)
    return -jnp.diagonal(jax.nn.log_softmax(logits))


def build(config: ml_collections.ConfigDict, data_dir: str, tokenizer: Tokenizer) -> Stage:
    """The stage. Training always starts from fresh parameters."""
    if config.train.accumulation_steps > 1:
        raise UserError(
            "stage text_encoder tells each example from the whole batch: leave config.train.accumulation_steps at 1"
        )
    train, validation = (records.Split(data_dir, "windows", split, _KEYS) for split in ("train", "validation"))
    tags = tag_vocabulary(train)
    network = parts.network("text_encoder", config)

    def init_params(key: jax.Array, start: Params) -> Params:
        del start
        head = dict(kernel=jnp.zeros((config.text_encoder.d_model, len(tags))), bias=jnp.zeros(len(tags)))
        return dict(text_encoder=network.init(key), tag_head=head)

    def loss(params: Params, batch: Batch, step: jax.Array, train: bool) -> tuple[jax.Array, Figures]:
        ids, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("ids", "mask"))
        states = network.apply(params["text_encoder"], ids, mask)
        pooled = jnp.sum(states * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
        pooled = pooled.reshape(-1, 2, pooled.shape[-1])

        one, other = jnp.moveaxis(pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1, 0)
        alike = jnp.all(batch["tags"][:, None] == batch["tags"][None], axis=-1)  # windows of one song are no negatives
        negatives = ~alike & batch["valid"][None]
        contrast = (_contrast(one, other, negatives) + _contrast(other, one, negatives)) / 2

        logits = pooled @ params["tag_head"]["kernel"] + params["tag_head"]["bias"]
        tag_loss = optax.sigmoid_binary_cross_entropy(logits, batch["tags"][:, None]).mean(axis=(1, 2))
        weight = jnp.ones_like(contrast)
        return contrast + tag_loss, dict(contrast=(contrast, weight), tags=(tag_loss, weight))

    sources = (TextSource(split, tokenizer, tags, config.max_text_tokens) for split in (train, validation))
    longest = config.max_text_tokens
    example = {
        "ids": jax.ShapeDtypeStruct((2, longest), np.int32),
        "mask": jax.ShapeDtypeStruct((2, longest), np.bool_),
        "tags": jax.ShapeDtypeStruct((len(tags),), np.float32),
    }
    return Stage(Task("text_encoder", init_params, loss, example), *sources)
