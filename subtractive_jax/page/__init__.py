"""The listening page: one `index.html` that plays and shows the audio files beside it, offline."""

from subtractive_jax.page.page import Row, write

__all__ = ["Row", "write"]
