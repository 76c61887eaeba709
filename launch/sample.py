"""Inserts stems into songs: audio, measures and a listening page.

  python -m launch.sample --model=tiny --input=song.wav --instruction="Add reggae beats" --output=OUT
  python -m launch.sample --model=RUN --input=STEMS --remove --instruction="Add jazzy drums" --output=OUT
  python -m launch.sample --model=RUN --input=song.wav --stem=bass,drums --instruction="Add a bass | Add rock drums" ...
  python -m launch.sample --model=tiny --jobs=JOBS.jsonl --output=OUT

--model is a run folder, a model folder or the name of a shipped model. --input is a song without the stem, or a MIDI
file, which is rendered. With --remove the stem is taken out first: --input is a folder of stems (drums.wav, bass.wav,
...), of which the one named by --stem is left out, a MIDI file, whose tracks of the stem are, or a complete song, which
Demucs separates. With --start and --end as well, the old stem stays outside of them, and the new one continues it.

A model of notes, such as midi_tiny, takes a MIDI file and writes stem.mid and mix.mid, in which all tracks of the song
are as they were; the page plays renderings of them.

--stem=bass,drums inserts one after the other, each to the song with those before it; --stem=bass+drums both at once, if
the model has learnt that.

OUT holds stem and mix of the best candidate, result.json, the other candidates in candidates/SEED/ and index.html, the
listening page. A line of JOBS.jsonl is {"id": ..., "input": ..., "instruction": ...} plus any other flag by name; flags
given on the command line hold for all lines, and the seed of a line without one follows from its id. Each job's files
go to OUT/ID/; one page and summary.jsonl cover all. A job that fails is reported there, and the others go on. Run again
with the same --output, the program skips the jobs that are finished.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import time
import typing
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import subtractive_jax
from launch import program, sample_notes
from subtractive_jax import page
from subtractive_jax.diffusion.solvers import SOLVERS
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.audio import FORMATS, audio_writer, check_format, resampled
from subtractive_jax.sampling import candidates, gates, note_gates
from subtractive_jax.sampling.insert import Settings
from subtractive_jax.sampling.insert_notes import NoteInsertion
from subtractive_jax.sampling.insertion import Insertion, on_grid
from subtractive_jax.sampling.song import Song, SongFile, Sum

if typing.TYPE_CHECKING:
    from subtractive_jax.model import Model

_MODEL = flags.DEFINE_string("model", None, "Run folder, model folder or name of a shipped model.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist, but for --jobs.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --output if an earlier run of this program wrote it.")
_JOBS = flags.DEFINE_string("jobs", None, "JSON lines of jobs, instead of --input and --instruction.")
flags.DEFINE_string("input", None, "Audio or MIDI file of the song, or with --remove also a folder of stems.")
flags.DEFINE_string("instruction", None, 'What to add, such as "Add reggae beats"; one for each stem with | between.')
flags.DEFINE_string("stem", "drums", "The stem to insert; several with commas, one after the other.")
flags.DEFINE_bool("remove", False, "Take the stem out first.")
flags.DEFINE_string("separator", "htdemucs", "The Demucs model that takes stems out of complete songs.")
flags.DEFINE_string("separator_repo", "", "A folder with that model, instead of the published ones.")
flags.DEFINE_integer("num_candidates", 1, "Stems to draw, with seeds from --seed on; the best comes first.")
flags.DEFINE_integer("max_redraws", 0, "How many more to draw in place of silent, unchanged or clipping ones.")
flags.DEFINE_integer("seed", None, "The same seed gives the same stem. 0 unless given.")
flags.DEFINE_string("solver", None, f"{', '.join(SOLVERS)}; the model's own unless given. ddim is Euler's for flow.")
flags.DEFINE_integer("steps", None, "Denoising steps; the model's own unless given.")
flags.DEFINE_float("text_guidance", None, "How strongly to follow the instruction; the model's own unless given.")
flags.DEFINE_float("context_guidance", None, "How strongly to follow the music; the model's own unless given.")
flags.DEFINE_float(
    "guidance_rescale", None, "0 to 1: how far to undo what guidance does to the level; the model's own unless given."
)
flags.DEFINE_string("guidance_interval", "0,1", "Where there is guidance: shares of the timesteps, 0 clean, 1 noise.")
flags.DEFINE_string("method", "insert", "insert, or sdedit: the baseline with the base denoiser.")
flags.DEFINE_float("strength", None, "sdedit: how much of the song is redrawn, above 0 and at most 1.")
flags.DEFINE_float("start", 0.0, "Where in the song the stem may begin, in seconds.")
flags.DEFINE_float("end", None, "Where in the song the stem must end, in seconds.")
flags.DEFINE_float("stem_gain_db", 0.0, "Makes the stem louder or softer.")
flags.DEFINE_string("format", None, f"Of the files: {', '.join(FORMATS)}, wav unless given; mid of a model of notes.")

_MIDI_RATE = 44_100  # Hz, at which MIDI is rendered
LOSSY = ("mp3", "ogg")
_ROWS_SHOWN = 40  # of the table at the end


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of a jobs file, or the command line; fields are the flags of the same names."""

    id: str
    input: str
    instruction: str
    stem: str
    remove: bool
    separator: str
    separator_repo: str
    num_candidates: int
    max_redraws: int
    seed: int
    solver: str | None
    steps: int | None
    text_guidance: float | None
    context_guidance: float | None
    guidance_rescale: float | None
    guidance_interval: str
    method: str
    strength: float | None
    start: float
    end: float | None
    stem_gain_db: float
    format: str | None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in ("mid", *FORMATS):
            raise unknown_name("format", self.format, ("mid", *FORMATS))

    @property
    def audio_format(self) -> str:
        """That of audio files.

        Raises:
          UserError: it is to be MIDI.
        """
        if self.format == "mid":
            raise UserError('format "mid": this model writes audio, not notes; "midi_tiny" writes notes')
        return self.format or "wav"

    @property
    def stems(self) -> list[str]:
        """Those inserted one after the other."""
        return [name.strip() for name in self.stem.split(",")]

    @property
    def settings(self) -> Settings:
        """Those of the sampler.

        Raises:
          UserError: `guidance_interval` is not two numbers.
        """
        try:
            low, high = map(float, self.guidance_interval.split(","))
        except ValueError:
            raise UserError(
                f'guidance_interval "{self.guidance_interval}": give two numbers, such as 0.1,0.9'
            ) from None
        names = {field.name for field in dataclasses.fields(Settings)} - {"guidance_interval"}
        return Settings(guidance_interval=(low, high), **{name: getattr(self, name) for name in names})


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
            fields = {**defaults, **fields}
            if fields["seed"] is None:
                fields["seed"] = zlib.crc32(name.encode())
            yield name, job_from(fields)
        except json.JSONDecodeError as error:
            yield name, UserError(f"{path}:{number}: not JSON ({error})")
        except UserError as error:
            yield name, error


