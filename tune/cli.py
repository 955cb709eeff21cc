"""The entry point `dxmi`: hands over to `tune.commands`, whose imports take seconds and may be interrupted too."""

import sys
from collections.abc import Sequence

STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, see `tune.commands.run`."""
    try:
        from tune.commands import run  # noqa: PLC0415  (a Ctrl-C while PyTorch is imported is no error)

        return run(arguments)
    except KeyboardInterrupt:
        print("dxmi: stopped.", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
