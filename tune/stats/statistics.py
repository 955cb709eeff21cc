"""What the scores of a study say: intervals that hold for few seeds, exact paired tests, and a verdict on every arm.

An arm has a score for each seed, NaN where the run failed. Its seeds are those of the baseline, so that differences are
taken seed by seed.

How often intervals of 95 % hold the truth, by simulation (tests/test_statistics.py): those of means and differences 93
to 97 % from 3 seeds on, if the scores are normal, mildly skewed, or symmetric with heavy tails. With skewed scores they
hold it less often: 90 to 93 % at skewness 2 (exponential), 84 to 90 % for 3 to 9 seeds at skewness 2.8 and 6
(chi-squared with 1 degree of freedom, lognormal with sigma 1); Student's intervals would be 2 to 4 points below that.
Those of probabilities of improvement hold it in 92 to 99 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from tune.stats.multiple_testing import (
    Array,
    check_finite,
    closed_p,
    finite_vector,
    holm,
    rounding,
    sign_flip_p,
    smallest_sign_flip_p,
)
from tune.stats.power import Correction, SeedRange, correction_of, seeds_needed, seeds_to_test

Direction = Literal["minimize", "maximize"]

_SMOOTHING = 0.6
"""Standard deviation of the noise in a resample, in those of the stratum."""
_TRIMMED = 0.25
_ROUNDING = 1e-12
"""Of the largest term: what differs by less is equal."""


class Method(StrEnum):
    """What an interval rests on."""

    STUDENTISED = "bootstrap-t"
    """The studentised bootstrap, smoothed."""
    STUDENT = "t"
    """Student's t times a bootstrap standard error."""
    WILSON = "Wilson"
    """Wilson's interval of a proportion, at the number of pairs that the bootstrap's variance is worth."""
    NONE = "none"
    """One seed or none shows no spread: anything is possible."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made, and how sure a study has to be.

    Attributes:
        level: how often intervals are to hold the truth; 1 - level is the rate of false verdicts.
        resamples: how many.
        seed: of everything random. The same seed gives the same numbers, whatever else is asked.
    """

    level: float = 0.95
    resamples: int = 5_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.level < 1.0:
            raise UserError(f"level is {self.level}: it must lie between 0 and 1, like 0.95.")
        if self.resamples < 100:
            raise UserError(f"resamples is {self.resamples}: quantiles of the bootstrap take at least 100.")

    @property
    def error_rate(self) -> float:
        """Of false verdicts, of all arms of a study together."""
        return 1.0 - self.level

    @property
    def generator(self) -> np.random.Generator:
        """A new one, at its beginning."""
        return np.random.default_rng(self.seed)


DEFAULT = Bootstrap()


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth may be.

    Attributes:
        estimate: in the score's unit, or a probability.
        low: lower end; minus infinity if nothing is known.
        high: upper end.
        level: how often such intervals are to hold the truth.
        method: what it rests on.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: Method

    def __str__(self) -> str:
        half = (self.high - self.low) / 2.0
        form = f".{max(0, 1 - math.floor(math.log10(half)))}f" if 0.0 < half < math.inf else ".3g"
        return f"{self.estimate:{form}} [{self.low:{form}}, {self.high:{form}}]"


# ----------------------------------------------------------------------------
# Bootstrap intervals of one arm


