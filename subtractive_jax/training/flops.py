"""Floating-point operations of a model, counted where JAX traces it: those of the algorithm, on whatever device.

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) is the share of the devices' peak that the model
FLOPs of training reach; what is computed again to save memory is not among them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from subtractive_jax.training.partitioning import AXES
from subtractive_jax.training.train_step import LossFn

_CPU = AbstractMesh(
    (1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=AbstractDevice("cpu", None, "cpu")
)


def of_step(loss: LossFn, params: Any, batch: Any, train: Any) -> int:
    """Model FLOPs of a training step: those of the loss, and twice as many for the gradient.

    Where only some parameters learn, the gradient counts once: their share of the rest is left out.

    Args:
      params: of the loss, as arrays or shapes; `batch` likewise, over all devices.
      train: `config.train`.
    """
    unplaced = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, batch))
    with jax.sharding.use_abstract_mesh(_CPU):  # where attention is made of products that can be counted
        forward = count(lambda params, batch: loss(params, batch, jnp.zeros((), jnp.int32), True), *unplaced)
    return (2 if train.only or train.lora.rank else 3) * forward


def count(function: Callable[..., Any], *arguments: Any) -> int:
    """Two for each multiply-add of the matrix products and convolutions that `function(*arguments)` needs.

    Convolutions are counted without the zeros of padding and dilation. Of a branch (`lax.cond`,
    `lax.platform_dependent`) the costliest counts; a Pallas kernel and cuDNN's attention count nothing.

    Args:
      function: anything that JAX can trace; nothing is compiled or allocated.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`s, of all devices together.

    Raises:
      ValueError: matrix products in a loop whose length is not known.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
    total, needed = 0, {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            total += _of_equation(equation)
            needed.update(id(variable) for variable in equation.invars)
    return total


def _of_equation(equation: core.JaxprEqn) -> int:
    match equation.primitive.name:
        case "dot_general":
            return _of_dot(equation)
        case "conv_general_dilated":
            return _of_convolution(equation)
        case "pallas_call":
            return 0
    params = equation.params
    parts = [_of_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
    match equation.primitive.name:
        case "cond":
            return max(parts)
        case "scan":
            return params["length"] * sum(parts)
        case "while":
            if any(parts):
                raise ValueError("matrix products in a while loop: how many cannot be told; use lax.scan")
            return 0
        case "shard_map":  # shapes inside are one shard's; devices along axes that split nothing do the same work
            splitting = {
                axis
                for spec in (*params["in_specs"], *params["out_specs"])
                for axes in spec
                for axis in (axes if isinstance(axes, tuple) else (axes,))
                if axis is not None
            }
            return math.prod(params["mesh"].shape[axis] for axis in splitting) * sum(parts)
    return sum(parts)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _of_dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    x, y = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(y) * math.prod(x[axis] for axis in contracted)


def _of_convolution(equation: core.JaxprEqn) -> int:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    x, kernel, y = map(_shape, (*equation.invars, *equation.outvars))
    # The kernel's input axis is one group's; a group of the batch makes its own output features.
    per_position = 2 * y[numbers.out_spec[0]] * y[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    space = zip(
        (x[axis] for axis in numbers.lhs_spec[2:]),
        (kernel[axis] for axis in numbers.rhs_spec[2:]),
        (y[axis] for axis in numbers.out_spec[2:]),
        params["window_strides"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        (low for low, _ in params["padding"]),
        strict=True,
    )
    return per_position * math.prod(_products(*axis) for axis in space)


@functools.cache
def _products(inputs: int, taps: int, outputs: int, stride: int, dilation: int, tap_dilation: int, low: int) -> int:
    """Pairs of an output and a kernel tap along one axis that meet an input, not a zero."""
    few, many = sorted(((outputs, stride), (taps, tap_dilation)))
    positions = many[1] * np.arange(many[0]) - low
    return sum(
        int(np.count_nonzero((at >= 0) & (at <= (inputs - 1) * dilation) & (at % dilation == 0)))
        for at in (positions + few[1] * number for number in range(few[0]))
    )
