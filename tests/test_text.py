"""Texts to ids and states: special tokens, lengths, and the three ways to fill what the denoiser sees."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from subtractive_jax.errors import UserError
from subtractive_jax.text import special_tokens, tokenize, visible

CLIP = ConfigDict(dict(model_type="clip_text_model", bos_token_id=7, eos_token_id=8, pad_token_id=9))


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<unk>": 2, "add": 3, "reggae": 4, "beats": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_t5_ends_with_its_end_token(tokenizer):
    ids, mask = tokenize(tokenizer, ["add reggae beats", ""], 5)
    assert ids.tolist() == [[3, 4, 5, 1, 0], [1, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 4 + [False], [True] + [False] * 4]


def test_clip_stands_between_its_tokens_as_its_config_says(tokenizer):
    ids, mask = tokenize(tokenizer, ["add beats", ""], 5, special_tokens(CLIP))
    assert ids.tolist() == [[7, 3, 5, 8, 9], [7, 8, 9, 9, 9]]
    assert mask.sum(axis=1).tolist() == [4, 2]


def test_special_tokens_count(tokenizer):
    tokenize(tokenizer, ["add reggae beats"], 5, special_tokens(CLIP))
    with pytest.raises(UserError, match="text of 5 tokens, at most 4 are read"):
        tokenize(tokenizer, ["add reggae beats"], 4, special_tokens(CLIP))


def test_what_the_denoiser_sees():
    states, mask = np.ones((1, 3, 2)), np.array([[True, True, False]])
    for padding, kept, seen in (("masked", 3, 2), ("tokens", 3, 3), ("zeros", 2, 3)):
        given, may_look = visible(states, mask, padding)
        assert given.any(axis=-1).sum() == kept and may_look.sum() == seen
    with pytest.raises(UserError, match='did you mean "masked"'):
        visible(states, mask, "mask")
