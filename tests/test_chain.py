"""Three chains as users run them, every program for real, on seconds of music and the smallest models: training from
nothing, the same with notes, and fine-tuning published weights that go back to diffusers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest

from data_pipeline import splits
from subtractive_jax.representation.audio import read_audio, write_audio
from subtractive_jax.representation.notes import read_score
from subtractive_jax.weights import model_folder
from tests import worlds
from tests.midi import write_midi

REPOSITORY = Path(__file__).parents[1]
STEPS = 3
SPLITS = ("validation", "test")
FRACTIONS = (0.2, 0.2)


def run(module: str, *flags: str) -> str:
    command = [sys.executable, "-m", module, *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(
    stage: str,
    data_dir: Path,
    workdir: Path,
    parent: Path | None = None,
    *flags: str,
    config: str = "configs/minimal.py",
) -> list[str]:
    settings = [f"--config={config}:{stage}", f"--data_dir={data_dir}", f"--workdir={workdir}"]
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
        split = splits.split_of(song_id, *FRACTIONS)
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


def fractions() -> list[str]:
    return [f"--config.data.{name}_fraction={value}" for name, value in zip(SPLITS, FRACTIONS, strict=True)]


def test_songs_to_an_inserted_stem(songs, tmp_path):
    data = tmp_path / "data"
    text, codec, vocoder, base, final = (tmp_path / name for name in ("text", "codec", "vocoder", "base", "final"))
    config = "--config=configs/minimal.py"

    run("data_pipeline.build", config, f"--data_dir={data}", f"--source=midi:{songs}", *fractions())
    run("launch.train", *train("text_encoder", data, text))
    run("launch.train", *train("autoencoder", data, codec, text))
    run("data_pipeline.build", config, f"--data_dir={data}", f"--encoders={codec}", *fractions())
    run("launch.train", *train("vocoder", data, vocoder, codec))
    run("launch.train", *train("base", data, base, vocoder))

    run("launch.train", *train("subtractive", data, final, base))
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


NOTES = """
from tests import worlds

def get_config(stage="subtractive"):
    config = worlds.notes_config(stage, window_steps=16)
    config.data.window_hop_bars = 1
    config.train.update(dict(batch_size=8, warmup_steps=0, log_every=1))
    return config
"""


def test_notes_to_an_inserted_part(songs, tmp_path):
    config = tmp_path / "notes.py"
    config.write_text(NOTES)
    parent = worlds.notes_model(tmp_path / "parent", window_steps=16)
    data, base, final, model = (tmp_path / name for name in ("data", "base", "final", "model"))
    build = [f"--config={config}", f"--data_dir={data}", f"--source=midi:{songs}", f"--encoders={parent}", *fractions()]
    run("data_pipeline.build", *build)
    run("launch.train", *train("base", data, base, parent, config=str(config)))
    run("launch.train", *train("subtractive", data, final, base, config=str(config)))
    assert {path.suffix for path in (final / "samples" / str(STEPS)).iterdir()} == {".png", ".mid", ".json"}
    run("launch.convert", "--from=run", f"--input={final}", f"--output={model}")

    song, sampled = songs / "mid" / "song-0.mid", tmp_path / "sampled"
    asked = ["--instruction=Add a funk bass", "--stem=bass", f"--input={song}", "--remove", f"--output={sampled}"]
    run("launch.sample", f"--model={model}", *asked)
    given, mix = read_score(song), read_score(sampled / "mix.mid")
    for stem in ("drums", "keys"):
        np.testing.assert_array_equal(mix.parts[stem], given.parts[stem])
    result = json.loads((sampled / "result.json").read_text())
    assert result["instruction"] == "Add a funk bass" and result["figures"]["preservation"]["exact"]
    names = {path.name for path in sampled.iterdir()}
    players = {f"{name}.wav" for name in ("original", "without_stem", "mix", "stem")}
    assert names == {"stem.mid", "mix.mid", "roll.png", "result.json", "index.html", *players}


MINIATURE = """
from pathlib import Path

from configs import riffusion_t5
from subtractive_jax.weights import model_folder

OWN = ("representation", "text_encoder", "autoencoder", "denoiser", "max_text_tokens")

def get_config(stage="subtractive"):
    config, model = riffusion_t5.get_config(stage), model_folder.read_config(Path({model!r}))
    with config.unlocked():
        for name in OWN:
            config[name] = model[name]
        config.data.window_hop_frames = model.data.window_hop_frames
        config.compute_dtype = "float32"
        config.train.update(dict(batch_size=8, warmup_steps=0, log_every=1))
        config.sampling.steps = 2
    return config
"""


@pytest.mark.slow
def test_published_weights_fine_tuned_and_taken_back(songs, tmp_path):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tests import published

    # A miniature of Riffusion on disk, converted; CLIP replaced by T5 behind a fresh adapter.
    published.stable_diffusion(tmp_path / "riffusion", max_text_tokens=128)
    published.spiece(tmp_path / "t5")
    published.randomise(transformers.T5EncoderModel(published.t5_config())).save_pretrained(tmp_path / "t5")
    clip_model, model = tmp_path / "clip_model", tmp_path / "model"
    shape = [
        f"--config.{name}={value}" for name, value in (published.SMALL_WINDOWS | dict(max_text_tokens=128)).items()
    ]
    read = ["--from=riffusion", f"--input={tmp_path / 'riffusion'}", f"--output={clip_model}"]
    run("launch.convert", *read, "--config=configs/riffusion.py", *shape)
    told = run(
        "launch.convert", "--from=flan-t5", f"--input={tmp_path / 't5'}", f"--into={clip_model}", f"--output={model}"
    )
    assert "adapter" in told

    config = tmp_path / "miniature.py"
    config.write_text(MINIATURE.format(model=str(model / "config.json")))
    data, base, final = (tmp_path / name for name in ("data", "base", "final"))
    build = [f"--config={config}", f"--data_dir={data}", f"--source=midi:{songs}", f"--encoders={model}", *fractions()]
    run("data_pipeline.build", *build)

    # The base stage trains the adapter alone; then everything learns to read the context and the stem.
    run("launch.train", *train("base", data, base, model, config=str(config)))
    before, after = (model_folder.load(path).params["base_denoiser"] for path in (model, base))
    changed = {name for name in before if not _equal(before[name], after[name])}
    assert changed == {"condition_adapter"}
    run("launch.train", *train("subtractive", data, final, base, config=str(config)))

    song, sampled = tmp_path / "song.wav", tmp_path / "sampled"
    write_audio(song, 0.1 * np.random.default_rng(0).standard_normal((2, 44_100)).astype(np.float32), 44_100)
    asked = ["--instruction=Add reggae beats", f"--input={song}", "--solver=dpmsolver++"]
    run("launch.sample", f"--model={final}", *asked, f"--output={sampled}")
    mix = read_audio(sampled / "mix.wav")[0]
    assert mix.shape == (2, 44_100) and np.isfinite(mix).all() and np.abs(mix).max() > 0

    back = tmp_path / "back"
    run("launch.convert", "--to=diffusers", f"--input={final}", f"--output={back}")
    unet = diffusers.UNet2DConditionModel.from_pretrained(back / "unet")
    ours = model_folder.load(final).params["denoiser"]
    assert unet.config.in_channels == 8
    np.testing.assert_array_equal(
        unet.conv_in.weight.detach(), ours["conv_in"]["kernel"].transpose(3, 2, 0, 1), strict=True
    )


def _equal(one: object, other: object) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)
