"""Inserts a stem into songs: audio, measures and a listening page.

  python -m launch.sample --model=tiny --input=song.wav --instruction="Add reggae beats" --output=OUT
  python -m launch.sample --model=RUN --input=STEMS --remove --instruction="Add jazzy drums" --output=OUT
  python -m launch.sample --model=tiny --jobs=JOBS.jsonl --output=OUT

--model is a run folder, a model folder or the name of a shipped model. --input is a song without the stem; with
--remove it is a folder of stems (drums.wav, bass.wav, ...), of which the one named by --stem is left out.

OUT holds stem and mix of the best candidate, result.json, the other candidates in candidates/SEED/ and index.html, the
listening page. A line of JOBS.jsonl is {"id": ..., "input": ..., "instruction": ...} plus any other flag by name; flags
given on the command line hold for all lines. Each job's files go to OUT/ID/; one page and summary.jsonl cover all.
A job that fails is reported there, and the others go on.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import subtractive_jax
from launch import program
from subtractive_jax import page
from subtractive_jax.diffusion.solvers import SOLVERS
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.audio import FORMATS, read_audio, write_audio
from subtractive_jax.sampling import gates

if typing.TYPE_CHECKING:
    from subtractive_jax.model import Model

_MODEL = flags.DEFINE_string("model", None, "Run folder, model folder or name of a shipped model.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --output if an earlier run of this program wrote it.")
_JOBS = flags.DEFINE_string("jobs", None, "JSON lines of jobs, instead of --input and --instruction.")
flags.DEFINE_string("input", None, "Audio file of the song, or with --remove a folder of stems.")
flags.DEFINE_string("instruction", None, 'What to add, such as "Add reggae beats".')
flags.DEFINE_string("stem", "drums", "The stem to insert.")
flags.DEFINE_bool("remove", False, "Take the stem out first; --input is a folder of stems.")
flags.DEFINE_integer("num_candidates", 1, "Stems to draw, with seeds from --seed on; the best comes first.")
flags.DEFINE_integer("seed", 0, "The same seed gives the same stem.")
flags.DEFINE_string("solver", None, f"{', '.join(SOLVERS)}; the model's own unless given.")
flags.DEFINE_integer("steps", None, "Denoising steps; the model's own unless given.")
flags.DEFINE_float("text_guidance", None, "How strongly to follow the instruction; the model's own unless given.")
flags.DEFINE_float("context_guidance", None, "How strongly to follow the music; the model's own unless given.")
flags.DEFINE_string("method", "insert", "insert, or sdedit: the baseline with the base denoiser.")
flags.DEFINE_float("strength", None, "sdedit: how much of the song is redrawn, above 0 and at most 1.")
flags.DEFINE_float("start", 0.0, "Where in the song the stem may begin, in seconds.")
flags.DEFINE_float("end", None, "Where in the song the stem must end, in seconds.")
flags.DEFINE_float("stem_gain_db", 0.0, "Makes the stem louder or softer.")
flags.DEFINE_string("format", "wav", f"Of the audio files: {', '.join(FORMATS)}.")

OPTIONS = (  # of `Model.insert`, passed on as they are
    "solver",
    "steps",
    "text_guidance",
    "context_guidance",
    "method",
    "strength",
    "start",
    "end",
    "stem_gain_db",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of a jobs file, or the command line; fields are the flags of the same names."""

    id: str
    input: str
    instruction: str
    stem: str
    remove: bool
    num_candidates: int
    seed: int
    solver: str | None
    steps: int | None
    text_guidance: float | None
    context_guidance: float | None
    method: str
    strength: float | None
    start: float
    end: float | None
    stem_gain_db: float
    format: str

    def __post_init__(self) -> None:
        if self.format == "mid":
            raise UserError('format "mid": this model writes audio, not notes')
        if self.format not in FORMATS:
            raise unknown_name("format", self.format, FORMATS)
        if self.num_candidates < 1:
            raise UserError(f"num_candidates {self.num_candidates}: draw one at least")


