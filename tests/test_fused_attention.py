"""Attention by the TPU's kernel, interpreted, against the plain formula, with gradients; and which device gets what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from subtractive_jax.errors import UserError
from subtractive_jax.models.fused_attention import attend, attend_on_tpu
from subtractive_jax.training import partitioning

TOLERANCE = 1e-5  # of the largest value, float32


def _draw(batch, length, keys, heads, features, dtype=np.float32):
    draw = np.random.default_rng()
    return [
        draw.standard_normal((batch, count, heads, features), np.float32).astype(dtype)
        for count in (length, keys, keys, length)
    ]


def _with_gradients(attention, q, k, v, d_output):
    def run(q, k, v):
        y, gradients = jax.vjp(attention, q, k, v)
        return y, *gradients(d_output)

    return jax.jit(run)(q, k, v)


def _plain(mask=None):
    mask = None if mask is None else mask[:, None, None]
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask)


def _interpreted(mask=None):
    return lambda q, k, v: attend_on_tpu(q, k, v, mask, interpret=True)


def _assert_equal(ours, expected):
    for name, got, value in zip(("output", "dq", "dk", "dv"), ours, expected, strict=False):
        np.testing.assert_allclose(got, value, rtol=0, atol=TOLERANCE * jnp.abs(value).max(), err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "masked"),
    [
        ((2, 256, 256, 2, 40), False),  # blocks of 256
        ((1, 200, 1024, 1, 24), False),  # padded queries, two blocks of keys
        ((2, 100, 78, 2, 16), False),  # padded queries and keys
        ((3, 128, 78, 2, 8), True),
    ],
)
def test_kernel_is_the_formula(sizes, masked):
    arrays = _draw(*sizes)
    mask = np.arange(sizes[2]) < np.random.default_rng().integers(1, sizes[2], (sizes[0], 1)) if masked else None
    _assert_equal(_with_gradients(_interpreted(mask), *arrays), _with_gradients(_plain(mask), *arrays))


@pytest.mark.parametrize("masked", [False, True])
def test_kernel_on_a_mesh(masked):
    arrays, mask = _draw(4, 128, 128, 4, 16), np.arange(128) < np.array([[128], [3], [77], [1]]) if masked else None
    mesh = partitioning.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        ours = _with_gradients(_interpreted(mask), *arrays)
    _assert_equal(ours, _with_gradients(_plain(mask), *arrays))


def test_kernel_where_each_device_is_at_its_own_part():
    """As in sampling, which maps whole networks over the devices."""
    arrays, split = _draw(2, 128, 128, 1, 8), PartitionSpec("windows")
    mesh = jax.make_mesh((2,), ("windows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(_interpreted(), mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)
    _assert_equal([jax.jit(mapped)(*arrays[:3])], [_plain()(*arrays[:3])])


def test_heads_that_do_not_divide():
    q, k, v, _ = _draw(1, 128, 128, 3, 8)
    with (
        jax.set_mesh(partitioning.make_mesh(-1, 1, 2)),
        pytest.raises(UserError, match=r"mesh.tensor=2 does not divide the denoiser's 3 attention heads"),
    ):
        attend_on_tpu(q, k, v, interpret=True)


@pytest.mark.parametrize(("keys", "kernels"), [(4096, 2), (1000, 2), (77, 0)])
def test_tpu_gets_its_kernel_for_long_sequences(keys, kernels):
    """Lowered on this machine for a TPU, forward and backward."""
    tpu = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((4, 2, 2), partitioning.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=tpu)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _draw(8, keys, keys, 8, 40, jnp.bfloat16)]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *arrays: _with_gradients(attend, *arrays)).trace(*shapes)
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == kernels


@pytest.mark.parametrize("keys", [512, 78])
def test_cpu_keeps_to_the_formula(keys):
    arrays = _draw(2, 512, keys, 2, 24)
    _assert_equal(_with_gradients(attend, *arrays), _with_gradients(_plain(), *arrays))
