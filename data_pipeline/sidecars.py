"""Captions and tags that people bring beside their music: tables in a source's folder, one line a song.

The files are `captions.csv`, `captions.jsonl`, `tags.csv` and `tags.jsonl`, directly in the folder, in UTF-8. A line
names its song by `song_id` or, as MusicCaps does, by `ytid`, and may hold

  caption                   what the full mix is like
  title                     what people call the song, kept out of all texts
  group_id                  what splits never straddle
  aspect_list               phrases, as MusicCaps writes them: "['mellow', 'soft piano', 'jazz']"; the moods and the
                            first genre among them become tags where the line does not say them itself
  genre, style, mood, ...   any of `song.TAGS`; `stems` in JSON only

and other columns, which are not read, as are empty values. What a table says comes before what the source says of
itself, value by value. Two tables may share the values of a song among them, but none may be given twice.
"""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline import files, vocabulary
from data_pipeline.song import TAGS, Rejected, Song
from subtractive_jax.errors import UserError

NAMES = ("captions.csv", "captions.jsonl", "tags.csv", "tags.jsonl")

_MAX_CHARACTERS = {"caption": 4000}  # of a text; 200 where not given
_TEXTS = ("caption", "title", "group_id", "genre", "style", "key", "time_signature", "dynamics", "feel")
_QUOTED = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")\s*(?:,|$)""")


@dataclasses.dataclass(frozen=True)
class Described:
    """Songs with what the tables of their folder say.

    Attributes:
      rejected: lines that cannot be read, with file, line and reason.
      unknown: good lines for songs that are not there; tables often describe more than a folder holds.
    """

    songs: list[Song]
    rejected: list[Rejected]
    unknown: int


def describe(folder: str, songs: Sequence[Song]) -> Described:
    """Fills in tags, captions, titles and groups from a source folder's tables; the order of songs is kept."""
    found = {song.song_id: song for song in songs}
    given: dict[str, dict[str, Any]] = {}
    rejected: list[Rejected] = []
    unknown = 0
    for name in NAMES:
        path = files.join(folder, name)
        if not files.exists(path):
            continue
        for number, row in _rows(path):
            try:
                song_id, values = _values(row)
                if song_id not in found:
                    unknown += 1
                    continue
                own = given.setdefault(song_id, {})
                if twice := own.keys() & values.keys():
                    raise UserError(f'"{min(twice)}" is given a second time for the song "{song_id}": keep one')
                own.update(values)
            except UserError as error:
                rejected.append(Rejected("", f"{path}:{number}", str(error)))
    return Described([_with(song, given.get(song.song_id, {})) for song in songs], rejected, unknown)


def _with(song: Song, values: Mapping[str, Any]) -> Song:
    tags = {key: value for key, value in values.items() if key in TAGS}
    others = {key: value for key, value in values.items() if key not in TAGS}
    return dataclasses.replace(song, tags=song.tags | tags, **others)


def _rows(path: str) -> Iterator[tuple[int, Mapping[Any, Any] | UserError]]:
    """Line numbers and what the lines hold."""
    with files.open_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
        yield from _csv_rows(text) if path.endswith(".csv") else _json_rows(text)


def _csv_rows(text: io.TextIOBase) -> Iterator[tuple[int, Mapping[Any, Any] | UserError]]:
    reader = csv.DictReader(text, strict=True)
    try:
        if not {"song_id", "ytid"} & set(reader.fieldnames or ()):
            yield 1, UserError('the first line names no column "song_id" (or "ytid"); nothing after it is read')
            return
        for row in reader:
            complete = None not in row and None not in row.values()
            yield reader.line_num, row if complete else UserError("not as many fields as the first line has")
    except csv.Error as error:
        yield reader.line_num, UserError(f"not CSV ({error}); nothing after it is read")


