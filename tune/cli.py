"""The entry point `dxmi`: hands over to `tune.commands`, whose imports take seconds and may be interrupted too."""

import sys
from collections.abc import Sequence

from dxmi.errors import UserError

BAD_INPUT, STOPPED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, see `tune.commands.run`."""
    try:
        from tune.machine import give_home, spare_loopback  # noqa: PLC0415  (no import is outside this try)

        spare_loopback()
        said = give_home()  # first: what is imported below looks for it
        if said:
            print(f"dxmi: {said}", file=sys.stderr)
        from tune.commands import run  # noqa: PLC0415  (a Ctrl-C while PyTorch is imported is no error)

        return run(arguments)
    except UserError as error:
        print(f"dxmi: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("dxmi: stopped.", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
