"""How long a compiled step takes on a TPU slice, predicted: its schedule replayed against the chips' datasheets.

Three resources work beside each other, each at the datasheet's rate: matrix units, main memory (HBM) and interconnect
(ICI). Assumed is that

  - an instruction of the schedule lasts as long as its matrix arithmetic at peak bf16 or its HBM traffic at full
    bandwidth, whichever is longer; vector arithmetic and the fixed cost of an instruction are free;
  - a copy or collective that the compiler made asynchronous begins where the schedule begins it and holds up only what
    waits for its end; one that it did not holds up everything;
  - a collective lasts its ring algorithm's bytes over the bandwidth of the links its group can use, or a microsecond
    for every hop if that is longer (Austin et al. 2025, "How to Scale Your Model", part 3);
  - copies share the HBM with the arithmetic, and collectives wait for one another.

`replay` is that prediction. Beside it stand a bound from below, where everything overlaps (the longest of the three
totals), one from above, where nothing does (their sum), and the same replay with the compiler's own estimate of each
instruction's cycles, which knows vector arithmetic and unfilled matrix units, in the place of the datasheet's rates;
kernels have no such estimate and keep those.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from subtractive_jax.chips import Chip
from subtractive_jax.cost import timeline

_HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over groups of one size, in one step and on one chip."""

    kind: str
    group: int
    count: int
    operand_bytes: float
    moved_bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one step, and what they follow from, per chip.

    Attributes:
      arithmetic, memory, interconnect: each resource's own total.
      replay, lower, upper, compiler: see this module; `compiler` is 0 where it estimated nothing.
      exposed: the part of `replay` in which only the interconnect works.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Traffic, ...]
    arithmetic: float
    memory: float
    interconnect: float
    replay: float
    compiler: float
    exposed: float

    @property
    def lower(self) -> float:
        return max(self.arithmetic, self.memory, self.interconnect)

    @property
    def upper(self) -> float:
        return self.arithmetic + self.memory + self.interconnect

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | dict(lower=self.lower, upper=self.upper)


class Slice:
    """A chip and where each partition of the program lies.

    Args:
      coordinates: of every partition's chip in the torus, in the order of the mesh.
    """

    def __init__(self, chip: Chip, coordinates: Sequence[Sequence[int]]) -> None:
        self.chip, self._coordinates = chip, coordinates
        self._sizes = [len(set(axis)) for axis in zip(*coordinates, strict=True)]

    def seconds(self, collective: timeline.Collective) -> float:
        """A chip at the end of a line has one link along it, on a ring two; the chip with the fewest decides."""
        places = [self._coordinates[partition] for partition in collective.group]
        links = hops = 0
        for size, axis in zip(self._sizes, zip(*places, strict=True), strict=True):
            used = len(set(axis))
            if used > 1:
                ring = used == size and size % self.chip.ring == 0
                links += 2 if ring else 1
                hops += used // 2 if ring else used - 1
        if not links or collective.kind == "collective-permute":
            links, hops = 1, min(hops, 1)
        bandwidth = self.chip.ici_bandwidth * links / self.chip.links
        return max(collective.moved_bytes / bandwidth, hops * _HOP_SECONDS)


def predict(program: timeline.Program, on: Slice) -> Prediction:
    """The time of one run of `program` on every chip of a slice."""
    chip = on.chip
    flops = sum(event.flops * times for event, times in program.walk())
    hbm_bytes = sum(event.hbm_bytes * times for event, times in program.walk())
    groups: dict[tuple[str, int], list[float]] = {}
    for event, times in program.walk():
        if event.collective:
            total = groups.setdefault((event.collective.kind, len(event.collective.group)), [0.0] * 4)
            moved = event.collective.operand_bytes, event.collective.moved_bytes, on.seconds(event.collective)
            for i, value in enumerate((1, *moved)):
                total[i] += times * value
    collectives = tuple(
        Traffic(kind, group, int(total[0]), *total[1:]) for (kind, group), total in sorted(groups.items())
    )
    estimated = any(event.cycles for event, _ in program.walk())
    replay, exposed = _Replay(on, cycles=False).run(program.events)
    return Prediction(
        flops=flops,
        hbm_bytes=hbm_bytes,
        collectives=collectives,
        arithmetic=flops / chip.flops,
        memory=hbm_bytes / chip.hbm_bandwidth,
        interconnect=math.fsum(traffic.seconds for traffic in collectives),
        replay=replay,
        compiler=_Replay(on, cycles=True).run(program.events)[0] if estimated else 0.0,
        exposed=exposed,
    )


class _Replay:
    """A chip that walks through a schedule."""

    def __init__(self, on: Slice, cycles: bool) -> None:
        self._slice, self._cycles = on, cycles

    def run(self, events: Sequence[timeline.Event]) -> tuple[float, float]:
        """Seconds in all, and those spent waiting for collectives."""
        chip = self._slice.chip
        now = memory_free = interconnect_free = exposed = 0.0
        ends: dict[str, tuple[float, bool]] = {}  # of what was started: when, and whether it is a collective
        for event in events:
            if event.waits:
                end, communicates = ends.pop(event.waits, (now, False))
                if communicates:
                    exposed += max(end - now, 0.0)
                now = max(now, end)
                continue
            if event.body:
                seconds, waited = self.run(event.body)
                now += event.times * seconds
                exposed += event.times * waited
                continue
            memory_free = max(memory_free, now) + event.hbm_bytes / chip.hbm_bandwidth
            if event.collective:
                begin = max(interconnect_free, now)
                end = interconnect_free = max(begin + self._slice.seconds(event.collective), memory_free)
            elif self._cycles and event.cycles:
                end = now + event.cycles / chip.clock
            else:
                end = max(now + event.flops / chip.flops, memory_free)
            if event.starts:
                ends[event.starts] = end, event.collective is not None
            else:
                exposed += end - now if event.collective else 0.0
                now = end
        return max([now, *(end for end, _ in ends.values())]), exposed