def mean_interval(scores: ArrayLike, bootstrap: Bootstrap = DEFAULT) -> Interval:
    """The mean and its interval, by the smoothed studentised bootstrap.

    Each resample redraws the seeds of each stratum and adds normal noise of 0.6 of its standard deviation. With
    t* = (mean* - mean) / error* of the resamples, the interval is mean - t* error at two quantiles of t* (Efron and
    Tibshirani 1993, section 12.5). The noise draws t* towards Student's t, which it would be for noise alone: without
    any, the interval of 3 seeds is infinite and that of 5 a third too wide; with much more, it no longer follows skewed
    scores (smoothing: Polansky and Schucany 1997; the 0.6 is by simulation).

    Args:
        scores: [seeds], or [strata, seeds] for a mean over strata (tasks) of the same number of seeds.
        bootstrap: level, resamples and seed.

    Raises:
        UserError: fewer than two seeds, or a score that is not finite.
    """
    values = _strata(scores)
    estimate, error = float(values.mean()), float(_errors(values))
    if error <= _ROUNDING * np.abs(values).max():
        return Interval(estimate, estimate, estimate, bootstrap.level, Method.STUDENTISED)
    generator = bootstrap.generator
    draws = _resampled(values, bootstrap.resamples, generator)
    draws += _SMOOTHING * values.std(axis=1, ddof=1, keepdims=True) * generator.standard_normal(draws.shape)
    ratios = (draws.mean(axis=(1, 2)) - estimate) / _errors(draws)
    low, high = np.quantile(ratios, [bootstrap.error_rate / 2.0, 1.0 - bootstrap.error_rate / 2.0]).tolist()
    return Interval(estimate, estimate - high * error, estimate - low * error, bootstrap.level, Method.STUDENTISED)


def iqm_interval(scores: ArrayLike, bootstrap: Bootstrap = DEFAULT) -> Interval:
    """The interquartile mean (the mean of the middle half: Agarwal et al. 2021, arXiv 2108.13264) and its interval.

    The strata are pooled for the mean and redrawn one by one for the error, as in that paper. The interval is
    estimate +- t error*, since percentiles of so few seeds cover too little: t is Student's, error* the bootstrap's,
    times sqrt(n / (n - 1)) for the n seeds of a stratum. One stratum of at least 4 seeds goes without that factor: the
    bootstrap's error of a trimmed mean is not too small there.

    Args:
        scores: [seeds], or [strata, seeds].
        bootstrap: level, resamples and seed.

    Raises:
        UserError: fewer than two seeds, or a score that is not finite.
    """
    from scipy.stats import t as student  # noqa: PLC0415  (it takes a second)
    from scipy.stats import trim_mean  # noqa: PLC0415

    values = _strata(scores)
    strata, seeds = values.shape
    estimate = float(trim_mean(values, _TRIMMED, axis=None))
    draws = _resampled(values, bootstrap.resamples, bootstrap.generator).reshape(bootstrap.resamples, -1)
    error = float(np.std(trim_mean(draws, _TRIMMED, axis=1), ddof=1))
    if strata > 1 or int(seeds * _TRIMMED) == 0:
        error *= math.sqrt(seeds / (seeds - 1))
    reach = float(student.isf(bootstrap.error_rate / 2.0, _degrees(values))) * error
    return Interval(estimate, estimate - reach, estimate + reach, bootstrap.level, Method.STUDENT)


def _resampled(values: Array, resamples: int, generator: np.random.Generator) -> Array:
    """[strata, seeds] to [resamples, strata, seeds]: the seeds of each stratum, redrawn."""
    strata, seeds = values.shape
    chosen = generator.integers(0, seeds, size=(resamples, strata, seeds))
    return values[np.arange(strata)[:, None], chosen]


def _errors(values: Array) -> Array:
    """Standard errors of the means of [..., strata, seeds]: sqrt(sum of s_k^2 / n) / number of strata."""
    strata, seeds = values.shape[-2:]
    errors: Array = np.sqrt(values.var(axis=-1, ddof=1).sum(axis=-1) / seeds) / strata
    return errors


def _degrees(values: Array) -> float:
    """Welch's degrees of freedom; n - 1 for one stratum."""
    variances = values.var(axis=1, ddof=1)
    if not variances.any():
        return float(values.shape[1] - 1)
    variances /= variances.max()  # squares of tiny ones would vanish
    return float((values.shape[1] - 1) * variances.sum() ** 2 / (variances**2).sum())


# ----------------------------------------------------------------------------
# The chance of beating the baseline


