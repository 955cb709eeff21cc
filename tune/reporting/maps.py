"""Maps of energies and values for reports of planar studies: downscaled copies of the runs' figures."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tune.plans.sweep import Plan
from tune.studies.arm_results import Results
from tune.studies.leaderboard import best_of
from tune.studies.records import TrialRecord, TrialState

_SHRINK = 0.8
_COLORS = 256
"""Palette size of an embedded map: a quarter of the bytes without visible color steps."""


@dataclass(frozen=True)
class Maps:
    """The energy and value functions of one run.

    Attributes:
        name: name of the arm or trial.
        note: which of its runs is shown.
        energy: data URI of the figure of the energy next to -log p of the data.
        values: data URI of the figure of V(x, t).
    """

    name: str
    note: str
    energy: str
    values: str


def trial_maps(plan: Plan, records: Sequence[TrialRecord]) -> list[Maps]:
    """Return the maps of the best trial, if it has any."""
    best = best_of(plan, records)
    return [] if best is None else _drawn(f"trial {best.number}", "the best", best)


def arm_maps(results: Results) -> list[Maps]:
    """Return the maps of each arm at its first complete seed, if the arm trains an energy."""
    found = []
    for arm in results.plan.arms:
        runs = [(seed, results.records.get((arm.name, seed))) for seed in results.seeds]
        complete = [(seed, run) for seed, run in runs if run is not None and run.state is TrialState.COMPLETE]
        for seed, run in complete[:1]:
            found += _drawn(arm.name, f"seed {seed}", run)
    return found


def _drawn(name: str, note: str, record: TrialRecord) -> list[Maps]:
    """Return the maps of a run; none for image data or if a figure cannot be read."""
    energy, values = (_embedded(record.run.samples / f"{what}.png") for what in ("energy", "values"))
    return [Maps(name, note, energy, values)] if energy and values else []


def _embedded(path: Path) -> str:
    """Return an image as a data URI, downscaled and with fewer colors; empty if it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            size = (round(_SHRINK * picture.width), round(_SHRINK * picture.height))
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            few = small.quantize(_COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(buffer, format="png", optimize=True)
    except (OSError, SyntaxError, ValueError):
        return ""
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
