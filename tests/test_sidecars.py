"""Captions and tags in tables beside the music."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import sidecars
from data_pipeline.instructions import caption, instructions
from data_pipeline.song import Rejected, Song
from subtractive_jax.errors import UserError

MUSIC_CAPS = """\
ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval
-0Gj8-vB1q4,30,40,"/m/0140xf,/m/02cjck","['low quality', 'Sad', 'soulful', 'Jazz', ""singer's voice"", 'ballad']",\
"The low quality recording features a ballad, with ""strings"" and
a soft voice.",4,False,True
-0SdAVK79lg,30,40,/m/0155w,[],Guitar.,0,False,False
"""


def song(song_id, **changes):
    return Song(song_id, song_id, "stems", (), **changes)


@pytest.fixture
def folder(tmp_path):
    def make(**tables):
        for name, content in tables.items():
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name.replace("_", ".")).write_bytes(data)
        return str(tmp_path)

    return make


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def reasons(described):
    return [(item.source.rpartition("/")[2], item.reason) for item in described.rejected]


def test_music_caps(folder):
    found = [song("-0Gj8-vB1q4", tags={"genre": "pop", "tempo": 90}), song("untold")]
    described = sidecars.describe(folder(captions_csv=MUSIC_CAPS), found)
    first, second = described.songs
    assert first.caption == 'The low quality recording features a ballad, with "strings" and a soft voice.'
    assert first.tags == {"mood": ["Sad", "soulful"], "genre": "Jazz", "tempo": 90}
    assert second is not found[0] and second == song("untold")
    assert described.rejected == [] and described.unknown == 1
    texts = instructions(first.tags, "drums", "x", 0.0, 40)
    assert any("sad" in text for text in texts) and any("jazz" in text for text in texts)
    assert "jazz" in caption(first.tags, "x", 0.0)


def test_a_table_comes_before_the_source_value_by_value(folder):
    own = song("a", tags={"genre": "pop", "tempo": 90}, title="Old", caption="Old.")
    row = {"song_id": "a", "genre": "rock", "mood": "dark, heavy", "title": "New", "group_id": "album", "tempo": ""}
    more = {"song_id": "a", "caption": " A\nnew\tone. ", "aspect_list": ["sad"], "key": None}
    described = sidecars.describe(
        folder(tags_jsonl=lines(row), captions_jsonl=lines({**more, "aspect_list": []})), [own]
    )
    (told,) = described.songs
    assert described.rejected == []
    assert told == Song(
        "a", "album", "stems", (), {"genre": "rock", "tempo": 90, "mood": ["dark", "heavy"]}, "New", "A new one."
    )


def test_no_value_is_given_twice(folder):
    tables = folder(captions_csv="song_id,caption\na,One.\na,Two.\n", tags_csv="song_id,caption,genre\na,Three.,rock\n")
    described = sidecars.describe(tables, [song("a")])
    assert described.songs == [song("a", caption="One.")]
    twice = '"caption" is given a second time for the song "a": keep one'
    assert reasons(described) == [("captions.csv:3", twice), ("tags.csv:2", twice)]


def test_what_a_line_says_comes_before_its_aspects(folder):
    row = {"song_id": "a", "aspect_list": "['sad', 'jazz', 'soft piano']", "mood": ["calm"], "genre": "bebop"}
    described = sidecars.describe(folder(tags_jsonl=lines(row)), [song("a")])
    assert described.songs[0].tags == {"mood": ["calm"], "genre": "bebop"}


def test_stems_tell_instructions_how_they_are_played(folder):
    stems = {"bass": {"articulation": "slapped", "density": "busy", "dynamics": "f", "instruments": ["Fretless Bass"]}}
    described = sidecars.describe(folder(tags_jsonl=lines({"song_id": "a", "stems": stems})), [song("a")])
    said = " ".join(instructions(described.songs[0].tags, "bass", "a", 0.0, 200))
    assert all(word in said for word in ("slapped", "busy", "powerful", "fretless"))


def test_bad_lines_are_refused_and_the_others_stand(folder):
    table = lines({"song_id": "a", "tempo": "fast"}, {"song_id": "a", "genre": "rock"}, {"caption": "Whose?"}, [1])
    table += '\n{"song_id": "a", \n\n{"song_id": "a", "mood": 3}\n' + "[" * 100_000
    table += "\n" + lines({"song_id": "a", "caption": "x" * 5000}, {"song_id": "a", "title": "a\x00b"})
    table += "\n" + lines({"song_id": "a", "stems": {"bass": 3}}, {"song_id": "a", "aspect_list": "['a' 'b']"})
    table += "\n" + lines({"song_id": "a", "stems": {"bass": {"vel_mean": "hard"}}}, {"song_id": "a", "tempo": True})
    table += "\n" + lines({"song_id": "a", "genre": ["rock"]}, {"song_id": "a", "tempo": float("nan")}, {"song_id": 7})
    described = sidecars.describe(folder(tags_jsonl=table), [song("a")])
    assert described.songs == [song("a", tags={"genre": "rock"})]
    assert reasons(described) == [
        ("tags.jsonl:1", '"tempo" is not a number'),
        ("tags.jsonl:3", 'no text "song_id" (or "ytid")'),
        ("tags.jsonl:4", "not a JSON object"),
        ("tags.jsonl:5", "not a JSON object"),
        ("tags.jsonl:7", '"mood" is neither a text nor a list of texts'),
        ("tags.jsonl:8", "not a JSON object"),
        ("tags.jsonl:9", '"caption" is longer than 4000 characters'),
        ("tags.jsonl:10", '"title" holds characters that are not text (or the file is not UTF-8)'),
        ("tags.jsonl:11", '"stems" is not an object of objects'),
        ("tags.jsonl:12", '"aspect_list" is not a list of quoted texts'),
        ("tags.jsonl:13", '"bass: vel_mean" is not a number'),
        ("tags.jsonl:14", '"tempo" is not a number'),
        ("tags.jsonl:15", '"genre" is not a text'),
        ("tags.jsonl:16", '"tempo" is not a number'),
        ("tags.jsonl:17", 'no text "song_id" (or "ytid")'),
    ]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("song_id,caption\na,One.,Two.\n", "not as many fields as the first line has"),
        ("song_id,caption,genre\na,One.\n", "not as many fields as the first line has"),
        ('song_id,caption\na,"One.\n', "not CSV (unexpected end of data); nothing after it is read"),
        ('song_id,caption\na,"One." Two\n', "not CSV (',' expected after '\"'); nothing after it is read"),
        ("id,caption\na,One.\nb,Two.\n", 'names no column "song_id" (or "ytid"); nothing after it is read'),
        ("", 'names no column "song_id" (or "ytid"); nothing after it is read'),
        ("song_id,caption\na,One.\n".encode("utf-16"), 'names no column "song_id"'),
        ("song_id,caption\na,café\n".encode("latin-1"), '"caption" holds characters that are not text'),
        (f"song_id,caption\na,{'x' * 200_000}\n", "not CSV (field larger than field limit (131072))"),
        ("song_id,caption\n,One.\n", 'no text "song_id"'),
    ],
)
def test_bad_csv(folder, table, reason):
    described = sidecars.describe(folder(captions_csv=table), [song("a")])
    assert described.songs == [song("a")]
    ((_, own),) = reasons(described)
    assert reason in own


def test_windows_line_ends_and_byte_order_marks(folder):
    described = sidecars.describe(folder(captions_csv="\ufeffsong_id,caption\r\na,One.\r\n"), [song("a")])
    assert described.songs == [song("a", caption="One.")] and not described.rejected


def test_a_folder_without_tables(folder):
    assert sidecars.describe(folder(notes_txt="x"), [song("a")]) == sidecars.Described([song("a")], [], 0)


def test_memory_grows_with_the_songs_and_not_with_the_table(folder):
    table = "song_id,caption\n" + "".join(f"{i},{'x' * 1000}\n" for i in range(20_000))
    source = folder(captions_csv=table)
    tracemalloc.start()
    try:
        described = sidecars.describe(source, [song("7")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert described.unknown == 19_999 and described.songs[0].caption
    assert peak < 2_000_000 < len(table)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_break_the_readers(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in sidecars.NAMES:
        (folder / name).write_bytes(b"song_id,caption,tempo,aspect_list\n" * name.endswith("csv") + content)
    described = sidecars.describe(str(folder), [song("a")])
    assert all(isinstance(item, Rejected) for item in described.rejected)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("sad", "['a']", "p")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("bass", "vel_mean", "pieces")), inner),
    max_leaves=6,
)
_STEM = st.dictionaries(
    st.sampled_from(("vel_mean", "onsets_per_s", "pieces", "instruments", "articulation", "density", "dynamics")),
    _VALUES,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(sidecars.TAGS, _VALUES)),
    st.dictionaries(st.just("bass"), _STEM),
)
def test_tags_that_pass_never_break_instructions(row, stems):
    try:
        tags = sidecars.tags_of(row | {"stems": stems})
    except UserError:
        return
    for stem in ("bass", "drums", "bass+drums"):
        texts = instructions(tags, stem, "x", 0.0, 4)
        assert all(text.isprintable() and text.isascii() for text in texts)
    json.dumps(tags)
    caption(tags, "x", 0.0)