def _json_rows(text: io.TextIOBase) -> Iterator[tuple[int, Mapping[Any, Any] | UserError]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield number, row if isinstance(row, dict) else UserError("not a JSON object")


def _values(row: Mapping[Any, Any] | UserError) -> tuple[str, dict[str, Any]]:
    """A line's song, and its values by name: of tags, and of the other attributes of a `Song`."""
    if isinstance(row, UserError):
        raise row
    song_id = row.get("song_id") or row.get("ytid")
    if not isinstance(song_id, str):
        raise UserError('no text "song_id" (or "ytid")')
    values = {name: _text(name, row[name]) for name in _TEXTS if row.get(name) not in (None, "") and name not in TAGS}
    values |= tags_of(row)
    aspects = _phrases("aspect_list", row.get("aspect_list") or [])
    moods = [aspect for aspect in aspects if aspect.lower() in vocabulary.MOOD_NAMES]
    genres = [aspect for aspect in aspects if aspect.lower() in vocabulary.GENRE_NAMES]
    return song_id, ({"mood": moods} if moods else {}) | ({"genre": genres[0]} if genres else {}) | values


def tags_of(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The tags, of `song.TAGS`, that a line of a table or a manifest holds, in their types.

    Raises:
      UserError: a value is not of its tag's type: `tempo` a number, `mood` a text or a list of texts, `stems` an object
        of objects, all others texts.
    """
    given = {name: row[name] for name in TAGS if row.get(name) not in (None, "", [])}
    tags: dict[str, Any] = {}
    for name, value in given.items():
        if name == "tempo":
            tags[name] = _number(name, value)
        elif name == "mood":
            tags[name] = _phrases(name, value)
        elif name == "stems":
            tags[name] = _stems(value)
        else:
            tags[name] = _text(name, value)
    return tags


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f'"{name}" is not a text')
    text = " ".join(value.split())
    if not text.isprintable() or "\ufffd" in text:
        raise UserError(f'"{name}" holds characters that are not text (or the file is not UTF-8)')
    if len(text) > (limit := _MAX_CHARACTERS.get(name, 200)):
        raise UserError(f'"{name}" is longer than {limit} characters')
    return text


def _phrases(name: str, value: Any) -> list[str]:
    """A list of texts: from JSON, written as a Python list, or separated by commas."""
    if isinstance(value, list):
        return [_text(name, phrase) for phrase in value]
    if not isinstance(value, str):
        raise UserError(f'"{name}" is neither a text nor a list of texts')
    if not (bracketed := re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)):
        return [phrase for phrase in (_text(name, part) for part in value.split(",")) if phrase]
    inside, position, phrases = bracketed[1].strip(), 0, []
    while position < len(inside):
        if not (match := _QUOTED.match(inside, position)):
            raise UserError(f'"{name}" is not a list of quoted texts')
        phrases.append(_text(name, re.sub(r"\\(.)", r"\1", match[1] or match[2] or "")))
        position = match.end()
    return phrases


def _number(name: str, value: Any) -> float:
    """A number from JSON as it is, or one that a CSV file holds."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = math.nan
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1e6:
        raise UserError(f'"{name}" is not a number')
    return number


def _stems(value: Any) -> dict[str, dict[str, Any]]:
    """What is known of each stem; what `instructions` reads of it is in its type."""
    if not isinstance(value, dict) or not all(isinstance(described, dict) for described in value.values()):
        raise UserError('"stems" is not an object of objects')
    stems = {}
    for stem, described in value.items():
        own = {name: known for name, known in described.items() if known is not None}
        own |= {name: _number(f"{stem}: {name}", own[name]) for name in ("onsets_per_s", "vel_mean") if name in own}
        own |= {name: _phrases(f"{stem}: {name}", own[name]) for name in ("instruments", "articulation") if name in own}
        if not isinstance(own.get("pieces", {}), dict):
            raise UserError(f'"{stem}: pieces" is not an object')
        stems[stem] = own
    return stems