@dataclasses.dataclass(frozen=True)
class Input:
    """What a job starts from.

    Attributes:
      context: the song without the stems.
      old_stems: for each stem to insert what was there before, where that is known.
      original: the whole song, where that is known.
    """

    context: Song
    old_stems: Sequence[Song | None]
    original: Song | None


def read_input(job: Job, folder: Path) -> Input:
    """Opens the input; what Demucs takes out of it is put into `folder`.

    Raises:
      UserError: the input is not what `remove` says, or unreadable.
    """
    path = Path(job.input)
    if path.suffix.lower() in (".mid", ".midi"):
        songs = rendered(path, folder)
        return without(job, songs) if job.remove else Input(total(songs), [None] * len(job.stems), None)
    if not path.is_dir():
        song = SongFile(path)
        return separated(job, song, folder) if job.remove else Input(song, [None] * len(job.stems), None)
    if not job.remove:
        raise UserError(f"{path} is a folder: add --remove to take the {job.stem} out of a folder of stems")
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower().removeprefix(".") in FORMATS]
    return without(job, {file.stem: SongFile(file) for file in files})


def total(songs: Mapping[str, Song], chosen: Collection[str] | None = None) -> Sum:
    """The sum of the chosen stems (of all unless given), as long, and of as many channels, as all of them."""
    return Sum(list(songs.values()), [1.0 if chosen is None or name in chosen else 0.0 for name in songs])


def without(job: Job, songs: Mapping[str, Song]) -> Input:
    """Leaves the job's stems out of a song whose stems are known.

    Raises:
      UserError: they are not there, or nothing else is.
    """
    removed = [stem.split("+") for stem in job.stems]
    names = {name for group in removed for name in group}
    for name in names - songs.keys():
        raise unknown_name(f"stem in {job.input}", name, songs)
    if names == songs.keys():
        raise UserError(f"{job.input}: nothing is left without the {job.stem}")
    context = total(songs, songs.keys() - names)
    return Input(context, [total(songs, group) for group in removed], Sum([context, total(songs, names)], [1.0, 1.0]))


