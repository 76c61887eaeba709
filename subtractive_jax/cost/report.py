"""What a compilation found, as text for people."""

import math
from typing import Any

_MEMORY = ("parameters", "ema", "optimizer", "batch", "activations", "code")
HEADER = (
    f"{'data':>5}{'fsdp':>6}{'batch':>7}  {'remat':<10}{'GiB':>7}{'ms':>9}{'waiting':>9}{'of peak':>9}{'ex/s/chip':>11}"
)


def row(result: dict[str, Any]) -> str:
    """A line of a table under `HEADER`, of a result of `aot.measure`."""
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


def _si(value: float, unit: str, base: int = 1000) -> str:
    """A number with a prefix: 1.25 TFLOP."""
    prefixes = ("", "K", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti")
    power = min(int(math.log(value, base)), len(prefixes) - 1) if value >= 1 else 0
    return f"{value / base**power:.2f} {prefixes[power]}{unit}"


def _bytes(value: float) -> str:
    return _si(value, "B", 1024)


def report(result: dict[str, Any]) -> str:
    """All that is known of a result of `aot.measure`, over some lines."""
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
