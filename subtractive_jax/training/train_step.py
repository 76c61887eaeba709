"""One optimizer update, and one evaluation: pure functions of (state, batch)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtractive_jax.models.network import Params
from subtractive_jax.training.state import State, trained

Batch = dict[str, jax.Array]  # [B, ...] each; `row` [B] int32 seeds the example's noise, `valid` [B] marks padding

# `loss(params, batch, step, train)` -> loss [B], and figures with their weights: name -> ([B], [B]).
Figures = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Params, Batch, jax.Array, bool], tuple[jax.Array, Figures]]

# Weighted sums, which add up over batches: name -> (sum, sum of weights).
Sums = dict[str, tuple[jax.Array, jax.Array]]


def _sums(loss: jax.Array, figures: Figures, valid: jax.Array) -> Sums:
    weighted = {"loss": (loss, jnp.ones_like(loss)), **figures}
    return {
        name: (jnp.sum(jnp.where(valid, value * weight, 0.0)), jnp.sum(jnp.where(valid, weight, 0.0)))
        for name, (value, weight) in weighted.items()
    }


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, ema_decay: float, only: Sequence[str] = ()
) -> Callable[[State, Batch], tuple[State, Sums]]:
    """`step(state, batch) -> (state, sums)`; the loss sees `state["step"]`, from which all randomness follows.

    Args:
      only: prefixes of the parameters that learn; no gradient is computed for the others. Empty: all learn.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Sums]:
        def mean_loss(params: Params) -> tuple[jax.Array, Sums]:
            params = jax.tree.map(
                lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf), params, trained(params, only)
            )
            loss, figures = loss_fn(params, batch, state["step"], True)
            return loss.mean(), _sums(loss, figures, batch["valid"])

        gradients, sums = jax.grad(mean_loss, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        # Early on the average is over the steps so far, not over the initial values (as in timm and diffusers).
        decay = jnp.minimum(ema_decay, (1.0 + state["step"]) / (10.0 + state["step"]))
        ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), state["ema"], params)
        sums["grad_norm"] = (optax.tree.norm(gradients), jnp.ones(()))
        return dict(params=params, ema=ema, opt_state=opt_state, step=state["step"] + 1), sums

    return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Batch], Sums]:
    """`step(params, batch) -> sums` over the valid examples; randomness is that of step 0 and of each example's row."""

    def eval_step(params: Params, batch: Batch) -> Sums:
        loss, figures = loss_fn(params, batch, jnp.zeros((), jnp.int32), False)
        return _sums(loss, figures, batch["valid"])

    return eval_step


def means(sums: list[dict[str, Any]]) -> dict[str, float]:
    """Host-side averages over many steps' sums; a figure without weight is left out."""
    averages = {}
    for name in sums[0]:
        value, weight = (float(sum(step[name][i] for step in sums)) for i in (0, 1))
        if weight > 0:
            averages[name] = value / weight
    return averages
