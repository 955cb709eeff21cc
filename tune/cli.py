"""The entry point `dxmi`: hands over to `tune.commands`, whose imports take seconds and may be interrupted too."""

import sys
from collections.abc import Sequence

BAD_INPUT, STOPPED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, see `tune.commands.run`."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("dxmi: stopped.", file=sys.stderr)
        return STOPPED


def _run(arguments: Sequence[str] | None) -> int:
    # Everything is imported here, where a Ctrl-C is heard: reading the first module from a slow disk takes long enough.
    from dxmi.errors import UserError  # noqa: PLC0415

    try:
        from tune.machine import give_home, spare_loopback  # noqa: PLC0415

        spare_loopback()
        said = give_home()  # first: what is imported below looks for it
        if said:
            print(f"dxmi: {said}", file=sys.stderr)
        from tune.commands import run  # noqa: PLC0415

        return run(arguments)
    except UserError as error:
        print(f"dxmi: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
