"""A training step compiled ahead of time, for a slice of TPUs, on a machine that has none.

`libtpu` holds the TPUs' compiler; it needs the description of a slice and no device. What it makes of a step is kept as
the program's text and memory, from which the figures are computed anew each time.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

import subtractive_jax
from subtractive_jax.chips import CHIPS, Chip
from subtractive_jax.cost import roofline, timeline
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.training import audio_stages, flops, latent_stages, limits, partitioning, steps
from subtractive_jax.training.stage import Task

_EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8"
_PROGRESS_SECONDS = 15.0
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no Google Cloud machine to ask about
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # libtpu wants one; the topology's name decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock guards devices
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs: its name, such as `v5e:4x4`, a device for each chip, and a chip's datasheet."""

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip


def topology(name: str) -> Topology:
    """The slice `GENERATION:AxB` or `GENERATION:AxBxC`.

    Raises:
      UserError: a generation without a datasheet here, a shape the compiler refuses, or no compiler.
    """
    generation = name.partition(":")[0]
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
        raise UserError(f'"{name}" is not a TPU topology: it is written GENERATION:AxB or AxBxC, such as {_EXAMPLES}')
    if generation not in CHIPS:
        raise unknown_name("TPU generation", generation, CHIPS)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("no TPU compiler: pip install 'subtractive-jax[tpu]' brings libtpu; no TPU is needed") from None
    os.environ.update(_LIBTPU_ENVIRONMENT)
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"TPU topology {name}: {str(error)[:200]}; such as {_EXAMPLES}") from error
    return Topology(name, tuple(devices), CHIPS[generation])


def measure(
    config: ml_collections.ConfigDict, on: Topology, cache: Path, progress: Callable[[float], None]
) -> dict[str, Any]:
    """What a training step of `config` needs on each chip of a slice, and how long it is predicted to take.

    Args:
      cache: a folder of what was compiled before.
      progress: told the seconds so far, every now and then while the compiler is silent.

    Returns:
      A JSON object. `fits`: whether the compiler found room; `memory` in bytes, of which `needed` is all, or what the
      compiler names where it refuses; `prediction`: `roofline.Prediction`; `utilisation` of peak by the model's own
      FLOPs, for each of the predicted times; `examples_per_second` of the slice.

    Raises:
      UserError: a config that does not fit the slice; see `steps.build`.
    """
    limits.check(config)
    task = _task(config)
    mesh = partitioning.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=on.devices)
    built = steps.build(config, task, mesh, {})
    chips = len(on.devices)
    compiled = _cached(
        cache / f"{_key(config, on.name)}.json.gz",
        lambda: compile_step(lambda: built.train.lower(built.abstract, built.batch), progress),
    )
    result: dict[str, Any] = dict(
        name=f"{config.name}:{config.stage}",
        topology=on.name,
        chips=chips,
        mesh=dict(mesh.shape),
        batch_size=config.train.batch_size,
        batch_per_chip=config.train.batch_size / chips,
        accumulation_steps=config.train.accumulation_steps,
        remat=config.remat,
        versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        cached=compiled.cached,
        compile_seconds=compiled.seconds,
        refusal=compiled.refusal,
        fits=not compiled.refusal,
    )
    trees = dict(
        parameters=built.abstract["params"],
        ema=built.abstract["ema"],
        optimizer=built.abstract["opt_state"],
        batch=built.batch,
    )
    memory = {name: _bytes_per_chip(tree) for name, tree in trees.items()}
    if compiled.refusal:
        needed, limit = refused_bytes(compiled.refusal)
        return result | dict(memory=memory | dict(needed=needed, limit=limit))
    sizes = compiled.memory
    needed = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"] + sizes["code"]
    memory |= dict(activations=needed - sum(memory.values()) - sizes["code"], code=sizes["code"])

    program = timeline.read(compiled.text)
    prediction = roofline.predict(program, roofline.Slice(on.chip, [device.coords for device in mesh.devices.flat]))
    model_flops = flops.of_step(task.loss, built.abstract["params"], built.batch, config.train) / chips
    times = {name: getattr(prediction, name) for name in ("lower", "replay", "upper", "compiler")}
    return result | dict(
        memory=memory | dict(needed=needed, limit=on.chip.hbm_bytes),
        prediction=prediction.to_dict(),
        unknown_loops=program.unknown_loops,
        silent_kernels=program.silent_kernels,
        xla_cost_analysis=compiled.costs,
        model_flops_per_chip=model_flops,
        utilisation={name: model_flops / (seconds * on.chip.flops) for name, seconds in times.items() if seconds},
        examples_per_second=config.train.batch_size / prediction.replay,
    )


