"""Every test sees eight virtual CPU devices; this must be said before JAX's first operation."""

import contextlib
import os
import tempfile

# What one test compiled, later tests, their subprocesses and the other process of `make test` need not.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 34)  # with a limit it is locked while it is written
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Eight devices on few cores wait for one another longer than XLA's 40 seconds, after which it would abort.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600"

with contextlib.suppress(ImportError):  # comes with PyTorch for GPUs, and crashes if loaded after TensorFlow
    import triton  # noqa: F401

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """See tests/worlds.py."""
    from tests import worlds

    return worlds.make(tmp_path_factory.mktemp("world"))


_LONGEST = ("test_training.py", "test_chain.py", "test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` gives each of two processes a file at a time: the longest first, or one would wait for the other."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)
