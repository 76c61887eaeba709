"""launch.sample with a model of notes: what it reads, what it refuses, several parts in turn, jobs on one page."""

import json

import pytest

import subtractive_jax
from launch import sample
from subtractive_jax import page
from subtractive_jax.errors import UserError
from subtractive_jax.representation.notes import read_score
from tests import worlds
from tests.midi import write_midi

_NOTES = {
    "drums/Drum kit 0": [(beat / 2, 42 if beat % 2 else 36) for beat in range(32)],
    "bass/Fingered Bass": [(beat, 33 + beat % 5) for beat in range(16)],
    "keys/Acoustic Grand Piano": [(beat, 60 + beat) for beat in range(16)],
}
_DEFAULTS = {
    **dict(id="job", instruction="Add a funk bass", stem="bass", remove=False, separator="", separator_repo=""),
    **dict(num_candidates=1, max_redraws=0, seed=0, solver=None, steps=2, text_guidance=None, context_guidance=None),
    **dict(guidance_rescale=0.0, guidance_interval="0,1", method="insert", strength=None, start=0.0, end=None),
    **dict(stem_gain_db=0.0, format=None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return subtractive_jax.load(str(worlds.notes_model(tmp_path_factory.mktemp("notes") / "model")))


@pytest.fixture
def song(tmp_path):
    write_midi(tmp_path / "song.mid", _NOTES, {name: 9 if "drums" in name else 0 for name in _NOTES}, beats=16)
    return tmp_path / "song.mid"


def _sample(model, folder, **fields):
    folder.mkdir()
    return sample.sample(model, sample.job_from({**_DEFAULTS, **fields}), folder)


def test_parts_in_turn_and_their_candidates(model, song, tmp_path):
    texts = "Add a funk bass | Add jazz keys"
    fields = dict(input=str(song), remove=True, stem="bass,keys", instruction=texts, num_candidates=2)
    result = _sample(model, tmp_path / "out", **fields)
    given, mix, stem = (read_score(path) for path in (song, tmp_path / "out/mix.mid", tmp_path / "out/stem.mid"))
    assert mix.parts["drums"].tolist() == given.parts["drums"].tolist()
    assert mix.parts.keys() == given.parts.keys() and stem.parts.keys() <= {"bass", "keys"}
    assert [one["stem"] for one in result["stems"]] == ["bass", "keys"] and result["stem"] == "bass,keys"
    for one in result["stems"]:
        (other,) = {"0", "1"} - {str(one["seed"])}
        names = {path.name for path in (tmp_path / "out/candidates" / other).iterdir()}
        assert {f"stem_{one['stem']}.mid", f"mix_{one['stem']}.mid"} <= names
    row = sample.page_row(result, tmp_path, "out/")
    assert row.section == "Style transfer" and row.picture.startswith(b"\x89PNG")
    assert {"In the song's harmony", "Groove agreement", "Notes a beat", "Music kept"} <= row.figures.keys()
    assert page.write(tmp_path, "One job", [row]).is_file()


def test_jobs_of_which_one_fails(model, song, tmp_path):
    jobs = [
        ("there", sample.job_from({**_DEFAULTS, "id": "there", "input": str(song)})),
        ("new", sample.job_from({**_DEFAULTS, "id": "new", "input": str(song), "remove": True})),
    ]
    rows, failures = sample.run_jobs(model, jobs, tmp_path)
    assert failures == 1 and "add --remove" in rows[0].note and rows[1].picture
    lines = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["failed", "done"]
    assert "harmony  groove  notes  flags" in sample.table(lines)


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("song.wav", b"RIFF", {}, r'song.wav: model ".*" writes notes and reads MIDI files; for audio take "tiny"'),
        (None, None, {"format": "flac"}, 'format "flac": model ".*" writes notes; leave out --format'),
        (None, None, {}, "has a part for bass already: take it out first .*add --remove"),
        (None, None, {"stem": "guitar", "remove": True}, "no guitar to remove .it has: drums, bass, keys.; leave out"),
        (None, None, {"stem": "bass,drums,keys", "remove": True}, "nothing is left without the bass,drums,keys"),
        (None, None, {"stem": "vocals", "remove": True}, 'unknown stem "vocals"'),
        (None, None, {"stem": "bass+keys", "remove": True}, r'unknown stem "bass\+keys"'),
        (None, None, {"instruction": "a | b | c", "stem": "guitar"}, "3 instructions for 1 stems"),
        ("empty.mid", b"", {}, "empty.mid: not a MIDI file"),
        (
            "none.mid",
            b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0",
            {},
            "none.mid: the MIDI file holds no notes",
        ),
        ("two.mid", b"MThd\0\0\0\6\0\2\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0", {}, "two.mid: MIDI of type 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, song, tmp_path, name, content, fields, message):
    if name:
        song = tmp_path / name
        song.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        _sample(model, tmp_path / "out", input=str(song), **fields)
    assert "\n" not in str(refusal.value)


def test_audio_models_write_no_midi(song, tmp_path):
    with pytest.raises(UserError, match='format "mid": this model writes audio, not notes; "midi_tiny" writes notes'):
        _sample(subtractive_jax.load("tiny"), tmp_path / "out", input=str(song), stem="drums", format="mid")
