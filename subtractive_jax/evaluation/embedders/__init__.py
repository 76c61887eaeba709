"""Networks that turn recordings into the embeddings and class logits that distances are measured on."""

import functools
from collections.abc import Callable
from pathlib import Path

from subtractive_jax.errors import unknown_name
from subtractive_jax.evaluation.embedders import clap, musicnn, panns, vggish
from subtractive_jax.evaluation.embedders.embedding import Embedder, Embedding

__all__ = ["EMBEDDERS", "Embedder", "Embedding", "load_embedder"]

EMBEDDERS: dict[str, Callable[[Path | None], Embedder]] = {
    musicnn.NAME: musicnn.load,
    vggish.NAME: vggish.load,
    panns.NAME: panns.load,
    clap.NAME: clap.load,
}


@functools.cache
def load_embedder(name: str, weights: Path | None = None) -> Embedder:
    """The embedder of this name, with its weights.

    Args:
      weights: what `launch.convert` wrote with --output; where it writes without, when None.

    Raises:
      UserError: the name is unknown, or the weights are not there or not its own.
    """
    if name not in EMBEDDERS:
        raise unknown_name("embedder", name, EMBEDDERS)
    return EMBEDDERS[name](weights)
