"""Display of a running sweep: a live table on a terminal, one plain line per event elsewhere."""

import time
from collections import Counter

from rich.console import Console
from rich.live import Live as LiveDisplay
from rich.text import Text

from dxmi.formatting import score_text
from tune.execution.controller import Controller, Note, RunningTrial
from tune.messages import complain, duration
from tune.reporting.text_tables import TextTable
from tune.search.space import show
from tune.studies.leaderboard import short_names
from tune.studies.records import TrialState

_REFRESH = 0.5
_LINES_EVERY = 60.0
"""Seconds between plain lines about the progress of running trials."""


class SweepView:
    """Shows a session. Call `note` for events, and the view itself regularly.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._display = LiveDisplay(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._said = time.monotonic()

    def __enter__(self) -> "SweepView":
        if self.console.is_terminal:
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._display.stop()

    def note(self, note: Note) -> None:
        """Print an event, above the table if there is one."""
        line = note.text if note.number is None else f"trial {note.number}: {note.text}"
        if self.console.is_terminal:
            if not note.minor:
                self.console.print(Text(line, style="red" if note.bad else ""))
        elif note.bad:
            complain(line)
        else:
            self.console.out(line, highlight=False)

    def __call__(self, controller: Controller) -> None:
        """Update the display if the refresh interval has passed."""
        now = time.monotonic()
        if self.console.is_terminal and now - self._drawn > _REFRESH:
            self._drawn = now
            self._display.update(_table(controller), refresh=True)
        elif not self.console.is_terminal and now - self._said > _LINES_EVERY:
            self._said = now
            for trial in controller.running.values():
                self.console.out(f"trial {trial.record.number}: {_where(trial)}", highlight=False)


def _where(trial: RunningTrial) -> str:
    return f"{trial.phase} {trial.step}/{trial.phase_total}" if trial.phase_total else trial.phase


def _table(controller: Controller) -> TextTable:
    """Build the table of running trials under a headline about the study."""
    table = TextTable(title=_headline(controller), title_justify="left", expand=False)
    names = ", ".join(short_names(controller.plan).values())
    for heading, justify in (
        ("trial", "right"), (names, "left"), ("phase", "left"), ("step", "right"),
        ("score", "right"), ("best", "right"), ("rate", "right"), ("left", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)
    now = controller.clock()
    for trial in controller.running.values():
        rate = _rate(trial, now)
        table.add_row(
            str(trial.record.number),
            ", ".join(show(value) for value in trial.record.values.values()),
            trial.stop_reason.value if trial.stop_reason else trial.phase,
            f"{trial.step}/{trial.phase_total}" if trial.phase_total else "",
            "" if trial.score is None else score_text(trial.score),
            "" if trial.best is None else score_text(trial.best),
            f"{rate:,.1f}/s" if rate else "",
            duration((trial.phase_total - trial.step) / rate) if rate else "",
        )
    return table


def _rate(trial: RunningTrial, now: float) -> float:
    """Return steps per second in the current phase."""
    passed = now - trial.phase_since
    return (trial.step - trial.phase_start) / passed if passed > 1.0 else 0.0


def _headline(controller: Controller) -> str:
    counts = Counter(controller.states)
    done = ", ".join(f"{counts[state]} {state.value}" for state in TrialState if counts[state])
    planned = controller.plan.num_trials
    parts = [f"{controller.plan.name}: {len(controller.states)}/{planned} trials", done, _left(controller)]
    return " · ".join(part for part in parts if part)


def _left(controller: Controller) -> str:
    """Describe the remaining time, assuming that remaining trials take as long as those of this session."""
    ended = len(controller.states) - controller.ended_before
    if controller.ending:
        return controller.ending
    if not ended:
        return ""
    passed = controller.session_seconds
    return f"about {duration(passed * (controller.plan.num_trials - len(controller.states)) / ended)} left"
