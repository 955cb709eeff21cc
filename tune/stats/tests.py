"""Scores of an arm and the baseline paired by seed, as input of the tests, and formatting of p-values."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from tune.stats.intervals import seeds_text
from tune.stats.multiple_testing import Array


@dataclass(frozen=True)
class Pairs:
    """The scores of an arm and the baseline at the seeds that have both.

    Attributes:
        arm: Name of the arm.
        scores: Scores of the arm [seeds].
        baseline: Scores of the baseline [seeds].
        left_out: Number of seeds that lack one of the two scores.
    """

    arm: str
    scores: Array
    baseline: Array
    left_out: int

    @property
    def differences(self) -> Array:
        """Arm minus baseline [seeds]."""
        return self.scores - self.baseline


def paired(scores: Mapping[str, ArrayLike], baseline: str) -> tuple[Pairs, ...]:
    """Pair every arm's scores with the baseline's at the seeds that have both.

    Raises:
        UserError: as `tune.stats.comparison.compare`.
    """
    if baseline not in scores:
        raise UserError(f"There is no arm {baseline!r} to compare with: the arms are {', '.join(scores) or 'none'}.")
    if len(scores) < 2:
        raise UserError(f"The baseline {baseline!r} is the only arm: a comparison needs another arm.")
    theirs = scores_of(baseline, scores[baseline])
    if np.isnan(theirs).all():
        raise UserError(f"The baseline {baseline!r} has no score at any seed: nothing can be compared with it.")
    return tuple(pair_up(arm, scores_of(arm, values), theirs) for arm, values in scores.items() if arm != baseline)


def pair_up(arm: str, ours: Array, theirs: Array) -> Pairs:
    """Pair an arm's scores [seeds] with the baseline's [seeds], leaving out seeds at which either is NaN.

    Raises:
        UserError: unequal numbers of seeds.
    """
    if ours.shape != theirs.shape:
        raise UserError(
            f"Arm {arm!r} has {seeds_text(len(ours))} and the baseline {len(theirs)}: "
            "give every arm the baseline's seeds, with NaN where a run failed."
        )
    common = ~(np.isnan(ours) | np.isnan(theirs))
    return Pairs(arm, ours[common], theirs[common], int((~common).sum()))


def scores_of(arm: str, scores: ArrayLike) -> Array:
    """An arm's scores as an array [seeds], NaN where a score is missing.

    Raises:
        UserError: the scores are not a list of numbers, or one is infinite.
    """
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"The scores of arm {arm!r} are {scores!r}: they must be numbers.") from error
    if values.ndim != 1 or np.isinf(values).any():
        raise UserError(f"The scores of arm {arm!r} are {values.tolist()}: give one finite number per seed, or NaN.")
    return values


def p_text(p: float) -> str:
    """Format a p-value with two digits, as in `p = .031`."""
    if p < 0.001:
        return "p < .001"
    return f"p = {p:.2g}".replace("= 0.", "= .")
