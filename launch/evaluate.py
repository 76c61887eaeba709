"""Measures generated music, with intervals and counts.

  python -m launch.evaluate --reference=DIR --candidate=DIR --output=OUT [--embedder=NAME]
      two folders of audio, by FD, FAD, FAD-inf, KAD and KL; files of the same name (suffix aside) are pairs; NAME is
      musicnn, or vggish, panns-cnn14-16k or clap, whose published weights launch.convert reads
  python -m launch.evaluate --paper_table --model=MODEL [--mix_model=MODEL] --data_dir=DIR --output=OUT
      the model, its SDEdit baseline and the framing rows on windows kept out of training, also by rhythm and harmony
  python -m launch.evaluate --midi_table --model=MODEL --data_dir=DIR --output=OUT
      a model of notes in the six cases of the paper's MIDI page, on windows kept out of training, beside the real part,
      another song's, and one by rule; OUT/index.html plays and shows one window of each
  python -m launch.evaluate --control --model=MODEL --data_dir=DIR --output=OUT
      how often the model does as it is told: density, dynamics, genre; of notes the register, too

Writes OUT/table.json, with what each figure means, and OUT/table.csv.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

import subtractive_jax
from launch import evaluate_notes, program
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.evaluation import control, midi_control, midi_table, paper_table, table
from subtractive_jax.evaluation.embedders import Embedder, load_embedder
from subtractive_jax.model import Model
from subtractive_jax.representation.audio import FORMATS, read_audio, to_mono

_REFERENCE = flags.DEFINE_string("reference", None, "Folder of real audio.")
_CANDIDATE = flags.DEFINE_string("candidate", None, "Folder of generated audio.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_EMBEDDER = flags.DEFINE_string("embedder", "musicnn", "The network behind the distances.")
_EMBEDDER_WEIGHTS = flags.DEFINE_string(
    "embedder_weights", None, "A file that launch.convert wrote with --output; where it writes without unless given."
)
_PAPER_TABLE = flags.DEFINE_bool("paper_table", False, "Measure a model on a dataset instead of two folders.")
_MIDI_TABLE = flags.DEFINE_bool("midi_table", False, "Measure a model of notes on a dataset.")
_CONTROL = flags.DEFINE_bool("control", False, "Measure how a model follows instructions.")
_MODEL = flags.DEFINE_string("model", None, "Run folder, model folder or shipped name.")
_MIX_MODEL = flags.DEFINE_string("mix_model", None, "With --paper_table: a second model, of the other target.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the `windows` dataset to measure a model on.")
_SPLIT = flags.DEFINE_string("split", "test", "Its split.")
_STEM = flags.DEFINE_list("stem", ["drums"], "What to insert; --paper_table takes several, one table each.")
_NUM_WINDOWS = flags.DEFINE_integer("num_windows", 64, "Windows to measure on; of each case.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; the models' own unless given.")

_MOST_EXAMPLES = 1000  # windows of the train split that tell what genres are like


class Report(NamedTuple):
    """What was measured, and what writes more than tables into the output folder."""

    text: str
    csv: str
    document: dict[str, Any]
    write_page: Callable[[Path], object] = lambda folder: None


def embedder() -> Embedder:
    """That of --embedder, with the weights of --embedder_weights."""
    return load_embedder(_EMBEDDER.value, Path(_EMBEDDER_WEIGHTS.value) if _EMBEDDER_WEIGHTS.value else None)


def audio_files(folder: str) -> list[Path]:
    """A folder's audio files, by name.

    Raises:
      UserError: no such folder, no audio in it, or two files of one name.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower().removeprefix(".") in FORMATS)
    if not paths:
        raise UserError(f"{folder}: no {', '.join(FORMATS)} files in it")
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f'{folder}: several files are named "{min(twice)}": keep one of them')
    return paths


