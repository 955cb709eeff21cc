"""Ablations: who is run when, what the numbers come to, how they are recorded; no training but in the last test."""

import base64
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from scipy.stats import norm

from dxmi.config import to_tree
from dxmi.errors import UserError
from dxmi.training.build import Experiment
from dxmi.training.config import SCHEMA
from dxmi.visualization.pictures import save_grid
from support import TINY, missing, stating
from tune import Ablation
from tune.api.sweep import Sweep
from tune.cli.main import main
from tune.config.ablation import parse_ablation
from tune.config.compose import compose_experiment
from tune.config.sweep import TrackingConfig
from tune.integrations.mlflow_tracker import Tracker
from tune.plans.ablation import AblationPlan, ablation_plan, any_plan_from
from tune.plans.arms import BASELINE, arms
from tune.plans.sweep import plan_from
from tune.reporting.ablation_figures import ablation_figures, frontier_paths
from tune.reporting.html import write_report
from tune.reporting.maps import arm_maps
from tune.reporting.samples import arm_matrix
from tune.reporting.sentences import verdict_sentences
from tune.reporting.study_tables import arms_table
from tune.stats.comparison import Verdict, compare
from tune.stats.intervals import Bootstrap
from tune.studies.arm_results import arms_frame, latex, p_label, p_note, results_of, write_tables
from tune.studies.folder import StudyFolder
from tune.studies.records import Outcome, TrialRecord, TrialState, completed, unfinished
from tune.studies.study import Study

TWO = {"no_entropy": {"algorithm.entropy_coef": 0}, "fast": {"algorithm.policy.lr": 3.0e-4}}
FACTORS = {"entropy": {"own": {}, "none": {"algorithm.entropy_coef": 0}}, "rate": {"own": {}, "fast": TWO["fast"]}}


def plan(name: str = "study", **given) -> AblationPlan:
    tree = {"hypothesis": "Something matters.", "variants": TWO, "seeds": 3, **given}
    if "factors" in given:
        del tree["variants"]
        tree.setdefault("design", "factorial")
    ablation = parse_ablation(tree)
    experiment = compose_experiment(TINY).experiment
    return ablation_plan(name, experiment, ablation, arms(ablation, experiment), tracking=TrackingConfig())


class Played(Study):
    """A study whose trials end with made-up scores."""

    references: ClassVar = {"ddpm_1000": 5.0}

    def play(self, score, *, most: int = 1000) -> list[tuple[str, int]]:
        """Run trials one by one until there are no more; returns (arm, seed) in order. A score of NaN is a failure."""
        order = []
        while len(order) < most and (record := self.add()) is not None:
            arm, seed = record.values["arm"], record.values["seed"]
            order.append((arm, seed))
            self.end(record.number, score(arm, seed))
        return order

    def end(self, number: int, value: float) -> None:
        record = self.record(number)
        if math.isnan(value):
            self.finish(number, unfinished(self.plan, {}, TrialState.FAILED, "made up", 1.0))
            return
        for step in (0, 20, 40):
            self.score(number, step, value + 40.0 - step)
        best = {"value": value, "step": 40, "checkpoint": ""}
        summary = {
            "scores": {"best": {"eval/fid_digits": value, "eval/kid_digits": value / 100.0}},
            "best": best, "last": best, "num_steps": 5,
            "reference": self.references, "seconds": {"finetune": 1.0}, "num_samples": 64, "device": "cpu",
            "threads": 1, "git_revision": None, "versions": {}, "signature": record.signature,
            "metric": "eval/fid_digits",
        }  # fmt: skip
        record.run.create()
        record.run.write_summary(summary)
        self.finish(number, completed(self.plan, summary))


@pytest.fixture
def played(tmp_path):
    """`played(**ablation)`: a study that has not started."""

    def make(name: str = "study", **given) -> Played:
        folder = StudyFolder(tmp_path / name)
        folder.path.mkdir()
        return Played.drive(folder, plan(name, **given))

    return make


def shifted(**shifts: float):
    """Scores that differ from seed to seed, and between arms by a constant and a little."""
    return lambda arm, seed: 10.0 + seed + shifts.get(arm, 0.0) + 0.01 * math.sin(7 * seed + len(arm))


# ----------------------------------------------------------------------------
# Training-free samplers


def test_arms_that_a_free_sampler_beats_are_named_by_their_means(played, monkeypatch):
    monkeypatch.setattr(
        Played, "references", {"ddpm_1000": 1.0, "ddim_5": 9.0, "dpm_solver_10": 2.0, "shortened": 60.0}
    )
    study = played(seeds=[0, 1])
    study.play(lambda arm, _: 7.0 if arm == "fast" else 12.0)
    results = results_of(study.plan, study.folder, study.records())
    (sentence,) = results.outdone  # neither by 1000 nor by 10 steps, which are more than the arms have
    assert "5 steps (DDIM, evenly over 0..999) reaches fid_digits 9.00" in sentence
    assert "baseline (12.00) and no_entropy (12.00)" in sentence
    assert "fast" not in sentence
    assert verdict_sentences(results)[-1] == sentence