def probability_of_improvement(
    arm: ArrayLike,
    baseline: ArrayLike,
    *,
    direction: Direction = "minimize",
    bootstrap: Bootstrap = DEFAULT,
) -> Interval:
    """The chance that a run of the arm beats a run of the baseline, whatever the seeds of the two (Mann and Whitney).

    The estimate is the share of all n^2 pairs of runs that the arm wins, ties counting half. Its variance v comes from
    resampling seeds, the arm's and the baseline's runs together, times n / (n - 1). The interval is Wilson's with
    estimate (1 - estimate) / v pairs, or n if the arm wins all or none: percentiles would then have no width.

    Args:
        arm: scores [seeds].
        baseline: scores [seeds], of the same seeds.
        direction: `minimize` if lower is better.
        bootstrap: level, resamples and seed.

    Raises:
        UserError: fewer than two seeds, unequal numbers of them, or a score that is not finite.
    """
    ours, theirs = finite_vector(arm, "scores of the arm"), finite_vector(baseline, "scores of the baseline")
    if ours.shape != theirs.shape:
        raise UserError(f"The arm has {len(ours)} scores and the baseline {len(theirs)}: pair them by seed.")
    _check_direction(direction)
    gain = (theirs[None, :] - ours[:, None]) * (1.0 if direction == "minimize" else -1.0)
    wins = (np.sign(gain) + 1.0) / 2.0  # [seed of the arm, seed of the baseline]
    estimate, seeds = float(wins.mean()), len(ours)
    even = np.full(seeds, 1.0 / seeds)
    counts = bootstrap.generator.multinomial(seeds, even, size=bootstrap.resamples) / seeds  # [resamples, seeds]
    variance = float(np.var(((counts @ wins) * counts).sum(axis=1), ddof=1)) * seeds / (seeds - 1)
    is_mixed = 0.0 < estimate < 1.0 and variance > 0.0
    return _wilson(estimate, estimate * (1.0 - estimate) / variance if is_mixed else float(seeds), bootstrap.level)


def _wilson(share: float, pairs: float, level: float) -> Interval:
    """Wilson's interval (1927) of a share of `pairs`."""
    from scipy.stats import norm  # noqa: PLC0415  (it takes a second)

    z = float(norm.ppf((1.0 + level) / 2.0))
    centre = (share + z * z / (2.0 * pairs)) / (1.0 + z * z / pairs)
    reach = z / (1.0 + z * z / pairs) * math.sqrt(share * (1.0 - share) / pairs + z * z / (4.0 * pairs * pairs))
    low, high = max(0.0, centre - reach), min(1.0, centre + reach)
    return Interval(share, min(low, share), max(high, share), level, Method.WILSON)


# ----------------------------------------------------------------------------
# Verdicts


class Verdict(StrEnum):
    """What the study says about an arm.

    `too few seeds` is about the study: whatever the scores had been, this many seeds could not have shown a difference.
    `no difference shown` is about the arm: they could have, and did not. How large a difference they leave possible is
    in the interval. `failed` and `unfinished` are about runs without a score: see `tune.studies.arm_results`.
    """

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"
    TOO_FEW_SEEDS = "too few seeds"
    FAILED = "failed"
    """Runs of the arm or of the baseline ended without a score. They are not missing at random, so no test is taken."""
    UNFINISHED = "unfinished"
    """Runs of the arm or of the baseline have not ended, so no test is taken yet."""


