"""The reader against raw reads of the same bytes, and against what a training step of `tiny` on a CPU consumes.

python -m tests.benchmarks.reader [--sizes=tiny,riffusion] [--rounds=5] [--seconds_per_step=4.6]

One epoch of shuffled batches is read from a dataset of noise whose records have a config's real size, by the code of
the stage `subtractive`; in turn with it, each in a process of its own, a plain `pread` of the same records in the same
order, a batch in memory at a time, and of the same bytes from front to back. `cold` drops the files from the page cache
first, as in a dataset larger than memory; `warm` measures what the reader itself costs. Printed are medians over the
rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from subtractive_jax import records
from subtractive_jax.training import latent_stages, reader
from tests import synthetic

_SIZES = {  # latents [F, T, 2C]; tokens and width of a text; records
    "tiny": ((8, 64, 16), 12, 256, 4096),
    "riffusion": ((64, 64, 8), 77, 768, 512),
}
_STEMS = ("drums", "bass")
_TEXTS = 4  # a window
_BATCH = 32
_BLOCK = 1 << 20  # bytes
_SHARD = "latents-train.tfrecord-00000-of-00001"
_PROGRAMS = ("reader", "same order", "front to back")

_CHOSEN = flags.DEFINE_list("sizes", list(_SIZES), "Configs whose record sizes are measured.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each program runs.", lower_bound=1)
_SECONDS_PER_STEP = flags.DEFINE_float("seconds_per_step", 4.6, "What a training step of `tiny`, batch 32, takes.")
_CHILD = flags.DEFINE_list("child", [], "Of one process: data folder, size, program, cold or warm.")


def write(data_dir: str, size: str) -> None:
    """A dataset of one shard."""
    (frequencies, frames, channels), tokens, width, count = _SIZES[size]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("mix_latent", "context_latent", "stem_latent"), (frequencies, frames, channels)
    )
    shapes |= dict(instruction_states=(_TEXTS * tokens, width), caption_states=(tokens, width))
    draw = np.random.default_rng(0)

    def payloads() -> Iterator[bytes]:
        for i in range(count):
            example: dict = {key: [draw.bytes(2 * int(np.prod(shape)))] for key, shape in shapes.items()}
            example |= dict(instruction_lengths=[np.full(_TEXTS, tokens, np.int32).tobytes()])
            example |= dict(stem_name=[_STEMS[i % 2].encode()], song_id=[b"song"], group_id=[b"song"], tags=[b"{}"])
            example |= dict(caption=[b"rock"], instructions=[b"Add drums"], start_seconds=[0.0], gain=[1.0])
            yield synthetic.encode_example(dict(sorted(example.items())))

    folder = Path(records.dataset_dir(data_dir, "latents"))
    folder.mkdir(parents=True)
    with open(folder / _SHARD, "wb") as file:
        (folder / (_SHARD + records.INDEX_SUFFIX)).write_bytes(records.write_records(file, payloads()))
        os.fsync(file.fileno())
    stored = {key: ("-1" if "states" in key else str(shape[0]), *map(str, shape[1:])) for key, shape in shapes.items()}
    stored |= dict(instruction_lengths=("-1",))
    features = {key: {"tensor": {"shape": {"dimensions": list(shape)}}} for key, shape in stored.items()}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (folder / "metadata.json").write_text(json.dumps({"schema_version": records.SCHEMA_VERSION}))


def _measure(data_dir: str, size: str, program: str, cache: str) -> float:
    """Bytes a second."""
    keys = {"stem_latent", "context_latent", "instruction_states", "instruction_lengths", "stem_name"}
    split = records.Split(data_dir, "latents", "train", keys)
    latent_stages._MEMORY_LIMIT = 0  # what fits into memory is read once; this is about what does not
    source = latent_stages.LatentSource(split, "stem_latent", _STEMS, _SIZES[size][1])
    batches = reader.Batches(source, _BATCH, seed=0, rows=np.arange(_BATCH))
    steps = len(split) // _BATCH
    path = Path(records.dataset_dir(data_dir, "latents")) / _SHARD
    index = np.frombuffer(path.with_name(_SHARD + records.INDEX_SUFFIX).read_bytes()[12:-4], "<u4")[::2].tolist()
    offsets = np.cumsum([12, *(length + 16 for length in index)])
    order = np.concatenate([batches.examples(step) for step in range(steps)]).tolist()
    file = os.open(path, os.O_RDONLY)
    if cache == "cold":
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    since = time.perf_counter()
    if program == "reader":
        for _ in batches.stream(0, steps):
            pass
    elif program == "same order":
        for step in range(steps):
            [os.pread(file, index[i], int(offsets[i])) for i in order[step * _BATCH : (step + 1) * _BATCH]]
    else:
        for start in range(0, split.nbytes, _BLOCK):
            os.pread(file, _BLOCK, start)
    return split.nbytes / (time.perf_counter() - since)


def _run(*child: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.reader", f"--child={','.join(child)}"]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: list[str]) -> None:
    del argv
    if _CHILD.value:
        print(_measure(*_CHILD.value))
        return
    for size in _CHOSEN.value:
        with tempfile.TemporaryDirectory() as data_dir:
            write(data_dir, size)
            record = records.Split(data_dir, "latents", "train").nbytes / _SIZES[size][3]
            for cache in ("warm", "cold"):
                rounds = [[_run(data_dir, size, program, cache) for program in _PROGRAMS] for _ in range(_ROUNDS.value)]
                ours, same_order, in_file_order = map(statistics.median, zip(*rounds, strict=True))
                print(
                    f"{size} ({record / 1e3:.0f} kB a record), {cache}: reader {ours / 1e6:.0f} MB/s, "
                    f"{ours / same_order:.2f} of the same records read raw, "
                    f"{ours / in_file_order:.2f} of the file read front to back; "
                    f"{ours / record * _SECONDS_PER_STEP.value / _BATCH:.0f} times what a step of tiny consumes",
                    flush=True,
                )


if __name__ == "__main__":
    app.run(main)
