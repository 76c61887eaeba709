"""Which split a song belongs to."""

import hashlib
from pathlib import Path

import pytest

from data_pipeline import sources, splits
from data_pipeline.song import Song


def song(song_id: str, group: str = "", split: str = "") -> Song:
    return Song(song_id, group or song_id, "midi", (), split=split)


def test_shipped_songs_and_held_out_hashes():
    songs = {song.song_id: song for song in sources.find_songs([]).songs}
    assert len(songs) == 15
    assert len(splits.held_out()) == 3
    for song_id, digest in splits.held_out().items():
        assert hashlib.sha256(Path(songs[song_id].files[0][1]).read_bytes()).hexdigest() == digest
    assigned = splits.assign(list(songs.values()), [], 0.0, 0.0)
    assert {name for name, split in assigned.items() if split == "test"} == set(splits.held_out())


def test_split_follows_the_group_alone():
    assigned = splits.assign([song(f"song {i}", f"group {i // 2}") for i in range(4000)], [], 0.1, 0.2)
    found = [assigned[f"song {i}"] for i in range(4000)]
    assert found[::2] == found[1::2]
    assert found.count("validation") / 4000 == pytest.approx(0.1, abs=0.03)
    assert found.count("test") / 4000 == pytest.approx(0.2, abs=0.03)
    alone = splits.assign([song("song 7", "group 3")], [], 0.1, 0.2)
    assert alone["song 7"] == assigned["song 7"], "what else is built does not matter"


def test_songs_that_are_alike_stay_together_through_others_and_groups():
    songs = [song("a", "album"), song("b", "album"), song("c"), song("d"), song("e")]
    family = splits.families(songs, [("b", "c"), ("d", "c")])
    assert family == {"a": "album", "b": "album", "c": "album", "d": "album", "e": "e"}


def test_what_resembles_a_held_out_song_is_for_testing():
    held_out = next(iter(splits.held_out()))
    songs = [song("copy"), song("sibling", "group"), song("cousin", "group"), song("free", split="train")]
    assigned = splits.assign(songs, [("copy", held_out), ("sibling", "copy")], 0.0, 0.0)
    assert assigned == {"copy": "test", "sibling": "test", "cousin": "test", "free": "train"}


def test_a_collections_own_split_wins_and_test_before_train():
    songs = [song("a", split="train"), song("b", split="test"), song("c", split="train"), song("d", split="validation")]
    assert splits.assign(songs, [("a", "b")], 1.0, 0.0) == {"a": "test", "b": "test", "c": "train", "d": "validation"}