@dataclass(frozen=True)
class Pairs:
    """The scores of an arm and of the baseline at the seeds that have both.

    Attributes:
        arm: its name.
        scores: of the arm [seeds].
        baseline: scores [seeds].
        left_out: seeds that lack one of the two.
    """

    arm: str
    scores: Array
    baseline: Array
    left_out: int

    @property
    def differences(self) -> Array:
        """Arm minus baseline [seeds]."""
        return self.scores - self.baseline


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline; `str` gives a line for a table.

    Attributes:
        arm: its name.
        seeds: that have a score of both.
        left_out: seeds that lack one.
        difference: mean of arm minus baseline, seed by seed.
        improvement: the chance that a run of the arm beats a run of the baseline.
        p: of the sign-flip test on this arm alone.
        p_adjusted: for all arms together; the verdict goes by it.
        correction: how it was adjusted.
        seeds_needed: how many would show a difference like this one.
        verdict: what it comes to.
        reason: why, in a sentence or two.
        gaps: which runs are missing, in words, if the verdict is about them; p, p_adjusted, improvement and
            seeds_needed are NaN then.
    """

    arm: str
    seeds: int
    left_out: int
    difference: Interval
    improvement: Interval
    p: float
    p_adjusted: float
    correction: Correction
    seeds_needed: SeedRange
    verdict: Verdict
    reason: str
    gaps: str = ""

    @property
    def verdict_text(self) -> str:
        """The verdict for a table."""
        return self.gaps or str(self.verdict)

    def __str__(self) -> str:
        if self.gaps:
            return f"{self.gaps}: {self.difference}, {self._counted}"
        if self.verdict is Verdict.TOO_FEW_SEEDS:
            return f"{self.verdict}: {self.difference}, {self._counted}; {self.enough}"
        return f"{self.verdict}: {self.difference}, {p_text(self.p_adjusted)} ({self.correction}, {self._counted})"

    @property
    def _counted(self) -> str:
        return _seeds(self.seeds) + (f", {self.left_out} left out" if self.left_out else "")

    @property
    def enough(self) -> str:
        """How many seeds would do, in words."""
        if math.isinf(self.seeds_needed.low):
            return "no number of seeds would show a difference of 0"
        end = "would do" if math.isfinite(self.seeds_needed.high) else "needed"
        return f"{self.seeds_needed.numbers} {end}"


def compare(
    scores: Mapping[str, ArrayLike],
    baseline: str,
    *,
    direction: Direction = "minimize",
    bootstrap: Bootstrap = DEFAULT,
    is_final: bool = True,
) -> tuple[Comparison, ...]:
    """Every arm against the baseline: permutation tests within seeds, with one error rate, and a verdict each.

    Up to 12 arms are compared by closed testing (`tune.stats.multiple_testing.closed_p`), more by sign flips with
    Holm's correction. A verdict says that an arm's scores are distributed differently from the baseline's; `better` and
    `worse` go by the sign of the mean difference. Equal means do not protect from a verdict if the paired differences
    are skewed: see `sign_flip_p`.

    An arm with fewer than two pairs stays in the table, as `too few seeds` with p = 1. An arm that lacks some seeds is
    tested at those that it has; in the joint tests only the scores that a seed has are permuted.

    Args:
        scores: of each arm and of the baseline [seeds], the same seeds in the same order; NaN where a run failed.
        baseline: its name among them.
        direction: `minimize` if lower is better.
        bootstrap: level, resamples and seed; all arms together have its rate of false verdicts.
        is_final: whether no score is still to come. Until then Holm's correction counts every arm, also one without
            scores, where closed testing would leave that one out of the family.

    Returns:
        One an arm, in the order given.

    Raises:
        UserError: no such baseline, no arm, unequal numbers of seeds, an infinite score, or a baseline without scores.
    """
    pairs = paired(scores, baseline)
    p_values = [sign_flip_p(p.differences, bootstrap.seed) if len(p.scores) > 1 else 1.0 for p in pairs]
    adjusted: Array | None = None
    if is_final and correction_of(len(pairs), bootstrap.error_rate) is Correction.CLOSED:
        table = [scores_of(pair.arm, scores[pair.arm]) for pair in pairs]
        adjusted = closed_p(scores_of(baseline, scores[baseline]), table, p_values, bootstrap.seed)
    return judge(pairs, p_values, adjusted, direction=direction, bootstrap=bootstrap)


def paired(scores: Mapping[str, ArrayLike], baseline: str) -> tuple[Pairs, ...]:
    """Every arm's scores beside the baseline's, at the seeds that have both.

    Raises:
        UserError: as `compare`.
    """
    if baseline not in scores:
        raise UserError(f"There is no arm {baseline!r} to compare with: the arms are {', '.join(scores) or 'none'}.")
    if len(scores) < 2:
        raise UserError(f"The baseline {baseline!r} is the only arm: a comparison needs another.")
    theirs = scores_of(baseline, scores[baseline])
    if np.isnan(theirs).all():
        raise UserError(f"The baseline {baseline!r} has no score at any seed: nothing can be compared with it.")
    return tuple(pair_up(arm, scores_of(arm, values), theirs) for arm, values in scores.items() if arm != baseline)


def pair_up(arm: str, ours: Array, theirs: Array) -> Pairs:
    """An arm's scores and the baseline's [seeds], of which some may be NaN, at the seeds that have both.

    Raises:
        UserError: unequal numbers of seeds.
    """
    if ours.shape != theirs.shape:
        raise UserError(
            f"Arm {arm!r} has {_seeds(len(ours))} and the baseline {len(theirs)}: "
            "give every arm the baseline's seeds, with NaN where a run failed."
        )
    common = ~(np.isnan(ours) | np.isnan(theirs))
    return Pairs(arm, ours[common], theirs[common], int((~common).sum()))


def scores_of(arm: str, scores: ArrayLike) -> Array:
    """An arm's scores as numbers [seeds], NaN where there is none.

    Raises:
        UserError: they are no list of numbers, or one is infinite.
    """
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"The scores of arm {arm!r} are {scores!r}: they must be numbers.") from error
    if values.ndim != 1 or np.isinf(values).any():
        raise UserError(f"The scores of arm {arm!r} are {values.tolist()}: give one finite number a seed, or NaN.")
    return values


def judge(
    pairs: Sequence[Pairs],
    p_values: Sequence[float],
    adjusted: ArrayLike | None = None,
    *,
    direction: Direction = "minimize",
    bootstrap: Bootstrap = DEFAULT,
) -> tuple[Comparison, ...]:
    """Verdicts by given p-values, one an arm; those of fewer than two pairs must be 1.

    Args:
        pairs: one an arm.
        p_values: one an arm, not yet adjusted for the number of arms.
        adjusted: the same, adjusted by closed testing; by default Holm's procedure adjusts them.
        direction: `minimize` if lower is better.
        bootstrap: level, resamples and seed.
    """
    _check_direction(direction)
    rules = _Rules(len(pairs), direction, bootstrap)
    final = holm(p_values) if adjusted is None else np.asarray(adjusted, dtype=np.float64)
    comparisons = []
    for index, pair in enumerate(pairs):
        verdict = _verdict(pair, index, p_values, float(final[index]), rules)
        needed = _needed(pair, rules)
        comparisons.append(
            Comparison(
                arm=pair.arm,
                seeds=len(pair.scores),
                left_out=pair.left_out,
                difference=_difference(pair, rules),
                improvement=_improvement(pair, rules),
                p=float(p_values[index]),
                p_adjusted=float(final[index]),
                correction=rules.correction,
                seeds_needed=needed,
                verdict=verdict,
                reason=" ".join(_reasons(pair, verdict, needed, rules)),
            )
        )
    return tuple(comparisons)


@dataclass(frozen=True)
class _Rules:
    """What every arm of a study is judged by: see `judge`."""

    arms: int
    direction: Direction
    bootstrap: Bootstrap

    @property
    def error_rate(self) -> float:
        return self.bootstrap.error_rate

    @property
    def correction(self) -> Correction:
        return correction_of(self.arms, self.error_rate)

    @property
    def fewest(self) -> int:
        """Seeds with which the tests can show anything."""
        return seeds_to_test(self.arms, self.error_rate)

    def gains(self, pair: Pairs) -> Array:
        """Differences with their sign turned so that more is better [seeds]."""
        return -pair.differences if self.direction == "minimize" else pair.differences


def _verdict(pair: Pairs, index: int, p_values: Sequence[float], adjusted: float, rules: _Rules) -> Verdict:
    if adjusted <= rules.error_rate:
        return Verdict.BETTER if rules.gains(pair).mean() > 0.0 else Verdict.WORSE
    if len(pair.scores) < 2:
        return Verdict.TOO_FEW_SEEDS
    is_same = not pair.differences.any()
    return Verdict.NO_DIFFERENCE if is_same or _could_show(pair, index, p_values, rules) else Verdict.TOO_FEW_SEEDS


def _could_show(pair: Pairs, index: int, p_values: Sequence[float], rules: _Rules) -> bool:
    """Whether differences of these sizes, all with the same sign, would be significant.

    Closed testing compares the arm's own p with the error rate; Holm's procedure judges it among the others' p.
    """
    smallest = min(p_values[index], smallest_sign_flip_p(pair.differences))
    if rules.correction is not Correction.HOLM:
        return smallest <= rules.error_rate
    at_best = [*p_values]
    at_best[index] = smallest
    return bool(holm(at_best)[index] <= rules.error_rate)


def _needed(pair: Pairs, rules: _Rules) -> SeedRange:
    """How many seeds would do; one pair or none says nothing of the spread, so at least what the tests need."""
    if len(pair.scores) < 2:
        return SeedRange(float(rules.fewest), math.inf)
    return seeds_needed(pair.differences, rules.arms, rules.error_rate)


def _difference(pair: Pairs, rules: _Rules) -> Interval:
    if len(pair.scores) < 2:
        return _unknown(pair.differences, -math.inf, math.inf, rules.bootstrap)
    return mean_interval(pair.differences, rules.bootstrap)


def _improvement(pair: Pairs, rules: _Rules) -> Interval:
    if len(pair.scores) < 2:
        return _unknown((np.sign(rules.gains(pair)) + 1.0) / 2.0, 0.0, 1.0, rules.bootstrap)
    return probability_of_improvement(pair.scores, pair.baseline, direction=rules.direction, bootstrap=rules.bootstrap)


def _unknown(values: Array, low: float, high: float, bootstrap: Bootstrap) -> Interval:
    return Interval(float(values[0]) if len(values) else math.nan, low, high, bootstrap.level, Method.NONE)


def _reasons(pair: Pairs, verdict: Verdict, needed: SeedRange, rules: _Rules) -> list[str]:
    """Sentences: what speaks for the verdict."""
    seeds = len(pair.scores)
    if verdict in (Verdict.BETTER, Verdict.WORSE):
        return [f"It beats the baseline at {(rules.gains(pair) > 0.0).sum()} of {_seeds(seeds)}."]
    if seeds < 2:
        return [f"{_seeds(seeds)} with both scores: a comparison takes at least two."]
    if not pair.differences.any():
        return ["Every score equals the baseline's at the same seed."]
    if verdict is Verdict.NO_DIFFERENCE:
        return [f"{_seeds(seeds)} could have shown a difference.", *_would_show(needed)]
    return [_too_few(pair, rules), *_would_show(needed)]


def _too_few(pair: Pairs, rules: _Rules) -> str:
    """Why no difference could be shown: the number of seeds, or scores that equal the baseline's."""
    seeds, ties = len(pair.scores), int((np.abs(pair.differences) <= rounding(pair.differences)).sum())
    takes = f"{rules.arms} arms take" if rules.arms > 1 else "one arm takes"
    equal = f", at {ties} of which the scores are equal," if ties else ""
    return f"With {_seeds(seeds)}{equal} the test cannot show any difference: {takes} {rules.fewest}" + (
        " that differ." if ties else "."
    )


