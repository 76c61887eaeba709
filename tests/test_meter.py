"""What a training costs: FLOPs against XLA's own count and published ones; measures of the loop; a trace."""

import functools
import gzip
import io
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from configs import riffusion
from subtractive_jax import chips, parts
from subtractive_jax.training import flops, latent_stages, meter, profile
from tests import worlds

_float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def _xla_counts(function, *arguments) -> int:
    return int(jax.jit(function).lower(*arguments).cost_analysis()["flops"])


def _convolution(x, kernel, groups=1, batch_groups=1, **settings):
    space = "HW"[-(len(x) - 2) :]
    names = (f"N{space}C", f"{space}IO", f"N{space}C")

    def function(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            dimension_numbers=names,
            feature_group_count=groups,
            batch_group_count=batch_groups,
            **settings,
        )

    return function, _float32(x), _float32(kernel)


_SAME = ((1, 1), (1, 1))
_CONVOLUTIONS = {
    "plain": _convolution((2, 9, 10, 4), (3, 3, 4, 6), window_strides=(1, 1), padding=_SAME),
    "strided": _convolution((2, 9, 10, 4), (3, 3, 4, 6), window_strides=(2, 2), padding=((0, 1), (0, 1))),
    "transposed": _convolution((2, 20, 4), (11, 4, 6), window_strides=(1,), padding=((8, 7),), lhs_dilation=(5,)),
    "dilated": _convolution((2, 40, 4), (3, 4, 6), window_strides=(1,), padding=((5, 5),), rhs_dilation=(5,)),
    "grouped": _convolution((2, 9, 10, 8), (3, 3, 2, 12), 4, window_strides=(1, 1), padding=_SAME),
    "batch groups": _convolution((6, 9, 10, 4), (3, 3, 4, 9), 1, 3, window_strides=(1, 1), padding=_SAME),
}


@pytest.mark.parametrize("name", _CONVOLUTIONS)
def test_convolutions_count_as_in_xla(name):
    function, *arguments = _CONVOLUTIONS[name]
    assert flops.count(function, *arguments) == _xla_counts(function, *arguments)


def test_a_convolution_by_hand():
    # Each axis of 5 meets 3 taps of 3, but for the 2 at the borders: 13 pairs. 2 FLOPs, 2 images, 3 to 7 channels.
    function, *arguments = _convolution((2, 5, 5, 3), (3, 3, 3, 7), window_strides=(1, 1), padding=_SAME)
    assert flops.count(function, *arguments) == 2 * 2 * 13 * 13 * 3 * 7


def test_the_gradient_of_a_convolution_costs_twice_the_convolution():
    convolve, x, kernel = _CONVOLUTIONS["strided"]
    dy = jax.eval_shape(convolve, x, kernel)
    gradient = flops.count(lambda x, kernel, dy: jax.vjp(convolve, x, kernel)[1](dy), x, kernel, dy)
    assert gradient == 2 * flops.count(convolve, x, kernel)


def _loop(length, body):
    return lambda x: jax.lax.scan(lambda carry, _: (body(carry), None), x, length=length)[0]


def _square(x):
    return x @ x


_PRODUCT = 2 * 8 * 8 * 8
_TRACED = {
    "product": (_square, 1),
    "batch": (lambda x: jnp.einsum("bij,bjk->bik", jnp.stack([x] * 3), jnp.stack([x] * 3)), 3),
    "jit": (jax.jit(_square), 1),
    "remat": (jax.checkpoint(_square), 1),
    "scan": (_loop(5, _loop(3, _square)), 15),
    "fori_loop": (lambda x: jax.lax.fori_loop(0, 4, lambda _, y: y @ y, x), 4),
    "map": (lambda x: jax.lax.map(_square, jnp.stack([x] * 6)), 6),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, _square, lambda y: y @ y @ y, x), 2),
    "platforms": (lambda x: jax.lax.platform_dependent(x, cpu=_loop(2, _square), default=lambda y: y), 2),
    "unused": (lambda x: (x @ x, x + 1)[1], 0),
    "loop without products": (lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y + 1, x) @ x, 1),
}


