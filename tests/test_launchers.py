"""Launchers of clusters: what they print is what they run, and it says what was asked."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
TRAIN = ("--config=configs/tiny.py:base", "--data_dir=gs://bucket/data", "--workdir=/runs/my run")
PROGRAM = ("python", "-m", "launch.train")
AWKWARD = ('--config.name=it\'s "$(HOME)" \\n `x` & é\ttab', "--config.init_from=two\nlines")
REQUIRED = {
    "local": ("--processes=2", "--cpu_devices=4"),
    "slurm": ("--nodes=4", "--gpus_per_node=8", "--time=24:00:00"),
    "gke": (
        "--name=run-1",
        "--image=registry/image:1",
        "--accelerator=tpu-v5-lite-podslice",
        "--topology=16x16",
        "--chips_per_host=4",
    ),
    "tpu_vm create": (
        "--name=pod",
        "--zone=us-west4-a",
        "--accelerator_type=v5litepod-256",
        "--runtime_version=v2-alpha-tpuv5-lite",
    ),
    "tpu_vm run": ("--name=pod", "--zone=us-west4-a"),
}


def launch(name: str, *arguments: str, path: str = "", **options) -> subprocess.CompletedProcess:
    """Runs `launch/NAME.sh`; programs in the folder `path` are found first."""
    script, *action = name.split()
    python = Path(sys.executable).parent
    return subprocess.run(
        [LAUNCH / f"{script}.sh", *action, *arguments],
        env={**os.environ, "PATH": f"{path}:{python}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def dry(name: str, *arguments: str, train: tuple[str, ...] = (*TRAIN, *AWKWARD)) -> str:
    done = launch(name, "--dry-run", *REQUIRED[name], *arguments, "--", *train)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def commands(text: str) -> list[list[str]]:
    """Words of each command of a script, as bash reads them."""
    printing = "run() { printf '%s\\0' \"$@\"; printf '\\1'; }\n"
    lines = re.sub(r"^(?=\S)", "run ", text, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-c", printing + lines], capture_output=True, text=True, check=True)
    return [command.split("\0")[:-1] for command in done.stdout.split("\1")[:-1]]


@pytest.fixture
def recorder(tmp_path):
    """Makes programs that write their words and their input to a log, and print what they are told; the log's lines."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    log.touch()

    def make(*names: str, prints: str = "", status: int = 0) -> None:
        for name in names:
            program = folder / name
            program.write_text(
                f"#!{sys.executable}\nimport json, sys\n"
                f"words = [{name!r}, *sys.argv[1:]]\n"
                "text = '' if sys.stdin.isatty() else sys.stdin.read()\n"
                f"open({str(log)!r}, 'a').write(json.dumps([words, text]) + '\\n')\n"
                f"print({prints!r}) if {prints!r} else None\nsys.exit({status})\n"
            )
            program.chmod(0o755)

    make.path = str(folder)
    make.calls = lambda: [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    return make


# On this machine.


def test_local_processes_get_their_place_and_their_devices():
    first, second = (line.removesuffix(" &") for line in dry("local", "--port=9000", train=TRAIN).splitlines()[:2])
    words = shlex.split(second)
    assert words[0] == "env" and words[words.index("python") :] == [*PROGRAM, *TRAIN, "--distributed"]
    assert {"JAX_COORDINATOR_ADDRESS=localhost:9000", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"} < set(words)
    assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"} < set(words)
    assert "JAX_PROCESS_ID=0" in shlex.split(first)
    done = launch("local", "--processes=2", "--gpus=4", "--dry-run", "--", *TRAIN)
    assert [re.search(r"JAX_LOCAL_DEVICE_IDS=(\S+)", line)[1] for line in done.stdout.splitlines()[:2]] == [
        "0,1,2,3",
        "4,5,6,7",
    ]


def fake_training(folder: Path, code: str) -> str:
    """A `python` that runs `code` with `process` and `sys`; everything else is as ever."""
    (folder / "python").write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        "if sys.argv[1] == '-c': exec(compile(sys.argv[2], 'c', 'exec')); sys.exit()\n"
        f"process = os.environ['JAX_PROCESS_ID']\n{code}\n"
    )
    (folder / "python").chmod(0o755)
    return str(folder)


def test_local_marks_lines_and_passes_arguments_on_unchanged(tmp_path):
    path = fake_training(tmp_path, "print(sys.argv[3:])\nprint('to stderr', file=sys.stderr)")
    done = launch("local", *REQUIRED["local"], "--", *AWKWARD, path=path)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {[*AWKWARD, '--distributed']}" for i in range(2)]
    assert sorted(done.stderr.splitlines()) == ["[0] to stderr", "[1] to stderr"]


def test_local_ends_all_with_the_status_of_the_first_that_fails(tmp_path):
    path = fake_training(tmp_path, "time.sleep(0.3 if process == '1' else 60)\nsys.exit(7)")
    done = launch("local", *REQUIRED["local"], "--", *TRAIN, path=path, timeout=20)
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1] == "error: process 1 ended with status 7, and so did the run"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_local_passes_signals_on_and_waits(tmp_path, name):
    code = (
        # Not by `print`: the signal may come while the other line is still in it.
        "def stop(*_): time.sleep(0.5); os.write(1, b'saved\\n'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    path = f"{fake_training(tmp_path, code)}:{os.environ['PATH']}"
    # A shell that starts with a signal ignored, as tests in the background may, cannot listen to it.
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", listening, LAUNCH / "local.sh", *REQUIRED["local"], "--", *TRAIN]
    with subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True) as process:
        assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        process.send_signal(signal.Signals[name])
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


