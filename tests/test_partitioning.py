"""The mesh, and which device holds what, on eight virtual CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs import minimal, tiny
from subtractive_jax import parts
from subtractive_jax.errors import UserError
from subtractive_jax.training import partitioning, state


@pytest.mark.parametrize(
    ("asked", "shape"),
    [((-1,), (8, 1, 1)), ((4, 2), (4, 2, 1)), ((2, -1), (2, 4, 1)), ((-1, 8), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2))],
)
def test_mesh(asked, shape):
    mesh = partitioning.make_mesh(*asked)
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("asked", [(3, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1), (2, 2, 3)])
def test_impossible_mesh(asked):
    said = "mesh.data={} times mesh.fsdp={} times mesh.tensor={} does not make 8 devices".format(*asked)
    with pytest.raises(UserError, match=said):
        partitioning.make_mesh(*asked)


def test_batch_not_divisible_names_both_numbers():
    with pytest.raises(UserError, match="batch_size=12 is not divisible by the 8 devices of .*; use 16"):
        partitioning.check_batch_size(12, partitioning.make_mesh(-1))
    with pytest.raises(UserError, match="the 4 devices of .* times train.accumulation_steps=3; use 24"):
        partitioning.check_batch_size(16, partitioning.make_mesh(2, 2, 2), 3)


def test_each_row_is_supplied_once():
    sharding = partitioning.batch_sharding(partitioning.make_mesh(4, 2))
    assert partitioning.local_rows(sharding, 16).tolist() == list(range(16))


@pytest.mark.parametrize("part", parts.PARTS)
def test_the_rules_fit_every_part(part):
    mesh = partitioning.make_mesh(4, 2)
    shapes = {part: parts.network(part, tiny.get_config()).shapes()}
    specs = partitioning.shardings(shapes, mesh, partitioning.RULES[part])
    assert any(leaf.spec != PartitionSpec() for leaf in jax.tree.leaves(specs))


def test_named_parameters_and_their_moments_share_a_spec():
    config = minimal.get_config()
    mesh = partitioning.make_mesh(2, 2, 2)
    network, optimizer = parts.network("denoiser", config), state.make_optimizer(config)
    init = state.make_init(
        lambda key, start: {"denoiser": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), network.shapes())},
        optimizer,
        seed=0,
    )
    shardings = partitioning.shardings(jax.eval_shape(init, {}), mesh, partitioning.RULES["denoiser"])
    born = jax.jit(init, out_shardings=shardings)({})
    arrays = {partitioning.path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(born)[0]}

    attention = "down_blocks/1/attentions/0/transformer_blocks/0"
    expected = {
        f"{attention}/attn2/to_k/kernel": PartitionSpec("fsdp", "tensor"),
        f"{attention}/attn1/to_out/0/kernel": PartitionSpec("tensor", "fsdp"),
        f"{attention}/ff/net/0/proj/kernel": PartitionSpec("fsdp", "tensor"),
        f"{attention}/ff/net/2/kernel": PartitionSpec("tensor", "fsdp"),
        f"{attention}/attn1/to_out/0/bias": PartitionSpec(),
        "up_blocks/0/resnets/0/conv1/kernel": PartitionSpec(None, None, "fsdp", None),  # 3 x 3 x 64 x 32: the fallback
        "conv_in/kernel": PartitionSpec(),  # small
        "stem_embedding/embedding": PartitionSpec(),
    }
    for name, spec in expected.items():
        holders = [path for path in arrays if path.endswith(f"denoiser/{name}")]
        assert len(holders) == 4, holders  # params, ema, first and second moment
        for path in holders:
            assert arrays[path].sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), arrays[path].ndim), (
                path,
                arrays[path].sharding,
            )
    kernel = arrays["params/denoiser/up_blocks/0/resnets/0/conv1/kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, kernel.shape[2] // 2, kernel.shape[3])


def test_a_rule_without_a_parameter_and_an_axis_that_does_not_divide():
    mesh = partitioning.make_mesh(2, 4)
    tree = {"a": {"kernel": jnp.zeros((6, 8))}}
    with pytest.raises(UserError, match='"b/kernel" matches no parameter'):
        partitioning.shardings(tree, mesh, [("b/kernel", PartitionSpec())])
    with pytest.raises(UserError, match="6 is not divisible by mesh.fsdp=4"):
        partitioning.shardings(tree, mesh, [("a/kernel", PartitionSpec("fsdp", None))])


def test_large_arrays_fall_back_to_their_largest_divisible_axis():
    mesh = partitioning.make_mesh(2, 4)
    for shape, spec in (
        ((127, 2**10), PartitionSpec(None, "fsdp")),
        ((2**10, 127), PartitionSpec("fsdp", None)),
        ((1025, 64), PartitionSpec(None, "fsdp")),
        ((1025, 127), PartitionSpec()),
        ((64, 64), PartitionSpec()),
    ):
        assert partitioning.partition_spec("x", shape, mesh, ()) == spec, shape
    assert np.prod((64, 64)) < partitioning.MIN_SHARDED_SIZE
