"""One optimizer update, and one evaluation: pure functions of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtractive_jax.models.network import Params

State = dict[str, Any]  # params, ema (like params), opt_state, step (int32 scalar: updates done)
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
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    learns: Callable[[Params], Any] = lambda params: jax.tree.map(lambda _: True, params),
    accumulation_steps: int = 1,
    unroll: bool = True,
) -> Callable[[State, Batch], tuple[State, Sums]]:
    """`step(state, batch) -> (state, sums)`; the loss sees `state["step"]`, from which all randomness follows.

    Args:
      learns: which parameters learn, as a tree of bools; no gradient is computed for the others.
      accumulation_steps: parts of the batch whose gradients are computed one after the other and averaged.
      unroll: whether the parts are written out, or computed in a loop.
    """

    def gradients_of(params: Params, batch: Batch, step: jax.Array) -> tuple[Params, Sums]:
        def mean_loss(params: Params) -> tuple[jax.Array, Sums]:
            params = jax.tree.map(
                lambda leaf, learns: leaf if learns else jax.lax.stop_gradient(leaf), params, learns(params)
            )
            loss, figures = loss_fn(params, batch, step, True)
            return loss.mean(), _sums(loss, figures, batch["valid"])

        return jax.grad(mean_loss, has_aux=True)(params)

    def accumulated(params: Params, batch: Batch, step: jax.Array) -> tuple[Params, Sums]:
        # Every device keeps its rows: part i takes each n-th row.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: tuple[Params, Sums], part: Batch) -> tuple[tuple[Params, Sums], None]:
            return jax.tree.map(jnp.add, total, gradients_of(params, part, step)), None

        first, rest = (jax.tree.map(lambda x, i=i: x[i], parts) for i in (0, slice(1, None)))
        (gradients, sums), _ = jax.lax.scan(add, gradients_of(params, first, step), rest, unroll=unroll)
        return jax.tree.map(lambda leaf: leaf / accumulation_steps, gradients), sums

    def train_step(state: State, batch: Batch) -> tuple[State, Sums]:
        compute = gradients_of if accumulation_steps == 1 else accumulated
        gradients, sums = compute(state["params"], batch, state["step"])
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
    for name in sums[0] if sums else ():
        value, weight = (float(sum(step[name][i] for step in sums)) for i in (0, 1))
        if weight > 0:
            averages[name] = value / weight
    return averages
