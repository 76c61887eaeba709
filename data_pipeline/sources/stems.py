"""Songs that are folders of stems: `stems:PATH`.

    PATH/
      any name/           the song's id
        drums.wav         named after its stem; wav, flac, mp3 or ogg, of any rate and number of channels
        bass.flac
        mix.wav           `mix` and `mixture` are what collections call the sum of their stems: left out
        tags.json         optional: an object with any of `song.TAGS`, `group_id` and `title`

A song has two stems or more. Hidden files, and files that are not audio, are left out.
"""

import json
from collections.abc import Iterator
from typing import Any

from data_pipeline import decode, files
from data_pipeline.song import TAGS, Rejected, Song
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.notes import STEMS

_MIXES = ("mix", "mixture")

load = decode.load_stems


def find(folder: str) -> Iterator[Song | Rejected]:
    """The songs of a folder, by name."""
    songs: dict[str, list[str]] = {}
    for path in files.list_files(folder):
        name, _, file = path.partition("/")
        if file and not name.startswith("."):
            songs.setdefault(name, []).append(file)
    for name, members in songs.items():
        path = files.join(folder, name)
        try:
            tags = _tags(files.join(path, "tags.json")) if "tags.json" in members else {}
            stems = _stems(members)
        except UserError as error:
            yield Rejected(name, path, str(error))
            continue
        yield Song(
            song_id=name,
            group_id=tags.get("group_id") or name,
            kind="stems",
            files=tuple((stem, files.join(path, file)) for stem, file in stems.items()),
            tags={key: tags[key] for key in TAGS if tags.get(key) is not None},
            title=tags.get("title") or "",
        )


def _stems(members: list[str]) -> dict[str, str]:
    """Stem to the name of its file."""
    stems: dict[str, str] = {}
    for file in members:
        stem, _, suffix = file.lower().rpartition(".")
        if f".{suffix}" not in decode.SUFFIXES or "/" in file or file.startswith(".") or stem in _MIXES:
            continue
        if stem not in STEMS:
            raise unknown_name("stem", stem, STEMS)
        if stem in stems:
            raise UserError(f'two files for the stem "{stem}": {stems[stem]} and {file}')
        stems[stem] = file
    if len(stems) < 2:
        raise UserError("fewer than two stem files")
    return stems


def _tags(path: str) -> dict[str, Any]:
    try:
        tags = json.loads(files.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"tags.json is not JSON ({error})") from error
    if not isinstance(tags, dict):
        raise UserError("tags.json is not a JSON object")
    for key in ("group_id", "title"):
        if not isinstance(tags.get(key) or "", str):
            raise UserError(f'"{key}" in tags.json is not a text')
    return tags