def _would_show(needed: SeedRange) -> list[str]:
    """How many seeds a difference like the one seen takes."""
    if math.isinf(needed.low):
        return ["No number of seeds would show a difference of 0."]
    return [f"One like this takes {needed}."]


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def p_text(p: float) -> str:
    """A p-value for people: two digits, as in `p = .031`."""
    if p < 0.001:
        return "p < .001"
    return f"p = {p:.2g}".replace("= 0.", "= .")


# ----------------------------------------------------------------------------
# One arm alone; two levels of seeds


@dataclass(frozen=True)
class Summary:
    """An arm without comparison.

    Attributes:
        arm: its name.
        seeds: that have a score.
        missing: that have none.
        mean: of the scores.
        iqm: their interquartile mean.
        spread: standard deviation between seeds; NaN for fewer than two.
    """

    arm: str
    seeds: int
    missing: int
    mean: Interval
    iqm: Interval
    spread: float


def summarize(arm: str, scores: ArrayLike, bootstrap: Bootstrap = DEFAULT) -> Summary:
    """Level and spread of an arm's scores [seeds], of which those that are NaN are counted and left out.

    Raises:
        UserError: they are no list of numbers, or one is infinite.
    """
    values = scores_of(arm, scores)
    present = values[~np.isnan(values)]
    missing = len(values) - len(present)
    if len(present) < 2:
        unknown = _unknown(present, -math.inf, math.inf, bootstrap)
        return Summary(arm, len(present), missing, unknown, unknown, math.nan)
    return Summary(
        arm=arm,
        seeds=len(present),
        missing=missing,
        mean=mean_interval(present, bootstrap),
        iqm=iqm_interval(present, bootstrap),
        spread=float(present.std(ddof=1)),
    )


