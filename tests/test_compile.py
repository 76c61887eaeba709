"""launch.compile: a real step for a slice of TPUs, its cache, its refusals, and the sweep."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import minimal
from subtractive_jax.cost import aot, sweep
from subtractive_jax.errors import UserError

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra tpu)")


def run(cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.compile", *flags],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": ""},
        capture_output=True,
        text=True,
    )


def test_a_step_is_compiled_once(tmp_path: Path) -> None:
    flags = [
        "--config=configs/minimal.py",
        "--topology=v5e:2x2",
        f"--output={tmp_path}/figures.json",
        "--config.mesh.fsdp=2",
        "--config.denoiser.block_out_channels=(16,)",
        '--config.denoiser.down_block_types=("CrossAttnDownBlock2D",)',
        '--config.denoiser.up_block_types=("CrossAttnUpBlock2D",)',
    ]
    first = run(tmp_path, *flags)
    assert first.returncode == 0, first.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["fits"] and not figures["cached"] and figures["chips"] == 4
    assert figures["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and figures["batch_per_chip"] == 2
    memory = figures["memory"]
    assert memory["parameters"] == memory["ema"] > 0
    assert (
        2 * memory["parameters"] <= memory["optimizer"] < 2 * memory["parameters"] + 1024
    )  # two moments, a few counts
    split = ("parameters", "ema", "optimizer", "batch", "activations", "code")
    assert sum(memory[name] for name in split) == memory["needed"] < memory["limit"] == 16 * GIB
    prediction = figures["prediction"]
    assert {traffic["kind"] for traffic in prediction["collectives"]} >= {"all-gather", "all-reduce"}
    assert prediction["lower"] <= prediction["replay"]
    # The model's own arithmetic is all there is without rematerialisation, but for padding and the optimizer.
    assert figures["model_flops_per_chip"] == pytest.approx(prediction["flops"], rel=0.25)
    assert figures["utilisation"]["replay"] == pytest.approx(
        figures["model_flops_per_chip"] / prediction["replay"] / 197e12
    )
    assert figures["examples_per_second"] == pytest.approx(8 / prediction["replay"])

    again = run(tmp_path, *flags)
    assert again.returncode == 0 and "cached" in again.stdout and "cached" not in first.stdout
    assert json.loads((tmp_path / "figures.json").read_text()) == figures | {"cached": True}


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--config=configs/minimal.py", "--topology=v5e:3x3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "v5e:3x3" in done.stderr and "v5e:4x4" in done.stderr


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e", "GENERATION:AxB.*v5e:4x4"),
        ("v5e:4x", "GENERATION:AxB.*v5e:4x4"),
        ("v4:2x2x1", 'unknown TPU generation "v4".*v5e, v5p, v6e'),
        ("v5e:3x3", "v5e:3x3.*not divisible.*v5e:4x4"),
    ],
)
def test_topologies_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        aot.topology(name)


def test_topologies_have_a_device_for_each_chip() -> None:
    for name, chips in (("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:2x4", 8)):
        topology = aot.topology(name)
        assert len({tuple(device.coords) for device in topology.devices}) == len(topology.devices) == chips


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("subtractive", {}, "train.batch_size=8 .* 16 devices"),
        ("subtractive", {"mesh.data": 3}, "mesh.data=3 .* 16 devices"),
        ("text_encoder", {}, "dataset"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, stage: str, changes: dict[str, Any], message: str) -> None:
    config = minimal.get_config(stage)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        aot.measure(config, aot.topology("v5e:4x4"), tmp_path, print)


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match="pip install"):
        aot.topology("v5e:2x2")


def test_too_little_memory_is_a_result() -> None:
    mesh = Mesh(np.array(aot.topology("v5e:2x2").devices), ("x",))
    array = jax.ShapeDtypeStruct((3 * GIB,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    compiled = aot.compile_step(lambda: jax.jit(jnp.add).lower(array, array), print)
    assert "RESOURCE_EXHAUSTED" in compiled.refusal and not compiled.text
    needed, limit = aot.refused_bytes(compiled.refusal)
    assert needed == 36 * GIB and 15 * GIB < limit < 16 * GIB


def test_bytes_in_the_compilers_sentences() -> None:
    sentence = "Ran out of memory in memory space hbm. Used 21.31G of 15.75G hbm. Exceeded hbm capacity by 5.56G."
    assert aot.refused_bytes(sentence) == (int(21.31 * GIB), int(15.75 * GIB))
    assert aot.refused_bytes("no numbers") == (0, 0)


def test_the_sweep_finds_the_largest_batch_and_the_fastest_mesh() -> None:
    """On a machine where an example takes 1 GiB, or 0.25 GiB by the policy `little`, which is slower."""
    points = []

    def measure(fsdp: int, batch: int, remat: str) -> dict[str, Any]:
        points.append((fsdp, batch, remat))
        needed = (2 + batch * (0.25 if remat == "little" else 1)) * GIB
        speed = batch / (batch + 4) * (1.0 if remat == "little" else 1.2) * (1.1 if fsdp == 4 else 1.0)
        return dict(
            mesh=dict(data=64 // fsdp, fsdp=fsdp, tensor=1),
            batch_per_chip=batch,
            remat=remat,
            fits=needed <= 15.75 * GIB,
            memory=dict(needed=needed),
            examples_per_second=speed,
        )

    best = sweep.search(measure, 64, ("all", "little"), 16 * GIB)
    assert best is not None
    assert (best["mesh"]["fsdp"], best["batch_per_chip"], best["remat"]) == (4, 48, "little")
    assert (16, 12, "all") in points and (16, 48, "little") in points
    assert len(points) == len(set(points)) <= 10

    best = sweep.search(lambda *point: measure(*point) | dict(fits=False), 64, ("all",), 16 * GIB)
    assert best is None
