"""The entry point `dxmi`: hands over to `tune.cli.runs`, whose imports take seconds and may be interrupted too."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

BAD_INPUT, STOPPED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, see `tune.cli.runs.run`."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("dxmi: stopped.", file=sys.stderr)
        return STOPPED


def _run(arguments: Sequence[str] | None) -> int:
    # Everything is imported here, where a Ctrl-C is heard: reading the first module from a slow disk takes long enough.
    with _interrupts_raised():
        from dxmi.errors import UserError  # noqa: PLC0415

    try:
        with _interrupts_raised():
            command = _imported()
        return command(arguments)
    except UserError as error:
        print(f"dxmi: {error}", file=sys.stderr)
        return BAD_INPUT


def _imported() -> Callable[[Sequence[str] | None], int]:
    from tune.machine import give_home, spare_loopback  # noqa: PLC0415

    spare_loopback()
    said = give_home()  # first: what is imported below looks for it
    if said:
        print(f"dxmi: {said}", file=sys.stderr)
    from tune.cli.runs import run  # noqa: PLC0415

    return run


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raise a KeyboardInterrupt at the end if one came inside and a library swallowed it, as some do on import."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield  # it is ignored, or somebody else hears it
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


if __name__ == "__main__":
    sys.exit(main())
