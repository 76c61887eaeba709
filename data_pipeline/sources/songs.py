"""`songs:FOLDER`: finished songs, taken apart by Demucs.

Every wav, flac, mp3 and ogg file anywhere under the folder is a song, at any rate and with any number of channels. Its
id is its path in the folder without the suffix; of two files with one id, such as `a.wav` and `a.mp3`, the first of
wav, flac, ogg, mp3 counts. A subfolder with up to 40 songs of its own is an album: its songs are one group. A larger
one is a library: every song is a group. The title is the file's name without a track number. Files whose names begin
with a dot are not songs.
"""

import collections
import copy
import re
from collections.abc import Iterator

import numpy as np
import soxr

from data_pipeline import decode, files, separation
from data_pipeline.song import Recording, Rejected, Song, Tools

_LARGEST_ALBUM = 40  # songs
_TRACK_NUMBER = re.compile(r"^\d{1,3}([-.]\d{1,3})?[\s._)-]+(?=\S)")


def find(folder: str) -> Iterator[Song | Rejected]:
    """The songs of a folder, by id; files with the id of another are rejected."""
    found = []
    for path in files.list_files(folder):
        song_id, dot, suffix = path.rpartition(".")
        if dot + suffix.lower() in decode.SUFFIXES and not files.name(path).startswith("."):
            found.append((song_id, decode.SUFFIXES.index(dot + suffix.lower()), path))
    albums = collections.Counter(_album(song_id) for song_id in {song_id for song_id, _, _ in found})
    taken = set()
    for song_id, _, path in sorted(found):
        if song_id in taken:
            yield Rejected(song_id, files.join(folder, path), "another file has the same name but for its suffix")
            continue
        taken.add(song_id)
        album = _album(song_id)
        group_id = album if album and albums[album] <= _LARGEST_ALBUM else song_id
        title = " ".join(_TRACK_NUMBER.sub("", files.name(song_id)).replace("_", " ").split())
        yield Song(song_id, group_id, "songs", (("mix", files.join(folder, path)),), title=title)


def _album(song_id: str) -> str:
    return song_id.rpartition("/")[0]


def load(song: Song, sample_rate: int, tools: Tools) -> Recording:
    """The song's stems as Demucs hears them.

    Raises:
      UserError: the model that `tools` names cannot be used; while blocks are read: the file cannot.
    """
    separator = separation.separator(tools)
    ((_, path),) = song.files
    notes: list[str] = []

    def mixture() -> Iterator[np.ndarray]:
        notes.clear()  # the song is read twice
        yield from decode.open_audio(path, separator.sample_rate, notes, channels=2)

    blocks = _resampled(separator.separate(mixture), len(separator.stems), separator.sample_rate, sample_rate)
    tags = {"stems": {stem: {} for stem in separator.stems}} | copy.deepcopy(song.tags)
    return Recording(separator.stems, blocks, tags, separated=True, notes=notes)


def _resampled(blocks: Iterator[np.ndarray], stems: int, from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    """Blocks `[stems, samples]` at another rate, in all `round(samples * to_rate / from_rate)` samples."""
    resampler = soxr.ResampleStream(from_rate, to_rate, stems, "float32", "HQ")
    heard = given = 0
    for block in blocks:
        heard += block.shape[1]
        resampled = resampler.resample_chunk(np.ascontiguousarray(block.T)).T
        given += resampled.shape[1]
        yield resampled
    missing = round(heard * to_rate / from_rate) - given
    rest = resampler.resample_chunk(np.zeros((0, stems), np.float32), last=True).T[:, :missing]
    yield np.pad(rest, ((0, 0), (0, missing - rest.shape[1])))