def job_from(fields: Mapping[str, Any]) -> Job:
    """Checks names and types.

    Raises:
      UserError: an unknown, missing or mistyped field.
    """
    types = typing.get_type_hints(Job)
    for name, value in fields.items():
        if name not in types:
            raise unknown_name("job field", name, types)
        allowed = typing.get_args(types[name]) or (types[name],)
        if float in allowed:
            allowed += (int,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise UserError(f"job field {name} is {json.dumps(value)}: it should be of type {allowed[0].__name__}")
    return Job(**fields)


def flag_values() -> dict[str, Any]:
    """The command line's values for all fields of `Job` but its id."""
    return {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Job) if field.name != "id"}


def jobs_in(path: str, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Job | UserError]]:
    """(id, job or what is wrong with it) of each line of a jobs file.

    Raises:
      UserError: the file is missing or holds no jobs.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a jobs file ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: no jobs in it")
    seen: set[str] = set()
    for number, line in numbered:
        name = f"line-{number}"
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict) or not {"id", "input", "instruction"} <= fields.keys():
                raise UserError(f"{path}:{number}: a job needs id, input and instruction")
            if not isinstance(fields["id"], str) or not re.fullmatch(r"[\w-][\w .+-]{0,99}", fields["id"]):
                raise UserError(f"{path}:{number}: the id {fields['id']!r} cannot name a folder")
            if fields["id"] in seen:
                raise UserError(f'{path}:{number}: the id "{fields["id"]}" is taken by an earlier line')
            name = fields["id"]
            seen.add(name)
            yield name, job_from({**defaults, **fields})
        except json.JSONDecodeError as error:
            yield name, UserError(f"{path}:{number}: not JSON ({error})")
        except UserError as error:
            yield name, error


def read_song(job: Job) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(the song without the stem, the whole song if known, sample rate); audio [channels, samples].

    Raises:
      UserError: the input is not what `remove` says, or unreadable.
    """
    path = Path(job.input)
    if path.suffix.lower() in (".mid", ".midi"):
        raise UserError(f"{path}: this version inserts into audio, not MIDI")
    if not path.is_dir():
        if job.remove:
            raise UserError(f"{path}: to remove a stem, give a folder of stems; this version does not separate mixes")
        context, sample_rate = read_audio(path)
        return context, None, sample_rate
    if not job.remove:
        raise UserError(f"{path} is a folder: add --remove to take the {job.stem} out of a folder of stems")
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower().removeprefix(".") in FORMATS}
    removed_stems = set(job.stem.split("+"))
    for name in removed_stems - files.keys():
        raise unknown_name(f"stem in {path}", name, files)
    if len(files) == 1:
        raise UserError(f"{path}: nothing is left without the {job.stem}")
    stems = {name: read_audio(file) for name, file in files.items()}
    rates = {sample_rate for _, sample_rate in stems.values()}
    if len(rates) > 1:
        raise UserError(f"{path}: the stems have different sample rates ({', '.join(map(str, sorted(rates)))} Hz)")
    channels = {len(audio) for audio, _ in stems.values()}
    if len(channels - {1}) > 1:
        raise UserError(
            f"{path}: the stems have different numbers of channels ({', '.join(map(str, sorted(channels)))})"
        )
    shape = max(channels), max(audio.shape[1] for audio, _ in stems.values())
    context, removed = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for name, (audio, _) in stems.items():
        (removed if name in removed_stems else context)[:, : audio.shape[1]] += audio
    return context, context + removed, rates.pop()


