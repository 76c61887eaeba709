"""Songs through `launch.sample`, as commands: start to first sound, speed against real time, peak memory.

python -m tests.benchmarks.sampling [--model=tiny] [--steps=20] [--minutes=1,60] [--channels=2] [--sample_rate=44100]

Each line is a process of its own, with its own wall and CPU seconds and its largest resident memory. The first, of five
seconds of music and an empty compilation cache, is what a new user waits for; the second has the cache of the first.
`--minutes` are then done one after the other. The music is decaying tones and noise.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from subtractive_jax.representation.audio import audio_writer

_MODEL = flags.DEFINE_string("model", "tiny", "What to sample with.")
_STEPS = flags.DEFINE_integer("steps", 20, "Denoising steps.")
_MINUTES = flags.DEFINE_list("minutes", ["1"], "Lengths of the songs.")
_CHANNELS = flags.DEFINE_integer("channels", 2, "Of the songs.")
_RATE = flags.DEFINE_integer("sample_rate", 44_100, "Of the songs, in Hz.")


def _write(path: Path, seconds: float) -> None:
    rate, random = _RATE.value, np.random.default_rng(0)
    with audio_writer(path, _CHANNELS.value, rate) as write:
        for _ in range(max(1, round(seconds))):
            within = np.arange(rate) / rate
            tone = np.exp(-6 * (within % 0.5)) * np.sin(2 * np.pi * random.uniform(80, 1000) * within)
            write((0.2 * tone + 0.01 * random.standard_normal((_CHANNELS.value, rate))).astype(np.float32))


def _measure(name: str, folder: Path, seconds: float) -> None:
    song, output = folder / "song.wav", folder / "out" / name.replace(" ", "-")
    _write(song, seconds)
    command = [sys.executable, "-m", "launch.sample", f"--model={_MODEL.value}", f"--input={song}"]
    command += ["--instruction=Add rock drums", f"--output={output}", f"--steps={_STEPS.value}"]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        sys.exit(f"{name}: launch.sample failed")
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{name:<12}{seconds:>8.0f} s of music{wall:>10.1f} s{cpu:>10.1f} CPU s{usage.ru_maxrss / 2**20:>8.2f} GiB"
        f"{seconds / wall:>8.2f} times real time",
        flush=True,
    )


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _measure("cold start", folder, 5.0)
        _measure("warm start", folder, 5.0)
        for minutes in map(float, _MINUTES.value):
            _measure(f"{minutes:g} min", folder, 60.0 * minutes)


if __name__ == "__main__":
    app.run(main)