# SLURM.


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_slurm_asks_for_one_process_a_node_a_signal_in_time_and_the_right_to_be_queued_again():
    options = directives(
        dry("slurm", "--cpus_per_task=12", "--sbatch_option=partition=gpu", "--sbatch_option=exclusive")
    )
    assert dict.fromkeys(options) == dict.fromkeys(
        [
            "--job-name=subtractive-jax",
            "--nodes=4",
            "--ntasks-per-node=1",
            "--gpus-per-node=8",
            "--cpus-per-task=12",
            "--time=24:00:00",
            "--output=%x-%j.out",
            "--open-mode=append",
            "--signal=TERM@300",
            "--requeue",
            "--partition=gpu",
            "--exclusive",
        ]
    )


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False), (134, False)])
def test_a_slurm_job_is_queued_again_only_if_it_was_told_to_stop(recorder, tmp_path, status, requeued):
    recorder("scontrol")
    recorder("srun", status=status)
    (tmp_path / "script").write_text(dry("slurm"))
    environment = {**os.environ, "PATH": f"{recorder.path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash", tmp_path / "script"], env=environment, stdin=subprocess.DEVNULL, check=False)
    (srun, _), *others = recorder.calls()
    assert done.returncode == status
    assert srun[srun.index("launch.train") + 1 :] == [*TRAIN, *AWKWARD, "--distributed", "--stopped_status=75"]
    assert [call[0] for call in others] == ([["scontrol", "requeue", "42"]] if requeued else [])


def test_slurm_submits_the_script_that_it_prints(recorder):
    recorder("sbatch")
    assert launch("slurm", *REQUIRED["slurm"], "--", *TRAIN, path=recorder.path).returncode == 0
    assert recorder.calls() == [(["sbatch"], dry("slurm", train=TRAIN))]


def test_all_gpus_of_a_node_are_the_process_s():
    """JAX gives a process under SLURM the GPU of its number on the node; the script must say otherwise."""
    script = dry("slurm")
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in script


# GKE.


