"""Images of samples in a report: trials by iteration, arms by seed, and references."""

import base64
import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dxmi.evaluation.scored_references import DATA, pictured, scored_references
from dxmi.metrics.keys import MINIMIZE
from tune.plans.sweep import Plan
from tune.reporting.sentences import score_of
from tune.studies.arm_results import Results
from tune.studies.leaderboard import number, summary_of
from tune.studies.ranking import ranked
from tune.studies.records import TrialRecord, TrialState

FIGURE_PIXELS = 60
"""Pixels of a figure's side per sample of a grid's side."""
_MATRIX_TRIALS, _MATRIX_STEPS = 8, 6
_ARM_SIDE = 2
"""Samples per side in the image of an ablation's run."""
_SAMPLES_A_SIDE = (4, 3, 2, 1)
"""Candidates for the samples per side of each grid; the first one that keeps the report small is used."""
_MAX_SAMPLE_BYTES = 3_000_000


@dataclass(frozen=True)
class MatrixRow:
    """Samples of a trial.

    Attributes:
        trial: name of the trial.
        note: its rank and score.
        pictures: data URIs, one per step; empty if an image cannot be read.
    """

    trial: str
    note: str
    pictures: list[str]


@dataclass(frozen=True)
class Strip:
    """Real data or samples of a reference, shown above the trials' samples.

    Attributes:
        name: what it shows.
        note: its score.
        picture: data URI of the image.
        cells: its width relative to a trial's image.
    """

    name: str
    note: str
    picture: str
    cells: float


@dataclass(frozen=True)
class Matrix:
    """Images of samples from the same noise: one row per trial, one column per iteration.

    Attributes:
        steps: iterations, or seeds of an ablation.
        rows: rows of images.
        are_figures: whether the images are figures, which are scaled smoothly, instead of grids of pixels.
        strips: images for comparison; empty for studies of versions that did not draw them.
    """

    steps: list[int]
    rows: list[MatrixRow]
    are_figures: bool
    strips: list[Strip]


def sample_matrix(plan: Plan, records: Sequence[TrialRecord]) -> Matrix | None:
    """Return grids of the best trials and the worst one at common iterations, or None if there are none."""
    chosen = _shown(plan, records)
    if not chosen:
        return None
    steps = _thinned(sorted(set.intersection(*(_sampled(record) for record in chosen))), _MATRIX_STEPS)
    if not steps:
        return None
    places = {record.number: place for place, record in enumerate(ranked(plan, records), start=1)}
    for side in _SAMPLES_A_SIDE:
        part = functools.partial(_part, plan, side)
        pictures = [[_picture(record, step, part) for step in steps] for record in chosen]
        if sum(len(picture) for row in pictures for picture in row) <= _MAX_SAMPLE_BYTES:
            break
    rows = [
        MatrixRow(f"trial {record.number}", _matrix_note(record, places[record.number]), row)
        for record, row in zip(chosen, pictures, strict=True)
    ]
    strips = reference_strips(plan, chosen, side, len(steps))
    return Matrix(steps, rows, are_figures=plan.experiment.data.is_planar, strips=strips)


def arm_matrix(results: Results) -> Matrix | None:
    """Return grids of the best checkpoints with one row per arm and one column per seed, or None if there are none."""
    part = functools.partial(_part, results.plan, _ARM_SIDE)
    seeds = results.seeds[:_MATRIX_STEPS]
    rows = []
    for arm in results.plan.arms:
        records = [results.records.get((arm.name, seed)) for seed in seeds]
        pictures = [
            "" if record is None or record.outcome.step is None else _picture(record, record.outcome.step, part)
            for record in records
        ]
        if any(pictures):
            summary = results.summaries[arm.name]
            note = "" if math.isnan(summary.mean.estimate) else number(summary.mean.estimate)
            rows.append(MatrixRow(arm.name, note, pictures))
    if not rows:
        return None
    runs = [results.records.get((arm.name, seed)) for arm in results.plan.arms for seed in seeds]
    strips = reference_strips(results.plan, [run for run in runs if run is not None], _ARM_SIDE, len(seeds))
    return Matrix([*seeds], rows, results.plan.experiment.data.is_planar, strips)


