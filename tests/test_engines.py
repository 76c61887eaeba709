"""Engines: workers in a process of their own, and launchers whose options Beam knows."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from absl import flags
from apache_beam.internal import pickler
from apache_beam.options.pipeline_options import DebugOptions, GoogleCloudOptions, PipelineOptions, WorkerOptions
from apache_beam.transforms import environments

from configs import midi_tiny, minimal
from data_pipeline import shards
from data_pipeline.song import Tools

ROOT = Path(__file__).parents[1]
BUILD = ("--config=configs/tiny.py", "--data_dir=gs://bucket/data", "--source=stems:gs://bucket/my songs")
REQUIRED = {
    "dataflow": (
        "--project=ours",
        "--region=europe-west4",
        "--temp_location=gs://bucket/temporary",
        "--sdk_container_image=image",
    ),
    "flink": ("--flink_master=master:8081", "--environment_config=image"),
    "spark": ("--spark_master_url=spark://master:7077", "--environment_config=image"),
}


def environment(**extra: str) -> dict[str, str]:
    """Of a process that finds this package and, as `python`, this Python, wherever it runs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **extra}


def build(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Builds `windows` of the songs in `folder`, run there by `command ARGUMENT...`."""
    (folder / "temporary").mkdir(exist_ok=True)
    return subprocess.run(
        [*command, f"--config={ROOT}/configs/minimal.py", "--source=stems:songs"],
        cwd=folder,
        env=environment(TMPDIR=str(folder / "temporary")),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two songs, and their `windows` as the DirectRunner builds them."""
    folder, rate = tmp_path_factory.mktemp("engines"), 16_000
    seconds, noise = np.arange(4 * rate) / rate, np.random.default_rng(0)
    for index in range(2):
        song = folder / "songs" / f"song {index}"
        song.mkdir(parents=True)
        hits = noise.standard_normal(len(seconds)) * np.exp(-8 * (seconds % 0.5))
        soundfile.write(song / "drums.wav", 0.2 * hits, rate)
        soundfile.write(song / "bass.wav", 0.3 * np.sin(2 * np.pi * (55 + 20 * index) * seconds), rate)
    done = build(folder, sys.executable, "-m", "data_pipeline.build", "--data_dir=direct")
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def service(module: str, *arguments: str, cwd: Path) -> Iterator[Path]:
    """A program of Beam's in a process of its own; its log."""
    log = cwd / f"{module.rpartition('.')[2]}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=cwd, env=environment(), stdout=output, stderr=output
        )
    try:
        yield log
    finally:
        process.send_signal(signal.SIGINT)  # so that it ends the processes that it started
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def wait_for(port: int, log: Path) -> None:
    for _ in range(600):
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(log.read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_workers_of_a_portable_runner_write_the_same_bytes(built, tmp_path):
    job, pool = free_port(), free_port()
    with (
        service("apache_beam.runners.portability.local_job_service_main", f"--port={job}", cwd=tmp_path) as job_log,
        service("apache_beam.runners.worker.worker_pool_main", f"--service_port={pool}", cwd=tmp_path) as pool_log,
    ):
        wait_for(job, job_log)
        wait_for(pool, pool_log)
        done = build(
            built,
            str(ROOT / "launch" / "flink.sh"),  # any job server of Beam will do
            f"--job_endpoint=localhost:{job}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool}",
            "--",
            "--data_dir=portable",
        )
    assert done.returncode == 0, f"{done.stderr}\n{job_log.read_text()}\n{pool_log.read_text()}"
    assert "Starting worker" in pool_log.read_text()
    assert files(built / "portable") == files(built / "direct")


def test_the_direct_runner_leaves_nothing_in_the_temporary_folder(built):
    assert [path.name for path in (built / "temporary").iterdir() if path.name.startswith("beam-temp")] == []


def test_what_is_sent_to_workers_is_small_and_whole():
    config, notes = minimal.get_config(), midi_tiny.get_config()
    representation = config.representation.to_dict()
    writers = (
        shards.WriteAudio("folder", representation, config.data.to_dict(), Tools()),
        shards.WriteNotes("folder", notes.representation.to_dict(), notes.data.to_dict()),
        shards.WriteLatents("folder", "model", representation, {"mix_latent": (8, 64, 8)}),
    )
    for writer in writers:
        sent = pickler.dumps(writer)
        assert len(sent) < 10_000  # a model is sent as its path
        assert vars(pickler.loads(sent)) == vars(writer)


def launch(engine: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "launch" / f"{engine}.sh", *arguments], capture_output=True, text=True, check=False)


def words(engine: str, *arguments: str) -> list[str]:
    """The command that a launcher prints, as a shell reads it."""
    done = launch(engine, "--dry-run", *REQUIRED[engine], *arguments, "--", *BUILD)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def beam_options(command: list[str]) -> PipelineOptions:
    """What Beam gets from a command; every option of it must be Beam's."""
    parsed = flags.FlagValues()
    flags.DEFINE_list("beam_pipeline_options", [], "", flag_values=parsed)  # as data_pipeline/build.py defines it
    parsed(["build", next(word for word in command if word.startswith("--beam_pipeline_options="))])
    options = PipelineOptions([f"--{option}" for option in parsed.beam_pipeline_options])
    known = set(PipelineOptions([]).get_all_options())
    unknown = set(options.get_all_options(retain_unknown_options=True)) - known
    assert not unknown
    return options


@pytest.mark.parametrize("engine", REQUIRED)
def test_launchers_print_the_build_with_options_that_beam_knows(engine):
    command = words(engine)
    assert command[:3] == ["python", "-m", "data_pipeline.build"]
    assert command[3:-1] == list(BUILD)
    assert beam_options(command).get_all_options()["runner"].lower() == f"{engine}runner"


