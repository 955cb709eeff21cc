"""Who proposes the next trial: pure functions of the history, and each sampler as good as its name."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import qmc

from dxmi.config import build
from dxmi.errors import UserError
from dxmi.training.config import ExperimentConfig
from support import stating
from tune.config.sweep import BudgetConfig, ObjectiveConfig, SamplerConfig, SweepConfig
from tune.search.samplers import Proposal, defaults, num_planned, propose, template
from tune.search.space import Axis, Value, parse_space

optuna.logging.set_verbosity(optuna.logging.WARNING)

EXPERIMENT = ExperimentConfig()
LR, TAU = "algorithm.policy.lr", "algorithm.entropy_coef"
RATES = parse_space({LR: {"log_uniform": [1e-6, 1e-4]}, TAU: {"log_uniform": [1e-3, 1.0]}}, EXPERIMENT)
MIXED = parse_space(
    {
        LR: {"log_uniform": [1e-6, 1e-4]},
        "schedule.num_steps": {"integer": [3, 8]},
        "algorithm.policy_mask": {"choice": [[1], [0.5], [2.0]]},
        "data.label": {"choice": [None, 3]},
        "algorithm.all_states": {"choice": [True, False]},
    },
    EXPERIMENT,
)
SMALL = parse_space({"schedule.num_steps": {"integer": [4, 6]}, "data.label": {"choice": [None, 0, 1]}}, EXPERIMENT)
KINDS = ("tpe", "sobol", "random", "grid", "nsga2")

Score = Callable[[dict[str, Value]], list[float]]


def sweep(kind: str, *, seed: int = 0, trials: int = 20, **sampler) -> SweepConfig:
    two = (ObjectiveConfig(), ObjectiveConfig(metric="num_steps"))
    config = SamplerConfig(kind=kind, seed=seed, **sampler)
    objectives = two if kind == "nsga2" else (ObjectiveConfig(),)
    return SweepConfig(objectives=objectives, sampler=config, budget=BudgetConfig(trials=trials))


def with_end(trial: FrozenTrial, state: TrialState, values: list[float] | None) -> FrozenTrial:
    """The trial, ended."""
    return create_trial(
        state=state,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs=trial.system_attrs,
        values=values if state is TrialState.COMPLETE else None,
    )


def played(config: SweepConfig, axes: Sequence[Axis], score: Score, number: int) -> tuple[list[Proposal], list]:
    """The first proposals of a sweep whose trials all complete, and their history."""
    study, proposals = optuna.create_study(directions=[o.direction or "minimize" for o in config.objectives]), []
    for _ in range(number):
        proposals.append(propose(config, axes, EXPERIMENT, study.trials))
        study.add_trial(with_end(template(axes, proposals[-1], {}), TrialState.COMPLETE, score(proposals[-1].values)))
    return proposals, study.trials


def bowl(values: dict[str, Value]) -> list[float]:
    """Least, at 0, where the policy's rate is 10^-5.5 and the entropy coefficient 10^-2."""
    return [(math.log10(values[LR]) + 5.5) ** 2 + (math.log10(values[TAU]) + 2.0) ** 2]


def some_score(number_of_objectives: int) -> Score:
    """Numbers that depend on the values and on nothing else."""

    def score(values: dict[str, Value]) -> list[float]:
        rng = random.Random(repr(sorted(values.items())))
        return [rng.random() for _ in range(number_of_objectives)]

    return score


# ----------------------------------------------------------------------------
# Purity


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_defaults", [True, False])
def test_a_sweep_that_is_resumed_from_its_journal_proposes_what_it_would_have_proposed(kind, with_defaults, tmp_path):
    config = sweep(kind, startup_trials=4, start_with_defaults=with_defaults)
    axes = SMALL if kind == "grid" else MIXED
    ends = random.Random(1)
    path, number = str(tmp_path / "journal"), 9 if kind == "grid" else 14
    directions = [objective.direction or "minimize" for objective in config.objectives]
    study = optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(path)), directions=directions)
    for _ in range(number):
        proposal = propose(config, axes, EXPERIMENT, study.trials)
        np.random.seed(0)  # nobody's seed but the sweep's counts
        random.seed(0)
        again = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(path)))
        assert propose(config, axes, EXPERIMENT, again.trials) == proposal
        state = ends.choice([TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED])
        trial = template(axes, proposal, {})
        if ends.random() < 0.8:  # else it still runs
            trial = with_end(trial, state, some_score(len(directions))(proposal.values))
        study.add_trial(trial)


