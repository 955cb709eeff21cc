"""The entry point `dxmi`: parses the command line, then imports the implementation of the command.

The import takes seconds and can be interrupted by Ctrl-C, see `_interrupts_raised`.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tune.cli.exit_codes import BAD_INPUT, STOPPED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, see `tune.cli.dispatch.run`."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("dxmi: stopped.", file=sys.stderr)
        return STOPPED


def _run(arguments: Sequence[str] | None) -> int:
    # Imported here so that Ctrl-C is caught: loading the first module from a slow disk can take a while.
    with _interrupts_raised():
        from dxmi.errors import UserError  # noqa: PLC0415

    try:
        with _interrupts_raised():
            _prepare_machine()
            from tune.cli import dispatch, parser  # noqa: PLC0415
        args = parser.parse(arguments)
        with _interrupts_raised():
            command = parser.implementation(args)
        return dispatch.run(command, args)
    except UserError as error:
        print(f"dxmi: {error}", file=sys.stderr)
        return BAD_INPUT


def _prepare_machine() -> None:
    """Set the environment up before other imports: some libraries look for a home directory when imported."""
    from tune.machine import give_home, spare_loopback  # noqa: PLC0415

    spare_loopback()
    said = give_home()
    if said:
        print(f"dxmi: {said}", file=sys.stderr)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raise a KeyboardInterrupt on exit if the block swallowed one, as the imports of some libraries do."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield  # SIGINT is ignored or has another handler
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