@pytest.mark.parametrize("name", _TRACED)
def test_what_jax_wraps_is_counted(name):
    function, products = _TRACED[name]
    assert flops.count(function, _float32((8, 8))) == products * _PRODUCT


def _train(rank=0, only=()):
    return types.SimpleNamespace(only=only, lora=types.SimpleNamespace(rank=rank))


def test_a_step_costs_three_times_its_loss_or_twice_where_few_learn():
    def loss(params, batch, step, train):
        return jnp.square(jax.nn.relu(batch["x"] @ params[0]) @ params[1]).mean(axis=1), {}

    def gradient(params, batch):
        return jax.grad(lambda *both: loss(*both, 0, True)[0].mean(), argnums=(0, 1))(params, batch)

    params, batch = _float32((2, 8, 8)), dict(x=_float32((8, 8)))
    counted = flops.of_step(loss, params, batch, _train())
    assert counted == 3 * 2 * _PRODUCT == flops.count(gradient, params, batch)
    assert flops.of_step(loss, params, batch, _train(rank=4)) == 2 * 2 * _PRODUCT
    assert flops.of_step(loss, params, batch, _train(only=("conv_in",))) == 2 * 2 * _PRODUCT


def test_a_diffusion_step_is_counted_without_data():
    config = worlds.small_config()
    task = latent_stages.task(config)
    params = jax.eval_shape(
        task.init_params, jax.random.key(0), dict(denoiser=parts.network("denoiser", config).shapes())
    )

    def cost(batch_size):
        batch = dict(task.example, row=jax.ShapeDtypeStruct((), jnp.int32), valid=jax.ShapeDtypeStruct((), bool))
        batch = {name: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype) for name, leaf in batch.items()}
        return flops.of_step(task.loss, params, batch, config.train)

    assert cost(8) == 4 * cost(2) > 1e6


def test_shards_add_up_and_copies_do_not():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    split, whole = PartitionSpec("data"), PartitionSpec()
    product = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(split, whole), out_specs=split)
    assert flops.count(product, _float32((8, 8)), _float32((8, 8))) == _PRODUCT


def test_an_unknown_number_of_products_is_an_error():
    with pytest.raises(ValueError, match="while loop"):
        flops.count(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, _square, x), _float32((8, 8)))


def test_stable_diffusion_costs_what_is_published():
    config = riffusion.get_config()
    network = parts.network("base_denoiser", config)
    examples = 2
    total = flops.count(
        network.apply,
        network.shapes(),
        _float32((examples, 64, 64, 4)),
        jax.ShapeDtypeStruct((examples,), jnp.int32),
        _float32((examples, config.max_text_tokens, 768)),
        jax.ShapeDtypeStruct((examples, config.max_text_tokens), bool),
    )
    # Profilers count 339 GMAC (Kim et al. 2023, "BK-SDM"): without attention's products, with the zeros of padding.
    attention = sum(
        2 * blocks * (tokens**2 + tokens * config.max_text_tokens) * channels
        for blocks, tokens, channels in ((5, 4096, 320), (5, 1024, 640), (5, 256, 1280), (1, 64, 1280))
    )
    padding = 0.032
    assert (1 + padding) * (total / examples / 2 - attention) == pytest.approx(339e9, rel=0.005)


def test_peaks_are_of_the_device_not_of_its_neighbour():
    assert chips.peak("NVIDIA H100 80GB HBM3") == chips.peak("NVIDIA H200") == 989e12
    assert chips.peak("NVIDIA H100 PCIe") == 756e12
    assert chips.peak("NVIDIA L4") == 121e12 and chips.peak("NVIDIA L40S") == 362e12
    assert (
        chips.peak("TPU v5 lite") == 197e12 and chips.peak("TPU v5p") == 459e12 and chips.peak("TPU v6 lite") == 918e12
    )
    assert chips.peak("cpu") is None


def _device(kind):
    return types.SimpleNamespace(device_kind=kind)


