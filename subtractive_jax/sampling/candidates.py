"""Several stems drawn for one place, the bad ones drawn again, the best first; and several stems in turn."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from subtractive_jax.errors import UserError
from subtractive_jax.sampling import gates
from subtractive_jax.sampling.insert import Settings, draw
from subtractive_jax.sampling.insertion import Insertion
from subtractive_jax.sampling.song import Song

if TYPE_CHECKING:
    from subtractive_jax.model import Model


def ranked(
    model: "Model",
    song: Song,
    instruction: str,
    stem: str,
    settings: Settings,
    seed: int = 0,
    num_candidates: int = 1,
    max_redraws: int = 0,
    old_stem: Song | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Insertion]:
    """Draws candidates with seeds from `seed` on and ranks them by `gates.score`.

    Those that `gates.is_bad` names are drawn again with the next seeds, together, until there are enough good ones or
    `max_redraws` were drawn; bad ones only fill the places that no good one takes. `info["redraws"]` tells how many
    there were.

    Raises:
      UserError: see `insert`; no candidates, or fewer redraws than none.
    """
    if num_candidates < 1:
        raise UserError(f"num_candidates {num_candidates}: draw one at least")
    if max_redraws < 0:
        raise UserError(f"max_redraws {max_redraws}: it must not be negative")
    seeds = itertools.count(seed)
    drawn: list[Insertion] = []
    missing, left = num_candidates, max_redraws
    while missing:
        drawn += draw(
            model, song, instruction, stem, [next(seeds) for _ in range(missing)], settings, old_stem, progress
        )
        bad = sum(gates.is_bad(insertion.info["figures"]) for insertion in drawn)
        missing = min(num_candidates - (len(drawn) - bad), left)
        left -= missing
    drawn.sort(key=lambda insertion: gates.score(insertion.info["figures"]), reverse=True)
    for insertion in drawn:
        insertion.info["redraws"] = max_redraws - left
    return drawn[:num_candidates]


def in_turn(
    model: "Model",
    song: Song,
    instructions: Sequence[str],
    stems: Sequence[str],
    settings: Settings,
    seed: int = 0,
    num_candidates: int = 1,
    max_redraws: int = 0,
    old_stems: Sequence[Song | None] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Insertion]]:
    """The ranked candidates of each stem, drawn to the song with the best of the stems before it.

    Args:
      instructions: one for all stems, or one for each.
      old_stems: of each stem, where they are known.

    Raises:
      UserError: see `ranked`; the number of instructions fits neither.
    """
    if len(instructions) not in (1, len(stems)):
        raise UserError(
            f"{len(instructions)} instructions for {len(stems)} stems: give one for all, or one for each separated by |"
        )
    texts = list(instructions) * (len(stems) // len(instructions))
    found: list[list[Insertion]] = []
    for text, stem, old_stem in zip(texts, stems, old_stems or [None] * len(stems), strict=True):
        found.append(ranked(model, song, text, stem, settings, seed, num_candidates, max_redraws, old_stem, progress))
        song = found[-1][0]
    return found
