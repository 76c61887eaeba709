"""Where songs come from: `KIND:PATH` to a list of `Song`s, without reading any music yet.

  midi:PATH    a folder with one `*.jsonl` manifest, one object a song with `id` and `midi` (a path inside the folder),
               or, without a manifest, every `.mid` file under the folder
  stems:PATH   a folder of songs, each a folder of audio files named after their stems, with an optional `tags.json`

`group_id` (groove family, album, piece) decides the split; where a source has none it is the song's id.
A new kind is one function from a folder to songs and rejections, entered in `KINDS`; see also `render.load_stems`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.grouping import STEMS
from subtractive_jax.errors import UserError, unknown_name

SHIPPED = Path(__file__).parent / "songs"
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
_MIXES = ("mix", "mixture")  # what collections call the sum of their stems: not a stem

# What a manifest may say about a song's sound. Titles and free text stay out of the records.
TAGS = ("genre", "style", "tempo", "key", "time_signature", "dynamics", "feel", "stems")


@dataclasses.dataclass(frozen=True)
class Song:
    """One song: what identifies it, where its music is, what is known about it."""

    song_id: str
    group_id: str
    kind: str  # a key of KINDS
    path: str  # a MIDI file, or a folder of stem files
    sha256: tuple[str, ...]  # of its music files
    tags: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A refused input: one line of `rejected.jsonl`."""

    song_id: str
    source: str
    reason: str


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder; nothing outside it can be named."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f'the path "{name}" leads out of the source folder')
    if not path.is_file():
        raise UserError(f'no such file "{name}" in the source folder')
    return path


def _manifest_song(folder: Path, line: str) -> Song:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("midi"), str):
        raise UserError('a manifest line is a JSON object with the texts "id" and "midi"')
    path = _inside(folder, row["midi"])
    tags = {key: row[key] for key in TAGS if row.get(key) is not None}
    return Song(row["id"], str(row.get("group_id") or row["id"]), "midi", str(path), (_sha256(path),), tags)


def _midi_songs(folder: Path) -> Iterable[Song | Rejected]:
    manifests = sorted(folder.glob("*.jsonl"))
    if len(manifests) > 1:
        raise UserError(f"{folder}: more than one manifest ({', '.join(path.name for path in manifests)}); keep one")
    if manifests:
        for number, line in enumerate(manifests[0].read_text().splitlines(), 1):
            try:
                yield _manifest_song(folder, line)
            except (UserError, json.JSONDecodeError) as error:
                yield Rejected("", f"{manifests[0].name}:{number}", str(error))
        return
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi")):
        song_id = path.relative_to(folder).with_suffix("").as_posix()
        yield Song(song_id, song_id, "midi", str(path), (_sha256(path),), {})


def stem_files(folder: Path) -> dict[str, Path]:
    """Stem name to audio file of one song's folder.

    Raises:
      UserError: a file's name is no stem's, or two files name the same stem.
    """
    files: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES):
        stem = path.stem.lower()
        if stem in _MIXES:
            continue
        if stem not in STEMS:
            raise unknown_name("stem", stem, STEMS)
        if stem in files:
            raise UserError(f'two files for the stem "{stem}": {files[stem].name} and {path.name}')
        files[stem] = path
    return files


def _stem_song(folder: Path) -> Song:
    tags_file = folder / "tags.json"
    tags = json.loads(tags_file.read_text()) if tags_file.is_file() else {}
    if not isinstance(tags, dict):
        raise UserError("tags.json is not a JSON object")
    files = stem_files(folder)
    if len(files) < 2:
        raise UserError("fewer than two stem files")
    return Song(
        folder.name,
        str(tags.get("group_id") or folder.name),
        "stems",
        str(folder),
        tuple(_sha256(path) for path in files.values()),
        {key: tags[key] for key in TAGS if tags.get(key) is not None},
    )


def _stem_songs(folder: Path) -> Iterable[Song | Rejected]:
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            yield _stem_song(path)
        except (UserError, json.JSONDecodeError) as error:
            yield Rejected(path.name, path.name, str(error))


KINDS: dict[str, Callable[[Path], Iterable[Song | Rejected]]] = {"midi": _midi_songs, "stems": _stem_songs}


def find_songs(sources: Sequence[str]) -> tuple[list[Song], list[Rejected]]:
    """All songs of all sources, sorted by id, and what was refused.

    Args:
      sources: texts `KIND:PATH`; the shipped songs when empty.

    Raises:
      UserError: a kind is unknown, or a folder is missing.
    """
    songs: dict[str, Song] = {}
    rejected = []
    for source in sources or [f"midi:{SHIPPED}"]:
        kind, _, name = source.partition(":")
        if kind not in KINDS:
            raise unknown_name("kind of source", kind, KINDS)
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"--source={source}: no such folder")
        for item in KINDS[kind](folder):
            if isinstance(item, Rejected):
                rejected.append(item)
            elif item.song_id in songs:
                rejected.append(Rejected(item.song_id, item.path, "another song has the same id"))
            else:
                songs[item.song_id] = item
    return [songs[song_id] for song_id in sorted(songs)], rejected


def held_out() -> dict[str, str]:
    """The shipped songs that no model may train on: id to SHA-256 of the MIDI file."""
    return json.loads((SHIPPED / "held_out.json").read_text())


def split_of(song: Song, validation_fraction: float, test_fraction: float) -> str:
    """`train`, `validation` or `test`: a function of the group's name alone, so variants of a piece stay together.

    Songs with the bytes, or the id, of a held-out song are always `test`.
    """
    kept_out = held_out()
    if song.song_id in kept_out or not set(song.sha256).isdisjoint(kept_out.values()):
        return "test"
    position = int.from_bytes(hashlib.sha256(song.group_id.encode()).digest()[:8], "big") / 2**64
    if position < validation_fraction:
        return "validation"
    return "test" if position < validation_fraction + test_fraction else "train"
