"""What configs mean is under review: every config and stage against its files in tests/golden/.

`configs/NAME-STAGE.txt` is the resolved config, `parameters/NAME-STAGE.txt` what the stage trains: each parameter's
type and shape, with the mesh axis that splits a dimension after an @. Configs with equal parameters share a file,
called after the first of them. Where a change is meant, write them anew with

  python -m tests.test_golden
"""

import difflib
import importlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import AbstractMesh

import configs
from subtractive_jax import parts
from subtractive_jax.models.network import Params
from subtractive_jax.training import audio_stages, latent_stages, partitioning, stages

_GOLDEN = Path(__file__).parent / "golden"
_MESH = AbstractMesh((2, 2, 2), partitioning.AXES)
_SHOWN = 12  # lines of a difference


def _configs() -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """Each config of each stage it has, as (NAME-STAGE, config)."""
    for path in sorted(Path(configs.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        for stage in stages.PART_OF_STAGE if hasattr(module, "get_config") else ():
            try:
                config = module.get_config(stage)
            except ValueError as error:
                assert "unknown stage" in str(error)
            else:
                yield f"{path.stem}-{stage}", config


def _trained(config: ml_collections.ConfigDict) -> Params:
    """Shapes of `{part: params}`; of the stage text_encoder without the head, which depends on the dataset."""
    if config.stage == "text_encoder":
        return {"text_encoder": parts.network("text_encoder", config).shapes()}
    stage = audio_stages if config.stage in ("autoencoder", "vocoder") else latent_stages
    return jax.eval_shape(lambda: stage.task(config).init_params(jax.random.key(0), {}))


def _settings(values: Any, name: str) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"{name} = {json.dumps(values)}"
        return
    for key, value in values.items():
        yield from _settings(value, f"{name}.{key}")


def _parameters(config: ml_collections.ConfigDict) -> Iterator[str]:
    params = _trained(config)
    shardings = partitioning.shardings(params, _MESH, partitioning.RULES[stages.PART_OF_STAGE[config.stage]])
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings), strict=True
    ):
        axes = itertools.zip_longest(leaf.shape, sharding.spec)
        shape = ",".join(f"{size}@{axis}" if axis else str(size) for size, axis in axes)
        yield f"{partitioning.path_of(path)} {leaf.dtype}[{shape}]"


def _files() -> dict[str, str]:
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, config in _configs():
        parameters = "\n".join(_parameters(config)) + "\n"
        owner = owners.setdefault(parameters, f"parameters/{name}.txt")
        files[owner] = parameters
        files[f"configs/{name}.txt"] = "\n".join([*_settings(config.to_dict(), "config"), f"trains {owner}"]) + "\n"
    return files


def test_configs_and_parameters_are_the_golden_ones():
    now = _files()
    golden = {path.relative_to(_GOLDEN).as_posix(): path.read_text() for path in _GOLDEN.rglob("*.txt")}
    differences: list[str] = []
    for name in sorted(now.keys() | golden.keys()):
        before, after = (side.get(name, "").splitlines() for side in (golden, now))
        lines = difflib.unified_diff(before, after, f"golden/{name}", "now", n=0, lineterm="")
        differences += itertools.islice(lines, _SHOWN)
    assert not differences, "\n".join(["where this is meant, run: python -m tests.test_golden", *differences])


if __name__ == "__main__":
    files = _files()
    shutil.rmtree(_GOLDEN, ignore_errors=True)
    for name, text in files.items():
        path = _GOLDEN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