def _metered(clock, devices=("TPU v5 lite", "TPU v5 lite")):
    """A hundred steps of a second, of which batches take a tenth; ten seconds of evaluation and twenty of saving."""
    measured = meter.Meter(batch_size=32, step_flops=int(197e12), devices=[_device(kind) for kind in devices])

    def batches():
        for number in range(100):
            clock.now += 0.1
            yield number

    clock.now = 50.0  # of compiling
    measured.begin()
    for number in measured.waiting(batches()):
        clock.now += 0.9
        if number in (49, 99):
            with measured.beside("evaluation"):
                clock.now += 10.0
            yield measured.figures(50), measured.seconds_left(100)
            with measured.beside("checkpoint"):
                clock.now += 20.0


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(meter, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_time_is_what_is_left_when_all_else_is_taken_off(clock):
    (first, left), (second, later_left) = _metered(clock)
    for figures in (first, second):
        assert figures["seconds_per_step"] == pytest.approx(1.0)
        assert figures["examples_per_second"] == pytest.approx(32.0)
        assert figures["data_wait"] == pytest.approx(0.1)
        assert figures["flops_per_second"] == pytest.approx(197e12)
        assert figures["utilisation"] == pytest.approx(0.5)
        assert figures["host_memory_bytes"] > 1e7
    assert first["evaluation_share"] == pytest.approx(10 / 60) and "checkpoint_share" not in first
    assert second["evaluation_share"] == pytest.approx(10 / 80) and second["checkpoint_share"] == pytest.approx(20 / 80)
    assert left == pytest.approx(100 + 20) and later_left == pytest.approx(100 + 40)


def test_utilisation_of_an_unknown_peak_is_not_told(clock):
    figures, _ = next(_metered(clock, devices=("TPU v5 lite", "TPU v9")))
    assert "utilisation" not in figures and figures["flops_per_second"] > 0


def test_measuring_costs_microseconds():
    measured = meter.Meter(32, 1, jax.devices())
    since = time.perf_counter()
    for _ in measured.waiting(range(10_000)):
        pass
    assert time.perf_counter() - since < 1.0


def test_progress_says_how_far_how_good_how_fast_and_how_long(capsys):
    scalars = dict(loss=0.12345, examples_per_second=85.24, data_wait=0.0031, utilisation=0.5214)
    meter.report(tqdm(disable=True), 100, 1000, scalars | {"validation/loss": 0.2}, 3725.4)
    assert capsys.readouterr().out == (
        "step 100/1000  loss 0.1235  validation/loss 0.2000  85.2 examples/s  data wait 0.3%  utilisation 52.1%  "
        "1:02:05 left\n"
    )
    bar = tqdm(total=1000, file=io.StringIO())
    meter.report(bar, 100, 1000, scalars, 3725.4)
    assert bar.postfix == "loss 0.1235  data wait 0.3%  utilisation 52.1%"


def _traced(folder, steps, run):
    step = jax.jit(lambda x: jnp.sin(x @ x))
    x = jnp.ones((64, 64))
    with profile.Trace(folder, steps) as trace:
        for _ in range(run):
            x = step(x)
            trace.after(x)
    return list(folder.rglob("*.trace.json.gz"))


def test_a_trace_shows_the_steps_asked_for(tmp_path, capsys):
    (path,) = _traced(tmp_path, steps=3, run=20)
    assert f"wrote a trace of 3 steps to {tmp_path / 'profile'}" in capsys.readouterr().out
    assert list(tmp_path.rglob("*.xplane.pb"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    numbers = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    assert sorted(numbers) == [10, 11, 12]


def test_a_run_that_ends_early_ends_its_trace(tmp_path, capsys):
    assert len(_traced(tmp_path / "cut", steps=30, run=12)) == 1
    assert _traced(tmp_path / "short", steps=3, run=9) == []
    assert "the run ended before its step 10" in capsys.readouterr().out
    assert _traced(tmp_path / "none", steps=0, run=15) == [] and not capsys.readouterr().out
