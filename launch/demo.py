"""The main job on shipped music, as the commands a user would type. `make demo` runs it.

Builds the datasets, fine-tunes the shipped model for a few minutes, inserts drums into a song kept out of all training
as three instructions ask, measures, and prints the path of the listening page.

  python -m launch.demo --output=OUT [--steps=N]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from data_pipeline import sources, splits
from launch import program
from subtractive_jax.errors import UserError

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
_STEPS = flags.DEFINE_integer("steps", 40, "Fine-tuning steps.", lower_bound=1)

CONFIG = "configs/tiny.py"
SONG = "demo-cc0-rockers-reggae"  # one of data_pipeline/songs/held_out.json
INSTRUCTIONS = {
    "reggae": "Add reggae beats",
    "rock": "Add aggressive rock drums with cymbal crashes",
    "jazz": "Add jazzy drums",
}


def command(module: str, *arguments: str) -> None:
    """Prints and runs `python -m module arguments...`; ends the demo with its exit status if it fails."""
    words = ["-m", module, *arguments]
    print(f"\n$ python {' '.join(words)}", flush=True)
    began = time.monotonic()
    status = subprocess.run([sys.executable, *words]).returncode
    if status:
        sys.exit(status)
    print(f"({time.monotonic() - began:.0f} s)", flush=True)


def main() -> None:
    output = Path(_OUTPUT.value)
    if output.exists():
        raise UserError(f"{output} exists: give another --output, or remove it")
    output.mkdir(parents=True)
    assert SONG in splits.held_out()
    ((_, song),) = next(song for song in sources.find_songs([]).songs if song.song_id == SONG).files
    began = time.monotonic()
    data, run, samples = (output / name for name in ("data", "run", "samples"))

    command("data_pipeline.build", f"--config={CONFIG}", f"--data_dir={data}", "--encoders=tiny")
    command(
        "launch.train",
        f"--config={CONFIG}",
        f"--data_dir={data}",
        f"--workdir={run}",
        "--config.init_from=tiny",
        f"--config.train.steps={_STEPS.value}",
        "--config.train.batch_size=8",
        "--config.train.learning_rate=1e-4",
        "--config.train.warmup_steps=5",
        "--config.train.log_every=5",
    )
    jobs = output / "jobs.jsonl"
    lines = [
        {"id": name, "input": song, "remove": True, "stem": "drums", "instruction": instruction, "seed": 0}
        for name, instruction in INSTRUCTIONS.items()
    ]
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command("launch.sample", f"--model={run}", f"--jobs={jobs}", f"--output={samples}")
    command(
        "launch.evaluate",
        "--paper_table",
        f"--model={run}",
        f"--data_dir={data}",
        "--num_windows=8",
        "--steps=15",
        f"--output={output / 'evaluation'}",
    )
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Listen: {(samples / 'index.html').resolve()}")


if __name__ == "__main__":
    program.run(main)
