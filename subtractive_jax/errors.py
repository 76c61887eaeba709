"""What is meant for the person at the terminal: the one exception for bad input, and warnings."""

import difflib
import sys
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """A `UserError` that lists what is known and guesses what was meant."""
    known = sorted(known)
    guess = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean "{guess[0]}"?' if guess else ""
    return UserError(f'unknown {kind} "{name}"{hint} (known: {", ".join(known) or "none"})')


def warn(message: str) -> None:
    """Says in one line, on stderr, that something was not as it should be and how the program goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
