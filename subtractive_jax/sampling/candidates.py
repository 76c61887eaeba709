"""Several stems drawn for one place, the bad ones drawn again, the best first; and several stems in turn."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from subtractive_jax.errors import UserError
from subtractive_jax.representation.notes import Score, read_score
from subtractive_jax.sampling import gates, note_gates
from subtractive_jax.sampling.insert import Settings, draw
from subtractive_jax.sampling.insert_notes import NoteInsertion, draw_notes
from subtractive_jax.sampling.insertion import Insertion
from subtractive_jax.sampling.song import Song

if TYPE_CHECKING:
    from subtractive_jax.model import Model

_Drawn = TypeVar("_Drawn", Insertion, NoteInsertion)


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

    def drawn(seeds: list[int]) -> list[Insertion]:
        return draw(model, song, instruction, stem, seeds, settings, old_stem, progress)

    return _best(drawn, gates.score, seed, num_candidates, max_redraws)


def ranked_notes(
    model: "Model",
    score: Score,
    instruction: str,
    stem: str,
    settings: Settings,
    seed: int = 0,
    num_candidates: int = 1,
    max_redraws: int = 0,
    old: Score | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[NoteInsertion]:
    """As `ranked`, of parts in notes: `note_gates.score` ranks them."""

    def drawn(seeds: list[int]) -> list[NoteInsertion]:
        return draw_notes(model, score, instruction, stem, seeds, settings, old, progress)

    return _best(drawn, note_gates.score, seed, num_candidates, max_redraws)


def _best(
    draw: Callable[[list[int]], list[_Drawn]],
    score: Callable[[dict[str, Any]], float],
    seed: int,
    num_candidates: int,
    max_redraws: int,
) -> list[_Drawn]:
    if num_candidates < 1:
        raise UserError(f"num_candidates {num_candidates}: draw one at least")
    if max_redraws < 0:
        raise UserError(f"max_redraws {max_redraws}: it must not be negative")
    seeds = itertools.count(seed)
    drawn: list[_Drawn] = []
    missing, left = num_candidates, max_redraws
    while missing:
        drawn += draw([next(seeds) for _ in range(missing)])
        bad = sum(gates.is_bad(insertion.info["figures"]) for insertion in drawn)
        missing = min(num_candidates - (len(drawn) - bad), left)
        left -= missing
    drawn.sort(key=lambda insertion: score(insertion.info["figures"]), reverse=True)
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
    found: list[list[Insertion]] = []
    for text, stem, old_stem in zip(
        _for_each(instructions, stems), stems, old_stems or [None] * len(stems), strict=True
    ):
        found.append(ranked(model, song, text, stem, settings, seed, num_candidates, max_redraws, old_stem, progress))
        song = found[-1][0]
    return found


def notes_in_turn(
    model: "Model",
    score: Score,
    instructions: Sequence[str],
    stems: Sequence[str],
    settings: Settings,
    seed: int = 0,
    num_candidates: int = 1,
    max_redraws: int = 0,
    old: Score | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[NoteInsertion]]:
    """As `in_turn`, of parts in notes; `old` is the song with the parts that it had before."""
    found: list[list[NoteInsertion]] = []
    for text, stem in zip(_for_each(instructions, stems), stems, strict=True):
        found.append(ranked_notes(model, score, text, stem, settings, seed, num_candidates, max_redraws, old, progress))
        score = read_score(found[-1][0].mix)
    return found


def _for_each(instructions: Sequence[str], stems: Sequence[str]) -> list[str]:
    if len(instructions) not in (1, len(stems)):
        raise UserError(
            f"{len(instructions)} instructions for {len(stems)} stems: give one for all, or one for each separated by |"
        )
    return list(instructions) * (len(stems) // len(instructions))
