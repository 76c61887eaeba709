"""The whole chain as a user runs it, on seconds of rendered music and the smallest model: every program, for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from data_pipeline import sources
from subtractive_jax.representation.audio import read_audio, write_audio
from subtractive_jax.training import checkpoint
from tests.midi import write_midi

REPOSITORY = Path(__file__).parents[1]
STEPS = 3
SPLITS = ("validation", "test")
FRACTIONS = (0.2, 0.2)


def start(module: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=pipe, stderr=pipe)


def run(module: str, *flags: str) -> str:
    process = start(module, *flags)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def train(stage: str, data_dir: Path, workdir: Path, parent: Path | None = None, *flags: str) -> list[str]:
    settings = [f"--config=configs/minimal.py:{stage}", f"--data_dir={data_dir}", f"--workdir={workdir}"]
    settings += [f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=1", *flags]
    return settings + ([f"--config.init_from={parent}"] if parent else [])


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Six songs of three seconds, of which four train."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "mid").mkdir()
    wanted, rows = {"train": 4, "validation": 1, "test": 1}, []
    for number in range(100):
        song_id = f"song-{number}"
        split = sources.split_of(sources.Song(song_id, song_id, "midi", "", (), {}), *FRACTIONS)
        if wanted[split]:
            wanted[split] -= 1
            tracks = {
                "drums/Drum kit 0": [(beat / 2, 42 if beat % 2 else 36) for beat in range(14)],
                "bass/Fingered Bass": [(beat, 33 + number % 7) for beat in range(7)],
                "keys/Acoustic Grand Piano": [(beat, 60 + (number + 4 * beat) % 12) for beat in range(7)],
            }
            path = f"mid/{song_id}.mid"
            write_midi(folder / path, tracks, {name: 9 if "drums" in name else 0 for name in tracks})
            rows.append({"id": song_id, "midi": path, "genre": "rock"})
    assert not any(wanted.values())
    (folder / "songs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_songs_to_an_inserted_stem(songs, tmp_path):
    data = tmp_path / "data"
    text, codec, vocoder, base, final = (tmp_path / name for name in ("text", "codec", "vocoder", "base", "final"))
    config = "--config=configs/minimal.py"
    fractions = [f"--config.data.{name}_fraction={value}" for name, value in zip(SPLITS, FRACTIONS, strict=True)]

    run("data_pipeline.build", config, f"--data_dir={data}", f"--source=midi:{songs}", *fractions)
    run("launch.train", *train("text_encoder", data, text))
    run("launch.train", *train("autoencoder", data, codec, text))
    run("data_pipeline.build", config, f"--data_dir={data}", f"--encoders={codec}", *fractions)
    run("launch.train", *train("vocoder", data, vocoder, codec))
    run("launch.train", *train("base", data, base, vocoder))

    # Killed once it has a checkpoint, and run again.
    flags = train("subtractive", data, final, base)
    killed = start("launch.train", *flags)
    while checkpoint.latest(final) is None:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    run("launch.train", *flags)
    assert checkpoint.latest(final) == STEPS
    assert [json.loads(line)["step"] for line in (final / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]

    model = tmp_path / "model"
    run("launch.convert", "--from=run", f"--input={final}", f"--output={model}")
    parts = {path.stem for path in model.glob("*.safetensors")}
    assert parts == {"text_encoder", "autoencoder", "vocoder", "base_denoiser", "denoiser"}

    song = tmp_path / "song.wav"
    music = 0.1 * np.random.default_rng(0).standard_normal((2, 2 * 44_100)).astype(np.float32)
    write_audio(song, music, 44_100)
    sampled = tmp_path / "sampled"
    asked = ["--instruction=Add reggae beats", f"--input={song}"]
    run("launch.sample", f"--model={model}", *asked, f"--output={sampled}")
    stem, mix = (read_audio(sampled / f"{name}.wav")[0] for name in ("stem", "mix"))
    np.testing.assert_array_equal(mix, read_audio(song)[0] + stem)
    assert np.abs(stem).max() > 0
    assert json.loads((sampled / "result.json").read_text())["instruction"] == "Add reggae beats"
    assert "Add reggae beats" in (sampled / "index.html").read_text()

    table = tmp_path / "latents.parquet"
    run("launch.export_latents", f"--model={model}", f"--data_dir={data}", f"--output={table}")
    counts = json.loads((data / "latents/1.0.0/metadata.json").read_text())["counts"]
    assert pyarrow.parquet.read_table(table).num_rows == sum(sum(stems.values()) for stems in counts.values())

    real, made = tmp_path / "real", tmp_path / "made"
    for folder, source in ((real, song), (made, sampled / "mix.wav")):
        folder.mkdir()
        for name in ("a.wav", "b.wav"):
            shutil.copy(source, folder / name)
    report = run("launch.evaluate", f"--reference={real}", f"--candidate={made}", f"--output={tmp_path / 'table'}")
    assert "FAD" in report
