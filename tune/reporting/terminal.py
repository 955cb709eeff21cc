"""The console that commands print to."""

import os

from rich.console import Console

from tune.messages import discard_output

_FILE_COLUMNS = 160


class Terminal(Console):
    """A console that tolerates a closed pipe: output stops, but work continues. In a file, tables are wider.

    Text is printed literally: brackets are not parsed as markup nor colons as emoji.
    """

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _FILE_COLUMNS

    def on_broken_pipe(self) -> None:
        """Discard further output; the default implementation of rich exits the process."""
        self.quiet = True
        discard_output()
