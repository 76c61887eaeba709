"""Compiles the training step for a slice of TPUs, without any TPU, and predicts what it will cost.

  python -m launch.compile --config=configs/riffusion.py --topology=v5e:16x16 --config.train.batch_size=2048
  python -m launch.compile --config=configs/riffusion.py --topology=v5e:4x4 --sweep [--output=FILE.json]

It is the step that `launch.train` runs, compiled by the TPU's own compiler (the extra `tpu`), for config.mesh,
config.train.batch_size and config.remat. A model of Stable Diffusion's size takes twenty minutes and 16 GB of memory.
`--sweep` tries meshes, policies of rematerialisation and batches, and prints the fastest that fits. What was compiled
before is kept in the user's cache folder, and a sweep that was interrupted goes on where it stood.

How times are predicted: subtractive_jax/training/roofline.py. Results and what led to them: launch/TPU.md.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from launch import program
from subtractive_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and stage, such as configs/riffusion.py.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5e:16x16, v5p:4x4x4 or v6e:8x8.", required=True)
_SWEEP = flags.DEFINE_bool("sweep", False, "Look for the fastest mesh, remat and batch, whatever the config says.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures; of a sweep, a list.")

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subtractive_jax" / "tpu"
ENVIRONMENT = {  # read when JAX and libtpu are loaded
    "JAX_PLATFORMS": "cpu",  # nothing runs on a device
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for other machines do not belong there
    "TPU_SKIP_MDS_QUERY": "1",  # there is no Google Cloud machine to ask about
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # libtpu wants one; --topology decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock guards devices
}
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # examples a chip that a sweep considers
_MEMORY = ("parameters", "ema", "optimizer", "batch", "activations", "code")


def main() -> None:
    os.environ.update(ENVIRONMENT)
    from subtractive_jax.training import aot  # after the flags are known to be good: it takes seconds

    topology = aot.topology(_TOPOLOGY.value)

    def progress(seconds: float) -> None:
        print(f"compiling for {topology.name}: {seconds / 60:.1f} min", file=sys.stderr, flush=True)

    def measure(config: ml_collections.ConfigDict) -> dict[str, Any]:
        return aot.measure(config, topology, _CACHE, progress)

    figures: Any
    if _SWEEP.value:
        figures = _sweep(_CONFIG.value, topology, measure)
    else:
        figures = measure(_CONFIG.value)
        print(_report(figures))
    if _OUTPUT.value:
        try:
            Path(_OUTPUT.value).write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output={_OUTPUT.value}: {error.strerror}") from error


def _si(value: float, unit: str, base: int = 1000) -> str:
    """A number with a prefix: 1.25 TFLOP."""
    prefixes = ("", "K", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti")
    power = min(int(math.log(value, base)), len(prefixes) - 1) if value >= 1 else 0
    return f"{value / base**power:.2f} {prefixes[power]}{unit}"


def _bytes(value: float) -> str:
    return _si(value, "B", 1024)


def _report(result: dict[str, Any]) -> str:
    """A result as text for people."""
    mesh = " x ".join(f"{name}={size}" for name, size in result["mesh"].items())
    parts = f", in {result['accumulation_steps']} parts" if result["accumulation_steps"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['name']} on {result['topology']}: {result['chips']} chips ({mesh}), {result['batch_per_chip']:g} "
        f"examples a chip{parts}, remat={result['remat']}",
        f"compiled {'earlier (cached)' if result['cached'] else 'now'} in {result['compile_seconds'] / 60:.1f} min by "
        f"{versions}",
    ]
    memory = result["memory"]
    split = ", ".join(f"{name} {_bytes(memory[name])}" for name in _MEMORY if name in memory)
    if not result["fits"]:
        return "\n".join(
            [
                *lines,
                f"does NOT fit: needs {_bytes(memory['needed'])} of {_bytes(memory['limit'])} a chip ({split})",
                f"  the compiler: {' '.join(result['refusal'].split())[:400]}",
            ]
        )
    prediction, use = result["prediction"], result["utilisation"]
    lines += [
        f"memory a chip: {_bytes(memory['needed'])} of {_bytes(memory['limit'])} ({split})",
        f"a step, each chip: {_si(prediction['flops'], 'FLOP')} executed, {_si(prediction['hbm_bytes'], 'B')} of HBM "
        f"traffic; the model's own are {_si(result['model_flops_per_chip'], 'FLOP')}",
        f"{'collective':<20}{'chips':>6}{'count':>7}{'given':>12}{'sent':>12}{'ms':>9}",
    ]
    for traffic in prediction["collectives"]:
        given, sent = (_si(traffic[name], "B") for name in ("operand_bytes", "moved_bytes"))
        lines.append(
            f"{traffic['kind']:<20}{traffic['group']:>6}{traffic['count']:>7}{given:>12}{sent:>12}"
            f"{traffic['seconds'] * 1e3:>9.2f}"
        )
    ms = {name: f"{value * 1e3:.2f} ms" for name, value in prediction.items() if isinstance(value, float)}
    lines += [
        f"alone: arithmetic {ms['arithmetic']}, memory {ms['memory']}, interconnect {ms['interconnect']}",
        f"step: {ms['replay']} predicted, {ms['exposed']} of them waiting for the interconnect "
        f"({ms['lower']} if all overlaps, {ms['upper']} if nothing does)",
        f"utilisation: {use['replay']:.1%} of peak predicted ({use['lower']:.1%} and {use['upper']:.1%})",
        f"{result['examples_per_second']:.1f} examples/s, {result['examples_per_second'] / result['chips']:.2f} a chip",
    ]
    if "compiler" in use:
        lines.append(f"with the compiler's own cycles: {ms['compiler']}, {use['compiler']:.1%} of peak")
    if result["unknown_loops"]:
        lines.append(f"note: {result['unknown_loops']} loop(s) of unknown length count once")
    for kernel, count in result["silent_kernels"].items():
        lines.append(f"note: {count} x {kernel} without an estimate of its cost: its arithmetic is not counted")
    return "\n".join(lines)


_HEADER = (
    f"{'data':>5}{'fsdp':>6}{'batch':>7}  {'remat':<10}{'GiB':>7}{'ms':>9}{'waiting':>9}{'of peak':>9}{'ex/s/chip':>11}"
)


def _row(result: dict[str, Any]) -> str:
    memory, mesh = result["memory"], result["mesh"]
    start = (
        f"{mesh['data']:>5}{mesh['fsdp']:>6}{result['batch_per_chip']:>7g}  {result['remat']:<10}"
        f"{memory['needed'] / 2**30:>7.2f}"
    )
    if not result["fits"]:
        return f"{start}  does not fit"
    prediction = result["prediction"]
    return (
        f"{start}{prediction['replay'] * 1e3:>9.1f}{prediction['exposed'] * 1e3:>9.1f}"
        f"{result['utilisation']['replay']:>9.1%}{result['examples_per_second'] / result['chips']:>11.2f}"
        f"{'  (cached)' if result['cached'] else ''}"
    )


def _sweep(
    config: ml_collections.ConfigDict, topology: Any, measure: Callable[[ml_collections.ConfigDict], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Prints each point as it is known; see `search` for which they are."""
    from subtractive_jax.models import unet

    chips = len(topology.devices)
    results: list[dict[str, Any]] = []

    def point(fsdp: int, batch: int, remat: str) -> dict[str, Any]:
        changed = copy.deepcopy(config)
        with changed.unlocked():
            changed.mesh.update(dict(data=-1, fsdp=fsdp, tensor=1))
            changed.train.batch_size = batch * chips
            changed.remat = remat
        results.append(measure(changed))
        print(_row(results[-1]), flush=True)
        return results[-1]

    print(_HEADER, flush=True)
    best = search(point, chips, tuple(unet.REMAT), topology.chip.hbm_bytes)
    if best is None:
        print(f"nothing fits a chip of {topology.name}: take a larger slice, or chips with more memory")
    else:
        mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best["mesh"].items())
        print(
            f"\n{mesh} --config.remat={best['remat']} --config.train.batch_size={best['batch_size']}\n{_report(best)}"
        )
    return results