@pytest.mark.parametrize(("mean", "verdict"), [(2.0, Verdict.BETTER), (30.0, Verdict.WORSE)])
def test_the_baseline_is_tested_against_the_best_free_sampler_with_as_many_evaluations(
    played, monkeypatch, mean, verdict
):
    """With eight seeds that agree, the p-value of the sign-flip test is 2 / 2^8."""
    monkeypatch.setattr(Played, "references", {"ddpm_1000": 0.1, "ddim_5": 9.0, "dpm_solver_5": 9.5})
    study = played(seeds=8)
    study.play(lambda _, seed: mean + 0.1 * seed)
    results = results_of(study.plan, study.folder, study.records())
    sampler, comparison = results.against_free
    assert (sampler.key, sampler.score) == ("ddim_5", 9.0)
    assert comparison.verdict is verdict
    assert comparison.p == pytest.approx(2.0 / 2**8)
    assert comparison.difference.estimate == pytest.approx(mean + 0.35 - 9.0)
    (sentence,) = (text for text in verdict_sentences(results) if "without fine-tuning (mean" in text)
    assert missing(f"5 steps … DDIM … 9.00 … {verdict}", sentence) == []


def test_an_unfinished_baseline_is_not_tested_against_free_samplers(played):
    study = played(seeds=4)
    study.play(shifted(), most=5)
    assert results_of(study.plan, study.folder, study.records()).against_free is None


def test_real_data_and_references_stand_above_the_arms_samples(played, monkeypatch):
    """Those of the first run that has them: here the baseline's with seed 1."""
    monkeypatch.setattr(Played, "references", {"ddpm_1000": 5.0, "ddim_5": 9.0})
    study = played(seeds=[0, 1])
    study.play(shifted())
    pixels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    for record in study.records():
        save_grid(record.run.samples / "step_000040.png", pixels)
    (chosen,) = (r for r in study.records() if (r.values["arm"], r.values["seed"]) == ("baseline", 1))
    for name in ("data", "full", "few"):
        save_grid(chosen.run.reference_picture(name), pixels)
    matrix = arm_matrix(results_of(study.plan, study.folder, study.records()))
    assert [row.trial for row in matrix.rows] == ["baseline", "no_entropy", "fast"]
    assert [strip.name for strip in matrix.strips] == [
        "real data",
        "1000 steps (DDPM, small variance)",
        "5 steps (DDIM, evenly over 0..999)",
    ]
    assert [strip.note.partition(",")[0] for strip in matrix.strips[1:]] == ["5.00", "9.00"]


# ----------------------------------------------------------------------------
# Who is run when


def test_every_arm_gets_the_same_seeds_one_seed_after_the_other(played):
    order = played(seeds=[5, 3]).play(shifted())
    assert order == [(arm, seed) for seed in (5, 3) for arm in ("baseline", "no_entropy", "fast")]


def test_an_interrupted_ablation_goes_on_where_it_was(played):
    study = played()
    first = study.play(shifted(), most=4)
    again = Played.drive(study.folder, study.plan)
    assert first + again.play(shifted()) == [
        (arm, seed) for seed in range(3) for arm in ("baseline", "no_entropy", "fast")
    ]


def test_a_plan_is_read_back_as_it_was_and_a_change_is_named(played):
    study = played(factors=FACTORS)
    assert study.folder.read_plan() == study.plan
    with pytest.raises(UserError, match=r"ablation\.level: 0\.05 -> 0\.1"):
        study.folder.require_same(plan(factors=FACTORS, level=0.1))
    study.folder.require_same(plan(factors=FACTORS, budget={"wall_minutes": 5}))


def test_auto_gives_more_seeds_where_the_verdict_is_open_and_only_there(played):
    study = played(seeds={"first": 3, "cap": 12})
    order = study.play(shifted(no_entropy=-5.0, fast=0.0))
    counts = {arm: sum(a == arm for a, _ in order) for arm in ("baseline", "no_entropy", "fast")}
    assert counts["baseline"] == max(counts.values())
    assert 6 <= counts["no_entropy"] < 12  # fewer cannot show anything
    assert study.is_done
    seen = {comparison.arm: str(comparison.verdict) for comparison in outcome(study).comparisons}
    assert seen["no_entropy"] == "better"


def test_auto_shows_what_there_is_while_arms_run_ahead_of_the_baseline_and_of_each_other(played):
    study = played(seeds={"first": 3, "cap": 12})
    begun = {(record.values["arm"], record.values["seed"]): record for record in (study.add() for _ in range(9))}
    ahead = [("baseline", 0), *((arm, seed) for seed in (0, 1) for arm in ("fast", "no_entropy"))]
    for arm, seed in ahead:
        study.end(begun[arm, seed].number, shifted(fast=1.0)(arm, seed))
    assert set(verdicts(study).values()) == {"2 of 3 running", "1 of 3 running, baseline 2 of 3 running"}
    require_said_everywhere(study, "baseline 2 of 3 running")