def reference_strips(plan: Plan, runs: Sequence[TrialRecord], side: int, columns: int) -> list[Strip]:
    """Return images of real data, the model with many steps, and the training-free samplers with few, best first.

    They are taken from the first run that has them.

    Args:
        plan: plan of the study.
        runs: runs in order of preference.
        side: samples per side of a trial's image; also the height of a strip.
        columns: maximum width of a strip, in trials' images.
    """
    complete = [run for run in runs if run.state is TrialState.COMPLETE and run.run.reference_picture("data").exists()]
    summary = summary_of(complete[0]) if complete else {}
    if not summary:
        return []
    run, in_grid = complete[0].run, _columns(plan)
    height = min(side, in_grid)
    width = height if plan.experiment.data.is_planar else min(in_grid, columns * height)
    part = functools.partial(_part, plan, side, width=width)
    drawn = [
        Strip(label, note, _embedded(run.reference_picture(name), part), width / height)
        for name, label, note in _strip_words(summary)
    ]
    return [strip for strip in drawn if strip.picture]


def _strip_words(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return file name, label and note of each reference image."""
    scored, floor = scored_references(summary), summary["reference"].get(DATA)
    references = pictured(scored, summary["num_steps"], str(summary.get("direction", MINIMIZE)))
    return [
        ("data", "real data", "" if floor is None else number(floor)),
        *((name, found.label, f"{number(found.score)}, no fine-tuning") for name, found in references.items()),
    ]


def _shown(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Select the best trials and the worst one by rank, only complete ones if there are any."""
    sampled = [record for record in ranked(plan, records) if record.same_as is None and _sampled(record)]
    complete = [record for record in sampled if record.state is TrialState.COMPLETE] or sampled
    return complete if len(complete) <= _MATRIX_TRIALS else [*complete[: _MATRIX_TRIALS - 1], complete[-1]]


def _sampled(record: TrialRecord) -> set[int]:
    """Return the iterations at which a grid was drawn."""
    found = (re.fullmatch(r"step_(\d+)\.png", path.name) for path in record.run.samples.glob("step_*.png"))
    return {int(match[1]) for match in found if match}


def _thinned(steps: Sequence[int], most: int) -> list[int]:
    """Return at most `most` evenly spaced steps, including the first and the last."""
    if len(steps) <= most:
        return [*steps]
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _matrix_note(record: TrialRecord, place: int) -> str:
    if record.state is not TrialState.COMPLETE:
        return record.state.value
    return f"#{place}, {number(score_of(record))} at {record.outcome.step}"


def _columns(plan: Plan) -> int:
    """Return the number of columns of an image grid, see `dxmi.visualization.pictures.save_grid`."""
    return max(1, round(math.sqrt(plan.experiment.evaluate.grid)))


def _part(plan: Plan, side: int, picture: Image.Image, width: int | None = None) -> Image.Image:
    """Crop a grid of images to its upper left `side` x `side` samples, or downscale a figure.

    Args:
        plan: plan of the study.
        side: number of samples per side.
        picture: a grid or a figure.
        width: number of samples per row; `side` if None.
    """
    if plan.experiment.data.is_planar:
        return picture.convert("RGB").resize((FIGURE_PIXELS * side, FIGURE_PIXELS * side), Image.Resampling.LANCZOS)
    columns, gap = _columns(plan), 2  # see dxmi.visualization.pictures.grid
    cell = (picture.width - gap) // columns
    size = (gap + min(width or side, columns) * cell, gap + min(side, columns) * cell)
    return picture.crop((0, 0, min(size[0], picture.width), min(size[1], picture.height)))


def _picture(record: TrialRecord, step: int, part: Callable[[Image.Image], Image.Image]) -> str:
    """Return a part of the image drawn at a step as a data URI."""
    return _embedded(record.run.samples / f"step_{step:06d}.png", part)


def _embedded(path: Path, part: Callable[[Image.Image], Image.Image]) -> str:
    """Return a part of an image as a data URI; empty if it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            part(picture).save(buffer, format="png", optimize=True)
    except (OSError, SyntaxError, ValueError):
        return ""
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
