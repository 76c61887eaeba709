"""Tokenizers of published text encoders <-> `tokenizers.Tokenizer`.

`tokenizer.json` is read as it is. Older folders hold CLIP's byte-pair merges (`vocab.json`, `merges.txt`), or T5's
SentencePiece model (`spiece.model`).
"""

import json
import struct
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from subtractive_jax import protobuf
from subtractive_jax.text import T5_TOKENS, special_tokens
from subtractive_jax.weights.published import Published

_CLIP_NAMES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPACE = "\u2581"  # SentencePiece's
_UNIGRAM = 1  # sentencepiece_model.proto, TrainerSpec.ModelType


def read(source: Published, folder: str, model_type: str) -> Tokenizer | None:
    """The tokenizer of a CLIP or T5 folder; None, and a note, where there is none."""
    file = f"{folder}/tokenizer.json"
    where = source.path / folder
    try:
        if source.has(file):
            tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
        elif model_type == "clip_text_model" and source.has(f"{folder}/vocab.json"):
            file = f"{folder}/vocab.json, merges.txt"
            tokenizer = _clip(where)
        elif model_type == "t5" and source.has(f"{folder}/spiece.model"):
            file = f"{folder}/spiece.model"
            tokenizer = _t5((where / "spiece.model").read_bytes())
        else:
            older = "vocab.json and merges.txt" if model_type == "clip_text_model" else "spiece.model"
            source.note(folder, f"no tokenizer (looked for tokenizer.json; {older})")
            return None
    except Exception as error:  # tokenizers raises nothing narrower
        source.note(file, f"damaged ({error})")
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _clip(folder: Path) -> Tokenizer:
    """CLIP's `SimpleTokenizer`, as transformers' `CLIPTokenizer` builds it."""
    model = models.BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=_CLIP_NAMES["eos_token"],
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(set(_CLIP_NAMES.values()), reverse=True))
    return tokenizer


def _t5(proto: bytes) -> Tokenizer:
    """SentencePiece's unigram model (Kudo 2018), from its `ModelProto`."""
    message = [(number, value) for number, _, value in protobuf.fields(memoryview(proto))]
    trainer, normalizer = (
        {number: value for part, body in message if part == spec for number, _, value in protobuf.fields(body)}
        for spec in (2, 3)
    )
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError("a SentencePiece model of another type than unigram")
    pieces = []
    for _, body in (entry for entry in message if entry[0] == 1):
        piece = {number: value for number, _, value in protobuf.fields(body)}
        pieces.append((bytes(piece[1]).decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=trainer.get(40, 0), byte_fallback=False))
    if normalizer.get(2):
        tokenizer.normalizer = normalizers.Precompiled(bytes(normalizer[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    return tokenizer


def special_ids(source: Published, folder: str, tokenizer: Tokenizer, model_type: str) -> dict[str, int]:
    """What `config.text_encoder` says of special tokens: the tokenizer's own ids, whatever the encoder's config says.

    Published CLIP configs name ids that their tokenizers do not have. T5's ids are the same everywhere, and checked.
    """
    if model_type == "t5":
        for name, expected in (("<pad>", T5_TOKENS.pad), ("</s>", T5_TOKENS.end)):
            if tokenizer.token_to_id(name) != expected:
                source.note(folder, f'another tokenizer: "{name}" is {tokenizer.token_to_id(name)}, not {expected}')
        return {}
    names: dict[str, Any] = dict(_CLIP_NAMES)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if source.has(f"{folder}/{file}"):
            names |= {key: value for key, value in (source.config(f"{folder}/{file}") or {}).items() if key in names}
    ids = {}
    for key, name in names.items():
        text = name["content"] if isinstance(name, dict) and "content" in name else name
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is None:
            source.note(folder, f"the {key} {text!r} is not in the tokenizer's vocabulary")
            continue
        ids[f"{key}_id"] = number
    return ids


def write(folder: Path, tokenizer: Tokenizer, text_encoder: ConfigDict, max_text_tokens: int) -> None:
    """The files that transformers' `AutoTokenizer` reads, which then gives the ids that `text.tokenize` gives."""
    folder.mkdir()
    special = special_tokens(text_encoder)
    names = {"eos_token": tokenizer.id_to_token(special.end), "pad_token": tokenizer.id_to_token(special.pad)}
    template, marks = f"$A {names['eos_token']}", [special.end]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if special.begin is not None:
        names |= {"bos_token": tokenizer.id_to_token(special.begin), "unk_token": names["eos_token"]}
        template, marks = f"{names['bos_token']} {template}", [special.begin, *marks]
        config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
        tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(tokenizer.id_to_token(mark), mark) for mark in marks]
    )
    copy.save(str(folder / "tokenizer.json"))
    config |= {"model_max_length": max_text_tokens, **names}
    for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / file).write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")