@pytest.mark.parametrize(("kind", "startup"), [("tpe", 3), ("sobol", 3), ("random", 3), ("nsga2", 8)])
def test_another_seed_or_another_number_gives_other_values(kind, startup):
    def values(seed: int) -> list[dict[str, Value]]:
        config = sweep(kind, seed=seed, startup_trials=startup)
        score = some_score(len(config.objectives))
        return [proposal.values for proposal in played(config, RATES, score, 8)[0]]

    first, second = values(0), values(1)
    assert first[0] == second[0]  # the defaults
    assert all(one != other for one, other in zip(first[1:], second[1:], strict=True))
    assert len({proposal[LR] for proposal in first}) == len(first)


@pytest.mark.parametrize("kind", ["tpe", "sobol", "random", "grid", "nsga2"])
def test_every_proposal_is_in_the_space(kind):
    axes = SMALL if kind == "grid" else MIXED
    proposals, _ = played(config := sweep(kind, startup_trials=3), axes, some_score(len(config.objectives)), 9)
    for proposal in proposals:
        assert list(proposal.values) == [axis.path for axis in axes]
        assert all(axis.contains(proposal.values[axis.path]) for axis in axes)


# ----------------------------------------------------------------------------
# The defaults first


@pytest.mark.parametrize("kind", ["tpe", "sobol", "random", "nsga2"])
def test_the_first_trial_has_the_experiments_own_values_if_the_space_contains_them(kind):
    assert propose(sweep(kind), RATES, EXPERIMENT, []).values == {LR: 1e-5, TAU: 0.1}
    assert propose(sweep(kind, start_with_defaults=False), RATES, EXPERIMENT, []).values != {LR: 1e-5, TAU: 0.1}


@pytest.mark.parametrize(
    ("space", "found"),
    [
        ({LR: {"uniform": [1e-5, 1]}}, {LR: 1e-5}),
        ({LR: {"uniform": [2e-5, 1]}}, None),
        ({LR: {"choice": [1e-5, 3e-5]}}, {LR: 1e-5}),
        ({LR: {"choice": [3e-5]}}, None),
        ({LR: {"uniform": [0, 1]}, TAU: {"uniform": [0.2, 1]}}, None),
        ({TAU: {"integer": [0, 3]}}, None),  # 0.1 is between them
        ({"data.label": {"choice": [None, 1]}}, {"data.label": None}),
        ({"data.label": {"choice": [0, 1]}}, None),
        ({"algorithm.all_states": {"choice": [False]}}, {"algorithm.all_states": False}),
        ({"algorithm.policy_mask": {"choice": [[0.5], [1]]}}, {"algorithm.policy_mask": [1.0]}),
    ],
)
def test_the_defaults_are_found_where_the_space_contains_them(space, found):
    axes = parse_space(space, EXPERIMENT)
    assert defaults(axes, EXPERIMENT) == found
    proposal = propose(sweep("random"), axes, EXPERIMENT, [])
    template(axes, proposal, {})  # Optuna takes it
    other = propose(sweep("random", start_with_defaults=False), axes, EXPERIMENT, []).values
    assert proposal.values == (found or other)


def test_the_defaults_take_no_point_of_the_sequence():
    for kind in ("sobol", "random"):
        with_defaults, _ = played(sweep(kind), RATES, bowl, 5)
        without, _ = played(sweep(kind, start_with_defaults=False), RATES, bowl, 4)
        assert with_defaults[1:] == without


# ----------------------------------------------------------------------------
# Sobol, random, grid


def drawn(kind: str, number: int, seed: int = 0) -> list[Proposal]:
    """The first points of a sequence without the defaults; nothing but the length of the history matters."""
    config = sweep(kind, seed=seed, start_with_defaults=False)
    return [propose(config, RATES, EXPERIMENT, n * [create_trial(value=0.0)]) for n in range(number)]


def units(proposals: Sequence[Proposal]) -> np.ndarray:
    """Where the rates lie in the unit square."""
    lr = [(math.log10(proposal.values[LR]) + 6.0) / 2.0 for proposal in proposals]
    tau = [(math.log10(proposal.values[TAU]) + 3.0) / 3.0 for proposal in proposals]
    return np.array([lr, tau]).T


@pytest.mark.parametrize("seed", [0, 7])
def test_sobol_is_scipys_scrambled_sequence(seed):
    assert units(drawn("sobol", 16, seed)) == pytest.approx(
        qmc.Sobol(2, scramble=True, rng=seed).random_base2(4), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [1, 2, 3, 5])
def test_the_first_sobol_points_lie_evenly_however_the_square_is_cut(seed, power):
    """A net: each of the 2^m boxes 2^-a by 2^-b with a + b = m holds one of the first 2^m points."""
    places = units(drawn("sobol", 2**power, seed))
    for across in range(power + 1):
        boxes = np.floor(places * [2**across, 2 ** (power - across)]).astype(int)
        assert len({tuple(box) for box in boxes}) == 2**power


def test_sobol_is_more_even_than_random():
    assert qmc.discrepancy(units(drawn("sobol", 64))) < 0.2 * qmc.discrepancy(units(drawn("random", 64)))


