"""Several real processes as one run: they give what one process gives, stop together, and name who is missing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch import multihost
from subtractive_jax.errors import UserError
from subtractive_jax.training import loop, metrics
from tests import worlds

ROOT = Path(__file__).parents[1]
STEPS = 6
HERE = socket.gethostname()


def configured(world: worlds.World, stage: str):
    """Parameters and optimizer state lie on both processes in parts."""
    config = world.config(stage, steps=STEPS, eval_every=3)
    config.mesh.update(dict(data=1, fsdp=8))
    return config


def arguments(world: worlds.World, run: Path, stage: str = "text_encoder") -> list[str]:
    """`configured` in the words of launch.train."""
    return [
        f"--config=configs/minimal.py:{stage}",
        "--config.denoiser.block_out_channels=(32,)",
        "--config.denoiser.down_block_types=('DownBlock2D',)",
        "--config.denoiser.up_block_types=('UpBlock2D',)",
        f"--config.init_from={'' if stage == 'text_encoder' else world.parent}",
        f"--config.train.steps={STEPS}",
        "--config.train.checkpoint_every=100",
        "--config.train.eval_every=3",
        "--config.train.preview_examples=0",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
        f"--data_dir={world.data_dir}",
        f"--workdir={run}",
    ]


def environment(**extra: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **extra}


def start(command: list, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_local(train: list[str]) -> subprocess.Popen:
    return start([ROOT / "launch" / "local.sh", "--processes=2", "--cpu_devices=4", "--", *train])


def start_one(process: int, count: int, port: int, train: list[str], **extra: str) -> subprocess.Popen:
    """One process of a run, as a cluster would start it."""
    place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return start(
        [sys.executable, "-m", "launch.train", *train, "--distributed"],
        **place,
        **{"JAX_PROCESS_ID": str(process), "JAX_NUM_CPU_DEVICES": "4", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        **extra,
    )


def wait_for(process: subprocess.Popen, pattern: str) -> str:
    """The first line of its output that matches."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line
    pytest.fail("".join(seen) + process.stderr.read())


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def children(process: subprocess.Popen, process_id: int) -> list[int]:
    """Children of a launcher that are process `process_id` of the run."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    own = f"JAX_PROCESS_ID={process_id}\0".encode()
    return [int(pid) for pid in pids if own in Path(f"/proc/{pid}/environ").read_bytes()]


def saved(run: Path) -> list[np.ndarray]:
    """All arrays of a run's last checkpoint."""
    arrays = []
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("train", "ema"):
            folder = run / "checkpoints" / str(STEPS) / item
            tree = reader.metadata(folder).item_metadata.tree
            types = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays += jax.tree.leaves(reader.restore(folder, restore_args=types))
    return arrays


