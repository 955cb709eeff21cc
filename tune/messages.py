"""Messages on standard error, and formatting of numbers, lists and errors. Uses only the standard library."""

import os
import sys
import time
from collections.abc import Sequence


def complain(sentence: str) -> None:
    """Print a message to standard error."""
    print(f"dxmi: {sentence}", file=sys.stderr, flush=True)


def discard_output() -> None:
    """Discard further output to standard output, so that work can continue after its reader has exited."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listed(parts: Sequence[str]) -> str:
    """Join texts as in `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_LONG = 300


def last_line(error: str) -> str:
    """The last line of a traceback, truncated to a line or two."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else "it exited without an error message"
    if "worker process has died" in last:  # Ray's message continues with a list of all possible causes
        return "its process died; if it ran out of memory, run fewer trials at once: lower sweep.max_concurrent"
    return last if len(last) <= _LONG else last[:_LONG] + "..."


def duration(seconds: float) -> str:
    """Format seconds: 45 s, 3:20 min, 2:05 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


def timestamp() -> str:
    """Format the current time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
