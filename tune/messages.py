"""Sentences to the error stream, and words for numbers, lists and errors. It needs no library."""

import os
import sys
import time
from collections.abc import Sequence


def complain(sentence: str) -> None:
    """One sentence to the error stream."""
    print(f"dxmi: {sentence}", file=sys.stderr, flush=True)


def discard_output() -> None:
    """Send what is printed from now on nowhere: whoever read it has left, and the work goes on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_LONG = 300


def last_line(error: str) -> str:
    """What a traceback ends with, no longer than a line or two."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else "it died without a word"
    if "worker process has died" in last:  # Ray goes on to list everything that could have been the cause
        return "its process died; if it was killed for memory, run fewer at once by sweep.max_concurrent"
    return last if len(last) <= _LONG else last[:_LONG] + "..."


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3:20 min, 2:05 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


def timestamp() -> str:
    """The present time for people, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