@pytest.mark.parametrize("engine", REQUIRED)
def test_every_option_in_a_launchers_help_is_taken(engine):
    text = launch(engine, "--help").stdout
    names = {line.split()[0].partition("=")[0] for line in text.splitlines() if line.startswith("  --")}
    other = {"--beam_option", "--dry-run"}
    values = {
        **dict.fromkeys(("--staging_location", "--temp_location"), "gs://bucket/folder"),
        **dict.fromkeys(("--disk_size_gb", "--max_num_workers", "--parallelism", "--sdk_worker_parallelism"), "3"),
        **{"--accelerator": "nvidia-l4:1", "--worker_machine_type": "g2-standard-8", "--environment_type": "DOCKER"},
        **{"--flink_version": "1.20", "--flink_master": "master:8081", "--spark_master_url": "spark://master:7077"},
    }
    given = [f"{name}={values.get(name, 'value')}" for name in sorted(names - other - {"--job_endpoint"})]
    assert names > other
    beam_options(words(engine, *given))


def test_dataflow_workers_hold_one_song_a_process_and_one_process_an_accelerator():
    plain = beam_options(words("dataflow"))
    assert plain.view_as(DebugOptions).number_of_worker_harness_threads == 1
    assert plain.view_as(DebugOptions).experiments is None
    assert plain.view_as(WorkerOptions).machine_type == "e2-standard-4"
    accelerated = beam_options(words("dataflow", "--accelerator=nvidia-l4:2", "--worker_machine_type=g2-standard-24"))
    assert accelerated.view_as(GoogleCloudOptions).dataflow_service_options == [
        "worker_accelerator=type:nvidia-l4;count:2;install-nvidia-driver"
    ]
    assert accelerated.view_as(DebugOptions).experiments == ["no_use_multiple_sdk_containers"]


@pytest.mark.parametrize("engine", ["flink", "spark"])
def test_a_cluster_needs_no_file_from_the_launching_machine(engine):
    assert environments.python_sdk_dependencies(beam_options(words(engine))) == []


@pytest.mark.parametrize("engine", ["flink", "spark"])
def test_options_with_commas_quotes_and_spaces_arrive_unchanged(engine):
    process = '{"command": "/opt/apache/beam/boot", "env": {"A": "it\'s, one"}}'
    options = beam_options(
        words(engine, "--environment_type=PROCESS", f"--environment_config={process}", "--beam_option=experiments=a,b")
    ).get_all_options()
    assert options["environment_config"] == process
    assert {"a", "b"} < set(options["experiments"])


def test_a_job_server_that_runs_already():
    done = launch("flink", "--dry-run", "--job_endpoint=server:8099", "--environment_config=image", "--", *BUILD)
    options = beam_options(shlex.split(done.stdout)).get_all_options()
    assert (options["runner"], options["job_endpoint"]) == ("PortableRunner", "server:8099")


@pytest.mark.parametrize(
    ("engine", "arguments", "message"),
    [
        ("dataflow", [], "data_pipeline.build's arguments after --"),
        ("dataflow", ["--projekt=ours", "--", *BUILD], "unknown option --projekt"),
        ("dataflow", ["project", "--", *BUILD], 'unexpected argument "project"'),
        ("dataflow", ["--project=ours", "--", *BUILD], "--region is missing"),
        ("dataflow", [*REQUIRED["dataflow"], "--temp_location=/tmp", "--", *BUILD], "--temp_location=/tmp: must be"),
        ("dataflow", [*REQUIRED["dataflow"], "--disk_size_gb=0", "--", *BUILD], "--disk_size_gb=0: must be"),
        ("dataflow", [*REQUIRED["dataflow"], "--accelerator=l4", "--", *BUILD], "--accelerator=l4: must be TYPE:COUNT"),
        ("dataflow", [*REQUIRED["dataflow"], "--accelerator=l4:1", "--", *BUILD], "--worker_machine_type is missing"),
        ("dataflow", [*REQUIRED["dataflow"], "--", "--data_dir=data"], "--data_dir=data: must be gs://"),
        ("dataflow", [*REQUIRED["dataflow"], "--", "--data_dir", "data"], "--data_dir=data: must be gs://"),
        ("dataflow", [*REQUIRED["dataflow"], "--", *BUILD, "--source=midi:/songs"], "--source=midi:/songs: must be"),
        ("dataflow", [*REQUIRED["dataflow"], "--", *BUILD, "--source", "gs://b/songs"], "must be KIND:gs://"),
        ("flink", ["--environment_config=image", "--", *BUILD], "--flink_master is missing"),
        ("flink", ["--flink_master=master:8081", "--", *BUILD], "--environment_config is missing"),
        ("flink", [*REQUIRED["flink"], "--job_endpoint=server:8099", "--", *BUILD], "give no --flink_master"),
        ("flink", [*REQUIRED["flink"], "--environment_type=LOOPBACK", "--", *BUILD], "must be DOCKER, EXTERNAL or"),
        ("flink", [*REQUIRED["flink"], "--environment_type=EXTERNAL", "--", *BUILD], "HOST:PORT of a worker pool"),
        ("spark", ["--spark_master_url=master", "--environment_config=image", "--", *BUILD], "spark://HOST:PORT"),
        ("spark", [*REQUIRED["spark"], "--", "--beam_pipeline_options=a=b"], "give --beam_option=NAME=VALUE"),
    ],
)
def test_launchers_refuse_bad_arguments_in_one_line(engine, arguments, message):
    done = launch(engine, "--dry-run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