def sample(model: "Model", job: Job, folder: Path) -> tuple[dict[str, Any], page.Row]:
    """Does one job.

    Returns:
      (the content of `folder/result.json`, the job's row of the listening page with files relative to `folder`).

    Raises:
      UserError: the job cannot be done.
    """
    context, original, sample_rate = read_song(job)
    options = {name: getattr(job, name) for name in OPTIONS}
    candidates = []
    for seed in range(job.seed, job.seed + job.num_candidates):
        with tqdm(desc=f"{job.id} (seed {seed})", unit="step", disable=None, leave=False) as bar:

            def progress(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            candidates.append(
                model.insert(context, sample_rate, job.instruction, job.stem, seed, progress=progress, **options)
            )
    candidates.sort(key=lambda candidate: gates.score(candidate.info["figures"]), reverse=True)
    folder.mkdir(parents=True, exist_ok=True)
    for rank, candidate in enumerate(candidates):
        place = folder / "candidates" / str(candidate.info["seed"]) if rank else folder
        place.mkdir(parents=True, exist_ok=True)
        write_audio(place / f"stem.{job.format}", candidate.stem, sample_rate)
        write_audio(place / f"mix.{job.format}", candidate.mix, sample_rate)
    players = [
        ("Without the stem", f"without_stem.{job.format}"),
        ("With the new stem", f"mix.{job.format}"),
        ("New stem alone" + " (estimated)" * candidates[0].estimated, f"stem.{job.format}"),
    ]
    write_audio(folder / players[0][1], context, sample_rate)
    if original is not None:
        players.insert(0, ("Original", f"original.{job.format}"))
        write_audio(folder / players[0][1], original, sample_rate)
    scores = {candidate.info["seed"]: gates.score(candidate.info["figures"]) for candidate in candidates}
    result = {"id": job.id, "input": job.input, **candidates[0].info, "candidates": scores}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result, page_row(result, players)


def page_row(result: Mapping[str, Any], players: list[tuple[str, str]]) -> page.Row:
    """What the listening page says about a result."""
    measured = result["figures"]
    kept = measured["preservation"]
    figures = {
        "Onset agreement (F1)": measured["onsets"]["f1"],
        "Stem against music (dB)": measured["stem_level_db"],
        "Music kept": "exactly" if kept["exact"] else f"within {kept['log_spectral_distance_db']:.1f} dB",
        "Flags": measured["flags"],
    }
    names = ("stem", "method", "seed", "solver", "steps", "text_guidance", "context_guidance", "strength", "model")
    settings = {name.replace("_", " ").capitalize(): result[name] for name in names if name in result}
    return page.Row(result["id"], result["instruction"], players, settings, figures)


def run_jobs(model: "Model", path: str, folder: Path) -> tuple[list[page.Row], int]:
    """Does all jobs of a file, writes `summary.jsonl`, and returns the page's rows and the number of failures."""
    rows, failures = [], 0
    with (folder / "summary.jsonl").open("w", encoding="utf-8") as summary:
        for name, job in jobs_in(path, flag_values()):
            try:
                if isinstance(job, UserError):
                    raise job
                result, row = sample(model, job, folder / name)
                rows.append(
                    dataclasses.replace(row, players=[(label, f"{name}/{file}") for label, file in row.players])
                )
                line = {"id": name, "status": "done", "result": result}
            except UserError as error:
                failures += 1
                instruction = job.instruction if isinstance(job, Job) else "This job was not understood"
                rows.append(page.Row(name, instruction, note=str(error)))
                line = {"id": name, "status": "failed", "error": str(error)}
            print(f"{name}: {line.get('error', 'done')}", flush=True)
            summary.write(json.dumps(line) + "\n")
            summary.flush()
    return rows, failures


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that appears as `path` when the block ends without an exception, and not at all otherwise.

    Raises:
      UserError: `path` exists and may not be replaced.
    """
    if path.exists():
        if not overwrite:
            raise UserError(f"{path} exists: give another --output, or --overwrite")
        if not any((path / name).is_file() for name in ("result.json", "summary.jsonl")):
            raise UserError(f"{path} was not written by this program, so --overwrite does not replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(temporary / "old")
        new.rename(path)
    finally:
        shutil.rmtree(temporary)


def main() -> None:
    values = flag_values()
    if _JOBS.value and (values["input"] or values["instruction"]):
        raise UserError("give either --jobs, or --input and --instruction")
    if not _JOBS.value and (values["input"] is None or values["instruction"] is None):
        raise UserError("give --input and --instruction, or --jobs")
    output = Path(_OUTPUT.value)
    with new_folder(output, _OVERWRITE.value) as folder:
        model = subtractive_jax.load(_MODEL.value)
        if _JOBS.value:
            rows, failures = run_jobs(model, _JOBS.value, folder)
            page.write(folder, f"{len(rows)} jobs with {_MODEL.value}", rows)
        else:
            job = job_from({"id": Path(values["input"]).resolve().stem, **values})
            _, row = sample(model, job, folder)
            page.write(folder, f"New {job.stem} for {job.id}", [row])
    print(output / "index.html")
    if _JOBS.value and failures:
        raise UserError(f"{failures} of {len(rows)} jobs failed: see {output / 'summary.jsonl'}")


if __name__ == "__main__":
    program.run(main)