def search(
    measure: Callable[[int, int, str], dict[str, Any]], chips: int, policies: tuple[str, ...], limit: float
) -> dict[str, Any] | None:
    """The fastest point that fits, with few compilations.

    On a mesh of fsdp=min(16, chips), for every policy: batches of 4 and 8 a chip give memory as a line over the batch
    (where 4 are too many: 2, then 1). The largest batch that `limit` bytes hold by that line is compiled, and while the
    compiler refuses, the next smaller one. Then, at the fastest of all these, the other sizes of fsdp: 1, 4, all chips.

    Args:
      measure: `measure(fsdp, batch a chip, policy)`, a result of `_measure`.
    """
    found: list[dict[str, Any]] = []

    def tried(fsdp: int, batch: int, remat: str) -> dict[str, Any]:
        found.append(measure(fsdp, batch, remat))
        return found[-1]

    def fastest() -> dict[str, Any] | None:
        return max((r for r in found if r["fits"]), key=lambda r: r["examples_per_second"], default=None)

    fsdp = min(16, chips)
    for remat in policies:
        small = tried(fsdp, 4, remat)
        if not small["fits"]:
            if not tried(fsdp, 2, remat)["fits"]:
                tried(fsdp, 1, remat)
            continue
        large = tried(fsdp, 8, remat)
        if not large["fits"]:
            continue
        slope = (large["memory"]["needed"] - small["memory"]["needed"]) / 4
        most = 8 + (limit - large["memory"]["needed"]) / max(slope, 1.0)
        for batch in reversed([batch for batch in _BATCHES if 8 < batch <= most]):
            if tried(fsdp, batch, remat)["fits"]:
                break
    best = fastest()
    if best is not None:
        for other in sorted({1, 4, chips} - {fsdp}):
            if chips % other == 0:
                tried(other, int(best["batch_per_chip"]), best["remat"])
    return fastest()


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    program.run(main)
