"""Compiled programs read, and their times predicted: by hand, and against programs of the TPU's own compiler."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from subtractive_jax.chips import CHIPS
from subtractive_jax.cost import aot, hlo, roofline, timeline
from subtractive_jax.models.fused_attention import attend_on_tpu
from subtractive_jax.training import partitioning

MIB = 2**20
V5E = CHIPS["v5e"]
LINK = V5E.ici_bandwidth / 4
SQUARE = roofline.Slice(V5E, [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)])

# A loop of three turns with a product of two 1024 x 1024 matrices and an all-reduce of two chips; then a copy and an
# all-gather of four chips, both beside a product that the copy's end must wait for. S(1) is VMEM.
TEXT = """HloModule step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %state = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"15000"}
  %z = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} all-reduce(%y), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %next = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) tuple(%i, %z)
}

%condition (state: (s32[], bf16[1024,1024])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %state = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%start (part: bf16[512,1024]) -> (bf16[512,1024], bf16[2048,1024], u32[]) {
  %part = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gathered = bf16[2048,1024]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %begun = (bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%done (part: bf16[512,1024]) -> bf16[2048,1024] {
  %part = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gathered = bf16[2048,1024]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %ended = bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(%gathered), custom_call_target="AsyncCollectiveDone"
}

%slicing (whole: bf16[64,1024,1024], at: s32[]) -> bf16[1,1024,1024] {
  %whole = bf16[64,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  ROOT %row = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%whole, %at, %at, %at), dynamic_slice_sizes={1,1024,1024}
}

ENTRY %main (x: bf16[1024,1024], whole: bf16[64,1024,1024], i: s32[]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[64,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %state = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) tuple(%i, %x)
  %loop = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) while(%state), condition=%condition, body=%body
  %y = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %copy = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%y)
  %part = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %begun = (bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%part), kind=kCustom, calls=%start
  %row = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} fusion(%whole, %i), kind=kLoop, calls=%slicing
  %copied = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy)
  %u = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%copied, %copied), dim_labels=bf_io->bf
  %v = bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%part), kind=kCustom, calls=%done
  ROOT %out = bf16[1024,1024]{1,0:T(8,128)(2,1)} copy(%u)
}
"""  # noqa: E501


def test_a_program_by_hand() -> None:
    program = timeline.read(TEXT)
    assert program.unknown_loops == 0 and not program.silent_kernels
    found = roofline.predict(program, SQUARE)

    assert found.flops == 4 * 2 * 1024**3  # three in the loop, one after
    # In the loop the product reads x; then the copy reads y, the fusion reads a row of `whole`, and `out` is written.
    assert found.hbm_bytes == (3 + 1 + 1 + 1) * 2 * MIB
    all_gather, all_reduce = found.collectives
    assert (all_gather.kind, all_gather.group, all_gather.count) == ("all-gather", 4, 1)
    assert (all_gather.operand_bytes, all_gather.moved_bytes) == (MIB, 3 * MIB)
    assert (all_reduce.kind, all_reduce.group, all_reduce.count) == ("all-reduce", 2, 3)
    assert (all_reduce.operand_bytes, all_reduce.moved_bytes) == (3 * 2 * MIB, 3 * 2 * MIB)

    product, transfer = 2 * 1024**3 / V5E.flops, 2 * MIB / V5E.hbm_bandwidth
    reduce, gather = 2 * MIB / LINK, 3 * MIB / (2 * LINK)  # a pair has one link, the corner of a square two
    turn = max(product, transfer) + reduce
    # The gather begins beside the copy; the row's read and the product fit beside it.
    assert 2 * transfer + product < gather
    assert found.replay == pytest.approx(3 * turn + gather + transfer)
    assert found.exposed == pytest.approx(3 * reduce + gather - 2 * transfer - product)
    assert found.arithmetic == pytest.approx(4 * product)
    assert found.memory == pytest.approx(6 * transfer)
    assert found.interconnect == pytest.approx(3 * reduce + gather)
    assert found.lower == found.interconnect < found.replay < found.upper
    cycles = 15_000 / V5E.clock
    assert found.compiler == pytest.approx(3 * (cycles + reduce) + gather + transfer)


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups={}", tuple(range(8))),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ],
)
def test_groups_in_every_notation(groups: str, expected: tuple[int, ...]) -> None:
    text = f"""HloModule m, num_partitions=8
ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %y = f32[8,128]{{1,0:T(8,128)}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    module = hlo.Module(text)
    assert hlo.first_group(module.entry["y"], module.partitions) == expected


@pytest.mark.parametrize(
    "kind, moved", [("all-gather", 3.0), ("reduce-scatter", 0.75), ("all-reduce", 1.5), ("all-to-all", 0.75)]
)
def test_bytes_of_the_ring_algorithms(kind: str, moved: float) -> None:
    assert timeline.Collective(kind, 1000, (0, 1, 2, 3)).moved_bytes == pytest.approx(1000 * moved)


def test_links_of_lines_rings_and_planes() -> None:
    pod = roofline.Slice(V5E, [(x, y, 0) for x in range(16) for y in range(16)])

    def bandwidth(on: roofline.Slice, group: range) -> float:
        collective = timeline.Collective("all-gather", 10**9, tuple(group))
        return collective.moved_bytes / on.seconds(collective)

    assert bandwidth(pod, range(16)) == pytest.approx(2 * LINK)  # one dimension of 16 closes to a ring
    assert bandwidth(pod, range(8)) == pytest.approx(LINK)  # half of it does not
    assert bandwidth(pod, range(256)) == pytest.approx(4 * LINK)
    assert bandwidth(SQUARE, range(2)) == pytest.approx(LINK)
    assert bandwidth(SQUARE, range(4)) == pytest.approx(2 * LINK)
    small = timeline.Collective("all-reduce", 4, tuple(range(256)))
    assert pod.seconds(small) == pytest.approx(16e-6)  # eight hops each way


def test_padding_and_loops_that_cannot_be_read() -> None:
    (array,) = (
        hlo.Module(
            "ENTRY %main () -> bf16[10,3,200] {\n  ROOT %x = bf16[10,3,200]{2,1,0:T(8,128)(2,1)} parameter(0)\n}\n"
        )
        .entry["x"]
        .arrays
    )
    assert array.nbytes == 10 * 8 * 256 * 2 and array.in_hbm
    unknown = TEXT.replace("constant(3)", "parameter(1)")
    assert timeline.read(unknown).unknown_loops == 1


def test_flops_of_a_convolution_leave_out_its_padding() -> None:
    module = hlo.Module("""HloModule m
ENTRY %main (x: bf16[2,32,32,128], k: bf16[3,3,128,256]) -> bf16[2,16,16,256] {
  %x = bf16[2,32,32,128]{3,2,1,0} parameter(0)
  %k = bf16[3,3,128,256]{3,2,1,0} parameter(1)
  ROOT %y = bf16[2,16,16,256]{3,2,1,0} convolution(%x, %k), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f
}
""")  # noqa: E501
    taps = 16 * 3 - 1  # along an axis, the last of 16 positions misses one of 3
    assert hlo.convolution_flops(module.entry["y"], module.entry) == 2 * 2 * taps**2 * 128 * 256


# The rest is compiled for a slice of four v5e.


@functools.cache
def _mesh() -> Mesh:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra tpu)")
    return Mesh(np.array(aot.topology("v5e:2x2").devices), ("x",))