def test_random_points_are_uniform():
    places = units(drawn("random", 400))
    for quarter in range(4):
        inside = np.logical_and(places >= quarter / 4, places < (quarter + 1) / 4).mean(axis=0)
        assert inside == pytest.approx([0.25, 0.25], abs=4 * math.sqrt(0.25 * 0.75 / 400))  # four standard errors
    assert abs(np.corrcoef(places.T)[0, 1]) < 4 / math.sqrt(400)


@pytest.mark.parametrize("kind", ["sobol", "random"])
def test_sobol_and_random_ignore_what_came_of_the_trials(kind):
    config = sweep(kind)
    proposals, history = played(config, RATES, bowl, 6)
    ended = [TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE] * 2
    others = [with_end(trial, state, [1e9]) for trial, state in zip(history, ended, strict=True)]
    assert propose(config, RATES, EXPERIMENT, others) == propose(config, RATES, EXPERIMENT, history)
    assert proposals == [propose(config, RATES, EXPERIMENT, others[:n]) for n in range(6)]


def test_a_grid_runs_every_combination_once():
    proposals, _ = played(sweep("grid"), SMALL, some_score(1), 9)
    found = [(p.values["schedule.num_steps"], p.values["data.label"]) for p in proposals]
    assert sorted(found, key=repr) == sorted([(n, label) for n in (4, 5, 6) for label in (None, 0, 1)], key=repr)


@pytest.mark.parametrize(
    ("kind", "trials", "planned"), [("grid", 20, 9), ("grid", 9, 9), ("grid", 4, 4), ("tpe", 20, 20), ("sobol", 4, 4)]
)
def test_a_sweep_plans_its_budget_or_its_grid_if_that_is_smaller(kind, trials, planned):
    assert num_planned(sweep(kind, trials=trials), SMALL) == planned


def test_a_grid_without_points_is_refused_when_it_is_planned():
    with pytest.raises(UserError, match=stating("grid … points")):
        num_planned(sweep("grid"), RATES)


# ----------------------------------------------------------------------------
# TPE


@pytest.mark.parametrize("seed", range(4))
def test_tpe_finds_the_better_region(seed):
    """Over the space, the bowl's mean is (1.5^3 + 0.5^3) / 6 + (2^3 + 1^3) / 9, which random trials would have."""
    proposals, _ = played(sweep("tpe", seed=seed, start_with_defaults=False), RATES, bowl, 40)
    assert np.mean([bowl(proposal.values)[0] for proposal in proposals[20:]]) < 0.75 * (3.5 / 6.0 + 1.0)


def test_tpe_draws_at_random_until_there_are_startup_trials():
    """While it does, what came of the trials does not matter; afterwards it does."""
    config = sweep("tpe", startup_trials=5)
    _, history = played(config, RATES, bowl, 8)
    upside_down = [with_end(trial, TrialState.COMPLETE, [-value for value in trial.values]) for trial in history]
    for number, differ in ((3, False), (4, False), (6, True), (8, True)):
        one, other = (propose(config, RATES, EXPERIMENT, trials[:number]) for trials in (history, upside_down))
        assert (one != other) is differ


def test_tpe_goes_the_other_way_when_more_is_better():
    def late(direction: str) -> float:
        objective = ObjectiveConfig(direction=direction)
        config = SweepConfig(objectives=(objective,), sampler=SamplerConfig(start_with_defaults=False))
        proposals, _ = played(config, RATES, bowl, 40)
        return float(np.mean([bowl(proposal.values)[0] for proposal in proposals[20:]]))

    assert late("maximize") > 3.0 > 1.0 > late("minimize")


def test_tpe_takes_account_of_trials_that_still_run():
    """They count as bad, so that two at once are not asked to try the same."""
    config = sweep("tpe", startup_trials=5)
    _, history = played(config, RATES, bowl, 20)

    def after(running_at: dict[str, Value]) -> dict[str, Value]:
        running = 10 * [template(RATES, Proposal(running_at), {})]
        return propose(config, RATES, EXPERIMENT, [*history, *running]).values

    proposed = after({LR: 9e-5, TAU: 0.9})  # far from where the others are good
    assert after(proposed) != proposed


# ----------------------------------------------------------------------------
# NSGA-II

COEFFICIENTS = parse_space(
    {f"algorithm.{name}": {"uniform": [0, 1]} for name in (TAU.rpartition(".")[2], "cost_coef", "energy_l2")},
    EXPERIMENT,
)


def zdt(values: dict[str, Value]) -> list[float]:
    """ZDT1 (Zitzler, Deb, Thiele 2000) with three variables: the front is y = 1 - sqrt(x), where the others are 0."""
    x, *others = values.values()
    g = 1.0 + 9.0 * sum(others) / len(others)
    return [x, g * (1.0 - math.sqrt(x / g))]


