"""Texts to the ids a text encoder reads, and its states to what the denoiser reads.

`text_padding` says how a text fills the positions that the denoiser sees:

| text_padding | the encoder reads | the denoiser looks at |
|---|---|---|
| masked | the text | its states |
| tokens | the text and padding tokens up to `max_text_tokens` (Stable Diffusion 1.x) | all states |
| zeros | the text | its states, and zeros up to `max_text_tokens` (Auffusion's adapter) |
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from subtractive_jax.errors import UserError, unknown_name

TEXT_PADDINGS = ("masked", "tokens", "zeros")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that stand around a text; `begin` is None where texts begin with their first word."""

    begin: int | None
    end: int
    pad: int


T5_TOKENS = SpecialTokens(begin=None, end=1, pad=0)


def special_tokens(text_encoder: Any) -> SpecialTokens:
    """Those of `config.text_encoder`: T5's are always the same, CLIP's are in its config."""
    if text_encoder.model_type == "t5":
        return T5_TOKENS
    return SpecialTokens(text_encoder.bos_token_id, text_encoder.eos_token_id, text_encoder.pad_token_id)


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, special: SpecialTokens = T5_TOKENS
) -> tuple[np.ndarray, np.ndarray]:
    """Texts to (ids [B, max_tokens] int32, mask [B, max_tokens] bool), each between its special tokens, then padding.

    The empty text, the null of classifier-free guidance, is the special tokens alone.

    Raises:
      UserError: a text is longer than `max_tokens`, special tokens included.
    """
    ids = np.full((len(texts), max_tokens), special.pad, np.int32)
    mask = np.zeros((len(texts), max_tokens), bool)
    begin = [] if special.begin is None else [special.begin]
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        tokens = [*begin, *encoding.ids, special.end]
        if len(tokens) > max_tokens:
            raise UserError(f'text of {len(tokens)} tokens, at most {max_tokens} are read: "{texts[row][:60]}..."')
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    return ids, mask


def visible(states: np.ndarray, mask: np.ndarray, text_padding: str) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's states [B, L, D] and its mask [B, L] as the denoiser gets them.

    Raises:
      UserError: unknown `text_padding`.
    """
    match text_padding:
        case "masked":
            return states, mask
        case "tokens":
            return states, np.ones_like(mask)
        case "zeros":
            return np.where(mask[..., None], states, 0.0), np.ones_like(mask)
    raise unknown_name("text_padding", text_padding, TEXT_PADDINGS)
