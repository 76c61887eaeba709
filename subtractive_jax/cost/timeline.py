"""What a compiled program does on one chip, read from the scheduled HLO text that XLA prints.

XLA's own cost analysis counts the body of a loop once, takes what stays in a chip's vector memory (VMEM) for traffic of
its main memory (HBM), and knows no schedule. The text says all three: instructions stand in the order in which they
run, every array's layout names its memory (`S(1)` is VMEM; without a name it is HBM), and asynchronous copies and
collectives have a beginning and an end. `read` turns the text into events; `cost/roofline.py` gives them times.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from subtractive_jax.cost.hlo import Array, Computation, Instruction, Module, convolution_flops, first_group

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier")
_MARKERS = ("AllocateBuffer", "ConcatBitcast")  # custom calls that only name memory
# Kernels of models/fused_attention.py, which give no estimate: their products of queries and keys, or of that shape.
_ATTENTION = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: one of `COLLECTIVES`.
      operand_bytes: what each chip gives, without padding.
      group: the partitions, by number, of the first of its groups; the others are alike.
    """

    kind: str
    operand_bytes: int
    group: tuple[int, ...]

    @property
    def moved_bytes(self) -> float:
        """What each chip sends by the ring algorithms: Thakur et al. 2005, "Optimization of Collective Communication
        Operations in MPICH"."""
        size = len(self.group)
        steps = {"all-gather": size - 1.0, "all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}
        return self.operand_bytes * steps.get(self.kind, (size - 1) / size)


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of the schedule.

    Attributes:
      flops: of matrix products and convolutions, a multiply-add being two; of a kernel, what it says.
      hbm_bytes: read from and written to HBM.
      cycles: the compiler's own estimate; 0 where it gives none.
      collective: what runs on the interconnect.
      starts: it runs on beside what follows, until the event that waits for this name; "": it ends before the next.
      waits: the name of what it waits for.
      times, body: a loop: `body` runs `times` times.
      kernel: the custom call's target; "": none.
      operation: where in the model it comes from.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    cycles: int = 0
    collective: Collective | None = None
    starts: str = ""
    waits: str = ""
    times: int = 1
    body: tuple["Event", ...] = ()
    kernel: str = ""
    operation: str = ""


@dataclasses.dataclass
class Program:
    """A program's events, and what could not be read from its text.

    Attributes:
      unknown_loops: loops whose number of turns the text does not tell; they count once.
      silent_kernels: custom calls of unknown cost, by target; their arithmetic is not counted.
    """

    events: tuple[Event, ...]
    unknown_loops: int
    silent_kernels: dict[str, int]

    def walk(self) -> Iterator[tuple[Event, int]]:
        """Every event outside of loops, and those inside with the number of times they run."""
        return _walk(self.events, 1)


def _walk(events: tuple[Event, ...], times: int) -> Iterator[tuple[Event, int]]:
    for event in events:
        yield event, times
        yield from _walk(event.body, times * event.times)


def read(text: str) -> Program:
    """The events of a program, from `jax.stages.Compiled.as_text()`."""
    return _Reader(text).program


class _Reader:
    def __init__(self, text: str) -> None:
        self._module = Module(text)
        self._unknown_loops, self._silent = 0, dict[str, int]()
        self.program = Program(self._events(self._module.entry), 0, self._silent)
        self.program.unknown_loops = self._unknown_loops

    def _events(self, computation: Computation) -> tuple[Event, ...]:
        events: list[Event] = []
        flying: dict[str, str] = {}  # a collective's channel, of those that began and did not end
        for instruction in computation.values():
            events.extend(self._event(instruction, computation, flying))
        return tuple(events)

    def _event(self, instruction: Instruction, computation: Computation, flying: dict[str, str]) -> tuple[Event, ...]:
        opcode = instruction.opcode
        operation = instruction.attribute(r'op_name="([^"]*)"')
        cycles = int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        if opcode in _FREE or instruction.attribute(r'custom_call_target="([^"]*)"') in _MARKERS:
            return ()
        if opcode == "while":
            body = self._module.computations[instruction.attribute(r"body=%([^\s,]+)")]
            return (Event(times=self._turns(instruction), body=self._events(body), operation=operation),)
        if opcode == "call":
            return self._events(self._module.computations[instruction.called])
        if opcode == "conditional":
            names = re.findall(r"%([^\s,}]+)", instruction.attribute(r"branch_computations=\{([^}]*)\}"))
            names += re.findall(r"(?:true|false)_computation=%([^\s,]+)", instruction.attributes)
            branches = [self._events(self._module.computations[name]) for name in names]
            return max(branches, key=lambda branch: sum(n * (e.flops + e.hbm_bytes) for e, n in _walk(branch, 1)))
        if opcode.endswith(("-done", "-update")):
            return (Event(waits=instruction.operands[0]),) if opcode.endswith("-done") else ()
        if opcode in ("copy-start", "slice-start"):
            moved = instruction.arrays[:2] if opcode == "copy-start" else instruction.arrays[1:2]
            nbytes = sum(array.nbytes for array in moved if array.in_hbm or opcode == "slice-start")
            return (Event(hbm_bytes=nbytes, starts=instruction.name, operation=operation),)
        base = opcode.removesuffix("-start")
        if base in COLLECTIVES:
            asynchronous = base != opcode
            event = Event(
                collective=self._collective(base, instruction, computation),
                hbm_bytes=_touched_bytes(instruction, computation, asynchronous),
                starts=instruction.name if asynchronous else "",
                operation=operation,
            )
            return (event,)
        inner = self._module.computations.get(instruction.called) if opcode in ("fusion", "async-start") else None
        work = Event(
            flops=self._flops(instruction, computation),
            hbm_bytes=self._traffic(instruction, computation),
            cycles=cycles,
            kernel=instruction.attribute(r'custom_call_target="([^"]*)"') if opcode == "custom-call" else "",
            operation=operation,
        )
        communication = next((i for i in inner.values() if i.opcode in COLLECTIVES), None) if inner else None
        if inner is None or communication is None:
            return (work,)
        return self._fused_collective(instruction, computation, communication, inner, work, flying)

    def _fused_collective(
        self,
        instruction: Instruction,
        computation: Computation,
        communication: Instruction,
        inner: Computation,
        work: Event,
        flying: dict[str, str],
    ) -> tuple[Event, ...]:
        """TPU programs spread a collective over fusions: one starts it, some carry it on beside their own arithmetic,
        one ends it; all of them repeat the instruction with its channel, which therefore counts only at the start."""
        channel = communication.attribute(r"channel_id=(\d+)")
        markers = {i.attribute(r'custom_call_target="([^"]*)"') for i in inner.values() if i.opcode == "custom-call"}
        if "AsyncCollectiveDone" in markers:
            return (Event(waits=flying.pop(channel, "")),)
        if channel in flying:
            return (work,)
        kind = communication.opcode
        if kind == "all-reduce" and inner.root.opcode == "dynamic-slice":
            kind = "reduce-scatter"
        asynchronous = instruction.opcode == "async-start" or "AsyncCollectiveStart" in markers
        if asynchronous and instruction.opcode == "fusion":
            flying[channel] = instruction.name
        event = Event(
            collective=self._collective(kind, communication, inner),
            hbm_bytes=_touched_bytes(instruction, computation, asynchronous),
            starts=instruction.name if asynchronous else "",
            operation=work.operation,
        )
        return (event, work) if work.flops else (event,)

    def _collective(self, kind: str, instruction: Instruction, computation: Computation) -> Collective:
        operands = [array for arrays in computation.operand_arrays(instruction) for array in arrays]
        nbytes = sum(math.prod(array.shape) * array.bits // 8 for array in operands)
        return Collective(kind, nbytes, first_group(instruction, self._module.partitions))

    def _turns(self, loop: Instruction) -> int:
        """A loop that counts from 0 up to a constant, as scans do."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self._module.computations[loop.attribute(r"condition=%([^\s,]+)")]
        if condition.root.opcode == "compare" and "direction=LT" in condition.root.attributes:
            for name in condition.root.operands:
                if condition[name].opcode == "constant":
                    return int(condition[name].literal)
        self._unknown_loops += 1
        return 1

    def _flops(self, instruction: Instruction, computation: Computation) -> float:
        if instruction.opcode == "custom-call":
            if estimate := instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"'):
                return float(estimate)
            for name, products in _ATTENTION.items():
                if instruction.name.startswith(name):
                    # [batch, heads, features, positions], a batch of one without its axis; first come tables of blocks.
                    inputs = [array.shape for (array, *_) in computation.operand_arrays(instruction)]
                    queries, keys = [shape for shape in inputs if shape[-1] % 128 == 0][:2]
                    return 2.0 * products * math.prod(queries) * keys[-1]
            target = instruction.attribute(r'custom_call_target="([^"]*)"')
            self._silent[target] = self._silent.get(target, 0) + 1
            return 0.0
        if instruction.opcode == "convolution":
            return convolution_flops(instruction, computation)
        if instruction.opcode == "dot":
            left = computation.operand_arrays(instruction)[0][0]
            axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            contracted = math.prod(left.shape[int(axis)] for axis in axes.split(",") if axis)
            return 2.0 * math.prod(instruction.arrays[0].shape) * contracted
        if instruction.opcode == "fusion":
            inner = self._module.computations[instruction.called]
            busy = [i for i in inner.values() if i.opcode in ("convolution", "dot", "fusion")]
            return sum(self._flops(i, inner) for i in busy)
        return 0.0

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes of HBM: whole operands and results, but of slices and updates in place only what they touch."""
        operands = computation.operand_arrays(instruction)
        if instruction.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice"):
            (written,) = instruction.arrays
            source = operands[instruction.opcode == "dynamic-update-slice"][0]  # what is put in, or taken from
            moved = min(source.nbytes, written.nbytes)
            return float(moved * (source.in_hbm + written.in_hbm))
        if instruction.opcode != "fusion":
            return _touched_bytes(instruction, computation)
        inner = self._module.computations[instruction.called]
        total = sum(
            _read_bytes(parameter, arrays[0], inner)
            for parameter, arrays in zip(inner.parameters, operands, strict=True)
            if arrays[0].in_hbm
        )
        root = inner.root
        results = (
            [inner[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(instruction.arrays)
        )
        for result, array in zip(results, instruction.arrays, strict=True):
            if array.in_hbm and result.opcode not in ("parameter", *COLLECTIVES):
                in_place = result.opcode == "dynamic-update-slice"
                total += inner[result.operands[1]].arrays[0].nbytes if in_place else array.nbytes
        return float(total)


def _touched_bytes(instruction: Instruction, computation: Computation, hands_on_operands: bool = False) -> float:
    """Bytes of HBM of all operands and results; an asynchronous collective's results begin with its operands."""
    operands = [array for arrays in computation.operand_arrays(instruction) for array in arrays]
    results = instruction.arrays[len(operands) :] if hands_on_operands else instruction.arrays
    return float(sum(array.nbytes for array in (*operands, *results) if array.in_hbm))


def _read_bytes(parameter: Instruction, array: Array, inner: Computation) -> int:
    """How much of an operand a fusion reads."""
    users = inner.users[parameter.name]
    if all(user.opcode in ("tuple", *COLLECTIVES) for user in users):
        return 0  # only handed on
    if all(user.opcode in ("slice", "dynamic-slice", "dynamic-update-slice") for user in users):
        touched = 0
        for user in users:
            if user.opcode != "dynamic-update-slice":
                touched += user.arrays[0].nbytes
            elif user.operands[0] != parameter.name:
                touched += array.nbytes
        return min(touched, array.nbytes)
    return array.nbytes