def _task(config: ml_collections.ConfigDict) -> Task:
    if config.stage == "text_encoder":
        raise UserError("stage text_encoder cannot be built without its dataset; name another stage: CONFIG.py:STAGE")
    return (audio_stages if config.stage in ("autoencoder", "vocoder") else latent_stages).task(config)


def _bytes_per_chip(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What the compiler said: the program's text, bytes a chip and costs; or why it refused."""

    text: str
    memory: dict[str, int]
    costs: dict[str, float]
    refusal: str
    seconds: float
    cached: bool = False


def compile_step(lower: Callable[[], jax.stages.Lowered], progress: Callable[[float], None]) -> _Compiled:
    since = time.monotonic()
    with _told(lambda: progress(time.monotonic() - since)):
        try:
            compiled = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _Compiled("", {}, {}, str(error), time.monotonic() - since)
        finally:
            jax.clear_caches()
    text, costs, sizes = compiled.as_text() or "", compiled.cost_analysis() or {}, compiled.memory_analysis()
    assert sizes is not None  # the TPU compiler always tells
    return _Compiled(
        text,
        dict(
            argument=sizes.argument_size_in_bytes,
            output=sizes.output_size_in_bytes,
            alias=sizes.alias_size_in_bytes,
            temp=sizes.temp_size_in_bytes,
            code=sizes.generated_code_size_in_bytes,
        ),
        {name: costs[name] for name in ("flops", "bytes accessed") if name in costs},
        "",
        time.monotonic() - since,
    )


def _cached(path: Path, make: Callable[[], _Compiled]) -> _Compiled:
    with contextlib.suppress(OSError, ValueError, TypeError):  # none, or one that was cut short or is of another shape
        return dataclasses.replace(_Compiled(**json.loads(gzip.decompress(path.read_bytes()))), cached=True)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(made)).encode()))
    part.replace(path)
    return made


def _key(config: ml_collections.ConfigDict, topology: str) -> str:
    """A hash of all that a compiled program follows from."""
    package = Path(subtractive_jax.__file__).parent
    sources = [package / "parts.py", package / "rng.py"]
    for room in ("models", "vocoder", "diffusion", "training"):
        sources += sorted((package / room).glob("*.py"))
    said = [config.to_json(sort_keys=True), topology, os.environ.get("LIBTPU_INIT_ARGS", "")]
    said += [importlib.metadata.version(name) for name in ("jax", "libtpu", "flax", "optax")]
    said += [path.read_text() for path in sources if path.name != "flops.py"]  # read afterwards
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:32]


def refused_bytes(message: str) -> tuple[int, int]:
    """Bytes needed and bytes there, from what the compiler says when memory does not suffice; zeros if it does not."""
    units = dict(B=1, K=2**10, M=2**20, G=2**30, T=2**40)
    found = re.findall(r"\b(\d+(?:\.\d+)?)([BKMGT])\b", message)
    needed, limit = (int(float(number) * units[unit]) for number, unit in [*found, ("0", "B"), ("0", "B")][:2])
    return needed, limit


@contextlib.contextmanager
def _told(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` now and then."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            tell()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
