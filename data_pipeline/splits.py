"""Which split a song belongs to: songs that are variants of one another stay on one side."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipeline.song import Song

_HELD_OUT = Path(__file__).parent / "songs" / "held_out.json"


def held_out() -> dict[str, str]:
    """The shipped songs that no model may train on: id to SHA-256 of the MIDI file."""
    return json.loads(_HELD_OUT.read_text())


def families(songs: Sequence[Song], alike: Iterable[tuple[str, str]]) -> dict[str, str]:
    """For every song's id the name of its family: songs of one group, and songs that are alike, share it.

    Args:
      alike: pairs of ids, of songs or of `held_out`, that are the same music.

    Returns:
      The alphabetically first group of the family; `held out` for a family with a held-out song.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    def join(a: str, b: str) -> None:
        parent[root(b)] = root(a)

    kept_out = held_out()
    for song in songs:
        join(f"group {song.group_id}", f"song {song.song_id}")
    for a, b in alike:
        join(f"song {a}", f"song {b}")
    for song_id in kept_out:
        join("held out", f"song {song_id}")
    names: dict[str, str] = {root("held out"): "held out"}
    for song in songs:
        key = root(f"song {song.song_id}")
        names[key] = names[key] if names.get(key) == "held out" else min(names.get(key, song.group_id), song.group_id)
    return {song.song_id: names[root(f"song {song.song_id}")] for song in songs}


def split_of(family: str, validation_fraction: float, test_fraction: float) -> str:
    """`train`, `validation` or `test`: a function of the family's name alone."""
    if family == "held out":
        return "test"
    position = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big") / 2**64
    if position < validation_fraction:
        return "validation"
    return "test" if position < validation_fraction + test_fraction else "train"


def assign(
    songs: Sequence[Song], alike: Iterable[tuple[str, str]], validation_fraction: float, test_fraction: float
) -> dict[str, str]:
    """The split of every song, by id.

    A family goes where the collection put one of its songs, `test` before `validation` before `train`, and where no
    collection says anything, by `split_of`.
    """
    family = families(songs, alike)
    fixed: dict[str, str] = {}
    for song in songs:
        if song.split:
            name = family[song.song_id]
            fixed[name] = min(fixed.get(name, song.split), song.split, key=("test", "validation", "train").index)
    return {
        song_id: "test" if name == "held out" else fixed.get(name) or split_of(name, validation_fraction, test_fraction)
        for song_id, name in family.items()
    }