def recordings(paths: Sequence[Path]) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name without suffix, mono audio, sample rate in Hz) of each file."""
    for path in tqdm(paths, desc=str(paths[0].parent), leave=False):
        audio, sample_rate = read_audio(path)
        yield path.stem, to_mono(audio), sample_rate


def folders() -> Report:
    """The one-row table of two folders."""
    if not _REFERENCE.value or not _CANDIDATE.value:
        raise UserError(
            "give --reference=DIR and --candidate=DIR, or --paper_table, --midi_table or --control with --model"
        )
    reference, candidate = audio_files(_REFERENCE.value), audio_files(_CANDIDATE.value)
    network = embedder()
    row = table.compare(
        _CANDIDATE.value,
        table.embed_all(network, recordings(reference)),
        table.embed_all(network, recordings(candidate)),
    )
    about = {"embedder": network.name, "reference": _REFERENCE.value, "reference_count": len(reference)}
    return Report(table.to_text([row]), table.to_csv([row]), {**about, "rows": [row.as_json()]})


def given(names: Sequence[str | None], stems: Sequence[str]) -> tuple[list[Model], str]:
    """The models that were named, all of which know the stems, and the folder of the dataset."""
    if not _MODEL.value or not _DATA_DIR.value:
        raise UserError("--paper_table, --midi_table and --control need --model=MODEL and --data_dir=DIR")
    models = [subtractive_jax.load(name) for name in names if name]
    for model in models:
        for stem in stems:
            if stem not in model.stems:
                raise unknown_name("stem", stem, model.stems)
    return models, _DATA_DIR.value


def about_models(stems: Sequence[str]) -> dict[str, Any]:
    """What was measured on what, for table.json."""
    data = f"{_SPLIT.value} split of {_DATA_DIR.value}"
    return {"model": _MODEL.value, "data": data, "stem": ",".join(stems), "steps": _STEPS.value}


def paper() -> Report:
    """The paper's table on windows of a dataset, one for each stem set."""
    models, data_dir = given([_MODEL.value, _MIX_MODEL.value], _STEM.value)
    if any(model.writes_notes for model in models):
        raise UserError("--paper_table measures models of audio: give --midi_table for a model of notes")
    network = embedder()
    texts, rows = [], []
    for stem in _STEM.value:
        windows = list(paper_table.read_windows(data_dir, _SPLIT.value, stem, _NUM_WINDOWS.value))
        own = paper_table.measure(network, models, windows, _STEPS.value)
        if len(_STEM.value) > 1:
            own = [dataclasses.replace(row, name=f"{stem}: {row.name}") for row in own]
        texts.append(table.to_text(own))
        rows += own
    about = {"embedder": network.name, "reference": "the true mixes", **about_models(_STEM.value)}
    document = {
        **about,
        "mix_model": _MIX_MODEL.value,
        "definitions": paper_table.DEFINITIONS,
        "rows": [row.as_json() for row in rows],
    }
    return Report("\n\n".join(texts), table.to_csv(rows), document)


def midi() -> Report:
    """The cases of the paper's MIDI page on windows of a dataset."""
    stems = sorted({case.stem for case in midi_table.CASES})
    (model,), data_dir = given([_MODEL.value], stems)
    if not model.writes_notes:
        raise UserError("--midi_table measures models of notes: give --paper_table for a model of audio")
    known = midi_table.read_known(data_dir, stems)
    cases = evaluate_notes.measure(model, data_dir, _SPLIT.value, _NUM_WINDOWS.value, known, _STEPS.value)
    rows = evaluate_notes.rows(cases)
    document = {**about_models(stems), "definitions": midi_table.DEFINITIONS, "rows": [row.as_json() for row in rows]}
    return Report(
        evaluate_notes.to_text(cases),
        table.to_csv(rows, midi_table.METRICS),
        document,
        lambda folder: evaluate_notes.write_page(folder, f"Parts in notes by {Path(model.name).name}", cases, known),
    )


def instruction_control() -> Report:
    """How a model follows instructions on windows of a dataset."""
    if len(_STEM.value) > 1:
        raise UserError("--control takes one --stem at a time (stems that are missing together are joined by +)")
    ((model,), data_dir), (stem,) = given([_MODEL.value], _STEM.value), _STEM.value
    listener: control.Listener = control.AudioListener(model, stem, _STEPS.value)
    read: Callable[..., Iterable[Any]] = paper_table.read_windows
    if model.writes_notes:
        listener, read = midi_control.NoteListener(model, stem, _STEPS.value), midi_table.read_windows
    windows = list(read(data_dir, _SPLIT.value, stem, _NUM_WINDOWS.value))
    trials, note = control.measure(listener, windows, read(data_dir, "train", stem, _MOST_EXAMPLES))
    document = {**about_models([stem]), **control.as_json(listener, trials, note)}
    return Report(control.to_text(trials, note), control.to_csv(trials), document)


def write(output: Path, report: Report) -> None:
    """Writes the folder, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        (temporary / "table.json").write_text(json.dumps(report.document, indent=2) + "\n")
        (temporary / "table.csv").write_text(report.csv)
        report.write_page(temporary)
        temporary.chmod(0o755)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def main() -> None:
    output = Path(_OUTPUT.value)
    if output.exists():
        raise UserError(f"{output} exists: give another --output")
    reports = {paper: _PAPER_TABLE.value, midi: _MIDI_TABLE.value, instruction_control: _CONTROL.value}
    asked = [make for make, wanted in reports.items() if wanted]
    if len(asked) > 1:
        raise UserError("--paper_table, --midi_table and --control are different reports: give one of them")
    report = (asked or [folders])[0]()
    write(output, report)
    print(report.text)
    print(output / "table.json")


if __name__ == "__main__":
    program.run(main)
