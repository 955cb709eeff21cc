"""Effects and interactions of factorial designs, with seeds as blocks.

An effect is computed separately at each seed from that seed's scores of all runs of the design, so that whatever shifts
all scores of a seed cancels. Its values over the seeds are then tested like the paired differences of a comparison.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from tune.stats.intervals import DEFAULT, Bootstrap, Interval, mean_interval
from tune.stats.multiple_testing import Array, holm, sign_flip_p
from tune.stats.tests import p_text

Term = Sequence[str]
"""Names of factors: one for a main effect, several for their interaction."""


@dataclass(frozen=True)
class Effect:
    """A main effect or an interaction; `str` gives a table line.

    Attributes:
        term: Names of the factors.
        levels: One level per factor, which is compared with the factor's first level; empty for designs of -1 and +1.
        size: Size of the effect, in the unit of the score.
        seeds: Number of seeds with a score of every run.
        left_out: Number of seeds that lack a score.
        p: p-value of the sign-flip test over the seeds, without correction. NaN if a seed was left out, since runs
            without a score are not missing at random, or if the number of seeds was chosen depending on the scores.
        p_holm: p-value corrected for all requested effects; NaN in the same cases.
    """

    term: tuple[str, ...]
    levels: tuple[str, ...]
    size: Interval
    seeds: int
    left_out: int
    p: float
    p_holm: float

    def __str__(self) -> str:
        levels = self.levels or ("",) * len(self.term)
        parts = [f"{name} {level}".rstrip() for name, level in zip(self.term, levels, strict=True)]
        what = f"{' x '.join(parts)}: {self.size}"
        if self.left_out:
            return f"{what}, no test, since runs are missing at {self.left_out} of {self.seeds + self.left_out} seeds"
        if math.isnan(self.p):
            return f"{what}, no test, since seeds were added until there were verdicts ({self.seeds} seeds)"
        return f"{what}, {p_text(self.p_holm)} (Holm, {self.seeds} seeds)"


def two_level_effects(
    design: ArrayLike,
    factors: Sequence[str],
    terms: Sequence[Term],
    scores: ArrayLike,
    bootstrap: Bootstrap = DEFAULT,
) -> tuple[Effect, ...]:
    """Effects of a full or fractional design of -1 and +1 (Box, Hunter and Hunter 2005, chapter 5).

    A term's column is the product of its factors' columns; its effect is the mean score at +1 minus that at -1, or
    twice its least-squares coefficient if the columns are not orthogonal. The interaction of A and B is therefore half
    the change of A's effect when B changes from -1 to +1.

    Args:
        design: Design matrix [runs, factors] of -1 and +1.
        factors: Names of the factors.
        terms: Effects to estimate in addition to the mean.
        scores: Scores [runs, seeds], NaN where a run failed. Seeds with a missing score are left out, and then no
            effect is tested.
        bootstrap: Level, resamples and seed.

    Returns:
        One effect per term.

    Raises:
        UserError: mismatching shapes, an entry other than -1 and +1, an unknown factor, terms that the design cannot
            distinguish, or fewer than two complete seeds.
    """
    signs = np.asarray(design, dtype=np.float64)
    if signs.ndim != 2 or signs.shape[1] != len(factors) or not (np.abs(signs) == 1.0).all():
        raise UserError(f"The design must be [runs, {len(factors)}] of -1 and +1: one column per factor.")
    coded = {name: _Factor(signs[:, [i]], np.array([[2.0]]), ()) for i, name in enumerate(factors)}
    return _effects(coded, terms, scores, bootstrap)


def level_effects(
    levels: Mapping[str, Sequence[Hashable]],
    terms: Sequence[Term],
    scores: ArrayLike,
    bootstrap: Bootstrap = DEFAULT,
) -> tuple[Effect, ...]:
    """Effects of a design whose factors have any number of levels, each compared with the factor's first level.

    The effect of a level is its mean score minus that of the first level, with equal weights for the levels of the
    other factors: least squares with columns that sum to 0 over a factor's levels. The interaction of level i of A and
    j of B is ((m_ij - m_1j) - (m_i1 - m_11)) / 2; with a third factor it is half the difference of two such
    interactions. With two levels, the low one first, the effects are those of `two_level_effects`.

    Args:
        levels: Level of each factor in every run; the level of the first run is the reference.
        terms: Effects to estimate in addition to the mean.
        scores: Scores [runs, seeds], NaN where a run failed. Seeds with a missing score are left out, and then no
            effect is tested.
        bootstrap: Level, resamples and seed.

    Returns:
        For each term, one effect per combination of its factors' levels other than the first, the last factor varying
        fastest.

    Raises:
        UserError: as `two_level_effects`, or a factor with only one level.
    """
    coded = {name: _coded(name, values) for name, values in levels.items()}
    return _effects(coded, terms, scores, bootstrap)


@dataclass(frozen=True)
class _Factor:
    """A factor's part of the model matrix.

    Attributes:
        columns: Columns [runs, levels - 1], each summing to 0 over the levels.
        contrasts: Matrix [levels - 1, levels - 1] that maps coefficients to differences from the first level.
        labels: Labels of those differences.
    """

    columns: Array
    contrasts: Array
    labels: tuple[str, ...]


def _coded(name: str, values: Sequence[Hashable]) -> _Factor:
    known = list(dict.fromkeys(values))
    if len(known) < 2:
        raise UserError(f"Factor {name!r} has one level in all runs: its effect cannot be estimated.")
    coding = np.vstack([-np.ones(len(known) - 1), np.eye(len(known) - 1)])  # [levels, levels - 1]
    return _Factor(coding[[known.index(value) for value in values]], coding[1:] - coding[0], tuple(map(str, known[1:])))


def _effects(
    coded: Mapping[str, _Factor], terms: Sequence[Term], scores: ArrayLike, bootstrap: Bootstrap
) -> tuple[Effect, ...]:
    """Fit each seed by least squares and compute statistics of the contrasts over the seeds."""
    table = _table(scores, coded)
    complete = table[:, ~np.isnan(table).any(axis=0)]
    if complete.shape[1] < 2:
        raise UserError(
            f"{complete.shape[1]} seeds have a score for every run of the design: to estimate effects, give at least 2."
        )
    parts = [_term(coded, term) for term in _checked(coded, terms)]
    _check_rank(parts, terms)
    at_seeds = _contrasts(parts, complete)
    left_out = table.shape[1] - complete.shape[1]
    p_values = [math.nan if left_out else sign_flip_p(values, bootstrap.seed) for values in at_seeds]
    adjusted = p_values if left_out else holm(p_values).tolist()
    names = [(tuple(term), labels) for term in terms for labels in _labels(coded, term)]
    return tuple(
        Effect(
            term=term,
            levels=labels,
            size=mean_interval(values, bootstrap),
            seeds=complete.shape[1],
            left_out=left_out,
            p=p,
            p_holm=p_holm,
        )
        for (term, labels), values, p, p_holm in zip(names, at_seeds, p_values, adjusted, strict=True)
    )


def _contrasts(parts: Sequence[_Factor], scores: Array) -> Array:
    """Effects at each seed [effects, seeds]; values within rounding error are set to 0."""
    coefficients = np.linalg.lstsq(_model(parts), scores)[0][1:]  # [columns, seeds]
    ends = np.cumsum([part.columns.shape[1] for part in parts])
    by_term = zip(parts, np.split(coefficients, ends[:-1]), strict=True)
    effects = np.vstack([part.contrasts @ own for part, own in by_term])
    effects[np.abs(effects) <= 1e-12 * np.abs(scores).max()] = 0.0
    return effects


def _model(parts: Sequence[_Factor]) -> Array:
    """Model matrix [runs, 1 + columns], the column of the mean first."""
    return np.hstack([np.ones((len(parts[0].columns), 1)), *(part.columns for part in parts)])


def _term(coded: Mapping[str, _Factor], term: Term) -> _Factor:
    """Products of the factors' columns, and their contrasts."""
    both = [coded[name] for name in term]
    columns, contrasts = both[0].columns, both[0].contrasts
    for factor in both[1:]:
        columns = (columns[:, :, None] * factor.columns[:, None, :]).reshape(len(columns), -1)
        contrasts = np.asarray(np.kron(contrasts, factor.contrasts) / 2.0, dtype=np.float64)
    return _Factor(columns, contrasts, ())


