"""`launch.sample` and `launch.export_latents` as commands: what they write, and what they refuse."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

import subtractive_jax
from configs import minimal
from subtractive_jax import parts, records
from subtractive_jax.representation.audio import read_audio, write_audio
from subtractive_jax.training import text_stage
from tests import synthetic
from tests.midi import write_midi

RATE = 16_000


def _run(module, *arguments, cwd, cache, devices=1):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.getcwd()}
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # of the tests
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=cwd, env=environment)


def _refused(result, *words):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of noise, a dataset made with it, a song, a folder of stems, and bad files."""
    place = tmp_path_factory.mktemp("sampling")
    config = minimal.get_config()
    with config.unlocked():
        for name in ("latent_shift", "latent_scale", "context_scale"):
            config[name] = (float(name != "latent_shift"),) * config.autoencoder.latent_channels
    tokenizer = text_stage.train_tokenizer(["Add rock drums", "Add reggae beats", "Add jazzy drums"], 256)
    synthetic.write_model(place / "model", config, parts.PARTS, tokenizer)
    synthetic.write_latents(place / "data", config, place / "model", train=300, validation=1)
    random = np.random.default_rng(0)
    (place / "stems").mkdir()
    for name, channels in (("drums", 2), ("bass", 1), ("keys", 2)):
        audio = np.round(random.uniform(-0.2, 0.2, (channels, 44_100)) * 2**15) / 2**15
        write_audio(place / "stems" / f"{name}.wav", audio.astype(np.float32), 44_100)
    audio = np.round(random.uniform(-0.2, 0.2, 2 * RATE + 7) * 2**15) / 2**15
    write_audio(place / "song.wav", audio.astype(np.float32), RATE)
    write_audio(place / "fast.wav", audio.astype(np.float32), 96_000)
    (place / "noise.wav").write_bytes(b"not audio")
    (place / "noise.mid").write_bytes(b"not notes")
    (place / "nothing.wav").write_bytes(b"")
    soundfile.write(place / "no samples.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(place / "nan.wav", np.array([0.1, np.nan, 0.2], np.float32), RATE, subtype="FLOAT")
    return place


@pytest.fixture(scope="module")
def sample(place):
    return lambda *arguments: _run("launch.sample", *arguments, cwd=place, cache=place / "cache")


SONG = ("--model=model", "--input=song.wav", "--instruction=Add reggae beats", "--steps=2")


@pytest.fixture(scope="module")
def single(place, sample):
    result = sample(*SONG, "--output=single/out", "--num_candidates=2", "--seed=5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("single/out/index.html")
    return place / "single" / "out"


def test_a_song_gets_its_stem(place, single):
    song, _ = read_audio(place / "song.wav")
    stem, mix, context = (read_audio(single / f"{name}.wav") for name in ("stem", "mix", "without_stem"))
    assert stem[1] == mix[1] == RATE and stem[0].shape == song.shape and stem[0].any()
    np.testing.assert_array_equal(mix[0] - stem[0], song)
    np.testing.assert_array_equal(context[0], song)
    assert not list(single.parent.glob(".*"))  # nothing temporary is left


def test_the_result_says_how_it_was_made(single):
    result = json.loads((single / "result.json").read_text())
    assert result["instruction"] == "Add reggae beats" and result["stem"] == "drums" and result["steps"] == 2
    assert result["model"] == "model" and result["estimated"] is False
    assert [result[name] for name in ("text_guidance", "context_guidance", "guidance_rescale")] == [4.0, 3.0, 0.7]
    assert result["figures"]["preservation"]["exact"] and result["seconds"]["sampling"] > 0
    assert set(result["candidates"]) == {"5", "6"}
    other = ({5, 6} - {result["seed"]}).pop()
    assert result["candidates"][str(result["seed"])] >= result["candidates"][str(other)]
    assert {path.name for path in (single / "candidates" / str(other)).iterdir()} == {"stem.wav", "mix.wav"}
    text = (single / "index.html").read_text()
    assert all(f'src="{name}.wav"' in text for name in ("without_stem", "mix", "stem"))


def test_the_number_of_devices_does_not_matter(single, place):
    result = _run("launch.sample", *SONG, "--output=spread", "--seed=5", cwd=place, cache=place / "cache", devices=3)
    assert result.returncode == 0, result.stderr
    first = json.loads((single / "result.json").read_text())["seed"] == 5
    expected, found = (
        read_audio(path)[0]
        for path in (single / ("stem.wav" if first else "candidates/5/stem.wav"), place / "spread" / "stem.wav")
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_compiled_programs_are_kept(single, place):
    assert any((place / "cache" / "subtractive_jax").iterdir())


def test_an_output_that_exists_is_left_alone(single, sample, place):
    before = {path: path.stat().st_mtime_ns for path in single.rglob("*")}
    _refused(sample(*SONG, "--output=single/out"), "single/out exists", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in single.rglob("*")} == before
    (place / "diary").mkdir(exist_ok=True)
    (place / "diary" / "monday.txt").write_text("dear diary")
    _refused(sample(*SONG, "--output=diary", "--overwrite"), "was not written by this program")
    assert (place / "diary" / "monday.txt").read_text() == "dear diary"


@pytest.fixture(scope="module")
def jobs(place, sample):
    """A jobs file of which most lines are broken; its output replaces an earlier one."""
    good = {"input": "song.wav", "instruction": "Add rock drums"}
    lines = [
        {"id": "good", **good, "seed": 3, "steps": 3, "solver": "pndm", "format": "flac"},
        {"id": "removed", "input": "stems", "remove": True, "instruction": "Add jazzy drums", "start": 0.2, "end": 0.9},
        {"id": "baseline", **good, "method": "sdedit", "strength": 0.5},
        {"id": "stem", **good, "stem": "drum"},
        {"id": "method", **good, "method": "sdedti"},
        {"id": "field", **good, "instructions": "Add"},
        {"id": "type", **good, "steps": "many"},
        {"id": "format", **good, "format": "midi"},
        {"id": "empty", **good, "instruction": ""},
        {"id": "long", **good, "instruction": "Add drums and " * 100},
        {"id": "missing", **good, "input": "gone.wav"},
        {"id": "noise", **good, "input": "noise.wav"},
        {"id": "nothing", **good, "input": "nothing.wav"},
        {"id": "no samples", **good, "input": "no samples.wav"},
        {"id": "nan", **good, "input": "nan.wav"},
        {"id": "folder", **good, "input": "stems"},
        {"id": "separation", **good, "remove": True, "separator": "demucs"},
        {"id": "not there", **good, "input": "stems", "remove": True, "stem": "guitar"},
        {"id": "good", **good},
        {"id": "../escape", **good},
        {"id": "no input"},
        {"id": "rate", **good, "input": "fast.wav", "format": "mp3"},
    ]
    text = "\n".join(["{not json", *map(json.dumps, lines)]) + "\n"
    (place / "jobs.jsonl").write_text(text)
    (place / "many").mkdir()
    (place / "many" / "summary.jsonl").write_text("of an earlier run\n")
    result = sample(
        "--model=model", "--jobs=jobs.jsonl", "--output=many", "--steps=2", "--solver=dpmsolver++", "--overwrite"
    )
    _refused(result, "20 of 23 jobs failed", "summary.jsonl")
    return place / "many"


def _summary(jobs):
    return [json.loads(line) for line in (jobs / "summary.jsonl").read_text().splitlines()]


def test_good_jobs_are_done_beside_broken_ones(jobs):
    done = {line["id"]: line["result"] for line in _summary(jobs) if line["status"] == "done"}
    assert list(done) == ["good", "removed", "baseline"]
    assert done["good"]["seed"] == 3 and done["good"]["steps"] == 3  # the line's own
    assert done["good"]["solver"] == "pndm" and done["removed"]["solver"] == "dpmsolver++"
    assert done["removed"]["steps"] == 2  # the command line's
    assert done["baseline"]["estimated"] and done["baseline"]["strength"] == 0.5
    assert {path.name for path in jobs.iterdir()} == {*done, "summary.jsonl", "index.html"}
    assert (jobs / "good" / "stem.flac").is_file() and (jobs / "good" / "result.json").is_file()


def test_removing_a_stem_keeps_the_others(jobs, place):
    stems = {name: read_audio(place / "stems" / f"{name}.wav")[0] for name in ("drums", "bass", "keys")}
    found = {
        name: read_audio(jobs / "removed" / f"{name}.wav")[0] for name in ("without_stem", "original", "mix", "stem")
    }
    np.testing.assert_array_equal(found["without_stem"], stems["bass"] + stems["keys"])
    np.testing.assert_array_equal(found["original"], stems["bass"] + stems["keys"] + stems["drums"])
    np.testing.assert_array_equal(found["mix"] - found["stem"], found["without_stem"])
    outside = np.r_[0 : int(0.2 * 44_100), int(0.9 * 44_100) : 44_100]
    np.testing.assert_array_equal(found["stem"][:, outside], stems["drums"][:, outside])  # only a part was to change
    assert np.abs(found["stem"] - stems["drums"])[:, 10_000:39_000].max() > 0.01


@pytest.mark.parametrize(
    "job, words",
    [
        ("line-1", "jobs.jsonl:1: not JSON"),
        ("stem", 'unknown stem "drum"; did you mean "drums"'),
        ("method", 'did you mean "sdedit"'),
        ("field", 'unknown job field "instructions"; did you mean "instruction"'),
        ("type", 'steps is "many": it should be of type int'),
        ("format", 'unknown format "midi"'),
        ("empty", "the instruction is empty"),
        ("long", "tokens, at most"),
        ("missing", "gone.wav"),
        ("noise", "noise.wav"),
        ("nothing", "nothing.wav"),
        ("no samples", "no samples.wav"),
        ("nan", "NaN"),
        ("folder", "add --remove"),
        ("separation", 'unknown Demucs model "demucs"'),
        ("not there", 'unknown stem in stems "guitar"'),
        ("line-20", 'the id "good" is taken'),
        ("line-21", "cannot name a folder"),
        ("line-22", "needs id, input and instruction"),
        ("rate", "mp3 cannot hold 1 channels at 96000 Hz"),
    ],
)
def test_a_broken_job_is_reported(jobs, job, words):
    (line,) = [line for line in _summary(jobs) if line["id"] == job and line["status"] == "failed"]
    assert words in line["error"] and "\n" not in line["error"]
    assert not (jobs / job).exists()


def test_one_page_covers_all_jobs(jobs):
    text = (jobs / "index.html").read_text()
    assert text.count("<article") == 23 and text.count("<h2>Not done</h2>") == 1
    assert 'src="removed/original.wav"' in text and 'src="good/mix.flac"' in text and "estimated" in text


@pytest.fixture(scope="module")
def odd_jobs(place, sample):
    """Inputs and outputs of many kinds, done by a run that is killed and run again."""
    random = np.random.default_rng(1)
    for name, channels, rate, seconds in (
        ("telephone", 1, 8_000, 1.1),
        ("studio", 2, 96_000, 0.7),
        ("short", 1, RATE, 0.2),
    ):
        noise = random.uniform(-0.2, 0.2, (channels, int(seconds * rate)))
        write_audio(place / f"{name}.wav", (np.round(noise * 2**15) / 2**15).astype(np.float32), rate)
    write_audio(place / "silence.wav", np.zeros((1, RATE), np.float32), RATE)
    tracks = {"kit": [(beat, 36) for beat in range(8)], "bass": [(beat, 40) for beat in range(4, 8)]}
    write_midi(place / "song.mid", tracks, {"kit": 9, "bass": 0})
    text = {"instruction": "Add rock drums"}
    lines = [
        *({"id": name, "input": f"{name}.wav", **text} for name in ("telephone", "studio", "short", "silence")),
        {"id": "mp3", "input": "song.wav", **text, "format": "mp3"},
        {"id": "turn", "input": "song.wav", "stem": "bass,drums", "instruction": "Add jazzy drums | Add rock drums"},
        {"id": "demucs", "input": "song.wav", **text, "remove": True, "separator": "demucs_unittest"},
        {"id": "notes", "input": "song.mid", **text, "remove": True},
        {"id": "all notes", "input": "song.mid", **text},
    ]
    (place / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--model=model", "--jobs=odd.jsonl", "--output=odd", "--steps=2", "--num_candidates=2"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(place / "cache"),
        "PYTHONPATH": os.getcwd(),
    }
    command = [sys.executable, "-m", "launch.sample", *arguments]
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as run:
        while not (place / "odd" / "studio" / "result.json").is_file():
            assert run.poll() is None, run.stderr.read().decode()
            time.sleep(0.01)
        run.kill()
    before = {path: path.stat().st_mtime_ns for path in (place / "odd" / "telephone").rglob("*")}
    result = sample(*arguments)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in (place / "odd" / "telephone").rglob("*")} == before
    return place / "odd", arguments, result


def test_a_killed_run_goes_on(odd_jobs, sample):
    folder, arguments, result = odd_jobs
    names = ["telephone", "studio", "short", "silence", "mp3", "turn", "demucs", "notes", "all notes"]
    assert [line["id"] for line in _summary(folder)] == names
    assert {path.name for path in folder.iterdir()} == {
        *names,
        "summary.jsonl",
        "index.html",
    }
    assert "9 done" in result.stdout and "0 failed" in result.stdout
    seeds = [line["result"]["job"]["seed"] for line in _summary(folder)]
    assert len(set(seeds)) == 9  # each its own
    _refused(sample(*arguments, "--steps=3"), "9 of 9 jobs failed")
    assert all("steps was 2, now 3" in line["error"] for line in _summary(folder))
    assert sample(*arguments).returncode == 0


@pytest.mark.parametrize("name, channels, rate", [("telephone", 1, 8_000), ("studio", 2, 96_000), ("short", 1, RATE)])
def test_the_output_is_like_the_input(odd_jobs, place, name, channels, rate):
    song = read_audio(place / f"{name}.wav")[0]
    (stem, found), (mix, _) = (read_audio(odd_jobs[0] / name / f"{file}.wav") for file in ("stem", "mix"))
    assert found == rate and stem.shape == song.shape and len(song) == channels
    np.testing.assert_array_equal(mix - stem, song)


def test_silence_and_mp3(odd_jobs):
    result = json.loads((odd_jobs[0] / "silence" / "result.json").read_text())
    assert result["input_gain"] == 1.0 and result["figures"]["onsets"]["context"] == 0
    assert result["figures"]["flags"] == ["silent_context"]
    assert soundfile.info(odd_jobs[0] / "mp3" / "mix.mp3").format == "MP3"


def test_stems_in_turn(odd_jobs, place):
    folder, song = odd_jobs[0] / "turn", read_audio(place / "song.wav")[0]
    found = {path.stem: read_audio(path)[0] for path in folder.glob("*.wav")}
    assert set(found) == {"without_stem", "stem", "stem_bass", "stem_drums", "mix"}
    np.testing.assert_allclose(found["stem"], found["stem_bass"] + found["stem_drums"], atol=1e-7)
    np.testing.assert_allclose(found["mix"], song + found["stem"], atol=1e-7)
    result = json.loads((folder / "result.json").read_text())
    assert [each["instruction"] for each in result["stems"]] == ["Add jazzy drums", "Add rock drums"]
    assert [each["stem"] for each in result["stems"]] == ["bass", "drums"]
    assert list(folder.glob("candidates/*/stem_bass.wav")) and list(folder.glob("candidates/*/mix_drums.wav"))


def test_demucs_takes_the_stem_out(odd_jobs, place):
    found = {path.stem: read_audio(path)[0] for path in (odd_jobs[0] / "demucs").glob("*.wav")}
    np.testing.assert_array_equal(found["original"], read_audio(place / "song.wav")[0])
    assert np.abs(found["without_stem"] - found["original"]).max() > 1e-4
    np.testing.assert_array_equal(found["mix"] - found["stem"], found["without_stem"])
    assert {path.name for path in (odd_jobs[0] / "demucs").iterdir() if path.name.startswith(".")} == set()


def test_notes_are_rendered_without_the_stem(odd_jobs):
    found = {path.stem: read_audio(path)[0] for path in (odd_jobs[0] / "notes").glob("*.wav")}
    begins = int(1.9 * 44_100)  # the bass has its first note at 2 s
    assert np.abs(found["without_stem"][:, :begins]).max() < 1e-4 < np.abs(found["without_stem"]).max()
    assert np.abs(found["original"][:, :begins]).max() > 1e-2  # the kit
    np.testing.assert_array_equal(found["mix"] - found["stem"], found["without_stem"])
    whole = read_audio(odd_jobs[0] / "all notes" / "without_stem.wav")[0]
    np.testing.assert_array_equal(whole, found["original"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model=model", "--jobs=jobs.jsonl", "--input=song.wav"), ("either --jobs",)),
        (("--model=model", "--input=song.wav"), ("--instruction",)),
        (("--model=modle", "--input=song.wav", "--instruction=Add drums"), ("modle",)),
        (("--model=model", "--jobs=gone.jsonl"), ("gone.jsonl",)),
        (("--model=model", "--input=nan.wav", "--instruction=Add drums"), ("nan.wav", "NaN")),
        (("--model=model", "--input=noise.mid", "--instruction=Add drums"), ("noise.mid", "not readable as MIDI")),
        (("--model=model", "--input=gone.mid", "--instruction=Add drums"), ("gone.mid", "no such file")),
    ],
)
def test_bad_commands_write_nothing(sample, place, arguments, words):
    _refused(sample(*arguments, "--output=refused"), *words)
    assert not (place / "refused").exists() and not list(place.glob(".refused*"))


# Latents for analysis


@pytest.fixture(scope="module")
def export(place):
    return lambda *arguments: _run("launch.export_latents", *arguments, cwd=place, cache=place / "cache")


def test_latents_of_a_dataset(export, place):
    result = export("--model=model", "--data_dir=data", "--output=data.parquet", "--signal=stem")
    assert result.returncode == 0, result.stderr
    table = pq.read_table(place / "data.parquet")
    examples = [records.Split(place / "data", "latents", split) for split in ("train", "validation")]
    examples = [split[index] for split in examples for index in range(len(split))]
    assert table.num_rows == len(examples) == 301  # more than are written at once
    assert table["song_id"].to_pylist() == [example["song_id"] for example in examples]
    assert table["instruction"].to_pylist() == [example["instructions"][0] for example in examples]
    assert table["split"].to_pylist() == ["train"] * 300 + ["validation"]
    shape = json.loads(table.schema.metadata[b"latent_shape"])
    latents = np.array(table["latent"].to_pylist(), np.float32).reshape(-1, *shape)
    means = np.stack([example["stem_latent"][..., : shape[-1]] for example in examples])
    np.testing.assert_array_equal(latents, means.astype(np.float32))
    embeddings = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(embeddings.reshape(-1, shape[0], shape[2]), latents.mean(axis=2), atol=1e-6)
    assert table.schema.field("latent").type.list_size == np.prod(shape)


def test_latents_of_audio_files(export, place):
    result = export("--model=model", "--input=song.wav,stems/bass.wav", "--output=audio.parquet")
    assert result.returncode == 0, result.stderr
    table = pq.read_table(place / "audio.parquet")
    assert table["song_id"].to_pylist() == ["song", "song", "bass"]
    np.testing.assert_allclose(table["start_seconds"].to_pylist(), [0.0, 1.28, 0.0], rtol=1e-6)
    model = subtractive_jax.load(str(place / "model"))
    shape = json.loads(table.schema.metadata[b"latent_shape"])
    assert tuple(shape) == model.encode_audio(np.zeros((1, model.mel.window_samples), np.float32))[..., :8].shape[1:]


def test_bad_exports_write_nothing(export, place):
    (place / "taken.parquet").write_text("mine")
    _refused(export("--model=model", "--input=song.wav", "--output=taken.parquet"), "taken.parquet exists")
    assert (place / "taken.parquet").read_text() == "mine"
    _refused(export("--model=model", "--data_dir=data", "--output=x.parquet", "--signal=stems"), 'did you mean "stem"')
    assert not (place / "x.parquet").exists()
