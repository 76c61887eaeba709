"""Hashes that tie a dataset to the models that encoded it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def params_hash(params: Mapping[str, Any]) -> str:
    """SHA-256 of a parameter tree: sorted paths, shapes and float32 bytes.

    The same values give the same hash whether they were stored in float16, bfloat16 or float32.
    """
    digest = hashlib.sha256()
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    for path in sorted(leaves):
        array = np.ascontiguousarray(np.asarray(leaves[path]), dtype=np.float32)
        digest.update(f"{path}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def dataset_hash(
    representation: Mapping[str, Any], autoencoder_hash: str, text_encoder_hash: str, schema_version: int | str
) -> str:
    """The `config_hash` of a `latents` dataset: everything its arrays depend on besides the audio and the texts."""
    parts = [dict(representation), autoencoder_hash, text_encoder_hash, schema_version]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