def _labels(coded: Mapping[str, _Factor], term: Term) -> list[tuple[str, ...]]:
    """One label per contrast, in the order of `_term`; empty labels for a design of -1 and +1."""
    labels = [coded[name].labels for name in term]
    return list(itertools.product(*labels)) if all(labels) else [()]


# ----------------------------------------------------------------------------
# Checks


def _table(scores: ArrayLike, coded: Mapping[str, _Factor]) -> Array:
    """Checked scores as an array [runs, seeds]."""
    table = np.asarray(scores, dtype=np.float64)
    for name, factor in coded.items():
        if table.ndim != 2 or len(table) != len(factor.columns):
            raise UserError(
                f"Scores have shape {list(table.shape)}, but factor {name!r} has {len(factor.columns)} runs: "
                "give [runs, seeds], with the runs in the order of the design."
            )
    if np.isinf(table).any():
        raise UserError("A score is infinite: give finite numbers, or NaN where a run failed.")
    return table


def _checked(coded: Mapping[str, _Factor], terms: Sequence[Term]) -> Sequence[Term]:
    for term in terms:
        unknown = [name for name in term if name not in coded]
        if not term or isinstance(term, str) or unknown or len(set(term)) < len(term):
            raise UserError(f"Term {term!r} must name different factors, out of {', '.join(coded)}.")
    if not terms or len({frozenset(term) for term in terms}) < len(terms):
        raise UserError("Name at least one term, and each once.")
    return terms


def _check_rank(parts: Sequence[_Factor], terms: Sequence[Term]) -> None:
    """Reject a model whose coefficients the design does not determine, naming the first redundant term."""
    for count, term in enumerate(terms, start=1):
        matrix = _model(parts[:count])
        if np.linalg.matrix_rank(matrix) < matrix.shape[1]:
            before = ", ".join(["the mean", *(" x ".join(other) for other in terms[: count - 1])])
            raise UserError(
                f"The design cannot distinguish {' x '.join(term)} from {before}: leave out a term, or add runs."
            )