def test_effects_are_not_tested_where_seeds_were_added_as_verdicts_needed_them(played):
    study = played(factors=FACTORS, seeds={"first": 3, "cap": 7})
    study.play(lambda arm, seed: shifted()(arm, seed) + (2.0 if "fast" in arm else 0.0))
    effects = outcome(study).effects
    assert len(effects) == 3
    for effect in effects:
        assert math.isnan(effect.p)
        assert math.isnan(effect.p_holm)
        assert missing(f"no test … {effect.seeds} seeds", str(effect)) == []


def test_until_all_arms_have_ended_a_verdict_counts_those_that_have_not(played):
    """Ten arms, seven seeds: p = 2 / 2^7 for one alone, ten times that while nine are to come."""
    variants = {f"arm{k}": {"algorithm.entropy_coef": 0.1 + k} for k in range(10)}
    study = played(seeds=7, variants=variants)
    scores = shifted(arm0=-5.0)
    first = [record for record in iter(study.add, None) if record.values["arm"] in ("baseline", "arm0")]
    for record in first:
        study.end(record.number, scores(record.values["arm"], record.values["seed"]))
    found = {comparison.arm: comparison for comparison in outcome(study).comparisons}
    assert found["arm0"].p == pytest.approx(2 / 2**7)
    assert found["arm0"].p_adjusted == pytest.approx(20 / 2**7)
    assert verdicts(study)["arm0"] == "other arms have not ended"


def test_auto_waits_for_running_trials_before_it_decides(played):
    study = played(seeds={"first": 3, "cap": 12})
    begun = [study.add() for _ in range(9)]
    assert study.add() is None
    assert not study.is_done
    for record in begun:
        study.end(record.number, shifted()(record.values["arm"], record.values["seed"]))
    assert study.add().values["seed"] == 3


@pytest.mark.parametrize(("first", "cap"), [(3, 4), (3, 50)])
def test_auto_refuses_a_cap_that_can_show_nothing_or_cannot_be_tested(first, cap):
    with pytest.raises(UserError, match=stating(f"cap is {cap} … 3 seeds … 20")):
        plan(seeds={"first": first, "cap": cap})


def test_arms_with_one_seed_begin_with_the_same_weights_data_and_noise():
    made = plan()
    experiments = [Experiment(made.config_of({"arm": arm.name, "seed": 1})) for arm in made.arms]
    weights = [experiment.build_denoiser().state_dict() for experiment in experiments]
    streams = [experiment.build_pretraining()[1].stream.next().x for experiment in experiments]
    for own, batch in zip(weights, streams, strict=True):
        assert all(torch.equal(own[key], weights[0][key]) for key in own)
        assert torch.equal(batch, streams[0])
    assert len({experiment.pretraining_signature for experiment in experiments}) == 1


def test_what_was_tuned_is_in_an_arms_config_and_not_in_the_others():
    tuned = replace(plan(), tuned={"fast": {"algorithm.critic.lr": 0.5}})
    rates = {arm.name: tuned.config_of({"arm": arm.name, "seed": 0}).algorithm.critic.lr for arm in tuned.arms}
    assert rates["fast"] == 0.5
    assert rates["baseline"] == rates["no_entropy"] != 0.5
    assert any_plan_from(tuned.tree()) == tuned
    assert tuned.signature == plan().signature  # it follows from the rest


# ----------------------------------------------------------------------------
# What the numbers come to


def outcome(study: Study):
    return results_of(study.plan, study.folder, study.records())


def test_means_and_differences_are_those_of_the_scores(played):
    study = played(seeds=6)
    study.play(shifted(no_entropy=-2.0, fast=1.0))
    results = outcome(study)
    frame = arms_frame(results).set_index("arm")
    own = np.array([shifted()("baseline", seed) for seed in range(6)])
    fast = np.array([shifted(fast=1.0)("fast", seed) for seed in range(6)])
    assert frame.loc["baseline", "mean"] == pytest.approx(own.mean())
    assert frame.loc["fast", "difference"] == pytest.approx((fast - own).mean())
    assert frame.loc["fast", "p"] == pytest.approx(2 / 2**6)
    assert frame.loc["fast", "p_adjusted"] == pytest.approx(2 / 2**6)
    assert list(frame["correction"]) == ["", "closed", "closed"]
    assert list(frame["verdict"]) == ["", "better", "worse"]
    assert list(frame["seeds_needed_low"][1:]) == list(frame["seeds_needed_high"][1:]) == [6, 6]


def test_every_table_names_the_test_and_five_seeds_are_too_few(played):
    study = played(seeds=5)
    study.play(shifted(no_entropy=-2.0, fast=1.0))
    results = outcome(study)
    assert [str(c.verdict) for c in results.comparisons] == ["too few seeds"] * 2
    assert "p (closed)" in [str(column.header) for column in arms_table(results).columns]
    assert "exchangeable" in str(arms_table(results).caption)
    assert "& $p$ (closed) &" in latex(results)
    page = write_report(study, study.records()).read_text()
    assert ">p (closed)</th>" in page
    assert missing("permutation … seeds", page) == []
    assert "Holm" not in page


