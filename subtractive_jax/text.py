"""Texts to the ids a T5 encoder reads."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from subtractive_jax.errors import UserError

PAD_ID, END_ID = 0, 1  # as in T5's vocabularies


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts to (ids [B, max_tokens] int32, mask [B, max_tokens] bool), each with T5's end token, then padding.

    The empty text, the null of classifier-free guidance, is the end token alone.

    Raises:
      UserError: a text is longer than `max_tokens`, the end token included.
    """
    ids = np.full((len(texts), max_tokens), PAD_ID, np.int32)
    mask = np.zeros((len(texts), max_tokens), bool)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        tokens = [*encoding.ids, END_ID]
        if len(tokens) > max_tokens:
            raise UserError(f'text of {len(tokens)} tokens, at most {max_tokens} are read: "{texts[row][:60]}..."')
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    return ids, mask
