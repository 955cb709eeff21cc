"""Runs a command and converts its exceptions to an error message and an exit code."""

import argparse
import errno
import logging
from pathlib import Path

from dxmi.errors import DivergedError, UserError, WorkersLostError
from dxmi.persistence.files import require_target
from tune.cli.exit_codes import BAD_INPUT, FAILED
from tune.cli.parser import Command
from tune.messages import complain, discard_output


def run(command: Command, args: argparse.Namespace) -> int:
    """Run a command and return its exit code: 0 success, 1 failure, 2 bad input, 130 stopped by a signal."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        for option, value in vars(args).items():
            if isinstance(value, Path):
                require_target(value, option if option == "run_dir" else f"--{option.replace('_', '-')}")
        return command(args)
    except UserError as error:
        complain(str(error))
        return BAD_INPUT
    except (DivergedError, WorkersLostError) as error:
        complain(str(error))
        return FAILED
    except BrokenPipeError:  # the reader closed the pipe, as in `dxmi config | head`
        discard_output()
        return FAILED
    except OSError as error:
        if error.filename is None:  # not caused by a file of the user
            raise
        complain(f"{error.filename} could not be read or written: {error.strerror or error}.{_advice(error)}")
        return FAILED


def _advice(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return " Everything saved so far is intact: free some space, then continue with --resume." if full else ""