@dataclass(frozen=True)
class Variances:
    """Where the noise of a score comes from.

    Attributes:
        training: variance between training seeds, in the score's unit squared; 0 if the estimate is negative.
        generation: variance between generation seeds of one trained model.
        of_mean: variance of the mean over all scores, the square of its standard error.
        training_seeds: how many.
        generation_seeds: how many for each of them.
    """

    training: float
    generation: float
    of_mean: float
    training_seeds: int
    generation_seeds: int


def variance_components(scores: ArrayLike) -> Variances:
    """The variances of training and generation, by the method of moments for a balanced nested design.

    y_ij = mu + a_i + e_ij for a training and b generation seeds. With the mean squares MS_a = b sum (y_i. - y..)^2 /
    (a - 1) and MS_e = sum (y_ij - y_i.)^2 / (a (b - 1)): generation = MS_e, training = max(0, (MS_a - MS_e) / b), and
    the mean has variance MS_a / (a b) = training / a + generation / (a b) (Searle, Casella and McCulloch 1992).
    Nested means that the e_ij are independent, as they are if each run is scored on noise of its own
    (`dxmi.evaluation.sampling.stream_of`). With one noise for all runs they would share a term that no mean over runs
    reduces.
    The interval of an arm's mean is `mean_interval(scores.mean(axis=1))`: only training seeds are independent.

    Args:
        scores: [training seeds, generation seeds]; those of a difference to the baseline will do as well.

    Raises:
        UserError: fewer than two seeds on either level, or a score that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        raise UserError(
            f"Scores of shape {list(values.shape)} do not tell training from generation: "
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


# ----------------------------------------------------------------------------
# Checks


def _strata(scores: ArrayLike) -> Array:
    """[strata, seeds], at least two seeds, finite."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim not in (1, 2) or not values.size:
        raise UserError(f"Scores have shape {list(values.shape)}: give [seeds] or [strata, seeds].")
    values = np.atleast_2d(values)
    if values.shape[1] < 2:
        raise UserError(f"{_seeds(values.shape[1])} shows no spread: give at least two.")
    check_finite(values, "scores")
    return values


def _check_direction(direction: str) -> None:
    if direction not in ("minimize", "maximize"):
        raise UserError(f"direction is {direction!r}: it must be minimize or maximize.")
