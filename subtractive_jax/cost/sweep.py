"""The fastest mesh, policy of rematerialisation and batch on a slice of TPUs, found with few compilations."""

import copy
from collections.abc import Callable
from typing import Any

import ml_collections

from subtractive_jax.models import unet

_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # examples a chip


def sweep(
    config: ml_collections.ConfigDict,
    chips: int,
    limit: float,
    measure: Callable[[ml_collections.ConfigDict], dict[str, Any]],
) -> dict[str, Any] | None:
    """The fastest point that fits `limit` bytes a chip, or None; see `search` for which points are compiled.

    Args:
      measure: a config to a result of `aot.measure`.
    """

    def point(fsdp: int, batch: int, remat: str) -> dict[str, Any]:
        changed = copy.deepcopy(config)
        with changed.unlocked():
            changed.mesh.update(dict(data=-1, fsdp=fsdp, tensor=1))
            changed.train.batch_size = batch * chips
            changed.remat = remat
        return measure(changed)

    return search(point, chips, tuple(unet.REMAT), limit)


def search(
    measure: Callable[[int, int, str], dict[str, Any]], chips: int, policies: tuple[str, ...], limit: float
) -> dict[str, Any] | None:
    """The fastest point that fits, with few compilations.

    On a mesh of fsdp=min(16, chips), for every policy: batches of 4 and 8 a chip give memory as a line over the batch
    (where 4 are too many: 2, then 1). The largest batch that `limit` bytes hold by that line is compiled, and while the
    compiler refuses, the next smaller one. Then, at the fastest of all these, the other sizes of fsdp: 1, 4, all chips.

    Args:
      measure: `measure(fsdp, batch a chip, policy)`, a result of `aot.measure`.
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