def rendered(path: Path, folder: Path) -> dict[str, SongFile]:
    """The stems of a MIDI file by name, rendered into `folder` as datasets are.

    Raises:
      UserError: the file is damaged or holds no notes, or the renderer is not installed.
    """
    try:
        from data_pipeline import song
        from data_pipeline.sources import midi
    except ImportError as error:
        raise UserError(f"{path}: MIDI needs the extra `pipeline`: pip install 'subtractive-jax[pipeline]'") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        recording = midi.load(song.Song("", "", "midi", (("midi", str(path)),)), _MIDI_RATE, song.Tools())
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(audio_writer(folder / f"{name}.wav", 1, _MIDI_RATE)) for name in recording.stems
            ]
            for block in tqdm(
                recording.blocks, desc=f"{path.name}: rendering", unit="block", disable=None, leave=False
            ):
                for write, samples in zip(writers, block, strict=True):
                    write(on_grid(samples[None]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {name: SongFile(folder / f"{name}.wav") for name in recording.stems}


def separated(job: Job, song: SongFile, folder: Path) -> Input:
    """Takes the stems out of a complete song; what Demucs hears of them is subtracted from the song."""
    from data_pipeline import separation
    from data_pipeline.song import Tools

    separator = separation.separator(Tools(separator=job.separator, separator_repo=job.separator_repo))
    samples = 0

    def mixture() -> Iterator[np.ndarray]:
        nonlocal samples
        samples = 0
        for block in resampled(song.blocks(), song.sample_rate, separator.sample_rate):
            yield np.broadcast_to(block, (2, block.shape[1])) if song.channels == 1 else block[:2]

    if song.channels > 2:
        raise UserError(f"{song.path}: {song.channels} channels; Demucs separates mono and stereo")
    names = sorted({name for stem in job.stems for name in stem.split("+")})
    paths = [folder / f"removed_{name}.wav" for name in names]
    length = sum(block.shape[1] for block in song.blocks())
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(audio_writer(path, song.channels, song.sample_rate)) for path in paths]
        bar = stack.enter_context(tqdm(desc=f"{job.id}: separating", total=length, unit="sample", leave=False))
        flat = (block.reshape(-1, block.shape[-1]) for block in separator.extract(mixture, names))
        for block in resampled(flat, separator.sample_rate, song.sample_rate):
            block = block[:, : length - samples]
            samples += block.shape[1]
            bar.update(block.shape[1])
            for write, stereo in zip(writers, block.reshape(len(names), 2, -1), strict=True):
                write(on_grid(stereo if song.channels == 2 else stereo.mean(axis=0, keepdims=True)))
    removed = {name: SongFile(path) for name, path in zip(names, paths, strict=True)}
    old_stems = [Sum([removed[name] for name in stem.split("+")], [1.0] * len(stem.split("+"))) for stem in job.stems]
    return Input(Sum([song, *old_stems], [1.0] + [-1.0] * len(old_stems)), old_stems, song)


def sample(model: "Model", job: Job, folder: Path) -> dict[str, Any]:
    """Does one job.

    Returns:
      The content of `folder/result.json`.

    Raises:
      UserError: the job cannot be done.
    """
    began = time.perf_counter()
    if model.writes_notes:
        with progress_bar(job) as progress:
            parts, players = sample_notes.sample(model, job, folder, progress)
        return write_result(folder, job, parts, note_gates.score, players, began)
    format = job.audio_format
    with tempfile.TemporaryDirectory(dir=folder, prefix=".removed.") as temporary:
        given = read_input(job, Path(temporary))
        check_format(format, given.context.channels, given.context.sample_rate)
        with progress_bar(job) as progress:
            found = candidates.in_turn(
                model,
                given.context,
                [text.strip() for text in job.instruction.split("|")],
                job.stems,
                job.settings,
                job.seed,
                job.num_candidates,
                job.max_redraws,
                given.old_stems,
                progress,
            )
        best = [ranked[0] for ranked in found]
        players = write_best(folder, job, given, best)
        for stem, ranked in zip(job.stems, found, strict=True):
            for other in ranked[1:]:
                place = folder / "candidates" / str(other.info["seed"])
                place.mkdir(parents=True, exist_ok=True)
                write_parts(other, place, format, f"_{stem}" if len(found) > 1 else "")
    return write_result(folder, job, found, gates.score, players, began)


def write_result(
    folder: Path,
    job: Job,
    found: Sequence[Sequence[Insertion | NoteInsertion]],
    score: Callable[[dict[str, Any]], float],
    players: list[tuple[str, str]],
    began: float,
) -> dict[str, Any]:
    """Writes `result.json` and returns its content.

    Args:
      found: for each stem its candidates, the best first; `score` ranked them.
      began: when the job did, by `time.perf_counter`.
    """
    best = [ranked[0] for ranked in found]
    scores = [{one.info["seed"]: score(one.info["figures"]) for one in ranked} for ranked in found]
    result = {"id": job.id, "input": job.input, **best[-1].info, "candidates": scores[-1]}
    if len(found) > 1:
        stems = [{**one.info, "candidates": each} for one, each in zip(best, scores, strict=True)]
        result |= {"stem": job.stem, "instruction": job.instruction, "stems": stems}
    result |= {"players": players, "job": dataclasses.asdict(job)}
    result["seconds"] = {**result["seconds"], "all": time.perf_counter() - began}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


@contextlib.contextmanager
def progress_bar(job: Job) -> Iterator[Callable[[int, int], None]]:
    """Yields what is called with (calls of the denoiser done, calls in all)."""
    with tqdm(desc=job.id, unit="step", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def write_parts(insertion: Insertion, folder: Path, format: str, suffix: str) -> None:
    """Writes stem and mix."""
    channels, rate = insertion.channels, insertion.sample_rate
    with (
        audio_writer(folder / f"stem{suffix}.{format}", channels, rate) as write_stem,
        audio_writer(folder / f"mix{suffix}.{format}", channels, rate) as write_mix,
    ):
        for _, stem, mix in insertion.parts():
            write_stem(stem)
            write_mix(mix)


def write_best(folder: Path, job: Job, given: Input, best: Sequence[Insertion]) -> list[tuple[str, str]]:
    """Writes the song before and after, and the stems; returns the page's players."""
    players = {
        "original": "Original",
        "without_stem": "Without the stem",
        "mix": "With the new stem",
        "stem": "New stem alone",
    }
    if given.original is None:
        del players["original"]
    if any(one.estimated for one in best):
        players["stem"] += " (estimated)"
    alone = [f"stem_{name}" for name in job.stems] if len(best) > 1 else []
    channels, rate = given.context.channels, given.context.sample_rate
    with contextlib.ExitStack() as stack:

        def writer(name: str) -> Callable[[np.ndarray], None]:
            return stack.enter_context(audio_writer(folder / f"{name}.{job.audio_format}", channels, rate))

        writers = {name: writer(name) for name in [*players, *alone]}
        for parts in zip(*(one.parts() for one in best), strict=True):
            writers["without_stem"](parts[0][0])
            writers["stem"](sum(stem for _, stem, _ in parts))
            writers["mix"](parts[-1][2])
            for name, (_, stem, _) in zip(alone, parts, strict=False):
                writers[name](stem)
        if given.original is not None:
            for block in given.original.blocks():
                writers["original"](block)
    return [(label, f"{name}.{job.audio_format}") for name, label in players.items()]


def is_notes(result: Mapping[str, Any]) -> bool:
    return result["target"] == "notes"


def page_row(result: Mapping[str, Any], root: Path, folder: str = "") -> page.Row:
    """What the page in `root` says about a result, whose files are in its `folder`."""
    measured = result["figures"]
    kept = measured["preservation"]
    exactly = "exactly" + (f", but for {result['job']['format']}" if result["job"]["format"] in LOSSY else "")
    music_kept = exactly if kept["exact"] else f"within {kept['log_spectral_distance_db']:.1f} dB"
    if is_notes(result):
        figures = sample_notes.page_figures(measured)
    else:
        figures = {
            "Onset agreement (F1)": measured["onsets"]["f1"],
            "Beat agreement (F1)": measured["beats"],
            "Stem against music (dB)": measured["stem_level_db"],
        }
    figures |= {"Music kept": music_kept}
    names = ("stem", "method", "seed", "solver", "steps", "text_guidance", "context_guidance", "strength", "model")
    settings = {name.replace("_", " ").capitalize(): result[name] for name in names if name in result}
    players = [(label, f"{folder}{file}") for label, file in result["players"]]
    section = "Style transfer" if result["job"]["remove"] else "Generation"
    return page.Row(
        result["id"],
        result["instruction"],
        players,
        settings,
        figures,
        section=section,
        flags=measured["flags"],
        picture=sample_notes.picture(root / folder) if is_notes(result) else b"",
    )


def run_jobs(model: "Model", jobs: Sequence[tuple[str, Job | UserError]], folder: Path) -> tuple[list[page.Row], int]:
    """Does the jobs that `folder` lacks, writes `summary.jsonl`, and returns the page's rows and failures."""
    rows, lines = [], []
    with (folder / "summary.jsonl").open("w", encoding="utf-8") as summary:
        for name, job in jobs:
            try:
                if isinstance(job, UserError):
                    raise job
                result = finished(job, folder / name)
                if result is None:
                    with new_folder(folder / name, overwrite=False) as place:
                        result = sample(model, job, place)
                rows.append(page_row(result, folder, f"{name}/"))
                line = {"id": name, "status": "done", "result": result}
            except Exception as error:  # whatever one job meets, the others go on
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                reason = " ".join(reason.split())
                instruction = job.instruction if isinstance(job, Job) else "This job was not understood"
                rows.append(page.Row(name, instruction, note=reason, section="Not done"))
                line = {"id": name, "status": "failed", "error": reason}
            tqdm.write(f"{name}: {line.get('error', 'done')}")
            summary.write(json.dumps(line) + "\n")
            summary.flush()
            lines.append(line)
    print(table(lines))
    return rows, sum(line["status"] == "failed" for line in lines)


def finished(job: Job, folder: Path) -> dict[str, Any] | None:
    """The result of an earlier run, if it is there.

    Raises:
      UserError: it is of another job.
    """
    if not folder.exists():
        return None
    try:
        result = json.loads((folder / "result.json").read_text())
        before = {**result["job"], "model": result["model"]}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is there, and is no result of this program: give another --output") from error
    now = {**dataclasses.asdict(job), "model": _MODEL.value}
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} is of another job ({name} was {before.get(name)}, now {value}): give another --output, or "
                "--overwrite to do all again"
            )
    return result


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What came of the jobs, for a terminal."""
    done = [line["result"] for line in lines if line["status"] == "done"]
    width = max(len(line["id"]) for line in lines)
    text: list[str] = []
    for result in done[:_ROWS_SHOWN]:
        measured = result["figures"]
        if is_notes(result):
            columns = sample_notes.table_columns(measured)
        else:
            columns = {
                "onset F1": f"{measured['onsets']['f1']:.2f}",
                "beat F1": f"{measured['beats']:.2f}",
                "stem dB": f"{measured['stem_level_db']:.1f}",
            }
        text = text or [f"{'':<{width}}  {'  '.join(columns)}  flags"]
        values = "".join(f"{value:>{len(name) + 2}}" for name, value in columns.items())
        text.append(f"{result['id']:<{width}}{values}  {', '.join(measured['flags']) or '-'}")
    if len(done) > _ROWS_SHOWN:
        text.append(f"... and {len(done) - _ROWS_SHOWN} more in summary.jsonl")
    flagged = sum(bool(result["figures"]["flags"]) for result in done)
    seconds = sum(result["seconds"]["all"] for result in done)
    text.append(f"{len(done)} done in {seconds:.0f} s, {flagged} of them flagged; {len(lines) - len(done)} failed")
    return "\n".join(text)


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


@contextlib.contextmanager
def jobs_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder, or that of an earlier run of jobs, to go on in.

    Raises:
      UserError: `path` exists and is neither.
    """
    if overwrite or not path.exists():
        if path.exists():
            with new_folder(path, overwrite):
                pass
        path.mkdir(parents=True, exist_ok=True)
    elif not (path / "summary.jsonl").is_file():
        raise UserError(f"{path} exists and holds no jobs of this program: give another --output")
    for unfinished in path.glob(".*/"):  # of a run that was killed
        shutil.rmtree(unfinished)
    yield path


