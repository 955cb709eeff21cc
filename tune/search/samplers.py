"""Samplers: the next trial as a pure function of the sampler's seed and the trials so far.

Each proposal is drawn by a new sampler, seeded from the sweep's seed and the trial's number, so that a killed and
resumed sweep makes the same proposals as an uninterrupted one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dxmi.metrics.keys import MINIMIZE
from dxmi.training.config import ExperimentConfig
from tune.config.sweep import SweepConfig
from tune.search.space import Axis, Value, grid_points

if TYPE_CHECKING:  # Optuna and SciPy are imported where they are used, since most code that reads a study needs neither
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Proposal:
    """Values proposed for one trial.

    Attributes:
        values: Values by path.
        system_attrs: Attributes that the sampler stores with the trial.
    """

    values: dict[str, Value]
    system_attrs: dict[str, Any] = field(default_factory=dict)


def defaults(axes: Sequence[Axis], experiment: ExperimentConfig) -> dict[str, Value] | None:
    """The experiment's own values, or None if the space does not contain them."""
    values = {axis.path: axis.own(experiment) for axis in axes}
    return values if all(axis.contains(values[axis.path]) for axis in axes) else None


def num_planned(sweep: SweepConfig, axes: Sequence[Axis]) -> int:
    """Number of trials of the whole sweep: the budget's, or the size of the grid if that is smaller."""
    budget = sweep.budget.trials
    return min(budget, len(grid_points(axes))) if sweep.sampler.kind == "grid" else budget


def propose(
    sweep: SweepConfig, axes: Sequence[Axis], experiment: ExperimentConfig, history: "Sequence[FrozenTrial]"
) -> Proposal:
    """Propose the trial that follows `history`; its number is the length of `history`."""
    number, sampler = len(history), sweep.sampler
    if sampler.kind == "grid":  # start_with_defaults does not apply, since the whole grid is run
        return Proposal(grid_points(axes)[number])
    first = defaults(axes, experiment) if sampler.start_with_defaults else None
    if first is not None and number == 0:
        attrs = _from_model(sweep, axes, history).system_attrs if sampler.kind == "nsga2" else {}
        return Proposal(first, attrs)  # with nsga2, it belongs to the first generation
    if sampler.kind in ("sobol", "random"):
        index = number - (first is not None)
        units = (_sobol if sampler.kind == "sobol" else _random)(sampler.seed, index, len(axes))
        return Proposal({axis.path: axis.at(unit) for axis, unit in zip(axes, units, strict=True)})
    return _from_model(sweep, axes, history)


def _sobol(seed: int, index: int, dimensions: int) -> list[float]:
    """Point `index` of a scrambled Sobol sequence in [0, 1)^d."""
    from scipy.stats import qmc  # noqa: PLC0415

    engine = qmc.Sobol(dimensions, scramble=True, rng=seed)
    if index:
        engine.fast_forward(index)
    with warnings.catch_warnings():  # SciPy warns that a single point is not balanced, but the sequence continues
        warnings.simplefilter("ignore", UserWarning)
        return [float(unit) for unit in engine.random(1)[0]]


def _random(seed: int, index: int, dimensions: int) -> list[float]:
    return [float(unit) for unit in np.random.default_rng([seed, index]).random(dimensions)]


def _from_model(sweep: SweepConfig, axes: Sequence[Axis], history: "Sequence[FrozenTrial]") -> Proposal:
    """Ask Optuna's sampler for a proposal, in an in-memory study that contains the history."""
    import optuna  # noqa: PLC0415

    directions: list[Any] = [objective.direction or MINIMIZE for objective in sweep.objectives]
    study = optuna.create_study(directions=directions, sampler=_sampler(sweep, len(history)))
    study.add_trials(history)
    asked = study.ask({axis.path: axis.distribution for axis in axes})
    system_attrs = study.trials[-1].system_attrs
    return Proposal({axis.path: axis.value(asked.params[axis.path]) for axis in axes}, system_attrs)


def _sampler(sweep: SweepConfig, number: int) -> "BaseSampler":
    from optuna.exceptions import ExperimentalWarning  # noqa: PLC0415
    from optuna.samplers import NSGAIISampler, TPESampler  # noqa: PLC0415

    config = sweep.sampler
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if config.kind == "nsga2":
            return NSGAIISampler(population_size=config.startup_trials, seed=seed)
        # constant_liar: running trials count as bad, so that concurrent trials do not get similar values.
        return TPESampler(n_startup_trials=config.startup_trials, multivariate=True, constant_liar=True, seed=seed)


def template(axes: Sequence[Axis], proposal: Proposal, user_attrs: dict[str, Any]) -> "FrozenTrial":
    """A running trial with all its values, to be added to Optuna's storage in a single operation."""
    from optuna.trial import TrialState, create_trial  # noqa: PLC0415

    return create_trial(
        state=TrialState.RUNNING,
        params={axis.path: axis.param(proposal.values[axis.path]) for axis in axes},
        distributions={axis.path: axis.distribution for axis in axes},
        user_attrs=user_attrs,
        system_attrs=proposal.system_attrs,
    )
