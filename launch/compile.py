"""Compiles the training step for a slice of TPUs, without any TPU, and predicts what it will cost.

  python -m launch.compile --config=configs/riffusion.py --topology=v5e:16x16 --config.train.batch_size=2048
  python -m launch.compile --config=configs/riffusion.py --topology=v5e:4x4 --sweep [--output=FILE.json]

It is the step that `launch.train` runs, compiled by the TPU's own compiler (the extra `tpu`), for config.mesh,
config.train.batch_size and config.remat. A model of Stable Diffusion's size takes twenty minutes and 16 GB of memory.
`--sweep` tries meshes, policies of rematerialisation and batches, and prints the fastest that fits. What was compiled
before is kept in the user's cache folder, and a sweep that was interrupted goes on where it stood.

How times are predicted: subtractive_jax/cost/roofline.py. Results and what led to them: launch/TPU.md.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from launch import program
from subtractive_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file and stage, such as configs/riffusion.py.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5e:16x16, v5p:4x4x4 or v6e:8x8.", required=True)
_SWEEP = flags.DEFINE_bool("sweep", False, "Look for the fastest mesh, remat and batch, whatever the config says.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures; of a sweep, a list.")

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subtractive_jax" / "tpu"
_ENVIRONMENT = {  # read when JAX is loaded
    "JAX_PLATFORMS": "cpu",  # nothing runs on a device
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for other machines do not belong there
}


def main() -> None:
    os.environ.update(_ENVIRONMENT)
    from subtractive_jax.cost import aot, report, sweep  # after the flags are known to be good: it takes seconds

    topology = aot.topology(_TOPOLOGY.value)
    results: list[dict[str, Any]] = []

    def progress(seconds: float) -> None:
        print(f"compiling for {topology.name}: {seconds / 60:.1f} min", file=sys.stderr, flush=True)

    def measure(config: ml_collections.ConfigDict) -> dict[str, Any]:
        results.append(aot.measure(config, topology, _CACHE, progress))
        if _SWEEP.value:
            print(report.row(results[-1]), flush=True)
        return results[-1]

    if _SWEEP.value:
        print(report.HEADER, flush=True)
        best = sweep.sweep(_CONFIG.value, len(topology.devices), topology.chip.hbm_bytes, measure)
        if best is None:
            print(f"nothing fits a chip of {topology.name}: take a larger slice, or chips with more memory")
        else:
            mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best["mesh"].items())
            print(f"\n{mesh} --config.remat={best['remat']} --config.train.batch_size={best['batch_size']}")
            print(report.report(best))
    else:
        print(report.report(measure(_CONFIG.value)))
    if _OUTPUT.value:
        figures = results if _SWEEP.value else results[0]
        try:
            Path(_OUTPUT.value).write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output={_OUTPUT.value}: {error.strerror}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    program.run(main)
