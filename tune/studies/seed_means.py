"""Trials of several seeds: their run folders, and the means of their curves and summaries.

The run folder of such a trial is that of its first seed. The runs with the other seeds are in folders in it:

    trials/0007/              the run with the first seed
    trials/0007/seeds/1/      the run with seed 1
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dxmi.metrics.keys import mean_scores
from dxmi.persistence.run_directory import Row, RunDirectory

BY_SEED = "by_seed"
"""Key of a mean summary: the summaries of the seeds, in order."""


def seed_runs(out: Path, seeds: Sequence[int]) -> tuple[RunDirectory, ...]:
    """The run folders of a trial, one per seed.

    Args:
        out: Run folder of the trial.
        seeds: Its seeds, in order.
    """
    return RunDirectory(out), *(RunDirectory(out / "seeds" / str(seed)) for seed in seeds[1:])


def mean_rows(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The mean rows of several runs, in the order of steps: for each step, the keys that all runs have."""
    if len(runs) == 1:
        return list(runs[0])
    by_step = [_by_step(rows) for rows in runs]
    steps = sorted(set.intersection(*(set(rows) for rows in by_step)))
    means = [(step, mean_scores([rows[step] for rows in by_step])) for step in steps]
    return [{"step": step, **mean} for step, mean in means if mean]


def _by_step(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """The numbers of each step, joined from all rows of that step."""
    joined: dict[int, dict[str, float]] = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if key != "step"}
        joined.setdefault(int(row["step"]), {}).update(numbers)
    return joined


def mean_summary(summaries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The summary of a trial: the scores are means over its seeds, all else is that of the first seed.

    The best checkpoints of the seeds may be of different iterations; the step is that of the first seed. Seconds are
    the time of all seeds.
    """
    first = summaries[0]
    if len(summaries) == 1:
        return first
    names = set.intersection(*(set(summary["scores"]) for summary in summaries))
    return {
        **first,
        "reference": mean_scores([summary["reference"] for summary in summaries]),
        "scores": {
            name: mean_scores([summary["scores"][name] for summary in summaries])
            for name in first["scores"]
            if name in names
        },
        **{
            name: {**first[name], "value": sum(summary[name]["value"] for summary in summaries) / len(summaries)}
            for name in ("best", "last")
        },
        "seconds": {phase: sum(summary["seconds"][phase] for summary in summaries) for phase in first["seconds"]},
        BY_SEED: list(summaries),
    }
