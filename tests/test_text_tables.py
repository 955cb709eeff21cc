"""Tables at every width: no number is cut, and what a user wrote is shown as it is."""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_ablation import outcome, played, shifted
from test_report import Fabricated, made

from dxmi.data.description import ClassCount
from tune.reporting.console import result_table, show_data
from tune.reporting.study_tables import arms_table, leaderboard_table
from tune.reporting.terminal import Terminal
from tune.reporting.text_tables import TextTable

__all__ = ["Fabricated", "made", "played"]

WIDTHS = pytest.mark.parametrize("width", [40, 60, 80])
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]\d+)?%?")


def printed(table: TextTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def numbers(table: TextTable, *headings: str) -> list[str]:
    """The numbers in the cells of some columns, or of all."""
    columns = [column for column in table.columns if not headings or str(column.header) in headings]
    return sorted(number for column in columns for cell in column.cells for number in _NUMBER.findall(str(cell)))


def require_whole(table: TextTable, width: int, *headings: str) -> None:
    """Every number of the cells stands in the output as often as in the cells."""
    found = _NUMBER.findall(printed(table, width))
    for number in (wanted := numbers(table, *headings)):
        assert found.count(number) >= wanted.count(number), number
    assert wanted


@WIDTHS
def test_the_arms_keep_their_numbers(played, width):
    study = played(seeds=6)
    study.play(shifted(no_entropy=-2000.0, fast=1.0))
    require_whole(arms_table(outcome(study)), width)


@WIDTHS
def test_the_leaderboard_keeps_its_numbers(made, width):
    sweep = made()
    for score in (7.123, 12345.0, 5.0):
        sweep.complete(score)
    table = leaderboard_table(sweep.study.plan, sweep.records)
    headings = [str(column.header) for column in table.columns if column.justify == "right"]
    require_whole(table, width, *headings)


@WIDTHS
def test_the_result_keeps_its_numbers(width):
    names = ["ddpm_1000", "ddim_5_trailing", "shortened", "best"]
    values = {"eval/fid_digits": 12345.25, "eval/precision_digits": 0.551, "eval/recall_digits": 0.919}
    summary = SimpleNamespace(
        direction="minimize",
        num_steps=5,
        metric="eval/fid_digits",
        num_samples=5000,
        generations=[],
        best={"value": 12345.25, "step": 1000},
        reference=dict.fromkeys(names[:-1], 12345.25),
        scores={name: {key: value * (1 + place) for key, value in values.items()} for place, name in enumerate(names)},
        seconds_per_1000_images={name: 1234.5678 / (1 + place) for place, name in enumerate(names)},
        samplers={},
    )
    table = result_table(summary)
    require_whole(table, width)
    shown = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert shown["precision_digits"] == ["0.551", "1.10", "1.65", "2.20"]
    assert shown["recall_digits"] == ["0.919", "1.84", "2.76", "3.68"]


@WIDTHS
def test_the_classes_keep_their_counts(width):
    rows = [ClassCount(number, f"a name of several words {number}", 10**number) for number in range(8)]
    console = Console(file=io.StringIO(), width=width)
    show_data(console, SimpleNamespace(facts={}, notes=(), classes=rows), "")
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    found = _NUMBER.findall(text)
    for row in rows:
        assert {str(row.number), f"{row.count:,}"} <= set(found)


@WIDTHS
def test_settings_keep_their_values(width):
    table = TextTable("arm", "changes of the baseline")
    table.add_row("slow", "algorithm.lr=1.25e-05, algorithm.steps=1000000, x=0.123456")
    require_whole(table, width)


@WIDTHS
@pytest.mark.parametrize("columns", [1, 3, 9])
def test_numbers_of_any_table_are_whole(width, columns):
    values = torch.rand(4, columns, generator=torch.Generator().manual_seed(columns)) * 1e6
    table = TextTable("name", title="of some", caption="words " * 30)
    for column in range(columns):
        table.add_column(f"heading {column}", justify="right")
    for row in values.tolist():
        table.add_row("a long text that may be broken", *(f"{value:,.2f}" for value in row))
    require_whole(table, width)


def test_a_table_without_a_heading_becomes_lines_with_names():
    table = TextTable(show_header=False)
    table.add_row("trials", "123456789012345")
    assert printed(table, 18).split() == ["trials:", "123456789012345"]


def test_text_is_shown_as_it_is_written(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = "[bold]/data/[abc]/:smile:[/bold]"
    table = TextTable("[red]heading", title="[a] title", caption="[b] caption :x:")
    table.add_row(words)
    console = Terminal()
    console.print(table)
    console.print(words)
    text = capsys.readouterr().out
    assert text.count(words) == 2
    for part in ("[red]heading", "[a] title", "[b] caption :x:"):
        assert part in text