def main() -> None:
    values = flag_values()
    if _JOBS.value and (values["input"] or values["instruction"]):
        raise UserError("give either --jobs, or --input and --instruction")
    if not _JOBS.value and (values["input"] is None or values["instruction"] is None):
        raise UserError("give --input and --instruction, or --jobs")
    output = Path(_OUTPUT.value)
    if _JOBS.value:
        jobs = list(jobs_in(_JOBS.value, values))
        model = subtractive_jax.load(_MODEL.value)
        with jobs_folder(output, _OVERWRITE.value) as folder:
            rows, failures = run_jobs(model, jobs, folder)
            page.write(folder, f"{len(rows)} jobs with {_MODEL.value}", rows)
        print(output / "index.html")
        if failures:
            raise UserError(f"{failures} of {len(rows)} jobs failed: see {output / 'summary.jsonl'}")
        return
    with new_folder(output, _OVERWRITE.value) as folder:
        model = subtractive_jax.load(_MODEL.value)
        job = job_from({"id": Path(values["input"]).resolve().stem, **values, "seed": values["seed"] or 0})
        result = sample(model, job, folder)
        page.write(folder, f"New {job.stem} for {job.id}", [page_row(result, folder)])
    print(output / "index.html")


if __name__ == "__main__":
    program.run(main)
