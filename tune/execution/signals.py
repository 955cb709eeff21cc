"""Ctrl-C and SIGTERM: the first asks for a gentle stop, the second for one at once, the third gets it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_BOUNCE_SECONDS = 0.5
"""`timeout` and some schedulers signal a process and then its whole group: that is one request, not two."""


def interrupt() -> None:
    """What Ctrl-C does where nobody minds it."""
    raise KeyboardInterrupt


@contextmanager
def gentle_stop(first: Callable[[str], None], second: Callable[[], None] = interrupt) -> Iterator[None]:
    """While this lasts, the first signal calls `first` with its name, the second `second`; the third ends the process.

    A handler runs wherever the main thread happens to be: one that raises does so inside whatever library that is.
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
    except ValueError:  # not the main thread, as in some notebooks: there is no Ctrl-C to hear
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
