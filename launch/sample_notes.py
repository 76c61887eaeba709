"""What launch.sample does with a model of notes: MIDI in, MIDI out, with renderings and pictures to judge it by."""

import dataclasses
import json
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from subtractive_jax import page
from subtractive_jax.errors import UserError
from subtractive_jax.page import pictures
from subtractive_jax.representation import notes as midi
from subtractive_jax.representation.notes import Score
from subtractive_jax.sampling import candidates, note_gates
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
        if stem in model.stems and stem not in score.parts:
            raise UserError(f"{path}: no {stem} to remove (it has: {', '.join(score.parts)}); leave out --remove")
    try:
        return score.without(job.stems), score
    except UserError as error:
        raise UserError(f"{path}: nothing is left without the {job.stem}") from error


def sample(model: "Model", job: "Job", folder: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Does one job.

    Returns:
      The content of `folder/result.json`.

    Raises:
      UserError: the job cannot be done.
    """
    began = time.perf_counter()
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
    files = {
        "original": original.content if original else None,
        "without_stem": context.content,
        "mix": best[-1].mix,
        "stem": midi.parts_alone(context, parts, programs),
    }
    for name in ("mix", "stem"):
        (folder / f"{name}.mid").write_bytes(files[name])
    for stem, ranked in zip(job.stems, found, strict=True):
        for other in ranked[1:]:
            place = folder / "candidates" / str(other.info["seed"])
            place.mkdir(parents=True, exist_ok=True)
            suffix = f"_{stem}" if len(found) > 1 else ""
            (place / f"stem{suffix}.mid").write_bytes(other.alone)
            (place / f"mix{suffix}.mid").write_bytes(other.mix)
    (folder / _PICTURE).write_bytes(pictures.piano_roll(midi.read_score(files["mix"]), new=set(parts)))
    players = listening.render(folder, files)
    scores = [{one.info["seed"]: note_gates.score(one.info["figures"]) for one in ranked} for ranked in found]
    result = {"id": job.id, "input": job.input, **best[-1].info, "candidates": scores[-1]}
    if len(found) > 1:
        stems = [{**one.info, "candidates": each} for one, each in zip(best, scores, strict=True)]
        result |= {"stem": job.stem, "instruction": job.instruction, "stems": stems}
    result |= {"players": players, "job": dataclasses.asdict(job)}
    result["seconds"] = {**result["seconds"], "all": time.perf_counter() - began}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


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
