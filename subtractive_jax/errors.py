"""The one exception whose message is meant for the person at the terminal."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """A `UserError` that lists what is known and guesses what was meant."""
    known = sorted(known)
    guess = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean "{guess[0]}"?' if guess else ""
    return UserError(f'unknown {kind} "{name}"{hint} (known: {", ".join(known) or "none"})')
