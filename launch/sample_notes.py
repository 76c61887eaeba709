"""What launch.sample does with a model of notes: MIDI in, MIDI out, with renderings and pictures to judge it by."""

import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import listening
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation import notes as midi
from subtractive_jax.representation.notes import Score
from subtractive_jax.sampling import candidates
from subtractive_jax.sampling.insert_notes import NoteInsertion

if typing.TYPE_CHECKING:
    from launch.sample import Job
    from subtractive_jax.model import Model

_PICTURE = "roll.png"


def read_input(job: "Job", model: "Model") -> tuple[Score, Score | None]:
    """(the song without the parts, the song as it was if they were taken out of it).

    Raises:
      UserError: the input is no MIDI file, or not what `remove` says.
    """
    path = Path(job.input)
    if path.is_dir() or path.suffix.lower() not in (".mid", ".midi"):
        raise UserError(f'{path}: model "{model.name}" writes notes and reads MIDI files; for audio take "tiny"')
    score = midi.read_score(path)
    if not job.remove:
        return score, None
    for stem in job.stems:
        if stem not in model.stems:
            raise unknown_name("stem", stem, model.stems)
        if stem not in score.parts:
            raise UserError(f"{path}: no {stem} to remove (it has: {', '.join(score.parts)}); leave out --remove")
    try:
        return score.without(job.stems), score
    except UserError as error:
        raise UserError(f"{path}: nothing is left without the {job.stem}") from error


def sample(
    model: "Model", job: "Job", folder: Path, progress: Callable[[int, int], None]
) -> tuple[list[list[NoteInsertion]], list[tuple[str, str]]]:
    """Does one job: all files but `result.json`.

    Returns:
      (for each stem its candidates, the best first; the page's players).

    Raises:
      UserError: the job cannot be done.
    """
    if job.format not in (None, "mid"):
        raise UserError(f'format "{job.format}": model "{model.name}" writes notes; leave out --format')
    context, original = read_input(job, model)
    found = candidates.notes_in_turn(
        model,
        context,
        [text.strip() for text in job.instruction.split("|")],
        job.stems,
        job.settings,
        job.seed,
        job.num_candidates,
        job.max_redraws,
        original,
        progress,
    )
    best = [ranked[0] for ranked in found]
    parts = {one.stem: one.notes for one in best}
    programs = {one.stem: one.program for one in best if one.program is not None}
    mix, alone = best[-1].mix, midi.parts_alone(context, parts, programs)
    write(folder, mix, alone)
    for stem, ranked in zip(job.stems, found, strict=True):
        for other in ranked[1:]:
            place = folder / "candidates" / str(other.info["seed"])
            place.mkdir(parents=True, exist_ok=True)
            write(place, other.mix, other.alone, f"_{stem}" if len(found) > 1 else "")
    before = original.content if original else None
    versions = {"original": before, "without_stem": context.content, "mix": mix, "stem": alone}
    players = listening.render(folder, versions)
    (folder / _PICTURE).write_bytes(listening.picture(folder, mix, parts, players))
    return found, players


def write(folder: Path, mix: bytes, stem: bytes, suffix: str = "") -> None:
    """Writes stem and mix."""
    (folder / f"mix{suffix}.mid").write_bytes(mix)
    (folder / f"stem{suffix}.mid").write_bytes(stem)


def page_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the listening page says of `note_gates.figures`."""
    named = {"In the song's harmony": "harmony", "Groove agreement": "groove", "Notes a beat": "notes_per_beat"}
    return {label: measured[name] for label, name in named.items() if measured[name] is not None}


def table_columns(measured: Mapping[str, Any]) -> dict[str, str]:
    """What the table of jobs says of `note_gates.figures`."""
    shares = {name: measured[name] for name in ("harmony", "groove")}
    columns = {name: "-" if value is None else f"{value:.2f}" for name, value in shares.items()}
    return columns | {"notes": str(measured["notes"])}


def picture(folder: Path) -> bytes:
    """The piano roll of a result."""
    return (folder / _PICTURE).read_bytes()
