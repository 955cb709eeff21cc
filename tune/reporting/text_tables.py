"""Tables for terminals of any width, in which text is wrapped and numbers are never truncated."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_LONGEST_WORD = 14
"""Words up to this width are kept on one line; longer ones, such as paths, may be broken."""
_PATH = re.compile(r"\w{2,}/|/\w{2,}")


class TextTable(Table):
    """A table whose numbers are never broken or truncated, at any width.

    Right-justified columns hold numbers and keep their width. Other columns are wrapped, but not within a number. If
    the table is still too wide, each row is printed as a block of lines `heading: value`. Strings are printed
    literally: brackets are not parsed as markup nor colons as emoji.

    Args:
        headings: headings of left-justified columns; `add_column` adds others.
        title: text above the table.
        caption: text below the table.
        settings: further arguments of `rich.table.Table`.
    """

    def __init__(self, *headings: str, title: str | None = None, caption: str | None = None, **settings: Any) -> None:
        style = settings.get("caption_style") or "table.caption"
        super().__init__(
            title=None if title is None else Text(title, style="table.title"),
            caption=None if caption is None else Text(caption, style=style),
            **settings,
        )
        for heading in headings:
            self.add_column(heading)

    def add_column(self, header: Any = "", *args: Any, **settings: Any) -> None:
        """Add a column; see `rich.table.Table.add_column`."""
        super().add_column(_plain(header), *args, **{"overflow": "fold"} | settings)

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row; see `rich.table.Table.add_row`."""
        super().add_row(*map(_plain, cells), **settings)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, or its rows as blocks of lines if it is too wide."""
        columns = [self._texts(index) for index in range(len(self.columns))]
        wanted = [max(map(_width, texts), default=1) for texts in columns]
        unbounded = options.update_width(sum(wanted) + 10 * len(wanted) + 10)
        borders = Measurement.get(console, unbounded, self).maximum - sum(max(width, 1) for width in wanted)
        least = [self._least(index, texts) for index, texts in enumerate(columns)]
        widths = _fitted(wanted, least, options.max_width - borders)
        if widths is None:
            yield from self._blocks()
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        try:
            yield from super().__rich_console__(console, options)
        finally:
            for column in self.columns:
                column.width = None

    def _texts(self, index: int) -> list[Text]:
        """Return the texts of a column, including its heading if headings are shown."""
        column = self.columns[index]
        return [_plain(cell) for cell in ([column.header] if self.show_header else []) + list(column.cells)]

    def _least(self, index: int, texts: Sequence[Text]) -> int:
        """Return the minimum width at which no number of a column is broken."""
        heading, cells = (texts[:1], texts[1:]) if self.show_header else ([], texts)
        words = [word for text in heading for word in text.plain.split()]
        if self.columns[index].justify == "right":
            return max([*map(_width, cells), *map(cell_len, words)], default=1)
        words += [word for text in cells for word in text.plain.split()]
        whole = [cell_len(word) for word in words if cell_len(word) <= _LONGEST_WORD or _holds_number(word)]
        return max([*whole, min(_LONGEST_WORD, max(map(cell_len, words), default=1))], default=1)

    def _blocks(self) -> RenderResult:
        """Render each row as a block of lines."""
        headings = [_plain(column.header) for column in self.columns]
        if self.title:
            yield self.title
        for cells, row in zip(zip(*(column.cells for column in self.columns), strict=True), self.rows, strict=True):
            parts = [_plain(cell) for cell in cells]
            names = headings
            if not self.show_header:  # the first column names the others
                names, parts = [parts[0]] * (len(parts) - 1), parts[1:]
            for name, part in zip(names, parts, strict=True):
                if part.plain:
                    yield Text.assemble(f"{name.plain}: " if name.plain else "", part, style=row.style or "")
            yield Text()
        if self.caption:
            yield self.caption


def _plain(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def _width(text: Text) -> int:
    return max(map(cell_len, text.plain.splitlines()), default=0)


def _holds_number(word: str) -> bool:
    """Whether a word is a number or a setting's value, rather than a path with digits in it."""
    return any(character.isdigit() for character in word) and not _PATH.search(word)


def _fitted(wanted: Sequence[int], least: Iterable[int], room: int) -> list[int] | None:
    """Return column widths that fit into `room`, or None if the minimum widths do not fit.

    The widest columns are narrowed first, and no column below its minimum.
    """
    floors = [max(1, min(pair)) for pair in zip(wanted, least, strict=True)]
    if sum(floors) > room:
        return None
    widths = [max(1, width) for width in wanted]
    while sum(widths) > room:
        excess = sum(widths) - room
        above = [index for index, floor in enumerate(floors) if widths[index] > floor]
        widest = max(above, key=lambda index: widths[index])
        others = [widths[index] for index in above if widths[index] < widths[widest]]
        equal = sum(widths[index] == widths[widest] for index in above)
        step = min(math.ceil(excess / equal), widths[widest] - max([floors[widest], *others]))
        widths[widest] -= max(1, step)
    return widths
