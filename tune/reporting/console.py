"""Terminal output of a run: progress while it runs, and tables at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dxmi.data.description import ClassCount, Description
from dxmi.evaluation.scored_references import DATA, best_reference, data_label, scored_references
from dxmi.formatting import score_text
from dxmi.metrics.keys import better_text, is_better
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.progress import Phase
from dxmi.training.progress import Progress as Event
from dxmi.training.summary import Summary
from tune.messages import complain
from tune.reporting.text_tables import TextTable
from tune.studies.outdone import outdone, outdone_sentences

_LABELS = {
    Phase.PRETRAIN: "pretrain",
    Phase.REFERENCES: "score references",
    Phase.FINETUNE: "fine-tune",
    Phase.REPORT: "final scores",
}
_UNITS = {
    Phase.PRETRAIN: "iterations",
    Phase.REFERENCES: "network evaluations",
    Phase.FINETUNE: "iterations",
    Phase.REPORT: "policies",
}
_PLAIN_LINES = 10
"""Lines printed per phase when the output is not a terminal, not counting evaluations."""


class _RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="dim")


class ProgressReporter:
    """Reporter for `train` that shows a run's progress: bars on a terminal, plain lines elsewhere.

    Args:
        console: where to print.

    Attributes:
        stop: whether the run is to stop at its next report.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stop = False
        self._tasks: dict[Phase, TaskID] = {}
        self._printed: dict[Phase, int] = {}
        self._bars = Progress(
            TextColumn("{task.description:<17}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressReporter":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def ask_to_stop(self, _signal: str) -> None:
        """Make the run save and stop at its next report."""
        self.stop = True
        complain("stopping at the next logged iteration, and saving; press Ctrl-C again to stop immediately.")

    def __call__(self, event: Event) -> bool:
        """Show one event; returns whether a stop was requested."""
        if event.note:
            complain(event.note)
            return self.stop
        score = _score_note(event.metrics)
        if self.console.is_terminal:
            self._advance(event, score)
        else:
            self._print(event, score)
        return self.stop

    def _advance(self, event: Event, score: str) -> None:
        if event.phase not in self._tasks:
            # Started by the first report, so that the rate of a resumed run counts only steps of this session.
            task = self._bars.add_task(_LABELS[event.phase], total=event.total, completed=event.step, note="")
            self._tasks[event.phase] = task
        task = self._tasks[event.phase]
        self._bars.update(task, completed=event.step)
        if score:
            self._bars.update(task, note=score)

    def _print(self, event: Event, score: str) -> None:
        part = event.step * _PLAIN_LINES // max(event.total, 1)
        if not score and self._printed.get(event.phase, 0) == part:
            return
        self._printed[event.phase] = part
        line = f"{_LABELS[event.phase]}: {event.step}/{event.total} {_UNITS[event.phase]}"
        self.console.out(f"{line}, {score}" if score else line, highlight=False)


def _score_note(metrics: Mapping[str, float]) -> str:
    """Return the evaluation score among `metrics` as text, or an empty string."""
    primary = next((key for key in metrics if key.startswith("eval/")), None)  # it comes first: see `Progress`
    return "" if primary is None else f"{primary.removeprefix('eval/')} {score_text(metrics[primary])}"


_BESIDE = ("eval/precision_", "eval/recall_", "eval/copies", "eval/energy_auc")
"""Key prefixes of scores that a table shows in addition to the one by which runs are compared."""
_NOT_COMPUTED = "-"


def result_table(summary: Summary) -> TextTable:
    """Compare the samplers of a finished run: network evaluations, score, seconds per 1,000 samples.

    The best sampler with at most as many evaluations as the policy is bold, whether fine-tuned or not.
    """
    steps, metric = summary.num_steps, summary.metric.removeprefix("eval/")
    others = [key for key in summary.scores["best"] if key.startswith(_BESIDE)]
    references = scored_references(vars(summary))
    bold = best_reference(references, steps, summary.direction)
    is_beaten = bold is not None and is_better(bold.score, summary.best["value"], summary.direction)
    best = bold.key if bold is not None and is_beaten else "best"
    after = f"{steps} step{'s' if steps > 1 else ''}, after (iteration {summary.best['step']})"
    rows = [(reference.label, str(reference.evaluations), reference.key) for reference in references]
    rows += [(after, str(steps), "best"), (data_label(vars(summary)), "", DATA)]
    draws = len(summary.generations)
    generations = (
        f"; the score of the fine-tuned policy is the mean over {draws} draws of the noise" if draws > 1 else ""
    )
    better = better_text(summary.direction)
    table = TextTable(
        caption=f"Network evaluations per sample; {metric} of {summary.num_samples:,} samples each, {better}; "
        f"seconds per 1,000 samples{generations}; {_NOT_COMPUTED}: not computed. Bold: the best sampler with at most "
        f"{steps} evaluations."
    )
    headings = [key.removeprefix("eval/") for key in others]
    for heading in ("sampler", "evaluations", metric, *headings, "seconds per 1,000"):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    for label, evaluations, name in rows:
        if name not in summary.scores:
            continue
        scores = summary.scores[name]
        shown = [score_text(scores[key]) if key in scores else _NOT_COMPUTED for key in (summary.metric, *others)]
        seconds = _NOT_COMPUTED if name == DATA else f"{summary.seconds_per_1000_images[name]:.3f}"
        table.add_row(label, evaluations, *shown, seconds, style="bold" if name == best else None)
    return table


def show_result(console: Console, run: RunDirectory, summary: Summary) -> None:
    """Print a run's result table, whether a training-free sampler is better, and the paths of its outputs."""
    console.print(result_table(summary))
    if summary.labels:
        console.out(f"labels: {summary.labels}", highlight=False)
    references = scored_references(vars(summary))
    found = outdone("this run", summary.best["value"], references, summary.num_steps, summary.direction)
    for sentence in outdone_sentences(summary.metric, [found]):
        console.print(Text(sentence), highlight=False)
    for label, path in (
        ("curve", run.curves),
        ("scores by divergence", run.divergence),
        ("samples, step by step", run.samples / "steps.png"),
        ("everything else", run.summary),
    ):
        if path.exists() or path != run.divergence:
            _say_path(console, label, path)


def show_data(console: Console, found: Description, labels: str) -> None:
    """Print the description of a data set.

    Args:
        console: where to print.
        found: description of the data set.
        labels: how its labels are used; empty if it has none.
    """
    facts = found.facts | ({"labels": labels} if labels else {})
    for name, text in facts.items():
        console.out(f"{name + ':':<12}{text}", highlight=False)
    for note in found.notes:
        console.out(f"{'note:':<12}{note}", highlight=False)
    if found.classes:
        console.print(_class_table(found.classes))


def _class_table(classes: Sequence[ClassCount]) -> TextTable:
    total, hidden = sum(row.count for row in classes), classes[_CLASSES:]
    caption = None
    if hidden:
        fewest, most = min(row.count for row in hidden), max(row.count for row in hidden)
        caption = f"and {len(hidden):,} more classes with {fewest:,} to {most:,} samples each"
    table = TextTable(caption=caption)
    for heading in ("label", "class", "samples", "share"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in classes[:_CLASSES]:
        table.add_row(str(row.number), row.name, f"{row.count:,}", f"{row.count / total:.2%}")
    return table


def _say_path(console: Console, label: str, path: Path) -> None:
    console.out(f"{label + ':':<23}{path}", highlight=False)


_CLASSES = 100
"""Maximum number of classes in a table."""