def _array(shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(_mesh(), PartitionSpec(*spec)))


def _read(function: Any, *arguments: jax.ShapeDtypeStruct) -> roofline.Prediction:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text
    return roofline.predict(timeline.read(text), roofline.Slice(V5E, [d.coords for d in _mesh().devices.flat]))


def test_bytes_of_a_sum() -> None:
    array = _array((16 * MIB,), jnp.float32)
    assert _read(jnp.add, array, array).hbm_bytes == 3 * 64 * MIB


def test_flops_of_a_scan_and_its_gradient() -> None:
    def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0].astype(jnp.float32).sum()

    w, x = _array((512, 512), jnp.bfloat16), _array((1024, 512), jnp.bfloat16, "x")
    assert _read(jax.grad(scanned), w, x).flops == 3 * 5 * 2 * 256 * 512 * 512  # of the 256 rows of a chip


def test_flops_are_those_of_xla_where_there_are_no_loops() -> None:
    def convolved(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    kernel, x = _array((3, 3, 128, 256), jnp.bfloat16), _array((8, 32, 32, 128), jnp.bfloat16, "x")
    compiled = jax.jit(convolved).lower(kernel, x).compile()
    text, costs = compiled.as_text(), compiled.cost_analysis()
    assert text and costs
    (products,) = (event.flops for event, _ in timeline.read(text).walk() if event.flops)
    assert products == pytest.approx(costs["flops"], rel=0.01)  # which counts additions too


def test_collectives_of_known_sizes() -> None:
    @functools.partial(
        jax.shard_map, mesh=_mesh(), in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False
    )
    def communicate(x: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(x, "x", tiled=True)  # 1 MiB each
        part = jax.lax.psum_scatter(jnp.sin(whole), "x", tiled=True)
        return jax.lax.psum(jnp.cos(part), "x") * jax.lax.ppermute(part, "x", [(0, 1), (1, 0)])

    found = _read(communicate, _array((4 * 256, 1024), jnp.float32, "x"))
    given = {traffic.kind: traffic.operand_bytes for traffic in found.collectives}
    assert given == {
        "all-gather": MIB,
        "reduce-scatter": 4 * MIB,
        "all-reduce": MIB,
        "collective-permute": MIB,
    }


@pytest.mark.parametrize("said", [None, 123_456])
def test_kernels_count_what_they_say(said: int | None) -> None:
    estimate = None if said is None else pl.CostEstimate(flops=said, bytes_accessed=0, transcendentals=0)

    def double(x: Any, y: Any) -> None:
        y[...] = 2 * x[...]

    @functools.partial(
        jax.shard_map, mesh=_mesh(), in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False
    )
    def run(x: jax.Array) -> jax.Array:
        return pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=estimate)(x)

    text = jax.jit(run).lower(_array((4 * 256, 128), jnp.float32, "x")).compile().as_text()
    assert text
    program = timeline.read(text)
    assert math.fsum(event.flops for event, _ in program.walk()) == (said or 0)
    assert program.silent_kernels == ({"tpu_custom_call": 1} if said is None else {})


@pytest.mark.parametrize("batch", [4, 8])
def test_fused_attention_is_counted(batch: int) -> None:
    length, heads, features = 512, 2, 40
    mesh = partitioning.make_mesh(4, devices=list(_mesh().devices))
    x = jax.ShapeDtypeStruct(
        (batch, length, heads, features), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend_on_tpu(q, k, v).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    assert text
    program = timeline.read(text)
    # Forward two products of queries and keys; backward five, since the scores are computed again.
    products = sum(event.flops for event, _ in program.walk() if event.kernel)
    assert products == (2 + 5) * 2 * batch // 4 * heads * length**2 * features
    assert not program.silent_kernels
