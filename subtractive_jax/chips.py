"""Datasheets of accelerators."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A datasheet, per chip.

    Attributes:
      flops: peak in bfloat16, per second.
      hbm_bytes: what the datasheet calls GB are 2**30 bytes; the compiler keeps some for itself (0.25 of v5e's 16).
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second, out of all links together.
      links: to neighbours, two for each dimension of the torus.
      ring: sizes at which a dimension of a slice closes to a ring: multiples of this.
      clock: Hz, from the peak and the size of the matrix units.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    links: int
    ring: int
    clock: float


# Google Cloud TPU documentation, pages "TPU v5e", "TPU v5p" and "TPU v6e": peak compute, HBM capacity and bandwidth,
# ICI bandwidth per chip. The clock is the peak over what the matrix units do in a cycle: v5e has 4 of 128 x 128, v5p 8,
# and for v6e the compiler counts 4 of 256 x 256.
CHIPS = {
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 1600e9 / 8, links=4, ring=16, clock=1.5e9),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 4800e9 / 8, links=6, ring=4, clock=1.75e9),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1640e9, 3584e9 / 8, links=4, ring=16, clock=1.75e9),
}

_PEAK = {  # dense bfloat16 FLOP/s of one device, by the beginning of its `device_kind`; vendors' datasheets
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s that a device's datasheet promises; None for CPUs and devices unknown."""
    return next((flops for kind, flops in _PEAK.items() if device_kind.startswith(kind)), None)
