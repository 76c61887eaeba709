"""launch.sample with a model of notes: what it reads, what it refuses, several parts in turn, jobs on one page."""

import json
import os
import subprocess
import sys

import pytest

from subtractive_jax.representation.notes import read_score
from tests import worlds
from tests.midi import write_midi

_NOTES = {
    "drums/Drum kit 0": [(beat / 2, 42 if beat % 2 else 36) for beat in range(32)],
    "bass/Fingered Bass": [(beat, 33 + beat % 5) for beat in range(16)],
    "keys/Acoustic Grand Piano": [(beat, 60 + beat) for beat in range(16)],
}
_NO_NOTES = b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0"
_FILES = {
    "song.wav": b"RIFF",
    "empty.mid": b"",
    "none.mid": _NO_NOTES,
    "two.mid": _NO_NOTES.replace(b"\0\1\0\1", b"\0\2\0\1"),
}
_GOOD = {
    "turn": {
        **dict(remove=True, stem="bass,keys", num_candidates=2),
        "instruction": "Add a funk bass | Add jazz keys",
    },
    "new": {"remove": True},
}
_BAD = {  # job: (its fields, what is said)
    "audio": (
        {"input": "song.wav"},
        'song.wav: model "model" writes notes and reads MIDI files; for audio take "tiny"',
    ),
    "flac": ({"format": "flac"}, 'format "flac": model "model" writes notes; leave out --format'),
    "there": ({}, "has a part for bass already: take it out first"),
    "no guitar": ({"stem": "guitar", "remove": True}, "no guitar to remove (it has: drums, bass, keys); leave out"),
    "nothing left": ({"stem": "bass,drums,keys", "remove": True}, "nothing is left without the bass,drums,keys"),
    "vocals": ({"stem": "vocals", "remove": True}, 'unknown stem "vocals"'),
    "together": ({"stem": "bass+keys", "remove": True}, 'unknown stem "bass+keys"'),
    "three texts": ({"instruction": "a | b | c", "stem": "guitar"}, "3 instructions for 1 stems"),
    "empty": ({"input": "empty.mid"}, "empty.mid: not a MIDI file"),
    "none": ({"input": "none.mid"}, "none.mid: the MIDI file holds no notes"),
    "two": ({"input": "two.mid"}, "two.mid: MIDI of type 2"),
}


def _run(place, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(place / "cache")}
    command = [sys.executable, "-m", "launch.sample", "--steps=2", *arguments]
    return subprocess.run(
        command, cwd=place, env=environment | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A song, damaged files, a model of notes, and what became of many jobs."""
    place = tmp_path_factory.mktemp("notes")
    worlds.notes_model(place / "model")
    write_midi(place / "song.mid", _NOTES, {name: 9 if "drums" in name else 0 for name in _NOTES}, beats=16)
    for name, content in _FILES.items():
        (place / name).write_bytes(content)
    usual = {"input": "song.mid", "instruction": "Add a funk bass", "stem": "bass"}
    jobs = [*_GOOD.items(), *((name, fields) for name, (fields, _) in _BAD.items())]
    (place / "jobs.jsonl").write_text(
        "".join(json.dumps({"id": name, **usual, **fields}) + "\n" for name, fields in jobs)
    )
    run = _run(place, "--model=model", "--jobs=jobs.jsonl", "--output=out")
    assert run.returncode == 2 and f"{len(_BAD)} of {len(jobs)} jobs failed" in run.stderr, run.stderr
    assert "harmony  groove  notes  flags" in run.stdout
    return place


def _summary(place):
    lines = [json.loads(line) for line in (place / "out/summary.jsonl").read_text().splitlines()]
    return {line["id"]: line for line in lines}


def test_parts_in_turn_and_their_candidates(place):
    out, result = place / "out/turn", json.loads((place / "out/turn/result.json").read_text())
    given, mix, stem = (read_score(path) for path in (place / "song.mid", out / "mix.mid", out / "stem.mid"))
    assert mix.parts["drums"].tolist() == given.parts["drums"].tolist()
    assert mix.parts.keys() == given.parts.keys() and stem.parts.keys() <= {"bass", "keys"}
    assert [one["stem"] for one in result["stems"]] == ["bass", "keys"] and result["stem"] == "bass,keys"
    for one in result["stems"]:
        (other,) = {str(seed) for seed in one["candidates"]} - {str(one["seed"])}
        names = {path.name for path in (out / "candidates" / other).iterdir()}
        assert {f"stem_{one['stem']}.mid", f"mix_{one['stem']}.mid"} <= names


def test_one_page_covers_all_jobs(place):
    text = (place / "out/index.html").read_text()
    assert text.count("<article") == len(_GOOD) + len(_BAD)
    assert text.count("data:image/png;base64,") >= len(_GOOD)
    for name in ("In the song's harmony", "Groove agreement", "Notes a beat", "Music kept"):
        assert text.replace("&#x27;", "'").count(name) >= len(_GOOD), name


@pytest.mark.parametrize("job", _BAD)
def test_bad_input_is_refused_in_one_line(place, job):
    line = _summary(place)[job]
    assert line["status"] == "failed" and _BAD[job][1] in line["error"] and "\n" not in line["error"]
    assert not (place / "out" / job).exists()


def test_audio_models_write_no_midi(place):
    arguments = ("--input=song.mid", "--instruction=Add drums", "--stem=drums", "--remove", "--format=mid")
    run = _run(place, "--model=tiny", *arguments, "--output=audio")
    assert run.returncode == 2 and not (place / "audio").exists()
    assert 'format "mid": this model writes audio, not notes; "midi_tiny" writes notes' in run.stderr
