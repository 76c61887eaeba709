"""Checkpoints: exact on every mesh, damaged ones passed over, a full disk said in one line."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from subtractive_jax.errors import UserError
from subtractive_jax.training import checkpoint, partitioning

_ROOT = Path(__file__).parents[1]


def _state(step, mesh=None, rows=64):
    values = np.random.default_rng(step).standard_normal((2, rows, 8)).astype(np.float32)
    state = dict(params={"w": values[0]}, ema={"w": values[1]}, opt_state=(), step=np.int32(step))
    mesh = mesh or partitioning.make_mesh(4, 2)

    def placed(leaf):
        return NamedSharding(mesh, PartitionSpec("fsdp") if leaf.ndim else PartitionSpec())

    return jax.tree.map(lambda leaf: jax.device_put(leaf, placed(leaf)), state)


def _abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _save(run, *steps, keep=3, keep_every=0):
    with checkpoint.Checkpoints(run, keep, keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(_state(step), {"dataset": "a", "batch_size": 8})


def _restore(run, abstract=None):
    with checkpoint.Checkpoints(run, 3) as checkpoints:
        return checkpoints.restore(abstract or _abstract(_state(0)))


def _data_files(run, step):
    return [path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file() and "/d/" in str(path)]


def _flip_bits(run, step):
    for path in _data_files(run, step):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def _cut(run, step):
    for path in _data_files(run, step):
        os.truncate(path, path.stat().st_size // 2)


def _exchange(run, step):
    """Files that are sound, of another state."""
    saved = run / "checkpoints"
    shutil.rmtree(saved / str(step) / "train")
    shutil.copytree(saved / "3" / "train", saved / str(step) / "train")


def _lose_an_item(run, step):
    shutil.rmtree(run / "checkpoints" / str(step) / "ema")


@pytest.mark.parametrize(("shape", "devices"), [((8, 1), 8), ((2, 4), 8), ((1, 8), 8), ((1, 2), 2), ((1, 1), 1)])
def test_restored_on_another_mesh_and_device_count(tmp_path, shape, devices):
    _save(tmp_path, 3)
    target = _state(0, partitioning.make_mesh(*shape, devices=jax.devices()[:devices]))
    state, position = _restore(tmp_path, _abstract(target))
    assert position == {"dataset": "a", "batch_size": 8}
    assert state["ema"]["w"].sharding == target["ema"]["w"].sharding
    for restored, saved in zip(jax.tree.leaves(state), jax.tree.leaves(_state(3)), strict=True):
        np.testing.assert_array_equal(restored, saved)


@pytest.mark.parametrize("damage", [_flip_bits, _cut, _lose_an_item, _exchange])
def test_a_damaged_checkpoint_is_passed_over_and_moved_aside(tmp_path, capsys, damage):
    _save(tmp_path, 3, 5)
    damage(tmp_path, 5)
    state, _ = _restore(tmp_path)
    np.testing.assert_array_equal(state["params"]["w"], _state(3)["params"]["w"])
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "checkpoints/5 is damaged" in warning and "from checkpoint 3" in warning
    assert warning.count("\n") == 1 and "tensorstore_spec" not in warning
    assert (tmp_path / "damaged" / "5").is_dir() and checkpoint.latest(tmp_path) == 3
    _save(tmp_path, 5)  # the run gets there again
    np.testing.assert_array_equal(_restore(tmp_path)[0]["params"]["w"], _state(5)["params"]["w"])


def test_reads_that_were_abandoned_are_not_told_of(monkeypatch):
    """TensorStore's threads come back to orbax's event loop after it was closed."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    loop = asyncio.new_event_loop()
    loop.close()

    class Late:
        def __init__(self, call):
            self._call = call

        def __del__(self):
            self._call()

    checkpoint._overlook_abandoned_reads()
    Late(lambda: loop.call_soon_threadsafe(print))
    Late(lambda: [][0])
    assert told == ["list index out of range"]


def test_nothing_moves_if_no_checkpoint_fits(tmp_path):
    _save(tmp_path, 3, 5)
    with pytest.raises(UserError, match="checkpoints/5 is damaged, or not of this model"):
        _restore(tmp_path, _abstract(_state(0, rows=32)))
    assert not (tmp_path / "damaged").exists() and checkpoint.latest(tmp_path) == 5


def test_which_checkpoints_are_kept(tmp_path):
    _save(tmp_path, *range(1, 9), keep=2, keep_every=3)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 6, 7, 8]


def test_the_digest_sees_exchanged_values_and_signs():
    digests = {
        checkpoint._digest({"x": jnp.array(values)}) for values in ([0.0, 1.0], [1.0, 0.0], [-0.0, 1.0], [0.0, -1.0])
    }
    assert len(digests) == 4


_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=4m tmpfs "$1" && exec "$2" - "$1" <<'PYTHON'
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from subtractive_jax.errors import UserError
from tests import test_checkpoint
from subtractive_jax.training import checkpoint
with checkpoint.Checkpoints(sys.argv[1], 3) as checkpoints:
    checkpoints.save(test_checkpoint._state(1, rows=2**14), {})
    checkpoints._manager.wait_until_finished()
    for step, fits in ((2, True), (3, False)):
        if fits:
            checkpoints._check_room = lambda *_: None  # the disk fills up while the checkpoint is written
        else:
            del checkpoints._check_room
        try:
            checkpoints.save(test_checkpoint._state(step, rows=2**17), {})
            checkpoints.close()
        except UserError as error:
            print(error)
print(checkpoint.latest(sys.argv[1]))
PYTHON
"""


def test_a_full_disk(tmp_path):
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True)
    if probe.returncode:
        pytest.skip("no right to mount a small disk here")
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", _ON_A_SMALL_DISK, "bash", tmp_path, sys.executable],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout.splitlines()
    assert len(said) == 3, done.stderr
    assert said[0].startswith(f"{tmp_path}: No space left on device; what the run saved before is kept")
    assert "checkpoint 3 needs up to 8.4 MB, the disk has " in said[1]
    assert said[2] == "1"
