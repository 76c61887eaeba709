"""WORKSPACE.md is true, rooms import only what they may, and nothing deprecated or unsafe is used."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("subtractive_jax", "data_pipeline", "configs", "launch", "tests")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
CORE_PROGRAMS = {f"launch/{name}.py" for name in ("train", "sample", "export_latents", "evaluate", "program")}
OFFLINE_ONLY = {
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "apache_beam",
    "librosa",
    "transformers",
    "diffusers",
    "demucs",
}


def mapped():
    return re.findall(r"^- `([^`]+)`: \S", (ROOT / "WORKSPACE.md").read_text(), re.MULTILINE)


def test_every_file_is_in_the_map():
    own = {path.as_posix() for path in FILES if (ROOT / path).read_text().strip()}
    assert own - set(mapped()) == set()


def test_every_mapped_file_exists_once():
    assert [path for path in mapped() if not (ROOT / path).exists()] == []
    assert len(mapped()) == len(set(mapped()))


def imports(tree):
    """Full names of what a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def banned(tree):
    """Uses of what JAX and flax have deprecated, and of what can run code from a file."""
    modules = ("jax.experimental.pjit", "jax.experimental.shard_map", "flax.training", "pickle", "cloudpickle", "dill")
    for name in imports(tree):
        if f"{name}.".startswith(tuple(f"{module}." for module in modules)):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in ("jax.pmap", "jax.tree_map", "nnx.jit", "nnx.pmap"):
                yield name
        elif isinstance(node, ast.With):
            if any(isinstance(item.context_expr, ast.Name) and "mesh" in item.context_expr.id for item in node.items):
                yield "with mesh:"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield node.func.id


@pytest.mark.parametrize(
    "code",
    [
        "from jax.experimental.pjit import pjit",
        "import pickle",
        "jax.pmap(f)",
        "with mesh: pass",
        "@nnx.jit\ndef f(): pass",
    ],
)
def test_the_check_below_finds(code):
    assert list(banned(ast.parse(code)))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_and_calls(path):
    tree = ast.parse((ROOT / path).read_text())
    assert list(banned(tree)) == []
    names = set(imports(tree))
    roots = {name.partition(".")[0] for name in names}
    room = path.parts[0]
    if room == "subtractive_jax":
        assert roots & {"data_pipeline", "launch", "configs", "tests"} == set()
    if room == "configs":
        assert roots <= {"ml_collections", "configs"}
    if room == "subtractive_jax" or path.as_posix() in CORE_PROGRAMS:
        assert roots & OFFLINE_ONLY == set()


def test_sampling_loads_no_other_framework():
    code = f"import sys, launch.evaluate; print(sorted({OFFLINE_ONLY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_every_requirement_is_pinned(version):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [
        *project["dependencies"],
        *(name for extra in extras if extra not in ("tpu", "cuda") for name in extras[extra]),
    ]
    lines = (ROOT / f"constraints-py{version}.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert {name.lower().replace("_", "-") for name in required} <= pinned