def hypervolume(points: Sequence[Sequence[float]], corner: tuple[float, float]) -> float:
    """Area that the points dominate below a corner."""
    area, lowest = 0.0, corner[1]
    for x, y in sorted(map(tuple, points)):
        if x < corner[0] and y < lowest:
            area, lowest = area + (corner[0] - x) * (lowest - y), y
    return area


def test_nsga2_dominates_more_than_random():
    def reached(kind: str) -> float:
        found = []
        for seed in range(3):
            config = SweepConfig(
                objectives=(ObjectiveConfig(), ObjectiveConfig(metric="num_steps")),
                sampler=SamplerConfig(kind=kind, seed=seed, startup_trials=10),
            )
            _, history = played(config, COEFFICIENTS, zdt, 60)
            found.append(hypervolume([trial.values for trial in history], (1.0, 8.0)))
        return float(np.mean(found))

    # All that can be dominated is 8 - 1/3; the margin is half of what was measured.
    assert reached("nsga2") > reached("random") + 0.3


GENERATION = "NSGAIISampler:generation"


def test_nsga2_makes_one_generation_after_the_other_and_the_defaults_belong_to_the_first():
    proposals, _ = played(sweep("nsga2", startup_trials=5), RATES, lambda v: [v[LR], v[TAU]], 20)
    assert proposals[0].values == {LR: 1e-5, TAU: 0.1}
    assert [p.system_attrs[GENERATION] for p in proposals] == [n // 5 for n in range(20)]


def test_nsga2_breeds_from_the_best():
    """Children have their parents' genes, and only parents with small labels survive."""
    axes = parse_space({"data.label": {"choice": [*range(10)]}, LR: {"uniform": [0, 1]}}, EXPERIMENT)
    proposals, _ = played(sweep("nsga2", startup_trials=10), axes, lambda v: [v["data.label"], v["data.label"]], 60)
    labels = [proposal.values["data.label"] for proposal in proposals]
    assert np.mean(labels[-20:]) < 0.5 * np.mean(labels[:10])


def test_nsga2_goes_on_where_trials_fail():
    """Only complete trials count as a generation's members."""
    config = sweep("nsga2", startup_trials=4)
    study = optuna.create_study(directions=["minimize", "minimize"])
    for number in range(24):
        trial = template(RATES, propose(config, RATES, EXPERIMENT, study.trials), {})
        state = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)[number % 3]
        study.add_trial(with_end(trial, state, [1.0, 2.0]))
    complete = [t.system_attrs[GENERATION] for t in study.trials if t.state is TrialState.COMPLETE]
    assert complete == [0, 0, 0, 0, 1, 1, 1, 1]


# ----------------------------------------------------------------------------
# In the journal


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposal_is_in_the_journal_whole_by_one_line(kind, tmp_path):
    config, axes = sweep(kind), SMALL if kind == "grid" else MIXED
    path = tmp_path / "journal"
    directions = [objective.direction or "minimize" for objective in config.objectives]

    def opened(file: Path) -> optuna.Study:
        return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(file))))

    optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))), directions=directions)
    before = path.read_bytes()
    proposal = propose(config, axes, EXPERIMENT, [])
    opened(path).add_trial(template(axes, proposal, {"about": {"seed": 3}}))
    added = path.read_bytes().removeprefix(before)
    assert added.count(b"\n") == 1
    assert added.endswith(b"\n")
    (trial,) = opened(path).trials
    assert trial.state is TrialState.RUNNING
    assert {axis.path: axis.value(trial.params[axis.path]) for axis in axes} == proposal.values
    assert (trial.user_attrs, trial.system_attrs) == ({"about": {"seed": 3}}, proposal.system_attrs)


def test_a_model_learns_from_choices_that_are_lists():
    masks = [[1.0], [0.5], [2.0], [3.0]]
    axes = parse_space({"algorithm.policy_mask": {"choice": masks}}, EXPERIMENT)
    score = lambda values: [float(masks.index(values["algorithm.policy_mask"]) != 2)]  # noqa: E731
    proposals, _ = played(sweep("tpe", startup_trials=8), axes, score, 40)
    chosen = [proposal.values["algorithm.policy_mask"] for proposal in proposals]
    assert all(value in masks for value in chosen)
    assert chosen[20:].count([2.0]) > 10


def test_a_default_that_optuna_stores_as_another_type_is_the_same_value():
    experiment = build(ExperimentConfig, {"algorithm": {"entropy_coef": 1.0}})
    axes = parse_space({TAU: {"integer": [0, 3]}}, experiment)
    trial = template(axes, propose(sweep("tpe"), axes, experiment, []), {})
    assert axes[0].value(trial.params[TAU]) == 1
