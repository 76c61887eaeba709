"""Where songs come from: `KIND:PATH` to a list of songs, without reading any music, and a song to its music.

A kind is a module of this package with two functions, and its docstring documents the layout of the folder:

  find(folder) -> Iterator[Song | Rejected]           on the launching machine; lists files, reads small metadata only
  load(song, sample_rate, tools) -> Recording         on a worker; streams, so memory does not grow with the song
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from data_pipeline import files, sidecars
from data_pipeline.song import Recording, Rejected, Song, Tools
from data_pipeline.sources import midi, moisesdb, musdb18hq, slakh2100, songs, stems
from subtractive_jax.errors import UserError, unknown_name

SHIPPED = f"midi:{Path(__file__).parents[1] / 'songs'}"
KINDS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module for module in (songs, stems, musdb18hq, moisesdb, slakh2100, midi)
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What sources hold.

    Attributes:
      songs: sorted by id, with what tables beside them say (see `sidecars`).
      rejected: songs that are refused.
      rejected_lines: lines of tables that are refused.
      unknown: good lines of tables for songs that are not there.
    """

    songs: list[Song]
    rejected: list[Rejected]
    rejected_lines: list[Rejected]
    unknown: int


def find_songs(sources: Sequence[str]) -> Found:
    """All songs of all sources.

    Args:
      sources: texts `KIND:PATH`; the shipped songs when empty.

    Raises:
      UserError: a kind is unknown, or a folder is missing or empty.
    """
    found: dict[str, Song] = {}
    rejected: list[Rejected] = []
    rejected_lines: list[Rejected] = []
    unknown = 0
    for source in sources or [SHIPPED]:
        kind, _, folder = source.partition(":")
        if kind not in KINDS:
            raise unknown_name("kind of source", kind, KINDS)
        if not files.exists(folder):
            raise UserError(f"--source={source}: no such folder")
        folder = files.absolute(folder)
        own: list[Song] = []
        refused: list[Rejected] = []
        for item in KINDS[kind].find(folder):
            (refused if isinstance(item, Rejected) else own).append(item)
        if not own and not refused:
            raise UserError(f"--source={source}: no song there; data_pipeline/sources/{kind}.py tells the layout")
        described = sidecars.describe(folder, own)
        for song in described.songs:
            try:
                if song.song_id in found:
                    raise UserError("a song of another source has the same id: rename its file or folder")
                found[song.song_id] = _checked(song)
            except UserError as error:
                refused.append(Rejected(song.song_id, song.files[0][1], str(error)))
        rejected += refused
        rejected_lines += described.rejected
        unknown += described.unknown
    return Found([found[song_id] for song_id in sorted(found)], rejected, rejected_lines, unknown)


def _checked(song: Song) -> Song:
    try:
        "".join((song.song_id, song.group_id, song.title, song.caption)).encode()
    except UnicodeEncodeError as error:
        raise UserError("its name or caption is not valid Unicode; rename it") from error
    return dataclasses.replace(song, tags=sidecars.tags_of(song.tags))


def load(song: Song, sample_rate: int, tools: Tools) -> Recording:
    """The song's music as a stream of stems, mono at `sample_rate`.

    Raises:
      UserError: the music is unreadable, empty or not what its source promises; also while its blocks are read.
    """
    return KINDS[song.kind].load(song, sample_rate, tools)
