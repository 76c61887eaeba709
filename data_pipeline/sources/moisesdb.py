"""MoisesDB v0.1, 240 songs in eleven kinds of stems (Pereira et al. 2023): `moisesdb:PATH`.

    PATH/moisesdb_v0.1/               or PATH itself, or folders between
      <uuid of a song>/
        data.json                     {"song": title, "artist": name, "genre": name, "stems": [
                                        {"stemName": "drums", "tracks": [
                                          {"id": uuid, "extension": "wav", "trackType": "kick_drum",
                                           "has_bleed": false}, ...]}, ...]}
        drums/<uuid of a track>.wav   for every track of every stem

The tracks of a stem are added up, and its stems become ours by `grouping.stem_of_moisesdb`. Stems that end early are
silent from there, as in the collection's own tool. An artist's songs are one group. Tracks said to have bleed are kept
and noted. There are no official splits.
"""

import json
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from data_pipeline import decode, files
from data_pipeline.grouping import stem_of_moisesdb
from data_pipeline.song import Recording, Rejected, Song, Tools
from subtractive_jax.errors import UserError

_GENRES = {  # where its name for a genre is not ours
    **{"bossa nova": "latin", "hip hop": "hip-hop", "rap": "hip-hop", "musical theatre": "show", "rnb": "r&b"},
    **{"singer songwriter": "singer-songwriter", "world folk": "folk", "undefined": "", "other": ""},
}


def find(folder: str) -> Iterator[Song | Rejected]:
    """The songs of a folder, by path."""
    members = files.list_files(folder)
    for path in members:
        relative, _, name = path.rpartition("/")
        if name != "data.json" or not relative:
            continue
        song_id = f"moisesdb/{files.name(relative)}"
        try:
            yield _song(song_id, folder, relative, members)
        except UserError as error:
            yield Rejected(song_id, files.join(folder, relative), str(error))


def _song(song_id: str, folder: str, relative: str, members: Collection[str]) -> Song:
    try:
        data = json.loads(files.read_bytes(files.join(folder, relative, "data.json")))
        tracks = [(str(stem["stemName"]), track) for stem in data["stems"] for track in stem["tracks"]]
        paths, stems = _stems(tracks, relative, members)
        title, artist, genre = (str(data.get(key) or "") for key in ("song", "artist", "genre"))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"data.json is not as MoisesDB writes it ({type(error).__name__}: {error})") from error
    if len(stems) < 2:
        raise UserError("fewer than two stems")
    genre = re.sub(r"[\W_]+", " ", genre.lower()).strip()
    genre = _GENRES.get(genre, genre)
    return Song(
        song_id=song_id,
        group_id=f"moisesdb/{artist}" if artist else song_id,
        kind="moisesdb",
        files=tuple((stem, files.join(folder, path)) for stem, path in paths),
        tags={"stems": stems} | ({"genre": genre} if genre else {}),
        title=title,
    )


def _stems(
    tracks: list[tuple[str, dict[str, Any]]], relative: str, members: Collection[str]
) -> tuple[list[tuple[str, str]], dict[str, dict[str, Any]]]:
    """(stem, path) of every track, and the stems' tags."""
    paths = []
    stems: dict[str, dict[str, Any]] = {}
    for stem_name, track in tracks:
        path = f"{relative}/{stem_name}/{track['id']}.{track['extension']}"
        if path not in members:  # nor is any path that leads out of the folder
            raise UserError(f"no such file: {path}")
        kind = str(track["trackType"]).replace(" ", "_")
        stem = stem_of_moisesdb(stem_name, kind)
        paths.append((stem, path))
        tags = stems.setdefault(stem, {"instruments": []})
        # Capitals, as in General MIDI's names, which instructions are written from.
        tags["instruments"] = sorted({*tags["instruments"], kind.replace("_", " ").title()})
        if track.get("has_bleed"):
            tags["has_bleed"] = True
    return paths, stems


def load(song: Song, sample_rate: int, tools: Tools) -> Recording:
    """The song's stems, each the sum of its tracks.

    Raises:
      UserError: while blocks are read: a file is unreadable.
    """
    recording = decode.load_stems(song, sample_rate, tools, max_difference_seconds=math.inf)
    recording.notes.extend(
        f"{stem}: has bleed, says the collection" for stem, tags in song.tags["stems"].items() if tags.get("has_bleed")
    )
    return recording
