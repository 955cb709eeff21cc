"""Ablations: who is run when, what the numbers come to, how they are recorded; no training but in the last test."""

import base64
import io
import math
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from dxmi.errors import UserError
from dxmi.experiment import Experiment
from support import TINY
from tune import Ablation
from tune.ablation_config import parse_ablation
from tune.ablation_figures import ablation_figures
from tune.ablation_plan import AblationPlan, ablation_plan, any_plan_from
from tune.ablation_results import arms_frame, arms_table, latex, results_of, write_tables
from tune.cli import main
from tune.configs import compose_experiment
from tune.designs import arms
from tune.report import write_report
from tune.report_maps import arm_maps
from tune.study import Study, StudyFolder, TrialState, completed, unfinished
from tune.sweep import Sweep
from tune.sweep_config import TrackingConfig
from tune.tracking import Tracker

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
            self.finish(number, unfinished({}, TrialState.FAILED, "made up", 1.0))
            return
        for step in (0, 20, 40):
            self.score(number, step, value + 40.0 - step)
        best = {"value": value, "step": 40, "checkpoint": ""}
        summary = {
            "scores": {"best": {"eval/fid_digits": value, "eval/kid_digits": value / 100.0}},
            "best": best, "last": best, "num_steps": 5,
            "reference": {"ddpm_1000": 5.0}, "seconds": {"finetune": 1.0}, "num_samples": 64, "device": "cpu",
            "threads": 1, "git_revision": None, "versions": {}, "signature": record.signature,
            "metric": "eval/fid_digits",
        }  # fmt: skip
        record.run.create()
        record.run.write_summary(summary)
        self.finish(number, completed(self.plan, summary))


@pytest.fixture
def played(tmp_path):
    """`played(**ablation)`: a study that has not begun."""

    def make(name: str = "study", **given) -> Played:
        folder = StudyFolder(tmp_path / name)
        folder.path.mkdir()
        return Played.drive(folder, plan(name, **given))

    return make


def shifted(**shifts: float):
    """Scores that differ from seed to seed, and between arms by a constant and a little."""
    return lambda arm, seed: 10.0 + seed + shifts.get(arm, 0.0) + 0.01 * math.sin(7 * seed + len(arm))


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
    with pytest.raises(UserError, match="cap is"):
        plan(seeds={"first": first, "cap": cap})


def test_arms_with_one_seed_begin_with_the_same_weights_data_and_noise():
    made = plan()
    experiments = [Experiment(made.config_of({"arm": arm.name, "seed": 1})) for arm in made.arms]
    weights = [experiment.build_denoiser().state_dict() for experiment in experiments]
    streams = [experiment.build_pretraining()[1].stream.next() for experiment in experiments]
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
    assert frame.loc["fast", "p_holm"] == pytest.approx(2 * 2 / 2**6)
    assert list(frame["verdict"]) == ["", "too few seeds", "too few seeds"]  # 7 for two arms


def test_seven_seeds_for_two_arms_give_verdicts(played):
    study = played(seeds=7)
    study.play(shifted(no_entropy=-2.0, fast=1.0))
    assert [str(c.verdict) for c in outcome(study).comparisons] == ["better", "worse"]


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
    pd.testing.assert_frame_equal(more[plain.columns], plain)
    assert list(more.columns[len(plain.columns) :]) == [
        f"{name}{end}" for name in ("kid_digits", "recall_digits") for end in ("", "_low", "_high")
    ]
    for end, own in (("", "mean"), ("_low", "mean_low"), ("_high", "mean_high")):
        np.testing.assert_allclose(more[f"kid_digits{end}"], more[own] / 100.0)
        assert more[f"recall_digits{end}"].isna().all()
    results = outcome(studies[1])
    assert [str(column.header) for column in arms_table(results).columns][2:5] == [
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


def test_effects_of_a_factorial_design_are_the_differences_that_were_put_in(played):
    study = played(factors=FACTORS, seeds=6)
    study.play(shifted(**{"entropy-none": 2.0, "rate-fast": -1.0, "entropy-none.rate-fast": 1.0 + 0.5}))
    sizes = {effect.term: effect.size.estimate for effect in outcome(study).effects}
    assert sizes[("entropy",)] == pytest.approx((2.0 + 2.5) / 2, abs=0.02)
    assert sizes[("rate",)] == pytest.approx((-1.0 - 0.5) / 2, abs=0.02)
    assert sizes[("entropy", "rate")] == pytest.approx(0.5 / 2, abs=0.02)


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


def test_mlflow_has_study_arm_and_seed(played, tmp_path):
    study = played(seeds=2)
    study.play(shifted(), most=5)
    for goes_on in (True, False):
        tracker = Tracker(study.folder, study.plan, pytest.fail)
        tracker.start()
        tracker.update(study.records(), running=())
        assert tracker.finish("interrupted" if goes_on else "", patient=True) == 0
        study.play(shifted())
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("dxmi").experiment_id])
    names = {run.info.run_id: run.data.tags["mlflow.runName"] for run in runs}
    parents = {names[r.info.run_id]: names.get(r.data.tags.get("mlflow.parentRunId")) for r in runs}
    assert len(runs) == len(parents) == 1 + 3 + 6
    assert {name: parent for name, parent in parents.items() if parent in (None, "study")} == {
        "study": None, "study/baseline": "study", "study/no_entropy": "study", "study/fast": "study",
    }  # fmt: skip
    assert parents["study/no_entropy/seed 0"] == "study/no_entropy"
    assert parents["study/no_entropy/seed 1"] == "study/no_entropy"
    assert {run.info.status for run in runs} == {"FINISHED"}


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
        ("ablation.hypothesis=''", "hypothesis is missing"),
        ("ablation.seeds=1", "must be in 2"),
        ("ablation.objective.metric=eval/fdi", "which no trial reports"),
        ("ablation.also=[eval/energy_auc]", "ablation.also[0] is 'eval/energy_auc', which no trial reports"),
        ("+ablation.variants.same={algorithm.entropy_coef: 1.0}", "same"),
        ("ablation=nothing", "does not exist"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2_and_writes_nothing(tmp_path, capsys, override, sentence):
    chosen = override if override.startswith("ablation=") else f"ablation={file_of(tmp_path)}"
    more = [] if override == chosen else [override]
    assert main(["ablate", *TINY, chosen, *more, "--studies", str(tmp_path / "studies")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "studies").exists()


def test_a_study_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["ablate", "--resume", "nothing", "--studies", str(tmp_path)]) == 2
    assert "no study" in capsys.readouterr().err


@pytest.mark.slow
def test_an_ablation_with_tuning_is_run_gone_on_with_and_reported(tmp_path, capsys):
    tuning = {"trials": 2, "space": {"algorithm.critic.lr": {"log_uniform": [1.0e-4, 1.0e-3]}}}
    path = file_of(tmp_path, tuning=tuning, variants={"no_entropy": TWO["no_entropy"]})
    arguments = ["ablate", *TINY, f"ablation={path}", "name=real", "--studies", str(tmp_path / "studies")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "too few seeds, 6 would do" in said
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