@pytest.mark.parametrize(
    ("arms", "label", "words"),
    [
        (1, "p", "sign-flip test"),
        (2, "p (closed)", "permutation"),
        (12, "p (closed)", "sets"),
        (13, "p (Holm)", "Holm's"),
    ],
)
def test_tables_name_the_test_that_the_number_of_arms_calls_for(arms, label, words):
    results = SimpleNamespace(plan=SimpleNamespace(arms=range(1 + arms), ablation=SimpleNamespace(level=0.05)))
    assert p_label(results) == label
    assert words in p_note(results)


def test_higher_is_better_where_the_objective_says_so(played):
    study = played(seeds=7, objective={"metric": "eval/fid_digits", "direction": "maximize"})
    study.play(shifted(no_entropy=-2.0, fast=1.0))
    assert [str(c.verdict) for c in outcome(study).comparisons] == ["worse", "better"]


def test_the_spread_of_training_is_told_from_that_of_the_evaluation(played):
    study = played(seeds=3, generations=2)
    assert study.plan.config_of({"arm": "fast", "seed": 0}).evaluate.generations == 2
    study.play(shifted())
    for record in study.records():
        summary = record.run.read_summary()
        value = summary["best"]["value"]
        record.run.write_summary(summary | {"generations": [{"eval/fid_digits": value + d} for d in (0.0, 0.2)]})
    found = outcome(study).variances["baseline"]
    own = np.array([shifted()("baseline", seed) for seed in range(3)])
    assert found.generation == pytest.approx(0.2**2 / 2)
    assert found.training == pytest.approx(own.var(ddof=1) - 0.2**2 / 4)
    assert arms_frame(outcome(study))["std_generation"].notna().all()


def test_further_scores_are_shown_with_their_intervals_and_decide_nothing(played):
    also = ["eval/kid_digits", "eval/recall_digits"]  # of the latter nothing was made up
    studies = [played(seeds=6), played(name="more", seeds=6, also=also)]
    for study in studies:
        study.play(shifted(fast=1.0))
    assert studies[0].plan.signature == studies[1].plan.signature
    assert any_plan_from(studies[1].plan.tree()) == studies[1].plan
    plain, more = (arms_frame(outcome(study)).set_index("arm") for study in studies)
    assert studies[0].plan.also == ("eval/precision_digits", "eval/recall_digits")
    plain = plain[[name for name in plain if not name.startswith(("precision", "recall"))]]
    pd.testing.assert_frame_equal(more[plain.columns], plain)
    assert list(more.columns[len(plain.columns) :]) == [
        f"{name}{end}" for name in ("kid_digits", "recall_digits") for end in ("", "_low", "_high")
    ]
    for end, own in (("", "mean"), ("_low", "mean_low"), ("_high", "mean_high")):
        np.testing.assert_allclose(more[f"kid_digits{end}"], more[own] / 100.0)
        assert more[f"recall_digits{end}"].isna().all()
    results = outcome(studies[1])
    assert [str(column.header) for column in arms_table(results).columns][3:6] == [
        "fid_digits, mean", "kid_digits", "recall_digits",
    ]  # fmt: skip
    assert "& kid\\_digits & recall\\_digits &" in latex(results)
    page = write_report(studies[1], studies[1].records()).read_text().replace("<wbr>", "")
    assert page.count(">kid_digits</th>") == 1


def test_a_failed_run_costs_its_seed_in_that_arm_alone(played):
    study = played(seeds=7)
    scores = shifted(no_entropy=-2.0, fast=1.0)
    study.play(lambda arm, seed: math.nan if (arm, seed) == ("fast", 2) else scores(arm, seed))
    seeds = {c.arm: (c.seeds, c.left_out) for c in outcome(study).comparisons}
    assert seeds == {"no_entropy": (7, 0), "fast": (6, 1)}


# ----------------------------------------------------------------------------
# Missing runs


def verdicts(study: Study) -> dict[str, str]:
    frame = arms_frame(outcome(study))
    return dict(zip(frame["arm"], frame["verdict"], strict=True))


