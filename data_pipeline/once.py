"""What is loaded once a process, however many threads ask."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


def once(function: Callable[P, T]) -> Callable[P, T]:
    """Calls the function once for each choice of arguments; who asks while it runs waits. Errors are not kept."""
    cached = cast(Callable[P, T], functools.cache(function))
    lock = threading.RLock()

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock:
            return cached(*args, **kwargs)

    return locked
