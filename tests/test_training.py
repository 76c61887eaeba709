"""The trainer: resuming is exact, five stages run, meshes agree, bad input is refused in one line."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from subtractive_jax import records
from subtractive_jax.errors import UserError
from subtractive_jax.training import (
    checkpoint,
    loop,
    metrics,
    partitioning,
    reader,
    run_folder,
    stages,
    steps,
    text_stage,
)
from subtractive_jax.training.train_step import means
from subtractive_jax.weights import model_folder
from tests import synthetic

_ROOT = Path(__file__).parents[1]


def _difference(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in leaves)


def _lines(run):
    return [json.loads(line) for line in (Path(run) / metrics.FILE_NAME).read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """Four updates on a (4, 2) mesh, with checkpoints after two and four."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    config = world.config(checkpoint_every=2, preview_examples=1)
    config.mesh.update(dict(data=4, fsdp=2))
    return config, run, loop.train(config, world.data_dir, run)


def _interrupted_after_two(config, world, run, monkeypatch):
    """The same run, told to stop after two updates."""
    batch = reader.Batches.batch

    def stopping(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(reader.Batches, "batch", stopping)
        patch.setattr(reader, "_PREFETCH", 1)
        state = loop.train(config, world.data_dir, run)
    return state


def test_resumed_is_uninterrupted_and_cold_is_neither(world, uninterrupted, tmp_path, monkeypatch):
    config, _, full = uninterrupted
    run = tmp_path / "run"
    stopped = _interrupted_after_two(config, world, run, monkeypatch)
    updates = int(stopped["step"])
    assert 0 < updates < 4 and checkpoint.latest(run) == updates

    def resumed(name, damage):
        copy = tmp_path / name
        subprocess.run(["cp", "-r", run, copy], check=True)
        with monkeypatch.context() as patch:
            damage(patch)
            return loop.train(config, world.data_dir, copy)

    def no_damage(patch):
        pass

    def without_optimizer(patch):
        restore = checkpoint.Checkpoints.restore

        def forgetful(self, abstract):
            state, position = restore(self, abstract)
            return state | {"opt_state": jax.tree.map(jnp.zeros_like, state["opt_state"])}, position

        patch.setattr(checkpoint.Checkpoints, "restore", forgetful)

    def without_position(patch):
        batch = reader.Batches.batch
        patch.setattr(reader.Batches, "batch", lambda self, step: batch(self, step - updates))

    assert _difference(full, resumed("exact", no_damage)) == 0.0
    assert _difference(full["params"], resumed("optimizer", without_optimizer)["params"]) > 1e-6
    assert _difference(full["params"], resumed("position", without_position)["params"]) > 1e-6


def test_a_checkpoint_is_named_after_its_updates(uninterrupted):
    _, run, state = uninterrupted
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    assert int(state["step"]) == 4 and checkpoint.latest(run) == 4
    part, ema = checkpoint.load_ema(run)
    assert part == "denoiser" and _difference(ema, state["ema"]["denoiser"]) == 0.0
    assert _difference(state["ema"], state["params"]) > 0.0


def test_the_run_folder_is_a_model(world, uninterrupted):
    _, run, state = uninterrupted
    files = model_folder.load(run)
    assert set(files.params) == {"text_encoder", "autoencoder", "vocoder", "base_denoiser", "denoiser"}
    assert _difference(files.params["denoiser"], state["ema"]["denoiser"]) == 0.0
    parent = model_folder.load(world.parent)
    assert _difference(files.params["autoencoder"], parent.params["autoencoder"]) == 0.0
    assert files.tokenizer.to_str() == parent.tokenizer.to_str()
    assert "denoiser/conv_in/kernel" in (run / "parameters.txt").read_text()
    assert tuple(files.config.latent_shift) == (0.5,) * 8 and tuple(files.config.context_scale) == (0.25,) * 8


def test_state_is_sharded_as_the_rules_say(uninterrupted):
    _, _, state = uninterrupted
    kernel = state["params"]["denoiser"]["up_blocks"]["0"]["resnets"]["0"]["conv1"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, None, "fsdp", None)
    assert dict(kernel.sharding.mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    moment = state["opt_state"][1][0].mu["denoiser"]["mid_block"]["attentions"]["0"]["transformer_blocks"]["0"]
    assert moment["attn2"]["to_q"]["kernel"].sharding.spec == jax.P("fsdp", "tensor")


def test_metrics_are_json_lines_and_tensorboard_events(uninterrupted):
    _, run, _ = uninterrupted
    lines = _lines(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "seconds_per_step", "examples_per_second"} <= set(lines[0])
    assert {"validation/loss", "validation_raw/loss"} <= set(lines[3]) and "validation/loss" not in lines[2]
    assert {path.name for path in (run / "samples" / "4").iterdir()} >= {"0_stem.wav", "0_mel.png", "samples.json"}
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Scalars("loss")[1].value == pytest.approx(lines[1]["loss"])


@pytest.mark.parametrize("stage", ["text_encoder", "autoencoder", "vocoder", "base"])
def test_every_stage_learns_and_can_be_loaded(world, tmp_path, stage):
    config = world.config(stage, steps=12, learning_rate=1e-3, warmup_steps=1, eval_every=6)
    if stage == "vocoder":
        config.crop_frames = 32
    state = loop.train(config, world.data_dir, tmp_path / "run")
    lines = _lines(tmp_path / "run")
    assert int(state["step"]) == 12 and all(math.isfinite(line["loss"]) for line in lines)
    assert lines[11]["validation/loss"] < lines[5]["validation/loss"]
    part = stages.PART_OF_STAGE[stage]
    files = model_folder.load(tmp_path / "run")
    assert part in files.params and files.tokenizer is not None


def test_subtractive_begins_as_its_base(world):
    config = world.config()
    start, inherited = stages.prepare(config, world.data_dir)
    stage = stages.build(config, world.data_dir, inherited)
    params = stage.task.init_params(jax.random.key(0), start)["denoiser"]
    base = start["base_denoiser"]
    assert _difference(params["conv_in"]["kernel"][:, :, :8], base["conv_in"]["kernel"]) == 0.0
    assert not np.any(params["conv_in"]["kernel"][:, :, 8:])
    assert _difference(params["mid_block"], base["mid_block"]) == 0.0
    assert params["stem_embedding"]["embedding"].shape == (4, 32) and np.any(params["stem_embedding"]["embedding"])


def test_subtractive_goes_on_from_a_denoiser_for_the_same_stems(world, uninterrupted):
    _, run, _ = uninterrupted
    config = world.config()
    config.init_from = str(run)
    start, _ = stages.prepare(config, world.data_dir)
    assert set(start) == {"denoiser"}
    assert tuple(config.latent_shift) == (0.5,) * 8  # the parent's
    config = world.config()
    config.init_from, config.target = str(run), "mix"  # the same network, which has learnt to read the context
    assert set(stages.prepare(config, world.data_dir)[0]) == {"denoiser"}


def test_only_named_parameters_learn_and_the_run_goes_on(world, tmp_path):
    def config(updates):
        return world.config(only=("conv_in",), schedule="constant", steps=updates, warmup_steps=0)

    def learnt(state):
        return state["params"]["denoiser"]["conv_in"]

    base = model_folder.load(world.parent).params["base_denoiser"]
    whole = loop.train(config(4), world.data_dir, tmp_path / "whole")
    others = {name: leaf for name, leaf in whole["params"]["denoiser"].items() if name in base and name != "conv_in"}
    assert _difference(others, {name: base[name] for name in others}) == 0.0
    moments = [leaf.shape for leaf in jax.tree.leaves(whole["opt_state"]) if leaf.ndim]
    assert sorted(moments) == sorted([leaf.shape for leaf in jax.tree.leaves(learnt(whole))] * 2)

    stopped = loop.train(config(2), world.data_dir, tmp_path / "parts")
    assert _difference(learnt(whole), learnt(stopped)) > 0.0
    assert _difference(whole, loop.train(config(4), world.data_dir, tmp_path / "parts")) == 0.0

    with pytest.raises(UserError, match="steps=2 must be above train.warmup_steps=2"):
        loop.train(world.config(steps=2), world.data_dir, tmp_path / "none")
    with pytest.raises(UserError, match="train.only: no parameter is called"):
        loop.train(world.config(only=("conv",)), world.data_dir, tmp_path / "none")


@pytest.mark.parametrize("shapes", [[(2, 2, 2)], pytest.param([(8,), (2, 4)], marks=pytest.mark.slow)])
def test_meshes_agree(world, shapes):
    config = world.config()
    start, inherited = stages.prepare(config, world.data_dir)
    stage = stages.build(config, world.data_dir, inherited)

    def losses(*shape, accumulation_steps=1):
        config.train.accumulation_steps = accumulation_steps
        mesh = partitioning.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        sharding = partitioning.batch_sharding(mesh)
        rows = partitioning.local_rows(sharding, config.train.batch_size)
        batches = reader.Batches(stage.train, config.train.batch_size, config.seed, rows)
        compiled = steps.build(config, stage.task, mesh, start)
        state, figures = compiled.init(start), []
        for number in range(3):
            batch = jax.device_put(batches.batch(number), sharding)
            assert {key: (leaf.shape, leaf.dtype) for key, leaf in batch.items()} == {
                key: (leaf.shape, leaf.dtype) for key, leaf in compiled.batch.items()
            }
            state, sums = compiled.train(state, batch)
            figures.append(means([jax.device_get(sums)]))
        return [(figure["loss"], figure["grad_norm"]) for figure in figures]

    one = losses(1)
    assert one[0] != one[1]
    for shape in shapes:
        np.testing.assert_allclose(losses(*shape), one, rtol=2e-5)
    np.testing.assert_allclose(losses(2, accumulation_steps=4), one, rtol=2e-5)


class _Numbers:
    fingerprint = "numbers"

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def batch(self, examples, draws):
        return dict(example=np.array(examples), choice=np.array([draw.integers(1000) for draw in draws]))


def test_batches_are_epochs_of_all_examples_whatever_the_hosts():
    whole = reader.Batches(_Numbers(10), 4, seed=3, rows=np.arange(4))
    hosts = [reader.Batches(_Numbers(10), 4, seed=3, rows=rows) for rows in (np.arange(2), np.arange(2, 4))]
    examples = np.concatenate([whole.batch(step)["example"] for step in range(5)])
    assert sorted(examples[:10]) == sorted(examples[10:]) == list(range(10))
    assert examples[:10].tolist() != examples[10:].tolist()
    for step in range(5):
        for key in ("example", "choice", "row"):
            joined = np.concatenate([host.batch(step)[key] for host in hosts])
            assert joined.tolist() == whole.batch(step)[key].tolist()
    streamed = list(whole.stream(2, 5))
    assert [batch["choice"].tolist() for batch in streamed] == [whole.batch(s)["choice"].tolist() for s in (2, 3, 4)]
    other = reader.Batches(_Numbers(10), 4, seed=4, rows=np.arange(4))
    assert examples[:4].tolist() != other.batch(0)["example"].tolist()


def test_evaluation_sees_each_example_once():
    batches = list(reader.evaluation_batches(_Numbers(10), 4, np.arange(4), limit=256))
    assert [len(batch["example"]) for batch in batches] == [4, 4, 4]
    valid = np.concatenate([batch["example"][batch["valid"]] for batch in batches])
    assert valid.tolist() == list(range(10))
    again = list(reader.evaluation_batches(_Numbers(10), 4, np.arange(4), limit=256))
    assert all((a["choice"] == b["choice"]).all() for a, b in zip(batches, again, strict=True))
    few = list(reader.evaluation_batches(_Numbers(10), 4, np.arange(4), limit=5))
    assert np.concatenate([batch["example"][batch["valid"]] for batch in few]).tolist() == [0, 2, 4, 6, 8]


def test_reader_errors_reach_the_loop():
    class Broken(_Numbers):
        def batch(self, examples, draws):
            raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        next(reader.Batches(Broken(10), 4, 0, np.arange(4)).stream(0, 3))


def test_tokenizer_knows_all_english(world):
    tokenizer = text_stage.make_tokenizer(world.config("text_encoder"), world.data_dir)
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    printable = "".join(map(chr, range(33, 127))) + " too"
    ids = tokenizer.encode(printable).ids
    assert 2 not in ids and ids[-1] == 1 and max(ids) < 256
    assert tokenizer.decode(ids) == printable.lower()
    assert tokenizer.encode("").ids == [1]
    assert tokenizer.encode("Ａdd").ids == tokenizer.encode("add").ids


def test_labels_are_about_the_song_and_the_missing_stem():
    tags = {"genre": "rock", "tempo": 90, "stems": {"drums": {"pieces": {"snare": 3}}, "bass": {"instruments": ["P"]}}}
    example = dict(tags=json.dumps(tags), stem_name="drums")
    assert text_stage.labels(example) == {
        "tags/genre=rock",
        "tags/tempo",
        "tags/stem=drums",
        "tags/stems/drums/pieces/snare",
    }
    measured = {"bleed_db": -20.0, "semitones": 2, "speed": 1.05}  # no text speaks of them
    assert text_stage.labels(example | {"tags": json.dumps(tags | measured)}) == text_stage.labels(example)


# Bad input.


def _train(*arguments, **options):
    command = [sys.executable, "-m", "launch.train", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(
    ("config_flags", "said"),
    [
        (["--config=configs/minimal.py", "--config.train.stepz=3"], 'Did you mean "steps"'),
        (["--config=configs/minimal.py:subtractiv"], 'unknown stage "subtractiv"'),
        (["--config=configs/minimall.py"], "No such file or directory: 'configs/minimall.py'"),
        (["--confg=configs/minimal.py"], "Did you mean: config"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path, config_flags, said):
    process = _train(*config_flags, f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(errors.strip().splitlines()) == 1 and errors.startswith("error: ") and said in errors
    assert not (tmp_path / "run").exists()


def test_datasets_of_other_encoders_are_refused_with_both_hashes(world, tmp_path):
    metadata = records.read_metadata(world.data_dir, "latents")
    other = tmp_path / "data"
    subprocess.run(["cp", "-r", world.data_dir, other], check=True)
    path = records.dataset_dir(other, "latents") / "metadata.json"
    path.write_text(json.dumps(metadata | {"config_hash": "f00"}))
    with pytest.raises(UserError, match=f"f00.*{metadata['config_hash']}"):
        loop.train(world.config(), other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_padded_otherwise_are_refused(world, tmp_path):
    config = world.config()
    config.text_padding = "zeros"
    parent = model_folder.load(world.parent)
    parent.config.text_padding = "zeros"
    model_folder.save(tmp_path / "parent", parent, "float32", card="Noise.\n")
    config.init_from = str(tmp_path / "parent")
    with pytest.raises(UserError, match="text_padding=masked, this run has config.text_padding=zeros"):
        loop.train(config, world.data_dir, tmp_path / "run")


def test_griffin_lim_is_a_vocoder_without_parameters(world, tmp_path):
    config = world.config(steps=3)
    parent = model_folder.load(world.parent)
    del parent.params["vocoder"]
    for owner in (config, parent.config):
        with owner.unlocked():
            owner.vocoder = dict(model_type="griffin_lim", iterations=2, momentum=0.99)
    model_folder.save(tmp_path / "parent", parent, "float32", card="Noise.\n")
    config.init_from = str(tmp_path / "parent")
    loop.train(config, world.data_dir, tmp_path / "run")
    assert "vocoder" not in model_folder.load(tmp_path / "run").params


def test_changed_config_on_resume_names_the_field_and_both_values(world, uninterrupted):
    config, run, _ = uninterrupted
    changed = config.copy_and_resolve_references()
    changed.train.learning_rate = 1.0
    with pytest.raises(UserError, match=r"config.train.learning_rate=0.0003, now it is 1.0"):
        loop.train(changed, world.data_dir, run)
    free = config.copy_and_resolve_references()
    free.train.log_every = 7
    run_folder.check_unchanged(run, run_folder.read_config(run), free)


def test_other_data_on_resume(world, uninterrupted, tmp_path):
    config, run, _ = uninterrupted
    synthetic.write_latents(tmp_path, config, Path(world.parent), train=11)
    with pytest.raises(UserError, match="other data: dataset was"):
        loop.train(config, tmp_path, run)


def test_workdir_that_is_no_run_folder(world, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run folder"):
        loop.train(world.config(), world.data_dir, tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        loop.train(world.config(), world.data_dir, world.parent)
    with pytest.raises(UserError, match="is a file"):
        loop.train(world.config(), world.data_dir, tmp_path / "precious.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_init_from_missing_unknown_or_poor(world, uninterrupted, tmp_path):
    config = world.config("base")
    config.init_from = ""
    with pytest.raises(UserError, match=r"stage base needs config.init_from"):
        loop.train(config, world.data_dir, tmp_path / "run")
    config.init_from = "/nowhere"
    with pytest.raises(UserError, match="/nowhere"):
        loop.train(config, world.data_dir, tmp_path / "run")
    poor = model_folder.load(world.parent)
    poor = dataclasses.replace(poor, params={"text_encoder": poor.params["text_encoder"]})
    model_folder.save(tmp_path / "poor", poor, dtype="float32", card="")
    config.init_from = str(tmp_path / "poor")
    with pytest.raises(UserError, match="no autoencoder and no vocoder, which stage base needs"):
        loop.train(config, world.data_dir, tmp_path / "run")
    config = world.config("text_encoder")
    config.init_from = world.parent
    with pytest.raises(UserError, match="starts from nothing"):
        loop.train(config, world.data_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_parent_may_have_been_sampled_otherwise(world, tmp_path):
    parent = model_folder.load(world.parent)
    parent.config.schedule.update(dict(timestep_spacing="linspace", steps_offset=1))
    model_folder.save(tmp_path / "parent", parent, "float32", card="Noise.\n")
    config = world.config()
    config.init_from = str(tmp_path / "parent")
    stages.load_parent(config)
    config.schedule.prediction_type = "epsilon"
    with pytest.raises(UserError, match="schedule.prediction_type=v_prediction, this run epsilon"):
        stages.load_parent(config)


def test_parent_of_another_shape(world, tmp_path):
    config = world.config()
    config.autoencoder.latent_channels = 4
    with pytest.raises(UserError, match="the autoencoder of .* has config.autoencoder.latent_channels=8, this run 4"):
        loop.train(config, world.data_dir, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.log_every": 0}, r"train.log_every=0 must be at least 1; for never, give more than train.steps"),
        ({"train.batch_size": 0}, r"train.batch_size=0 must be at least 1"),
        ({"train.accumulation_steps": 0}, r"train.accumulation_steps=0 must be at least 1"),
        ({"train.keep_checkpoints": 0}, r"train.keep_checkpoints=0 must be at least 1"),
        ({"train.learning_rate": -1e-3}, r"train.learning_rate=-0.001 must be at least 0"),
        ({"train.ema_decay": 1.5}, r"train.ema_decay=1.5 must be between 0.0 and 1.0"),
        ({"train.clip_norm": 0.0}, r"train.clip_norm=0.0 must be above 0"),
        ({"train.lora.rank": -1}, r"train.lora.rank=-1 must be at least 0"),
        ({"dropout.text": 0.6, "dropout.both": 0.5}, r"both=0.5, context=0.05, text=0.6: .* their sum at most 1"),
        ({"compute_dtype": "float16"}, r'unknown compute_dtype "float16"'),
    ],
)
def test_numbers_that_cannot_be(world, tmp_path, changes, said):
    config = world.config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        loop.train(config, world.data_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_and_devices(world, tmp_path):
    with pytest.raises(UserError, match="batch_size=12 is not divisible by the 8 devices"):
        loop.train(world.config(batch_size=12), world.data_dir, tmp_path / "run")


@pytest.mark.parametrize("stage", ["text_encoder", "vocoder"])
def test_losses_over_a_whole_batch_are_not_accumulated(world, tmp_path, stage):
    with pytest.raises(UserError, match="leave config.train.accumulation_steps at 1"):
        loop.train(world.config(stage, accumulation_steps=2, batch_size=16), world.data_dir, tmp_path / "run")


def test_unknown_stem_in_the_dataset(world, tmp_path):
    config = world.config()
    config.data.stems = ("drums", "flute")
    with pytest.raises(UserError, match='stem in the dataset .*"bass"'):
        loop.train(config, world.data_dir, tmp_path / "run")


def test_run_folder_without_checkpoint(world, tmp_path):
    run_folder.write_config(tmp_path / "run", world.config())
    with pytest.raises(UserError, match="no checkpoint yet"):
        model_folder.load(tmp_path / "run")


def test_a_config_that_was_damaged(tmp_path):
    (tmp_path / run_folder.CONFIG).write_text('{"stage": "sub')
    with pytest.raises(UserError, match="config.json is damaged .*put it back"):
        run_folder.read_config(tmp_path)


def test_a_disk_that_takes_no_more(tmp_path):
    kept = "what the run saved before is kept. Make room"
    with (
        pytest.raises(UserError, match=f"{tmp_path}: No space left on device; {kept}"),
        run_folder.written_to(tmp_path),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    with pytest.raises(UserError, match="/dev/null/run: Not a directory"), run_folder.written_to(tmp_path):
        run_folder.write_config("/dev/null/run", {})
    with pytest.raises(ValueError, match="of another kind"), run_folder.written_to(tmp_path):
        raise ValueError("of another kind")


def test_a_loss_that_is_not_finite_names_its_steps_and_keeps_the_checkpoint(world, tmp_path, monkeypatch):
    batch = reader.Batches.batch

    def poisoned(self, step):
        arrays = batch(self, step)
        return arrays | {"text_states": arrays["text_states"] * np.float16(np.nan if step == 3 else 1)}

    monkeypatch.setattr(reader.Batches, "batch", poisoned)
    config = world.config(steps=6, log_every=2, checkpoint_every=2)
    config.mesh.update(dict(data=4, fsdp=2))
    with pytest.raises(UserError, match="loss.* not finite between steps 3 and 4"):
        loop.train(config, world.data_dir, tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run") == 2


# Real processes.


def test_killed_in_the_middle_and_run_again(world, tmp_path):
    def command(name):
        return [
            "--config=configs/minimal.py",
            "--config.denoiser.block_out_channels=(32,)",  # as in worlds.small_config
            "--config.denoiser.down_block_types=('DownBlock2D',)",
            "--config.denoiser.up_block_types=('UpBlock2D',)",
            f"--config.init_from={world.parent}",
            "--config.train.steps=30",
            "--config.train.checkpoint_every=3",
            "--config.train.eval_every=100",
            f"--data_dir={world.data_dir}",
            f"--workdir={tmp_path / name}",
        ]

    undisturbed = _train(*command("undisturbed"))
    killed = _train(*command("killed"))
    folder = tmp_path / "killed" / "checkpoints"
    while not any(path.name.isdigit() for path in folder.glob("*")) and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert checkpoint.latest(tmp_path / "killed") < 30
    again = _train(*command("killed"))
    for process in (undisturbed, again):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    def arrays(name):
        folder = tmp_path / name / "checkpoints" / "30"
        with ocp.PyTreeCheckpointer() as checkpointer:
            return [checkpointer.restore(folder / item) for item in ("train", "ema")]

    assert _difference(arrays("undisturbed"), arrays("killed")) == 0.0
    assert [line["step"] for line in _lines(tmp_path / "killed")] == list(range(1, 31))
