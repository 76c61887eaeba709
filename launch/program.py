"""What every program shares: flags parsed with clear errors, `UserError` printed as one line, exit codes."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from subtractive_jax.errors import UserError


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
    ) as error:  # what ml_collections raises for a bad config
        _fail(str(error.args[0] if error.args else error))
        raise


def run(main: Callable[[], None]) -> None:
    """Runs a program's `main()` under absl: exit 0, or one line on stderr and exit 2 on bad input."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(logging.WARNING)

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f'unexpected argument "{argv[1]}": values are given as --flag=value')
        try:
            main()
        except UserError as error:
            _fail(str(error))

    app.run(guarded, flags_parser=_parse)


FLAGS = flags.FLAGS
