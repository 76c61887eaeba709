"""The text of a compiled program, as XLA writes it (HLO): computations, instructions, arrays, groups of devices."""

import dataclasses
import functools
import math
import re

import numpy as np

_BITS = {"pred": 8, "token": 0}  # all others say it in their name
_LINE = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      nbytes: as stored, with the padding of its tiles.
      in_hbm: whether it lies in the chip's main memory.
    """

    shape: tuple[int, ...]
    bits: int
    nbytes: int
    in_hbm: bool


def _array(match: re.Match[str]) -> Array:
    name, dimensions, layout = match.group(1), match.group(2), match.group(3) or ""
    shape = tuple(map(int, dimensions.split(","))) if dimensions else ()
    bits = _BITS[name] if name in _BITS else int(re.findall(r"\d+", name)[0])
    order, _, tiling = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    sizes = list(shape)
    if tile and sizes:
        minor_to_major = [int(axis) for axis in order.split(",")]
        for axis, step in zip(minor_to_major, reversed(tile.group(1).split(",")), strict=False):
            sizes[axis] = math.ceil(sizes[axis] / int(step)) * int(step)
    space = re.search(r"S\((\d+)\)", tiling)
    return Array(shape, bits, math.prod(sizes) * bits // 8, in_hbm=not space or space.group(1) == "0")


class Instruction:
    """One line of the text, taken apart only as far as asked."""

    literal: str
    attributes: str

    def __init__(self, match: re.Match[str]) -> None:
        self.name, self._result, self.opcode, rest = match.groups()
        self.literal, _, self.attributes = rest.partition(")")
        self.operands = re.findall(r"%([^\s,)]+)", self.literal)

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return [_array(match) for match in _ARRAY.finditer(self._result)]

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    @property
    def called(self) -> str:
        return self.attribute(r"(?:calls|to_apply)=%([^\s,]+)")


class Computation(dict[str, Instruction]):
    root: Instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self}
        for instruction in self.values():
            for operand in instruction.operands:
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [instruction for instruction in self.values() if instruction.opcode == "parameter"]
        return sorted(found, key=lambda instruction: int(instruction.literal))

    def operand_arrays(self, instruction: Instruction) -> list[list[Array]]:
        return [self[name].arrays for name in instruction.operands]


class Module:
    """A program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        entry, current = "", Computation()
        for line in text.split("\n"):
            if line.endswith("{") and line.startswith(("%", "ENTRY ")):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                entry = name if line.startswith("ENTRY ") else entry
                current = self.computations[name] = Computation()
            elif match := _LINE.match(line):
                instruction = Instruction(match)
                current[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    current.root = instruction
        self.entry = self.computations[entry]
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.partitions = int(partitions.group(1)) if partitions else 1


@functools.cache
def _taps(size: int, kernel: int, output: int, stride: int, pad: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of an output position and a kernel position that meet an input position, along one axis."""
    position = np.arange(output)[:, None] * stride + np.arange(kernel)[None, :] * kernel_dilation - pad
    inside = (position >= 0) & (position <= (size - 1) * dilation) & (position % dilation == 0)
    return int(inside.sum())


def convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Of a convolution, or of what XLA writes as one: on TPU, every matrix product. Padding does not count."""
    (left,), (kernel,) = computation.operand_arrays(instruction)
    labels = instruction.attribute(r"dim_labels=([^\s,]+)")
    left_labels, kernel_labels, output_labels = re.split(r"_|->", labels)
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute(r"window=\{([^}]*)\}")))

    def per_axis(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * (len(left_labels) - 2)

    multiply_adds = kernel.shape[kernel_labels.index("i")] * kernel.shape[kernel_labels.index("o")]
    multiply_adds *= left.shape[left_labels.index("b")]
    multiply_adds //= int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    axes = zip(
        per_axis("stride", "1"),
        per_axis("pad", "0_0"),
        per_axis("lhs_dilate", "1"),
        per_axis("rhs_dilate", "1"),
        strict=True,
    )
    for number, (stride, pad, dilation, kernel_dilation) in enumerate(axes):
        multiply_adds *= _taps(
            left.shape[left_labels.index(str(number))],
            kernel.shape[kernel_labels.index(str(number))],
            instruction.arrays[0].shape[output_labels.index(str(number))],
            int(stride),
            int(pad.split("_")[0]),
            int(dilation),
            int(kernel_dilation),
        )
    return 2.0 * multiply_adds


def _iota(text: str) -> np.ndarray:
    """Device numbers as XLA abbreviates them: `[4,2]T(1,0)` is 0...7 in that shape, transposed."""
    dimensions, _, order = text.partition("T")
    shape = tuple(map(int, dimensions.strip("[]").split(",")))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(tuple(map(int, order.strip("()").split(",")))) if order else numbers


def first_group(instruction: Instruction, partitions: int) -> tuple[int, ...]:
    """In any of the ways XLA writes replica groups: lists, iotas, or axes of a mesh."""
    if pairs := instruction.attribute(r"source_target_pairs=\{\{([\d,]+)\}"):
        return tuple(map(int, pairs.split(",")))
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return tuple(map(int, listed.split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", instruction.attributes)
    if iota:
        return tuple(_iota(iota.group(3)).reshape(int(iota.group(1)), int(iota.group(2)))[0].tolist())
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}",
        instruction.attributes,
    )
    if not mesh:
        return tuple(range(partitions))
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    shape: list[int] = []
    varying: list[int] = []
    # An axis of the mesh may take part as a whole, or as a factor of it: 'axis':(factors before)size.
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(3))
    for name, size in axes.items():
        factors = [(int(before or 1), int(part or size)) for named, before, part in parts if named == name]
        done = 1
        for before, part in sorted(factors):
            shape += [before // done, part]
            varying.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    numbers = _iota(mesh.group(2)) if mesh.group(2) else np.arange(math.prod(axes.values()))
    numbers = numbers.reshape(shape)
    first = tuple(slice(None) if axis in varying else 0 for axis in range(len(shape)))
    return tuple(numbers[first].reshape(-1).tolist())