def test_the_manifest_holds_what_was_asked_whatever_its_letters():
    manifest = yaml.safe_load(dry("gke", "--namespace=ns", "--volume=claim:/runs: a", "--spot", "--service_account=sa"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert (manifest["metadata"]["name"], manifest["metadata"]["namespace"]) == ("run-1", "ns")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 100
    (slice_,) = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (64, 64, 0)
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["terminationGracePeriodSeconds"] >= 300 and pod["restartPolicy"] == "Never"
    assert pod["serviceAccountName"] == "sa"
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "launch.train"]
    expected = [*TRAIN, *AWKWARD, "--distributed", "--stopped_status=75"]
    assert container["args"] == [word.replace("$(", "$$(") for word in expected]  # as Kubernetes escapes it
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/runs: a"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "claim"}}]


def test_only_what_was_asked_is_in_the_manifest():
    manifest = yaml.safe_load(dry("gke"))
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "namespace" not in manifest["metadata"]
    assert not {"serviceAccountName", "volumes", "tolerations"} & pod.keys()
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


@pytest.mark.parametrize(("status", "action"), [(2, "FailJobSet"), (75, None), (134, None)])
def test_bad_input_is_not_tried_again(status, action):
    spec = yaml.safe_load(dry("gke"))["spec"]
    (job_rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    (rule,) = spec["failurePolicy"]["rules"]
    fails = job_rule["action"] == "FailJob" and status in job_rule["onExitCodes"]["values"]
    assert (rule["action"] if fails and rule["onJobFailureReasons"] == ["PodFailurePolicy"] else None) == action


def test_gke_creates_the_manifest_that_it_prints(recorder):
    recorder("kubectl")
    assert launch("gke", *REQUIRED["gke"], "--", *TRAIN, path=recorder.path).returncode == 0
    assert recorder.calls() == [(["kubectl", "create", "--filename=-"], dry("gke", train=TRAIN))]


# TPU pods.


def test_a_pod_is_queued_awaited_and_installed(recorder):
    recorder("git", "gcloud", prints="ACTIVE")
    options = ("--spot", "--gcloud_option=network=mine", "--project=ours", "--setup=sudo mount /runs")
    printed = launch("tpu_vm create", "--dry-run", *REQUIRED["tpu_vm create"], *options).stdout
    done = launch("tpu_vm create", *REQUIRED["tpu_vm create"], *options, path=recorder.path)
    assert done.returncode == 0, done.stderr
    place = ["--zone=us-west4-a", "--project=ours"]
    create, describe, pack, copy, install = (words for words, _ in recorder.calls())
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [
        *(*queued, "create", "pod", "--node-id=pod", "--accelerator-type=v5litepod-256"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--network=mine", *place),
    ]
    assert describe == [*queued, "describe", "pod", "--format=value(state.state)", *place]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    first, wait, *rest = commands(printed)
    assert (
        [first, *rest] == [create, pack, copy, install]
        and wait[:2] == ["bash", "-c"]
        and shlex.join(describe) in wait[2]
    )
    archive = next(word.partition("=")[2] for word in pack if word.startswith("--output="))
    assert copy == [*vm, "scp", archive, "pod:subtractive-jax.tar.gz", "--worker=all", *place]
    assert install[:7] == [*vm, "ssh", "pod", "--worker=all"] and install[8:] == place
    script = install[7].removeprefix("--command=")
    assert script.startswith("set -e; sudo mount /runs; ") and "-c constraints-py3.12.txt -e '.[tpu]'" in script
    subprocess.run(["bash", "-n", "-c", script], check=True)


def test_a_pod_that_is_not_granted_is_an_error(recorder):
    recorder("gcloud", prints="FAILED")
    done = launch("tpu_vm create", *REQUIRED["tpu_vm create"], path=recorder.path, timeout=20)
    assert done.returncode == 2 and done.stderr == "error: pod was not granted: delete it\n"
    assert len(recorder.calls()) == 2


def test_training_on_a_pod_is_a_service_of_every_host(recorder):
    (command,) = commands(dry("tpu_vm run"))
    assert command[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"]
    script = command[7].removeprefix("--command=")
    recorder("sudo")
    environment = {**os.environ, "PATH": f"{recorder.path}:{os.environ['PATH']}", "HOME": "/home/me"}
    subprocess.run(["bash", "-c", script], env=environment, check=True, stdin=subprocess.DEVNULL)
    ((words, _),) = recorder.calls()
    assert words[:3] == ["sudo", "systemd-run", "--unit=subtractive-jax"]
    start = words.index("/home/me/subtractive-jax/.venv/bin/python")
    assert words[start + 1 :] == ["-m", "launch.train", *TRAIN, *AWKWARD, "--distributed"]
    unit = next(word for word in words if word.startswith("--unit="))
    stop = launch("tpu_vm stop", "--dry-run", *REQUIRED["tpu_vm run"]).stdout
    logs = launch("tpu_vm logs", "--dry-run", "--worker=3", *REQUIRED["tpu_vm run"]).stdout
    assert f"systemctl stop {unit.removeprefix('--unit=')}'" in stop and "--worker=all" in stop
    assert unit in logs and "--worker=3" in logs


def test_pods_are_listed_and_given_back():
    (words,) = commands(launch("tpu_vm list", "--dry-run", "--zone=z").stdout)
    assert words == ["gcloud", "compute", "tpus", "queued-resources", "list", "--zone=z"]
    (delete,) = commands(launch("tpu_vm delete", "--dry-run", "--zone=z", "--name=pod").stdout)
    assert delete == [*words[:4], "delete", "pod", "--force", "--quiet", "--zone=z"]


# All.


@pytest.mark.parametrize("name", ["local", "slurm", "gke", "tpu_vm"])
def test_help_is_the_text_at_the_top(name):
    done = launch(name, "--help")
    assert done.returncode == 0 and not done.stderr
    top = (LAUNCH / f"{name}.sh").read_text().partition("\n\n")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in top]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("local", ["--", *TRAIN], "--processes is missing"),
        ("local", ["--processes=2", "--", *TRAIN], "give --cpu_devices or --gpus"),
        ("local", ["--processes=2", "--cpu_devices=1", "--gpus=1", "--", *TRAIN], "not both"),
        ("local", ["--processes=0", "--cpu_devices=1", "--", *TRAIN], "--processes=0: must be"),
        ("local", ["--processes=2", "--cpu_devices=4"], "launch.train's arguments after --"),
        ("slurm", ["--nodes=2", "--", *TRAIN], "--gpus_per_node is missing"),
        ("slurm", ["--nodes=2", "--gpus_per_node=x", "--time=1:00:00", "--", *TRAIN], "--gpus_per_node=x: must be"),
        ("slurm", ["--nodes=2", "--gpus_per_node=8", "--time=soon", "--", *TRAIN], "--time=soon: must be"),
        ("slurm", [*REQUIRED["slurm"], "--sbatch_option=a=b c", "--", *TRAIN], "--sbatch_option=a=b c: must be"),
        ("slurm", [*REQUIRED["slurm"], "--partition=gpu", "--", *TRAIN], "give --sbatch_option=partition=VALUE"),
        ("slurm", ["--exclusive", "--", *TRAIN], "unknown option --exclusive"),
        ("gke", [*REQUIRED["gke"][1:], "--", *TRAIN], "--name is missing"),
        ("gke", [*REQUIRED["gke"], "--name=Run", "--", *TRAIN], "--name=Run: must be"),
        ("gke", [*REQUIRED["gke"], "--topology=16", "--", *TRAIN], "--topology=16: must be AxB"),
        ("gke", [*REQUIRED["gke"], "--topology=1x2", "--", *TRAIN], "2 chips are no multiple of --chips_per_host=4"),
        ("gke", [*REQUIRED["gke"], "--volume=claim", "--", *TRAIN], "--volume=claim: must be"),
        ("gke", [*REQUIRED["gke"], "--", "--config=\x1b"], "no control characters"),
        ("tpu_vm", [], "unknown action"),
        ("tpu_vm", ["start", "--name=pod"], 'unknown action "start"'),
        ("tpu_vm", ["run", "--name=pod", "--", *TRAIN], "--zone is missing"),
        ("tpu_vm", ["run", "--name=pod", "--zone=z"], "launch.train's arguments after --"),
        ("tpu_vm", ["create", "--name=pod", "--zone=z"], "--accelerator_type is missing"),
        ("tpu_vm", ["stop", "--zone=z"], "--name is missing"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(name, arguments, message):
    done = launch(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = sorted(LAUNCH.glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
