"""Runs a command, and turns what it raises into a sentence and an exit code."""

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
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad input, 130 stopped by a signal."""
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
    except BrokenPipeError:  # the reader of our output has left, as in `dxmi config | head`
        discard_output()
        return FAILED
    except OSError as error:
        if error.filename is None:  # no file of the user's
            raise
        complain(f"{error.filename} could not be read or written: {error.strerror or error}.{_advice(error)}")
        return FAILED


def _advice(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return " What was saved before is whole: free some space and go on with --resume." if full else ""
