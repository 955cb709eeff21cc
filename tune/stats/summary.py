"""Summary of a single arm (mean, interquartile mean, spread) and variance components of two levels of seeds."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from tune.stats.intervals import DEFAULT, Bootstrap, Interval, iqm_interval, mean_interval, unknown_interval
from tune.stats.multiple_testing import check_finite
from tune.stats.tests import scores_of


@dataclass(frozen=True)
class ArmSummary:
    """Summary statistics of an arm's scores.

    Attributes:
        arm: Name of the arm.
        seeds: Number of seeds with a score.
        missing: Number of seeds without a score.
        mean: Mean of the scores.
        iqm: Interquartile mean of the scores.
        spread: Standard deviation between seeds; NaN for fewer than two.
    """

    arm: str
    seeds: int
    missing: int
    mean: Interval
    iqm: Interval
    spread: float


def summarize(arm: str, scores: ArrayLike, bootstrap: Bootstrap = DEFAULT) -> ArmSummary:
    """Summarize an arm's scores [seeds]; NaN counts as a missing score.

    Raises:
        UserError: the scores are not a list of numbers, or one is infinite.
    """
    values = scores_of(arm, scores)
    present = values[~np.isnan(values)]
    missing = len(values) - len(present)
    if len(present) < 2:
        unknown = unknown_interval(present, -math.inf, math.inf, bootstrap)
        return ArmSummary(arm, len(present), missing, unknown, unknown, math.nan)
    return ArmSummary(
        arm=arm,
        seeds=len(present),
        missing=missing,
        mean=mean_interval(present, bootstrap),
        iqm=iqm_interval(present, bootstrap),
        spread=float(present.std(ddof=1)),
    )


@dataclass(frozen=True)
class Variances:
    """Variance components of a score.

    Attributes:
        training: Variance between training seeds, in the squared unit of the score; 0 if the estimate is negative.
        generation: Variance between generation seeds of one trained model.
        of_mean: Variance of the mean over all scores, the square of its standard error.
        training_seeds: Number of training seeds.
        generation_seeds: Number of generation seeds per training seed.
    """

    training: float
    generation: float
    of_mean: float
    training_seeds: int
    generation_seeds: int


def variance_components(scores: ArrayLike) -> Variances:
    """Estimate the variances of training and generation by the method of moments for a balanced nested design.

    y_ij = mu + a_i + e_ij for a training and b generation seeds. With the mean squares MS_a = b sum (y_i. - y..)^2 /
    (a - 1) and MS_e = sum (y_ij - y_i.)^2 / (a (b - 1)): generation = MS_e, training = max(0, (MS_a - MS_e) / b), and
    the mean has variance MS_a / (a b) = training / a + generation / (a b) (Searle, Casella and McCulloch 1992).
    Nested means that the e_ij are independent, which holds if each run is scored on its own noise
    (`dxmi.evaluation.sampling.stream_of`). With the same noise for all runs they would share a term that averaging over
    runs does not reduce. The interval of an arm's mean is `mean_interval(scores.mean(axis=1))`, since only training
    seeds are independent.

    Args:
        scores: Scores, or differences from the baseline [training seeds, generation seeds].

    Raises:
        UserError: fewer than two seeds on either level, or a score that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        raise UserError(
            f"Scores of shape {list(values.shape)} do not separate training from generation: "
            "give [training seeds, generation seeds], at least two of each."
        )
    check_finite(values, "scores")
    training_seeds, generation_seeds = values.shape
    between = generation_seeds * float(values.mean(axis=1).var(ddof=1))
    within = float(values.var(axis=1, ddof=1).mean())
    return Variances(
        training=max(0.0, (between - within) / generation_seeds),
        generation=within,
        of_mean=between / values.size,
        training_seeds=training_seeds,
        generation_seeds=generation_seeds,
    )