@pytest.mark.parametrize("stage", ["text_encoder", pytest.param("subtractive", marks=pytest.mark.slow)])
def test_two_processes_stop_together_go_on_and_give_what_one_gives(world, tmp_path, stage):
    run, port = tmp_path / "run", free_port()
    train = arguments(world, run, stage)
    pair = [start_one(process, 2, port, [*train, "--stopped_status=75"]) for process in range(2)]
    wait_for(pair[0], "8 cpu device")
    pair[1].send_signal(signal.SIGTERM)  # while the step is compiled
    for process in pair:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 75, errors
    (stopped,) = (int(path.name) for path in (run / "checkpoints").iterdir())
    assert 0 < stopped < STEPS

    again = start_local(train)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"steps {stopped} to {STEPS}" in output

    alone = tmp_path / "alone"
    loop.train(configured(world, stage), world.data_dir, alone)
    logged, expected = (
        [json.loads(line) for line in (folder / metrics.FILE_NAME).read_text().splitlines()] for folder in (run, alone)
    )
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    for ours, theirs in zip(logged, expected, strict=True):
        names = [name for name in theirs if "loss" in name or name == "grad_norm"]
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-5)
    assert "validation/loss" in logged[-1]
    # Gloo adds up in another order than one process does, so the last bits differ.
    for ours, theirs in zip(saved(run), saved(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_host_that_is_missing_is_named_on_all_others(world, tmp_path):
    port, timeout = free_port(), {"MULTIHOST_TIMEOUT_SECONDS": "4"}
    here = [start_one(process, 4, port, arguments(world, tmp_path / "run"), **timeout) for process in (0, 2)]
    alone = start_one(1, 2, free_port(), arguments(world, tmp_path / "run"), **timeout)
    for process in here:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors.startswith(
            f"error: process 0 of 4 on {HERE} waited 4 s at localhost:{port}, but process 1, 3 did"
        )
        assert errors.count("\n") == 1
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 2
    assert errors.startswith(
        f"error: process 1 of 2 on {HERE} waited 4 s for process 0, which does not answer at local"
    )
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_bad_input_on_one_host_ends_its_process_although_the_other_waits(world, tmp_path):
    port, run = free_port(), tmp_path / "run"
    train = arguments(world, run)
    first = start_one(0, 2, port, train)
    second = start_one(1, 2, port, [*train, f"--data_dir={tmp_path / 'none'}"])
    try:
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 2
        line = next(line for line in errors.splitlines() if line.startswith("error: "))
        assert str(tmp_path / "none") in line and line.endswith(f"(process 1 on {HERE})")
    finally:
        first.kill()
        first.communicate()


def test_a_process_that_dies_ends_the_run(world, tmp_path):
    local = start_local(arguments(world, tmp_path / "run"))
    wait_for(local, "8 cpu device")
    (victim,) = children(local, 1)
    os.kill(victim, signal.SIGKILL)
    _, errors = local.communicate(timeout=30)
    assert local.returncode == 128 + signal.SIGKILL
    assert errors.splitlines()[-1] == "error: process 1 ended with status 137, and so did the run"


# Where a process is.


@pytest.fixture
def cluster(monkeypatch):
    """Sets variables, in place of those of this machine's own cluster."""
    for name in list(os.environ):
        if re.match("JAX_(COORD|NUM_PROC|PROCESS|LOCAL)|SLURM|OMPI|MULTIHOST|TPU|KUBERNETES", name):
            monkeypatch.delenv(name)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_the_place_is_slurm_s(cluster):
    cluster(SLURM_JOB_ID="4096", SLURM_STEP_NODELIST="node[03-06]", SLURM_NTASKS="4", SLURM_PROCID="2")
    cluster(SLURM_LOCALID="0")
    assert multihost._place(1) == ("node03:61440", 4, 2, [0])
    cluster(JAX_LOCAL_DEVICE_IDS="0,1,2,3")
    assert multihost._place(1) == ("node03:61440", 4, 2, None)  # JAX reads the variable


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (
            {"JAX_PROCESS_ID": "0"},
            f"{HERE} is in no cluster that JAX knows: set JAX_COORDINATOR_ADDRESS",
        ),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: must be a whole number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be below JAX_NUM_PROCESSES=2"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host: must be HOST:PORT"),
        ({"MULTIHOST_TIMEOUT_SECONDS": "5 min"}, "MULTIHOST_TIMEOUT_SECONDS=5 min: must be a whole number"),
    ],
)
def test_a_place_that_is_not_known_is_refused(cluster, variables, message):
    if message[:3] == "JAX" and "whole" not in message:
        cluster(JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    cluster(**variables)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        multihost.initialize()


# How they meet.


class Meeting:
    """Process 0 of `count` in a thread; `result` is its error, empty if there was none."""

    def __init__(self, count: int, timeout: int = 10) -> None:
        self.port, self.result = free_port(), ""
        self._thread = threading.Thread(target=self._run, args=(count, timeout))
        self._thread.start()

    def _run(self, count: int, timeout: int) -> None:
        try:
            multihost._gather(f"process 0 of {count} on {HERE}", f"localhost:{self.port}", count, timeout)
        except UserError as error:
            self.result = str(error)

    def come(self, process: int, count: int) -> None:
        multihost._report(f"process {process}", f"localhost:{self.port}", count, process, 10)

    def connect(self, line: str) -> socket.socket:
        while True:
            try:
                connection = socket.create_connection(("localhost", self.port))
                break
            except ConnectionRefusedError:
                pass
        connection.sendall(line.encode())
        return connection

    def ended(self) -> bool:
        self._thread.join(20)
        return not self._thread.is_alive()


def test_strangers_are_ignored_and_a_process_may_come_again():
    meeting = Meeting(3)
    meeting.connect("GET / HTTP/1.1\r\n").close()
    meeting.connect("1 3 gone\n").close()
    again = meeting.connect("1 3 here\n")
    meeting.come(2, 3)
    assert meeting.ended() and not meeting.result and again.makefile().read() == "ready\n"
    again.close()


def test_a_process_that_left_again_is_missing():
    meeting = Meeting(3, timeout=2)
    meeting.connect("1 3 gone\n").close()
    with pytest.raises(UserError, match="waited 2 s at .* but process 1 did not come"):
        meeting.come(2, 3)
    assert meeting.ended()


def test_numbers_that_do_not_fit_are_refused_on_both_sides():
    meeting = Meeting(2)
    with pytest.raises(UserError, match=f"process 0 of 2 on {HERE}, but process 1 on {HERE} is one of 3"):
        meeting.come(1, 3)
    assert meeting.ended() and "is one of 3" in meeting.result

    meeting = Meeting(3)
    held = meeting.connect("1 3 elsewhere\n")
    with pytest.raises(UserError, match=f"process 1 is on elsewhere and on {HERE}"):
        meeting.come(1, 3)
    assert meeting.ended() and "process 1 is on elsewhere" in held.makefile().read()
    held.close()


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match="cannot listen on port"):
        multihost._gather("process 0 of 2", f"localhost:{taken.getsockname()[1]}", 2, 1)
