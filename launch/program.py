"""What every program shares: flags parsed with clear errors, `UserError` printed as one line, exit codes.

Compiled programs are kept in the user's cache folder ($JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/subtractive_jax
or ~/.cache/subtractive_jax), so that the next start is quick; the folder can be deleted at any time.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from subtractive_jax.errors import UserError

# Read by TensorFlow and JAX when they are imported, which every program does after this module.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subtractive_jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow announces them and computes nothing here


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# What absl raises for a bad flag, and ml_collections for a config that cannot be loaded or a field that is not there.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError)


def _parse(argv: list[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS["config"].value, "stage", None)  # a file that is not there is an error only when read
        return arguments
    except _FLAG_ERRORS as error:
        reason: Any = error
        while isinstance(reason, Exception) and len(reason.args) == 1:  # ml_collections wraps one in another
            reason = reason.args[0]
        flag, _, raised = str(reason).partition("Error whilst parsing config file:")
        _fail(flag + raised.strip().rpartition("\n")[2])  # without the traceback in between


def run(main: Callable[[], None]) -> None:
    """Runs a program's `main()` under absl: exit 0, or one line on stderr and exit 2 on bad input."""
    logging.set_verbosity(logging.ERROR)  # orbax warns of its own defaults

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f'unexpected argument "{argv[1]}": values are given as --flag=value')
        try:
            main()
        except UserError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=_parse)
