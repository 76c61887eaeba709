"""A task on a mesh: its state's shardings and its compiled steps, for the loop and for `launch.compile` alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from subtractive_jax.models.network import Params
from subtractive_jax.training import lora, partitioning
from subtractive_jax.training import state as training_state
from subtractive_jax.training.stage import Task
from subtractive_jax.training.train_step import Batch, Figures, make_eval_step, make_train_step

_BOOKKEEPING = {  # of every batch: the row seeds an example's randomness, invalid examples fill up the last batch
    "row": jax.ShapeDtypeStruct((), np.int32),
    "valid": jax.ShapeDtypeStruct((), np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Steps:
    """What `build` returns.

    Attributes:
      abstract: the state as `jax.ShapeDtypeStruct`s with shardings.
      batch: a global batch, likewise.
      init: `init(start) -> state`, born sharded.
      train: `train(state, batch) -> (state, sums)`; the state that goes in is used up.
      evaluate: `evaluate(params, batch) -> sums`, for `state["params"]` or `state["ema"]`.
    """

    abstract: training_state.State
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Any
    train: Any
    evaluate: Any


def build(config: ml_collections.ConfigDict, task: Task, mesh: Mesh, start: Params) -> Steps:
    """The steps of `task`, with adapters if `config.train.lora` asks for them.

    Args:
      start: the parent's parameters to start from, or their shapes; may be empty.

    Raises:
      UserError: a batch that does not split over the mesh, a partition rule or an optimizer setting that does not fit.
    """
    train = config.train
    partitioning.check_batch_size(train.batch_size, mesh, train.accumulation_steps)
    init_params = task.init_params
    if train.lora.rank:
        init_params = lora.with_adapters(init_params, task.part, train.lora, config.seed)
    optimizer = training_state.make_optimizer(config, task.frozen)
    init = training_state.make_init(init_params, optimizer, config.seed)
    abstract = jax.eval_shape(init, start)
    shardings = partitioning.shardings(abstract, mesh, partitioning.RULES[task.part])
    batch_sharding, replicated = partitioning.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    dtype = "float32" if task.part == "text_encoder" else config.compute_dtype  # T5 and CLIP compute in float32 always

    def loss(params: Params, batch: Batch, step: jax.Array, training: bool) -> tuple[jax.Array, Figures]:
        if train.lora.rank:
            params = lora.merge(params, train.lora)
        specs = {entry: shardings["params"][entry] for entry in params}
        return task.loss(partitioning.gather(params, specs, dtype), batch, step, training)

    def on_mesh(step: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # fused attention is mapped over it by hand
                return step(*arguments)

        return traced

    train_step = make_train_step(
        loss,
        optimizer,
        train.ema_decay,
        lambda params: training_state.learns(params, train, task.frozen),
        train.accumulation_steps,
        unroll=mesh.devices.flat[0].platform == "cpu",  # XLA's CPU convolutions are slow in loops
    )

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return Steps(
        abstract=jax.tree.map(placed, abstract, shardings),
        batch={
            name: jax.ShapeDtypeStruct((train.batch_size, *leaf.shape), leaf.dtype, sharding=batch_sharding)
            for name, leaf in (task.example | _BOOKKEEPING).items()
        },
        init=jax.jit(init, out_shardings=shardings),
        train=jax.jit(
            on_mesh(train_step),
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            on_mesh(make_eval_step(loss)),
            in_shardings=(shardings["params"], batch_sharding),
            out_shardings=replicated,
        ),
    )
