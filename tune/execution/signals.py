"""Handling of Ctrl-C and SIGTERM: a graceful stop first, then an immediate stop, then exit of the process."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_BOUNCE_SECONDS = 0.5
"""`timeout` and some schedulers signal a process and then its whole group: both count as one request."""


def interrupt() -> None:
    """Raise KeyboardInterrupt, the default effect of Ctrl-C."""
    raise KeyboardInterrupt


@contextmanager
def gentle_stop(first: Callable[[str], None], second: Callable[[], None] = interrupt) -> Iterator[None]:
    """In this context, the first signal calls `first` with its name, the second `second`; the third ends the process.

    A handler can run at any point of the main thread: an exception it raises may propagate through any library.
    """
    asked: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[-1] < _BOUNCE_SECONDS:
            return
        asked.append(now)
        if len(asked) == 1:
            first(signal.Signals(number).name)
        elif len(asked) == 2:
            second()
        else:
            os._exit(128 + number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, as in some notebooks: signals cannot be handled
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
