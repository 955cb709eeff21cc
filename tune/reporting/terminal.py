"""The console that commands print to."""

import os

from rich.console import Console

from tune.messages import discard_output

_FILE_COLUMNS = 160


class Terminal(Console):
    """A console whose reader may leave: the output ends, the work does not. In a file, tables have room.

    Text is shown as it is written: brackets are no markup and colons no emoji.
    """

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _FILE_COLUMNS

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own way is to exit."""
        self.quiet = True
        discard_output()