def require_said_everywhere(study: Study, words: str) -> None:
    """Every table, the report and the figures have the verdict, and none has another or a p-value for that arm."""
    results = outcome(study)
    csv, tex = write_tables(results)
    console = Console(width=250, file=io.StringIO())
    console.print(arms_table(results))
    forest = ablation_figures(results, study.curves())["forest"]
    figure = " ".join(text.get_text() for text in forest.findobj(Text))
    page = write_report(study, study.records()).read_text()
    for text in (csv.read_text(), tex.read_text(), console.file.getvalue(), page, figure):
        assert words in text
    for comparison in results.comparisons:
        if comparison.gaps:
            assert math.isnan(comparison.p)
            assert math.isnan(comparison.p_adjusted)
            assert comparison.verdict in (Verdict.FAILED, Verdict.UNFINISHED)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (TrialState.DIVERGED, "failed at 3 of 7 seeds"),
        (TrialState.FAILED, "failed at 3 of 7 seeds"),
        (TrialState.PRUNED, "pruned at 3 of 7 seeds"),
        (TrialState.STOPPED, "stopped at 3 of 7 seeds"),
        (TrialState.RUNNING, "3 of 7 running"),
    ],
)
def test_an_arm_with_missing_runs_has_no_verdict_but_what_is_missing(played, state, words):
    """The rest of it is better at every seed, and 7 of 7 such seeds are `better` in the test above."""
    study = played(seeds=7)
    scores = shifted(no_entropy=-2.0, fast=-2.0)
    while (record := study.add()) is not None:
        arm, seed = record.values["arm"], record.values["seed"]
        if arm != "fast" or seed < 4:
            study.end(record.number, scores(arm, seed))
        elif state is not TrialState.RUNNING:
            study.finish(record.number, unfinished(study.plan, {}, state, "made up", 1.0))
    assert verdicts(study) == {"baseline": "", "no_entropy": "better", "fast": words}
    row = arms_frame(outcome(study)).set_index("arm").loc["fast"]
    assert (row["seeds"], row["missing"], row[state.value]) == (4, 3, 3)
    assert row["difference"] == pytest.approx(-2.0, abs=0.1)
    require_said_everywhere(study, words)


def test_a_baseline_with_missing_runs_gives_no_arm_a_verdict(played):
    study = played(seeds=7)
    scores = shifted(no_entropy=-2.0, fast=1.0)
    study.play(lambda arm, seed: math.nan if (arm, seed) in {("baseline", 1), ("fast", 2)} else scores(arm, seed))
    assert verdicts(study) == {
        "baseline": "failed at 1 of 7 seeds",
        "no_entropy": "baseline failed at 1 of 7 seeds",
        "fast": "failed at 1 of 7 seeds, baseline failed at 1 of 7 seeds",
    }
    require_said_everywhere(study, "baseline failed at 1 of 7 seeds")
    assert {c.arm: (c.seeds, c.left_out) for c in outcome(study).comparisons} == {"no_entropy": (6, 1), "fast": (5, 2)}


def test_a_baseline_without_any_score_is_said_to_have_failed(played):
    study = played(seeds=3)
    study.play(lambda arm, seed: math.nan if arm == "baseline" else 1.0 + seed)
    assert missing("baseline failed … 3 of 3", verdicts(study)["fast"]) == []
    assert missing("failed … 3 of 3", write_report(study, study.records()).read_text()) == []


def test_a_study_that_has_not_ended_says_so_and_has_no_verdict(played):
    study = played(seeds=7)
    study.play(shifted(no_entropy=-2.0, fast=1.0), most=3 * 6 + 1)  # the last seed of the baseline alone
    study.add()
    assert verdicts(study) == {"baseline": "", "no_entropy": "1 of 7 running", "fast": "1 of 7 not started"}
    results = outcome(study)
    assert missing("21 runs … 1 running … 1 not started … Holm's", results.unfinished) == []
    assert results.unfinished in str(arms_table(results).caption)
    assert results.unfinished in latex(results)
    require_said_everywhere(study, "1 of 7 not started")


def test_a_failed_run_takes_no_verdict_from_another_arm(played):
    """Nine seeds of two arms; the arm that failed takes no part in the test."""
    study = played(seeds=9)
    scores = shifted(no_entropy=-2.0, fast=-2.0)
    study.play(lambda arm, seed: math.nan if (arm, seed) == ("fast", 2) else scores(arm, seed))
    found = {comparison.arm: comparison for comparison in outcome(study).comparisons}
    assert found["no_entropy"].verdict is Verdict.BETTER
    assert found["no_entropy"].p_adjusted <= 0.05


def test_auto_gives_no_more_seeds_to_an_arm_that_failed_or_beside_a_baseline_that_did(played):
    scores = shifted(no_entropy=-5.0, fast=0.3)
    study = played(seeds={"first": 3, "cap": 12})
    order = study.play(lambda arm, seed: math.nan if (arm, seed) == ("fast", 1) else scores(arm, seed))
    assert sum(arm == "fast" for arm, _ in order) == 3
    assert sum(arm == "no_entropy" for arm, _ in order) >= 6
    assert verdicts(study)["fast"] == "failed at 1 of 3 seeds"
    assert verdicts(study)["no_entropy"] == "better"
    study = played("baseline", seeds={"first": 3, "cap": 12})
    order = study.play(lambda arm, seed: math.nan if (arm, seed) == ("baseline", 1) else scores(arm, seed))
    assert len(order) == 9
    assert set(verdicts(study).values()) == {"failed at 1 of 3 seeds", "baseline failed at 1 of 3 seeds"}


def made_up(arm: str, seed: int, score: float, folder: StudyFolder) -> TrialRecord:
    """A record without a study."""
    state = TrialState.DIVERGED if math.isnan(score) else TrialState.COMPLETE
    made = Outcome(state, objectives=() if math.isnan(score) else (score,))
    return TrialRecord(0, {"arm": arm, "seed": seed}, "", seed, folder.run(0), made)


