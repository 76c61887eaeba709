"""Subtractive training: a text-conditioned latent diffusion model that puts a removed stem back into its song."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subtractive_jax.model import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # imports JAX, which programs configure first
        from subtractive_jax.model import load

        return load
    raise AttributeError(f'module "{__name__}" has no attribute "{name}"')