def test_an_arm_whose_worst_runs_diverge_is_never_better(tmp_path):
    """Arm and baseline are equal, but the worst 38 % of the arm's runs diverge. Those that are left would be better."""
    made, folder = plan(seeds=9, variants={"fast": TWO["fast"]}), StudyFolder(tmp_path / "study")
    rng, worst, called_better, found = np.random.default_rng(0), norm.isf(0.38), 0, set()
    for _ in range(60):
        baseline, arm = rng.normal(size=(2, 9))
        arm[arm > worst] = math.nan
        if np.isnan(arm).sum() not in range(1, 8):
            continue
        records = [made_up("baseline", seed, score, folder) for seed, score in enumerate(baseline)]
        records += [made_up("fast", seed, score, folder) for seed, score in enumerate(arm)]
        (comparison,) = results_of(made, folder, records).comparisons
        called_better += (
            str(compare({"b": baseline, "a": arm}, "b", bootstrap=Bootstrap(resamples=100))[0].verdict) == "better"
        )
        found.add(comparison.verdict)
        assert comparison.gaps == f"failed at {np.isnan(arm).sum()} of 9 seeds"
    assert called_better > 0  # by the test alone
    assert found == {Verdict.FAILED}


def test_effects_are_not_tested_where_runs_are_missing(played):
    study = played(factors=FACTORS, seeds=6)
    scores = shifted(**{"entropy-none": 2.0, "rate-fast": -1.0, "entropy-none.rate-fast": 1.5})
    study.play(lambda arm, seed: math.nan if (arm, seed) == ("rate-fast", 2) else scores(arm, seed), most=23)
    results = outcome(study)  # the last arm lacks the last seed
    for effect in results.effects:
        assert (effect.seeds, effect.left_out) == (4, 2)
        assert math.isnan(effect.p)
        assert math.isnan(effect.p_holm)
        assert missing("no test … missing … 2 of 6", str(effect)) == []
    figure = ablation_figures(results, study.curves())["interactions"]
    assert "4 of 6 seeds" in " ".join(text.get_text() for text in figure.findobj(Text))
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    whole = [0, 1, 3, 4]
    expected = np.mean([scores("baseline", seed) for seed in whole])
    assert lines[0].get_ydata()[0] == pytest.approx(expected)
    assert missing("no test … 2 of 6", write_report(study, study.records()).read_text()) == []


def test_without_two_complete_seeds_the_report_says_why_there_are_no_effects(played):
    study = played(factors=FACTORS, seeds=3)
    study.play(lambda arm, seed: math.nan if arm == "rate-fast" and seed else shifted()(arm, seed))
    assert outcome(study).effects == ()
    assert missing("so far … 1", write_report(study, study.records()).read_text()) == []


def test_what_became_of_the_tuning_inside_an_arm_is_said(played):
    tuning = {"trials": 4, "space": {"algorithm.critic.lr": {"log_uniform": [1.0e-4, 1.0e-3]}}}
    study = played(seeds=7, tuning=tuning)
    study.play(shifted(no_entropy=-2.0, fast=1.0))
    inner = plan_from(
        {
            "schema": SCHEMA,
            "name": "study-fast",
            "experiment": to_tree(study.plan.experiment),
            "sweep": {"space": tuning["space"], "budget": {"trials": 4}},
        }
    )
    folder = StudyFolder(study.folder.path / "tuning" / "study-fast")
    folder.path.mkdir(parents=True)
    sweep = Played.drive(folder, inner)
    for number in range(4):
        sweep.add()
        sweep.end(number, math.nan if number else 1.0)
    results = outcome(study)
    assert missing("fast … tuned … 1 of 4 … 3 failed", str(arms_table(results).caption)) == []
    assert missing("fast … tuned … 1 of 4 … 3 failed", latex(results)) == []
    frame = arms_frame(results).set_index("arm")
    assert tuple(frame.loc["fast", ["tuning_trials", "tuning_missing"]]) == (4, 3)
    assert frame.loc["fast", "verdict"] == "worse"


def test_every_table_says_over_how_many_draws_a_score_is_the_mean(played):
    study = played(seeds=3, generations=3)
    study.play(shifted())
    assert missing("3 draws", str(arms_table(outcome(study)).caption)) == []
    assert missing("3 draws", latex(outcome(study))) == []


def test_effects_of_a_factorial_design_are_the_differences_that_were_put_in(played):
    study = played(factors=FACTORS, seeds=6)
    study.play(shifted(**{"entropy-none": 2.0, "rate-fast": -1.0, "entropy-none.rate-fast": 1.0 + 0.5}))
    sizes = {effect.term: effect.size.estimate for effect in outcome(study).effects}
    assert sizes[("entropy",)] == pytest.approx((2.0 + 2.5) / 2, abs=0.02)
    assert sizes[("rate",)] == pytest.approx((-1.0 - 0.5) / 2, abs=0.02)
    assert sizes[("entropy", "rate")] == pytest.approx(0.5 / 2, abs=0.02)


@pytest.mark.draws
def test_tables_figures_and_report_say_the_same_in_every_state(played, tmp_path):
    study = played(factors=FACTORS, seeds=2, hypothesis="50 % of_it & <b>more</b>")
    for _ in range(4):
        results = outcome(study)
        csv, tex = write_tables(results)
        page = write_report(study, study.records()).read_text()
        assert "50 % of_it &amp; &lt;b&gt;more&lt;/b&gt;" in page
        assert csv.read_text().count("\n") == 5
        assert r"50 \% of\_it \& <b>more</b>" in tex.read_text()
        assert arms_table(results).row_count == 4
        ablation_figures(results, study.curves())
        study.play(shifted(), most=3)
    assert "interactions" in ablation_figures(outcome(study), study.curves())
    assert latex(outcome(study)).count(r"\\") == 5


def test_the_report_has_the_maps_of_each_arms_first_seed_that_drew_some(played):
    study = played(seeds=2)
    study.play(shifted())
    for record in study.records():
        for what in ("energy", "values") if record.values["arm"] != "fast" else ():
            Image.new("RGB", (50, 20)).save(record.run.samples / f"{what}.png")
    found = arm_maps(outcome(study))
    assert [(maps.name, maps.note) for maps in found] == [("baseline", "seed 0"), ("no_entropy", "seed 0")]
    picture = Image.open(io.BytesIO(base64.b64decode(found[0].values.partition(",")[2])))
    assert picture.size == (40, 16)
    page = write_report(study, study.records()).read_text()
    assert page.count('alt="Energy of no_entropy, seed 0') == 1
    first = next(r for r in study.records() if (r.values["arm"], r.values["seed"]) == ("baseline", 0))
    (first.run.samples / "energy.png").write_bytes(b"damaged")
    assert [maps.name for maps in arm_maps(outcome(study))] == ["no_entropy"]


# ----------------------------------------------------------------------------
# The record


def recorded(root: Path) -> list:
    """Every run in a local store."""
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name("dxmi").experiment_id]))


def test_mlflow_has_study_arm_and_seed(played, tmp_path):
    study = played(seeds=2)
    study.play(shifted(), most=5)
    for goes_on in (True, False):
        expected = {c.arm: c.p_adjusted for c in outcome(study).comparisons if not math.isnan(c.p_adjusted)}
        tracker = Tracker(study.folder, study.plan, pytest.fail)
        tracker.start()
        tracker.update(study.records(), running=())
        assert tracker.finish("interrupted" if goes_on else "", patient=True) == 0
        sent = {
            run.data.tags.get("arm"): run.data.metrics for run in recorded(tmp_path) if "trial_id" not in run.data.tags
        }
        assert {arm: sent[arm]["arm/p_adjusted"] for arm in expected} == pytest.approx(expected)
        study.play(shifted())
    assert len(expected) == 2
    runs = recorded(tmp_path)
    names = {run.info.run_id: run.data.tags["mlflow.runName"] for run in runs}
    parents = {names[r.info.run_id]: names.get(r.data.tags.get("mlflow.parentRunId")) for r in runs}
    assert len(runs) == len(parents) == 1 + 3 + 6
    assert {name: parent for name, parent in parents.items() if parent in (None, "study")} == {
        "study": None, "study/baseline": "study", "study/no_entropy": "study", "study/fast": "study",
    }  # fmt: skip
    assert parents["study/no_entropy/seed 0"] == "study/no_entropy"
    assert parents["study/no_entropy/seed 1"] == "study/no_entropy"
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_mlflow_says_which_runs_of_an_arm_are_missing(played, tmp_path):
    study = played(seeds=3)
    study.play(lambda arm, seed: math.nan if (arm, seed) == ("fast", 2) else shifted()(arm, seed))
    tracker = Tracker(study.folder, study.plan, pytest.fail)
    tracker.start()
    tracker.update(study.records(), running=())
    assert tracker.finish("", patient=True) == 0
    (fast,) = (run for run in recorded(tmp_path) if run.data.tags["mlflow.runName"] == "study/fast")
    assert fast.data.tags["verdict"] == "failed at 1 of 3 seeds"
    assert fast.data.tags["missing"] == "1 failed"
    assert (fast.data.metrics["arm/missing"], fast.data.metrics["arm/lost"]) == (1.0, 1.0)
    assert "arm/p_holm" not in fast.data.metrics


# ----------------------------------------------------------------------------
# The command


def file_of(folder: Path, **given) -> Path:
    path = folder / "mine.yaml"
    tree = {"hypothesis": "Something matters.", "variants": TWO, "seeds": 2, **given}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_dry_run_prints_arms_and_design_and_writes_nothing(tmp_path, capsys):
    path = file_of(tmp_path, variants={}, factors=FACTORS, design="factorial")
    assert main(["ablate", *TINY, f"ablation={path}", "--studies", str(tmp_path / "studies"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "entropy-none.rate-fast" in said
    assert "2^2 design" in said
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ablation.hypothesis=''", "ablation.hypothesis … missing"),
        ("ablation.seeds=1", "ablation.seeds is 1 … 2..1000"),
        ("ablation.objective.metric=eval/fdi", "'eval/fdi' … score … eval/fid_digits"),
        ("ablation.also=[eval/energy_auc]", "ablation.also[0] is 'eval/energy_auc'"),
        (
            "+ablation.variants.same={algorithm.entropy_coef: 1.0}",
            "ablation.variants.same … baseline … algorithm.entropy_coef is 1",
        ),
        ("ablation=nothing", "'nothing' … entropy"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2_and_writes_nothing(tmp_path, capsys, override, sentence):
    chosen = override if override.startswith("ablation=") else f"ablation={file_of(tmp_path)}"
    more = [] if override == chosen else [override]
    assert main(["ablate", *TINY, chosen, *more, "--studies", str(tmp_path / "studies")]) == 2
    said = capsys.readouterr().err
    assert missing(sentence, said) == []
    assert said.count("\n") == 1
    assert not (tmp_path / "studies").exists()


def test_the_wrong_command_to_go_on_with_a_study_names_the_right_one(played, tmp_path, capsys):
    study = played(seeds=2)
    sweep = Sweep("sweep=demo", *TINY, name="swept", studies=tmp_path)
    sweep.folder.path.mkdir()
    Study.drive(sweep.folder, sweep.plan)
    for arguments, command in ((["sweep", "--resume", "study"], "ablate"), (["ablate", "--resume", "swept"], "sweep")):
        for dry in ([], ["--dry-run"]):
            assert main([*arguments, *dry, "--studies", str(tmp_path)]) == 2
            assert f"dxmi {command} --resume {tmp_path / arguments[-1]}" in capsys.readouterr().err
    study.folder.journal.unlink()
    with pytest.raises(UserError, match=f"dxmi ablate --resume {study.folder.path}"):
        Study.read(study.folder)


def test_a_finished_ablation_that_needed_fewer_seeds_than_its_cap_is_called_finished(played, tmp_path, capsys):
    played(seeds={"first": 3, "cap": 12}).play(shifted(no_entropy=-5.0, fast=0.0))
    assert main(["studies", "--studies", str(tmp_path)]) == 0
    assert re.search(r"study\s.*finished", capsys.readouterr().out)


def test_a_study_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["ablate", "--resume", "nothing", "--studies", str(tmp_path)]) == 2
    assert missing(f"no study … {tmp_path / 'nothing'}", capsys.readouterr().err) == []


@pytest.mark.slow
def test_an_ablation_with_tuning_is_run_gone_on_with_and_reported(tmp_path, capsys):
    tuning = {"trials": 2, "space": {"algorithm.critic.lr": {"log_uniform": [1.0e-4, 1.0e-3]}}}
    path = file_of(tmp_path, tuning=tuning, variants={"no_entropy": TWO["no_entropy"]})
    arguments = ["ablate", *TINY, f"ablation={path}", "name=real", "--studies", str(tmp_path / "studies")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"too few seeds, (at least )?\d+( to \d+)? (needed|would suffice)", said)
    folder = StudyFolder(tmp_path / "studies" / "real")
    tuned = folder.read_plan().tuned
    assert set(tuned) == {"baseline", "no_entropy"}
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("trials/*/summary.json")}
    assert len(before) == 2 * 2 + 2 * 2
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("trials/*/summary.json")} == before
    frame = Ablation.resume("real", studies=tmp_path / "studies").comparisons()
    assert list(frame["arm"]) == ["baseline", "no_entropy"]
    assert isinstance(Sweep.resume("real", studies=tmp_path / "studies").plan, AblationPlan)
    assert main(["report", "real", "--studies", str(tmp_path / "studies")]) == 0


# ----------------------------------------------------------------------------
# Reward against divergence


def test_the_frontier_has_the_means_over_the_seeds_at_equal_iterations(played):
    study = played(seeds=[0, 1])
    study.play(shifted())
    assert "frontier" not in ablation_figures(outcome(study), study.curves())  # no run logs a divergence
    for record in study.records():
        arm, seed = record.values["arm"], record.values["seed"]
        for step in (0, 20, *([40] if seed == 0 else [])):
            divergence = step * (2.0 if arm == BASELINE else 1.0) + seed
            record.run.append([{"step": step, "eval/fid_digits": 9.0 - step / 10.0, "eval/kl_reference": divergence}])
    paths = frontier_paths(outcome(study))
    assert set(paths) == {arm.name for arm in study.plan.arms}
    assert paths[BASELINE].divergence == [0.5, 40.5]  # the last iteration is that of one seed only
    assert paths[BASELINE].score == [9.0, 7.0]
    figure = ablation_figures(outcome(study), study.curves())["frontier"]
    assert f"{BASELINE}: 7 at 40.5 nats" in figure.get_label()
    assert "Reward against divergence" in write_report(study, study.records()).read_text()
