"""The end of a sweep: ranking, leaderboard.csv, best.yaml, figures, and a report that needs no network."""

import base64
import csv
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial
from PIL import Image
from rich.console import Console

from dxmi.config import to_tree
from dxmi.diffusion.schedules.configs import VarScheduleConfig
from dxmi.evaluation.references import references as of_steps
from dxmi.evaluation.scored_references import Role
from dxmi.persistence import checkpoint
from dxmi.persistence.files import write_json
from dxmi.persistence.run_directory import read_yaml
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.run import train
from dxmi.training.schema import config_tree, read_config
from dxmi.visualization.pictures import save_grid
from support import TINY, changed, missing
from tune.config.compose import compose_experiment
from tune.config.sweep import BudgetConfig, ObjectiveConfig, SamplerConfig, SweepConfig
from tune.plans.sweep import Plan
from tune.reporting import samples as pictures
from tune.reporting.figures import StudyReference, importance_obstacle, importances, references, study_figures
from tune.reporting.html import sha256_base64, write_report
from tune.reporting.samples import sample_matrix
from tune.reporting.sentences import course_sentences, result_sentences
from tune.reporting.study_tables import leaderboard_table
from tune.studies.confirmation import confirmations, keep, unconfirmed
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import (
    changed_inputs,
    free_sampler_sentences,
    fresh_sentence,
    leaderboard,
    short_names,
    write_best,
    write_leaderboard,
)
from tune.studies.ranking import pareto_front
from tune.studies.records import Outcome, TrialRecord, TrialState, completed, pruned, unfinished
from tune.studies.study import Study

RATES = {
    "algorithm.policy.lr": {"log_uniform": [1.0e-6, 1.0e-3]},
    "algorithm.entropy_coef": {"log_uniform": [1.0e-3, 1.0]},
}
STEPS = (0, 10, 20, 30, 40)

EVIL = "<script>alert('x')</script> & <img src=http://evil/x.png>"

Score = Callable[[TrialRecord], float]


class Fabricated:
    """A study whose trials end as it is told, without training.

    Args:
        root: a folder for studies.
        space: of the sweep.
        experiment: what the trials vary; digits by default.
        sweep: fields of the sweep's config.
    """

    def __init__(
        self,
        root: Path,
        space: dict | None = None,
        name: str = "made-up",
        experiment: ExperimentConfig | None = None,
        **sweep: object,
    ) -> None:
        settings = {"sampler": SamplerConfig(kind="sobol"), "budget": BudgetConfig(trials=1000), **sweep}
        experiment = experiment or compose_experiment(TINY).experiment
        plan = Plan(name, experiment, SweepConfig(**settings), RATES if space is None else space)
        folder = StudyFolder(root / name)
        folder.path.mkdir(parents=True)
        self.study = Study.drive(folder, plan)

    @property
    def records(self) -> list[TrialRecord]:
        return self.study.records()

    def _begin(self, scores: list[float]) -> TrialRecord:
        record = self.study.add()
        assert record is not None
        for step, score in zip(STEPS, scores, strict=False):
            self.study.score(record.number, step, score)
        return record

    def complete(self, score: float | Score, *, files: bool = True, num_steps: int | None = None) -> TrialRecord:
        record = self.study.add()
        assert record is not None
        value = score(record) if callable(score) else score
        for step in STEPS:
            self.study.score(record.number, step, value * (1.0 + (40 - step) / 20.0))
        config = self.study.config(record)
        summary = _summary(config, value, num_steps or config.schedule.num_steps)
        if files:
            _write_run(record, config, summary)
        self.study.finish(record.number, completed(self.study.plan, summary))
        return self.study.record(record.number)

    def pruned(self, *scores: float) -> TrialRecord:
        record = self._begin(list(scores))
        curve = self.study.curves()[record.number]
        self.study.finish(record.number, pruned(self.study.plan, curve, max(curve), 2.0))
        return self.study.record(record.number)

    def ended(self, state: TrialState, reason: str, *scores: float) -> TrialRecord:
        record = self._begin(list(scores))
        curve = self.study.curves().get(record.number, {})
        self.study.finish(record.number, unfinished(self.study.plan, curve, state, reason, 1.0))
        return self.study.record(record.number)

    def running(self, *scores: float) -> TrialRecord:
        return self._begin(list(scores))

    def report(self) -> str:
        return write_report(self.study, self.records).read_text()


def _summary(config: ExperimentConfig, value: float, num_steps: int) -> dict:
    return {
        "scores": {
            "best": {
                "eval/fid_digits": value,
                "eval/precision_digits": 1.0 / (1.0 + value),
                "eval/recall_digits": 1.0 / (2.0 + value),
            }
        },
        "best": {"value": value, "step": 40, "checkpoint": "checkpoints/step_00000040"},
        "reference": {"ddpm_1000": 5.5, f"ddim_{num_steps}_trailing": 3.36, "shortened": 60.0 / num_steps},
        "samplers": {reference.key: reference.tree for reference in of_steps(VarScheduleConfig(num_steps=num_steps))},
        "num_steps": num_steps,
        "num_samples": 64,
        "seconds": {"pretrain": 0.5, "finetune": 2.0 + num_steps},
        "device": "cpu (x86_64)",
        "threads": 1,
        "git_revision": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"torch": "2.13"},
        "signature": config.signature,
    }


def _write_run(record: TrialRecord, config: ExperimentConfig, summary: dict) -> None:
    record.run.create()
    record.run.write_config(config_tree(config))
    checkpoint.path_of(record.run.checkpoints, 40).mkdir()
    for step in STEPS:
        noise = torch.Generator().manual_seed(step)
        pixels = torch.randint(0, 256, (4, 1, 8, 8), generator=noise, dtype=torch.uint8)
        save_grid(record.run.samples / f"step_{step:06d}.png", pixels)
    record.run.write_summary(summary)


def valley(record: TrialRecord) -> float:
    """Lowest at a rate of 3e-5; the other setting hardly matters."""
    rate, entropy = (record.values[path] for path in RATES)
    return 3.0 + 4.0 * math.log10(rate / 3.0e-5) ** 2 + 0.05 * entropy


@pytest.fixture
def made(tmp_path):
    return lambda *args, **kwargs: Fabricated(tmp_path, *args, **kwargs)


# ----------------------------------------------------------------------------
# The best trial on fresh noise


def confirmed(sweep: Fabricated, *records: TrialRecord, shift: float = 0.5) -> None:
    """Give complete trials scores on fresh noise."""
    for record in records:
        scores = {"eval/fid_digits": record.outcome.score + shift, "eval/precision_digits": 0.125}
        keep(sweep.study.folder, record, {"scores": scores})


def test_the_best_trial_and_each_of_a_front_are_to_be_confirmed_once(made):
    sweep = made()
    assert unconfirmed(sweep.study, sweep.records) == []
    for score in (7.0, 3.0, 5.0):
        sweep.complete(score)
    sweep.running(1.0)
    assert [record.number for record in unconfirmed(sweep.study, sweep.records)] == [1]
    confirmed(sweep, sweep.records[1])
    assert unconfirmed(sweep.study, sweep.records) == []
    sweep.complete(2.0)  # a study that went on has another best trial
    assert [record.number for record in unconfirmed(sweep.study, sweep.records)] == [4]
    assert set(confirmations(sweep.study.folder, sweep.records)) == {1}
    two = made(name="two", objectives=(ObjectiveConfig(), ObjectiveConfig(metric="num_steps")),
               sampler=SamplerConfig(kind="nsga2"))  # fmt: skip
    for score, num_steps in ((7.0, 4), (3.0, 6), (5.0, 8)):
        two.complete(score, num_steps=num_steps)
    assert [record.number for record in unconfirmed(two.study, two.records)] == [1, 0]


def test_a_confirmation_of_another_checkpoint_or_version_does_not_count(made):
    sweep = made()
    best = sweep.complete(3.0)
    for stale in ({"step": 20, "scores": {"eval/fid_digits": 9.0}}, {"step": 40, "scores": {"a": 1.0}, "version": 0}):
        write_json(sweep.study.folder.path / "confirmation.json", {str(best.number): stale})
        assert confirmations(sweep.study.folder, sweep.records) == {}
    for damaged in ("{", "[]", '{"x": {}}', '{"0": {"unknown": 1}}'):
        (sweep.study.folder.path / "confirmation.json").write_text(damaged)
        assert confirmations(sweep.study.folder, sweep.records) == {}
    assert len(unconfirmed(sweep.study, sweep.records)) == 1


def test_the_score_on_fresh_noise_stands_beside_the_one_that_chose(made):
    sweep = made()
    for score in (7.0, 3.0, 5.0):
        sweep.complete(score)
    confirmed(sweep, sweep.records[1])
    frame = leaderboard(sweep.study.plan, sweep.records)
    assert list(frame["fresh_score"].fillna(-1.0)) == [3.5, -1.0, -1.0]
    sentence = fresh_sentence(sweep.study.plan, sweep.records)
    assert missing("fresh noise … trial 1 … fid_digits … 3.50", sentence) == []
    assert sentence in sweep.report()
    assert sentence in " ".join(shown(sweep).split())
    path = write_best(sweep.study, sweep.records)
    assert f"# {sentence}\n" in path.read_text()
    write_leaderboard(sweep.study, sweep.records)
    assert "fresh_score" in sweep.study.folder.leaderboard.read_text().partition("\n")[0]


def test_another_objective_and_a_maximum_are_confirmed_too(made):
    objective = ObjectiveConfig(metric="eval/precision_digits", direction="maximize")
    sweep = made(objectives=(objective,))
    for score in (7.0, 3.0):
        sweep.complete(score)
    confirmed(sweep, sweep.records[1])
    frame = leaderboard(sweep.study.plan, sweep.records)
    assert list(frame["fresh_precision_digits"].fillna(-1.0)) == [0.125, -1.0]
    assert missing("trial 1 … precision_digits … 0.125", fresh_sentence(sweep.study.plan, sweep.records)) == []


@pytest.mark.parametrize("problem", ["", "made up"])
def test_a_best_trial_without_a_fresh_score_is_said(made, problem):
    """Its checkpoint was deleted, or scoring it failed."""
    sweep = made()
    best = sweep.complete(3.0)
    assert missing("not ended", fresh_sentence(sweep.study.plan, sweep.records)) == []
    shutil.rmtree(best.run.checkpoints)
    if problem:
        keep(sweep.study.folder, best, {"problem": problem})
    sentence = fresh_sentence(sweep.study.plan, sweep.records)
    assert missing(f"Trial 0 … no score … {problem or 'checkpoint'}", sentence) == []
    assert sentence in sweep.report()
    assert sentence in write_best(sweep.study, sweep.records).read_text()
    assert unconfirmed(sweep.study, sweep.records) == []


# ----------------------------------------------------------------------------
# Ranking, the data frame, the CSV, the terminal


def test_the_leaderboard_is_in_rank_order_with_every_column(made):
    sweep = made()
    for score in (7.0, 3.0, 5.0):
        sweep.complete(score)
    sweep.pruned(9.0, 2.0)
    sweep.ended(TrialState.FAILED, "RuntimeError: boom")
    sweep.running(8.0)
    frame = leaderboard(sweep.study.plan, sweep.records)
    assert list(frame.columns) == [
        "rank", "trial", "state", "score", "eval/precision_digits", "eval/recall_digits", "step", *RATES, "seconds",
        "signature", "checkpoint", "reason",
    ]  # fmt: skip
    assert list(frame["eval/precision_digits"].fillna(-1.0)) == [1 / 4, 1 / 6, 1 / 8, -1.0, -1.0, -1.0]
    assert list(frame["eval/recall_digits"].fillna(-1.0)) == [1 / 5, 1 / 7, 1 / 9, -1.0, -1.0, -1.0]
    assert frame["trial"].tolist() == [1, 2, 0, 3, 4, 5]
    assert frame["rank"].tolist()[:3] == [1, 2, 3]
    assert frame["rank"].isna().tolist() == [False] * 3 + [True] * 3  # 2.0 is on the noise that chose it: no rank
    assert frame["score"].tolist()[:4] == [3.0, 5.0, 7.0, 2.0]
    assert frame["checkpoint"].tolist() == [f"trials/{n:04d}/checkpoints/step_00000040" for n in (1, 2, 0)] + [""] * 3
    assert frame["reason"].tolist()[3:] == ["fell behind at iteration 10", "RuntimeError: boom", ""]
    first = sweep.records[1]
    assert frame.loc[0, list(RATES)].tolist() == list(first.values.values())
    assert frame.loc[0, "signature"] == first.signature


def test_a_metric_that_is_to_grow_ranks_the_other_way(made):
    sweep = made(objectives=(ObjectiveConfig(metric="eval/precision_digits", direction="maximize"),))
    for score in (3.0, 9.0, 1.0):
        sweep.complete(score)
    frame = leaderboard(sweep.study.plan, sweep.records)
    assert frame["trial"].tolist() == [2, 0, 1]
    assert frame["eval/precision_digits"].tolist() == [0.5, 0.25, 0.1]
    assert missing("1000 steps … DDPM … 5.50 … 5 steps … DDIM … 3.36", sweep.report()) == []


def test_an_objective_called_seconds_does_not_hide_the_seconds_of_the_trial(made):
    sweep = made(sampler=SamplerConfig(kind="nsga2"), objectives=(ObjectiveConfig(), ObjectiveConfig(metric="seconds")))
    sweep.complete(3.0)
    frame = leaderboard(sweep.study.plan, sweep.records)
    assert frame["finetune_seconds"].tolist() == [7.0]
    assert frame["seconds"].tolist() == [7.5]


def test_names_are_as_short_as_they_can_be_without_meaning_something_else(made):
    space = {
        "algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]},
        "algorithm.entropy_coef": {"uniform": [0, 1]},
        "schedule.num_steps": {"integer": [4, 6]},
        "pretrain.iterations": {"choice": [60, 70]},
    }
    names = list(short_names(made(space).study.plan).values())
    assert names == ["policy.lr", "entropy_coef", "num_steps", "pretrain.iterations"]
    both = (ObjectiveConfig(), ObjectiveConfig(metric="num_steps"))
    plan = made(space, name="two", sampler=SamplerConfig(kind="nsga2"), objectives=both).study.plan
    assert short_names(plan)["schedule.num_steps"] == "schedule.num_steps"  # num_steps is the objective's column


def test_the_csv_has_one_line_a_trial_and_no_formula(made):
    sweep = made({**RATES, "algorithm.value_mask": {"choice": [None, [1, 1, 1, 0, 0]]}})
    sweep.complete(3.25)
    sweep.ended(TrialState.FAILED, "=HYPERLINK(1)\nsecond line, with a comma", 4.0)
    sweep.ended(TrialState.FAILED, "  @SUM(1)")
    sweep.ended(TrialState.DIVERGED, "policy/entropy is -inf at iteration 3")
    write_leaderboard(sweep.study, sweep.records)
    text = sweep.study.folder.leaderboard.read_text()
    assert len(text.splitlines()) == 5
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["rank"] == "1"
    assert rows[1]["rank"] == rows[2]["score"] == ""
    assert float(rows[0]["algorithm.policy.lr"]) == sweep.records[0].values["algorithm.policy.lr"]
    assert {row["algorithm.value_mask"] for row in rows} == {"null", "[1, 1, 1, 0, 0]"}
    assert rows[1]["reason"] == "'=HYPERLINK(1) second line, with a comma"
    assert rows[2]["reason"] == "'@SUM(1)"
    assert rows[3]["reason"] == "policy/entropy is -inf at iteration 3"


def test_a_negative_number_in_the_csv_stays_a_number(made, monkeypatch):
    sweep = made()
    sweep.complete(3.0)
    frame = leaderboard(sweep.study.plan, sweep.records)
    frame["score"] = -3.5
    monkeypatch.setattr("tune.studies.leaderboard.leaderboard", lambda *_: frame)
    write_leaderboard(sweep.study, sweep.records)
    (row,) = csv.DictReader(io.StringIO(sweep.study.folder.leaderboard.read_text()))
    assert row["score"] == "-3.5"


def shown(sweep: Fabricated, limit: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(leaderboard_table(sweep.study.plan, sweep.records, limit=limit))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_a_terminal_and_lists_failures_beyond_the_limit(made):
    sweep = made()
    for score in (7.0, 3.0, 5.0):
        sweep.complete(score)
    sweep.pruned(9.0, 2.0)
    sweep.ended(TrialState.FAILED, "RuntimeError: [red]boom[/red] \x1b[31m")
    text = shown(sweep, limit=1)
    assert "policy.lr  entropy_coef" in text
    assert "trials/0001/checkpoints/step_00000040" in "".join(text.split())  # folded, not cut
    assert "failed: RuntimeError: [red]boom[/red]" in " ".join(text.split())
    assert "\x1b" not in text
    assert "3.00" in text
    assert "5.00" not in text
    assert "3 more trials" in text
    assert "2.00*" in shown(sweep)
    assert "not comparable" in " ".join(shown(sweep).split())


def test_many_settings_share_a_column_so_that_no_number_is_cut(made):
    more = {f"algorithm.{name}": {"uniform": [0.01, 1]} for name in ("cost_coef", "energy_l2", "step_cost_scale")}
    sweep = made({**RATES, **more})
    record = sweep.complete(3.0)
    words = shown(sweep).replace(",", " ").split()
    for path in more:
        assert {path.removeprefix("algorithm."), f"{record.values[path]:.3g}"} <= {*words}
    assert all(len(line) <= 100 for line in shown(sweep).splitlines())


# ----------------------------------------------------------------------------
# best.yaml


def test_best_yaml_trains_again_to_the_same_numbers(made):
    sweep = made()
    study = sweep.study
    sweep.complete(5000.0)  # worse than any training
    record = study.add()
    summary = train(Experiment(study.config(record)), out=record.run.path)
    assert summary is not None
    study.finish(record.number, completed(study.plan, record.run.read_summary()))
    path = write_best(study, sweep.records)
    assert path == study.folder.best
    config = read_config(read_yaml(path, "")).config
    assert config.signature == record.signature == summary.signature
    again = train(Experiment(config), out=study.folder.path / "again")
    assert again is not None
    assert (again.best, again.scores) == (summary.best, summary.scores)
    head = path.read_text().splitlines()[:3]
    assert f"trial {record.number}" in head[0]
    assert f"{summary.best['value']:.6g}" in head[1]
    assert record.signature in head[2]


def test_best_yaml_has_the_threads_that_the_trial_had(made):
    sweep = made()
    record = sweep.complete(3.0)
    tree = to_tree(sweep.study.config(record))
    tree["resources"]["threads"] = 7
    record.run.write_config(tree)
    path = write_best(sweep.study, sweep.records)
    assert path is not None
    assert read_yaml(path, "")["resources"]["threads"] == 7


def test_there_is_no_best_without_a_complete_trial(made):
    sweep = made()
    sweep.pruned(9.0, 2.0)
    sweep.ended(TrialState.FAILED, "boom", 1.0)
    assert write_best(sweep.study, sweep.records) is None
    assert not sweep.study.folder.best.exists()


# ----------------------------------------------------------------------------
# The report is one file that needs nothing


class Page(HTMLParser):
    """Tags in order, attributes, text; complains of a tag that is not closed."""

    _VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(
            re.sub(r'<wbr>|<span class="(?:interval|numeral)">([^<]*)</span>', r"\1", text)
        )  # no words of their own
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def require_self_contained(text: str) -> Page:
    page = Page(text)
    assert "link" not in page.tags
    assert "@import" not in text
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"{tag} has a handler {name}"
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), f"{tag} refers to {value[:60]}"
    assert all(target.startswith(('"#', "#")) for target in re.findall(r"url\(([^)]*)\)", text))
    assert page.tags.count("script") == 1
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "http" not in policy
    return page


def a_full_study(sweep: Fabricated) -> Fabricated:
    for _ in range(9):
        sweep.complete(valley)
    sweep.pruned(30.0, 40.0)
    sweep.ended(TrialState.STOPPED, "trial time used up", 30.0, 20.0)
    sweep.ended(TrialState.DIVERGED, "value/td_error is nan at iteration 23", 20.0, 1e6)
    sweep.ended(TrialState.FAILED, EVIL)
    sweep.running(30.0)
    sweep.study.folder.write_progress(200.0, "every planned trial has ended")
    return sweep


@pytest.mark.draws
def test_the_report_tells_everything_and_needs_no_network(made):
    sweep = a_full_study(made())
    page = require_self_contained(sweep.report())
    best = min((record for record in sweep.records if record.state is TrialState.COMPLETE), key=valley)
    result = " ".join(result_sentences(sweep.study.plan, sweep.records))
    assert missing(f"Trial {best.number} … best … fid_digits … {valley(best):.2f}", result) == []
    course = " ".join(course_sentences(sweep.study, sweep.records))
    counts = "9 complete … 1 pruned … 1 stopped … 1 diverged … 1 failed … 1 running"
    assert missing(f"14 of 1000 … {counts} … 3:20 min … every planned trial has ended", course) == []
    assert result in page.text
    assert course in page.text
    assert missing("1000 steps … DDPM … 5.50 … 5 steps … DDIM … 3.36", page.text) == []
    for heading in ("Leaderboard", "Score curves", "Settings", "Importance", "Samples", "Failed and diverged trials"):
        assert heading in page.words
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == 8 * 5
    assert "dxmi train --config studies" not in page.text  # the folder's own name, not an assumed one
    assert f"dxmi train --config {sweep.study.folder.path.parent.name}/made-up/best.yaml" in page.text
    assert sweep.study.plan.signature in page.text
    assert "0123456789ab" in page.text


def test_what_a_crash_said_is_shown_as_text(made):
    sweep = made()
    sweep.ended(TrialState.FAILED, EVIL)
    text = sweep.report()
    assert "<script>alert" not in text
    assert EVIL in require_self_contained(text).text


def test_the_script_is_the_one_that_the_policy_allows(made):
    text = made().report()
    (allowed,) = re.findall(r"script-src 'sha256-([^']*)'", text.replace("&#39;", "'"))
    (script,) = re.findall(r"<script>(.*)</script>", text, flags=re.DOTALL)
    assert sha256_base64(script) == allowed


@pytest.mark.draws
def test_two_writes_differ_in_the_time_only(made, monkeypatch):
    sweep = a_full_study(made())
    monkeypatch.setattr("tune.reporting.html.timestamp", lambda: "2026-01-01 00:00:00 UTC")
    first = sweep.report()
    again = Study.read(sweep.study.folder)
    assert write_report(again, again.records()).read_text() == first
    monkeypatch.setattr("tune.reporting.html.timestamp", lambda: "2026-01-01 00:00:01 UTC")
    later = sweep.report()
    assert later != first
    assert later.replace("00:00:01 UTC", "00:00:00 UTC") == first


# ----------------------------------------------------------------------------
# Training-free samplers


def test_the_report_says_when_a_free_sampler_beats_the_best_trial_and_marks_the_better_one(made):
    sweep = made()
    sweep.complete(4.0)
    (said,) = free_sampler_sentences(sweep.study.plan, sweep.records)
    assert missing("5 steps … DDIM … fid_digits … 3.36 … better … trial 0 … 4.00", said) == []
    text = sweep.report()
    assert said in Page(text).text
    assert missing("5 steps … DDIM", best_row(text)) == []
    sweep.complete(3.0)
    assert free_sampler_sentences(sweep.study.plan, sweep.records) == []
    text = sweep.report()
    assert said.partition(",")[0] not in text
    assert missing("trial 1", best_row(text)) == []


def best_row(text: str) -> str:
    """The marked row of the table of samplers, the first of a report."""
    (row,) = re.findall(r'<tr class="best">.*</tr>', text.partition("</table>")[0])
    return row


def test_trials_on_a_front_that_free_samplers_beat_are_named(made):
    both = (ObjectiveConfig(), ObjectiveConfig(metric="num_steps"))
    sweep = made({**RATES, "schedule.num_steps": {"integer": [4, 6]}}, objectives=both)
    for _ in range(6):
        sweep.complete(lambda record: 3.0 if record.values["schedule.num_steps"] == 6 else 4.0)
    sentences = free_sampler_sentences(sweep.study.plan, sweep.records)
    front = {r.values["schedule.num_steps"]: r.number for r in pareto_front(sweep.study.plan, sweep.records)}
    assert set(front) == {4, 6}
    (sentence,) = sentences
    assert missing(f"4 steps … DDIM … trial {front[4]} … 4.00", sentence) == []
    assert missing(f"trial {front[6]}", sentence) != []


def test_a_score_that_is_to_grow_plays_no_part_in_what_is_better(made):
    """Precision ranks the trials, but the references are compared by the FID."""
    sweep = made(objectives=(ObjectiveConfig(metric="eval/precision_digits", direction="maximize"),))
    sweep.complete(3.0)
    assert free_sampler_sentences(sweep.study.plan, sweep.records) == []
    sweep.complete(2.0)
    sweep.complete(9.0)
    assert free_sampler_sentences(sweep.study.plan, sweep.records) == []  # the best trial has 2.0


def test_real_data_and_references_stand_above_the_samples(made):
    sweep = made()
    record = sweep.complete(4.0)
    assert sample_matrix(sweep.study.plan, sweep.records).strips == []  # as of a study from before they were drawn
    noise = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    for name in ("data", "few"):
        save_grid(record.run.reference_picture(name), noise)
    record.run.reference_picture("full").write_bytes(b"no picture")
    data, few = sample_matrix(sweep.study.plan, sweep.records).strips
    assert missing("data", data.name) == []
    assert missing("5 steps … DDIM", few.name) == []
    assert missing("3.36", few.note) == []
    assert few.cells == 1.0
    assert len(few.picture) > 100
    page = require_self_contained(sweep.report())
    assert page.tags.count("img") == len(STEPS) + 2
    assert data.name in page.text


@pytest.mark.parametrize("experiment", ["digits", "moons"])
def test_the_model_with_all_of_its_steps_stands_there_too(made, experiment):
    sweep = made(experiment=compose_experiment([f"experiment={experiment}", *TINY[1:]]).experiment)
    record = sweep.complete(4.0)
    for name in ("data", "full", "few", "ddpm_5_trailing"):  # the last one is not in this summary
        save_grid(record.run.reference_picture(name), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8))
    strips = sample_matrix(sweep.study.plan, sweep.records).strips
    for strip, facts in zip(strips, ("data", "1000 steps … DDPM", "5 steps … DDIM"), strict=True):
        assert missing(facts, strip.name) == []
    assert [strip.note.partition(",")[0] for strip in strips[1:]] == ["5.50", "3.36"]


def test_a_strip_shows_the_whole_width_of_a_grid_and_the_rows_of_the_trials_pictures(made):
    experiment = compose_experiment(changed(TINY, "evaluate.grid=64")).experiment
    sweep = made(experiment=experiment)
    record = sweep.complete(4.0)
    pixels = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    for path in (record.run.reference_picture("data"), *(record.run.samples / f"step_{s:06d}.png" for s in STEPS)):
        save_grid(path, pixels)
    matrix = sample_matrix(sweep.study.plan, sweep.records)
    (strip,) = matrix.strips
    width, height = opened(strip.picture).size
    assert opened(matrix.rows[0].pictures[0]).size == (height, height)
    assert (width, height) == (8 * 34 + 2, 4 * 34 + 2)  # of 32 pixels and a gap
    assert strip.cells == 2.0


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


# ----------------------------------------------------------------------------
# Studies in any state


def test_a_study_without_trials(made):
    sweep = made()
    page = require_self_contained(sweep.report())
    assert (
        missing(
            "No trial … 1000", " ".join([*result_sentences(sweep.study.plan, []), *course_sentences(sweep.study, [])])
        )
        == []
    )
    assert "Leaderboard" not in page.words
    assert study_figures(sweep.study, []) == {}
    assert leaderboard(sweep.study.plan, []).empty
    assert "policy.lr" in shown(sweep)


def test_a_study_whose_trials_all_failed(made):
    sweep = made()
    for _ in range(3):
        sweep.ended(TrialState.FAILED, "it died without a word")
    page = require_self_contained(sweep.report())
    assert missing("No trial is complete", page.text) == []
    assert page.text.count("it died without a word") == 6  # in the leaderboard and among the failures
    assert "svg" not in page.tags


def test_a_study_of_one_trial_and_one_setting(made):
    sweep = made({"algorithm.policy.lr": RATES["algorithm.policy.lr"]})
    sweep.complete(3.0)
    assert set(study_figures(sweep.study, sweep.records)) == {"curves", "slices"}
    page = require_self_contained(sweep.report())
    assert missing("one setting", page.text) == []


def test_choices_of_null_lists_and_booleans(made):
    space = {
        "algorithm.value_mask": {"choice": [None, [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]},
        "algorithm.all_states": {"choice": [False, True]},
        "algorithm.target_ema": {"choice": [None, 0.99]},
    }
    sweep = made(space)
    for index in range(7):
        sweep.complete(3.0 + index)
    page = require_self_contained(sweep.report())
    assert "[1, 1, 1, 1, 0]" in page.words
    assert "null" in page.words
    assert "false" in page.words
    assert page.tags.count("svg") == 4
    mask, states, _ = study_figures(sweep.study, sweep.records)["slices"].axes
    assert [tick.get_text() for tick in mask.get_xticklabels()] == ["null", "[1, 1, 1, 1, 0]", "[1, 1, 1, 0, 0]"]
    drawn = sorted(float(x) for line in states.lines for x in line.get_xdata())
    false, true = ([x for x in drawn if abs(x - place) < 0.2] for place in (0, 1))
    assert len(false) == sum(record.values["algorithm.all_states"] is False for record in sweep.records)
    assert len(false) + len(true) == 7


def test_a_trial_that_shares_the_result_of_another_says_so_and_is_not_drawn_twice(made):
    sweep = made({"algorithm.preset": {"choice": ["as_released", "objective"]}})
    for _ in range(3):
        sweep.complete(3.0)
    (twin,) = [record for record in sweep.records if record.same_as is not None]
    reasons = leaderboard(sweep.study.plan, sweep.records).set_index("trial")["reason"]
    assert missing(f"same config … trial {twin.same_as}", reasons[twin.number]) == []
    matrix = sample_matrix(sweep.study.plan, sweep.records)
    assert matrix is not None
    assert len(matrix.rows) == 2


def test_a_run_folder_that_is_gone_or_damaged_spoils_no_report(made):
    sweep = made()
    sweep.complete(3.0, files=False)
    sweep.complete(2.0, files=False).run.create()
    sweep.records[1].run.write_summary({"from": "another version"})
    damaged = sweep.complete(4.0)
    damaged.run.summary.write_text("{")
    (damaged.run.samples / "step_000010.png").write_bytes(b"no picture")
    page = require_self_contained(sweep.report())
    assert missing("Trial 1 … best", " ".join(result_sentences(sweep.study.plan, sweep.records))) == []
    assert "1000 steps" not in page.text
    matrix = sample_matrix(sweep.study.plan, sweep.records)
    assert matrix is not None
    assert matrix.steps == list(STEPS)
    (row,) = matrix.rows
    assert [bool(picture) for picture in row.pictures] == [True, False, True, True, True]


def test_the_matrix_holds_steps_that_all_have_and_stays_small(made, monkeypatch):
    sweep = made()
    for score in range(12):
        sweep.complete(float(score + 1))
    (sweep.records[3].run.samples / "step_000020.png").unlink()
    matrix = sample_matrix(sweep.study.plan, sweep.records)
    assert matrix is not None
    assert matrix.steps == [0, 10, 30, 40]
    assert [row.trial for row in matrix.rows] == [f"trial {n}" for n in (0, 1, 2, 3, 4, 5, 6, 11)]
    size = sum(len(picture) for row in matrix.rows for picture in row.pictures)
    monkeypatch.setattr(pictures, "_MAX_SAMPLE_BYTES", size - 1)
    smaller = sample_matrix(sweep.study.plan, sweep.records)
    assert smaller is not None
    assert sum(len(picture) for row in smaller.rows for picture in row.pictures) < size


def test_figures_of_points_are_shown_whole_and_small(made, tmp_path):
    """A grid of images is cut, since a part of it says as much; half of a figure says nothing."""
    sweep = made(experiment=compose_experiment(["experiment=moons", *TINY[1:]]).experiment)
    record = sweep.complete(3.0)
    corners = Image.new("RGB", (462, 462), "white")
    corners.putpixel((461, 461), (0, 0, 0))
    corners.paste((255, 0, 0), (360, 360, 462, 462))
    for step in STEPS:
        corners.save(record.run.samples / f"step_{step:06d}.png")
    matrix = sample_matrix(sweep.study.plan, sweep.records)
    assert matrix is not None
    assert matrix.are_figures
    picture = opened(matrix.rows[0].pictures[0])
    assert picture.size == (240, 240)
    assert picture.getpixel((225, 225)) == (255, 0, 0)
    assert 'class="samples figures"' in sweep.report()


def test_the_best_trials_energy_and_value_are_shown_where_they_were_drawn(made):
    sweep = made(experiment=compose_experiment(["experiment=moons", *TINY[1:]]).experiment)
    records = [sweep.complete(score) for score in (3.0, 2.0)]
    assert 'id="maps"' not in sweep.report()
    for record in records:
        for what in ("energy", "values"):
            Image.new("RGB", (50, 20)).save(record.run.samples / f"{what}.png")
    page = sweep.report()
    assert f'alt="Energy of trial {records[1].number}, the best' in page
    assert f'alt="Energy of trial {records[0].number}' not in page


def test_three_hundred_trials_are_all_listed_in_a_small_file(made):
    sweep = made({**RATES, "algorithm.critic.lr": {"log_uniform": [1e-5, 1e-3]}})
    add_many(sweep, 300)
    text = sweep.report()
    page = require_self_contained(text)
    numbers = leaderboard(sweep.study.plan, sweep.records)["trial"].tolist()
    assert sorted(numbers) == list(range(300))
    body = text.split('class="sortable')[1].split("</table>")[0]
    assert body.count("<tr") == 301
    assert page.text.count("no space left") == 2 * 30
    assert len(text) < 1_500_000


def add_many(sweep: Fabricated, count: int) -> None:
    """Trials put into the journal at once, since one by one each looks at all before it."""
    plan, trials = sweep.study.plan, []
    for number in range(count):
        units = ((number * ratio) % 1.0 for ratio in (0.618034, 0.754878, 0.569840))
        values = {axis.path: axis.at(unit) for axis, unit in zip(plan.axes, units, strict=True)}
        kind = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.DIVERGED)[number % 10 // 4]
        kind = TrialState.FAILED if number % 10 == 9 else kind
        score = 5.0 + (number * 0.414214) % 1.0
        outcome = Outcome(kind, {"failed": "no space left"}.get(kind, ""), score, 40, (score,), 3.0)
        about = {"signature": f"{number:012x}", "seed": 0, "same_as": None, "outcome": asdict(outcome)}
        trials.append(
            create_trial(
                state={"complete": OptunaState.COMPLETE, "pruned": OptunaState.PRUNED}.get(kind, OptunaState.FAIL),
                value=score if kind is TrialState.COMPLETE else None,
                params={axis.path: values[axis.path] for axis in plan.axes},
                distributions={axis.path: axis.distribution for axis in plan.axes},
                user_attrs={"dxmi": about},
                intermediate_values={step: score + 40.0 - step for step in STEPS},
            )
        )
    sweep.study.optuna.add_trials(trials)


# ----------------------------------------------------------------------------
# Figures


def test_importance_finds_the_setting_that_matters(made):
    sweep = made()
    for _ in range(12):
        sweep.complete(valley)
    shares = importances(sweep.study.plan, sweep.records)
    assert list(shares) == ["algorithm.policy.lr", "algorithm.entropy_coef"]
    assert shares["algorithm.policy.lr"] > 0.8
    assert shares == importances(sweep.study.plan, sweep.records)


def test_importance_weighs_every_decade_of_a_log_range_alike(made):
    """Only below 3e-5 the rate matters: a hundredth of the range, but half of its decades."""
    sweep = made()

    def score(record: TrialRecord) -> float:
        rate, entropy = (record.values[path] for path in RATES)
        return (9.0 if rate < 3e-5 else 3.0) + 0.5 * entropy

    for _ in range(16):
        sweep.complete(score)
    assert importances(sweep.study.plan, sweep.records)["algorithm.policy.lr"] > 0.9


def test_importance_needs_enough_complete_trials_that_differ(made):
    sweep = made()
    for _ in range(5):
        sweep.complete(valley)
    sweep.pruned(9.0, 2.0)
    obstacle = importance_obstacle(sweep.study.plan, sweep.records)
    assert missing("5 … 6", obstacle) == []
    assert "importances" not in study_figures(sweep.study, sweep.records)
    assert obstacle in Page(sweep.report()).text
    sweep.complete(valley)
    assert "importances" in study_figures(sweep.study, sweep.records)
    same = made(name="same")
    for _ in range(6):
        same.complete(3.0)
    assert "same result" in importance_obstacle(same.study.plan, same.records)
    assert "importances" not in study_figures(same.study, same.records)


def test_a_pareto_front_is_shown_where_there_are_two_objectives(made):
    space = {**RATES, "schedule.num_steps": {"integer": [4, 6]}}
    both = (ObjectiveConfig(), ObjectiveConfig(metric="num_steps"))
    sweep = made(space, sampler=SamplerConfig(kind="sobol"), objectives=both)
    for _ in range(8):
        sweep.complete(lambda record: 12.0 - record.values["schedule.num_steps"] + record.number / 100.0)
    figures = study_figures(sweep.study, sweep.records)
    assert "pareto" in figures
    front = {4: None, 5: None, 6: None}
    for record in reversed(sweep.records):
        front[record.values["schedule.num_steps"]] = record.number
    label = figures["pareto"].get_label()
    assert label.endswith(f"{front[6]}, {front[5]}, {front[4]}")
    page = require_self_contained(sweep.report())
    assert missing("3 trials … Pareto front", page.text) == []
    one = made(name="one")
    one.complete(3.0)
    assert "pareto" not in study_figures(one.study, one.records)
    assert "Pareto front" not in Page(one.report()).words


def test_references_are_lines_only_where_all_trials_share_them(made):
    sweep = made({**RATES, "schedule.num_steps": {"integer": [4, 6]}})
    for _ in range(4):
        sweep.complete(3.0)
    steps = {record.values["schedule.num_steps"] for record in sweep.records}
    assert len(steps) > 1
    assert references(sweep.records) == [
        StudyReference("1000 steps (DDPM, small variance)", 5.5, 5.5, True, Role.FULL, (1000, 1000)),
        StudyReference("T steps (DDIM, trailing)", 3.36, 3.36, False, Role.FEW, (min(steps), max(steps))),
        StudyReference(
            "T steps, before", 60.0 / max(steps), 60.0 / min(steps), False, Role.SHORTENED, (min(steps), max(steps))
        ),
    ]
    label = study_figures(sweep.study, sweep.records)["curves"].get_label()
    assert missing("1000 steps … DDPM … 5.50", label) == []
    assert "DDIM" not in label
    assert missing("T steps … depends", Page(sweep.report()).text) == []


def lines_of(figure: mpl.figure.Figure, color: str) -> list[mpl.lines.Line2D]:
    (axes,) = figure.axes
    return [line for line in axes.lines if line.get_color() == color and len(line.get_xdata()) > 1]


def test_curves_end_where_a_trial_was_stopped_and_the_best_stands_out(made):
    sweep = made()
    sweep.complete(5.0)
    sweep.complete(3.0)
    sweep.pruned(30.0, 40.0)
    figure = study_figures(sweep.study, sweep.records)["curves"]
    (best,) = lines_of(figure, "#d55e00")
    assert list(best.get_ydata()) == list(sweep.study.curves()[1].values())
    (pruned,) = lines_of(figure, "#8c959f")
    assert list(pruned.get_xdata()) == [0, 10]
    assert pruned.get_alpha() < 1.0


def test_a_trial_that_explodes_does_not_press_the_others_flat(made):
    sweep = made()
    sweep.complete(3.0)
    sweep.complete(5.0)
    sweep.ended(TrialState.DIVERGED, "nan", 9.0, 1e9)
    (axes,) = study_figures(sweep.study, sweep.records)["curves"].axes
    assert axes.get_ylim()[1] < 100.0


def test_slices_have_the_scale_of_the_search_and_hollow_early_stops(made):
    sweep = made({**RATES, "schedule.kappa": {"uniform": [0.1, 0.9]}})
    for _ in range(3):
        sweep.complete(valley)
    sweep.pruned(6.0, 7.0)
    figure = study_figures(sweep.study, sweep.records)["slices"]
    rate, _, kappa = figure.axes
    assert rate.get_xlabel() == "policy.lr (log)"
    assert kappa.get_xlabel() == "kappa"
    assert [tick.get_text() for tick in rate.get_xticklabels()] == ["1e-06", "1e-05", "0.0001", "0.001"]
    hollow = [line for line in rate.lines if line.get_markerfacecolor() == "none"]
    assert [len(line.get_xdata()) for line in hollow] == [1]
    assert hollow[0].get_ydata() == [6.0]


def test_a_best_value_at_the_edge_of_its_range_is_pointed_out(made):
    sweep = made(sampler=SamplerConfig(kind="grid"), space={"algorithm.entropy_coef": {"uniform": [0, 1], "points": 3}})
    for score in (5.0, 4.0, 3.0):
        sweep.complete(score)
    assert missing("entropy_coef … upper end … range [0, 1]", Page(sweep.report()).text) == []
    inside = made(name="inside", sampler=SamplerConfig(kind="grid"), space=dict(sweep.study.plan.space))
    for score in (5.0, 3.0, 4.0):
        inside.complete(score)
    assert "upper end" not in Page(inside.report()).text


def test_sentences_name_the_budget_and_why_the_session_ended(made):
    sweep = made(budget=BudgetConfig(trials=5, wall_minutes=30.0))
    sweep.complete(3.0)
    sweep.study.folder.write_progress(600.0, "the budget of 30 minutes is used up")
    facts = ("1 of 5 … 1 complete", "10:00 min … 30:00 min", "the budget of 30 minutes is used up")
    for fact, sentence in zip(facts, course_sentences(sweep.study, sweep.records), strict=True):
        assert missing(fact, sentence) == []
    assert missing("Trial 0 … best", result_sentences(sweep.study.plan, sweep.records)[0]) == []


def _score_with(record: TrialRecord, signature: str) -> None:
    summary = record.run.read_summary()
    record.run.write_summary({**summary, "scored_with": {"reference": signature}})


def test_data_that_changed_while_a_study_went_on_are_told_of(tmp_path):
    study = Fabricated(tmp_path)
    for number, signature in enumerate(("aaa", "aaa", "bbb")):
        _score_with(study.complete(5.0 + number), signature)
        said = changed_inputs(study.study.plan, study.records)
        assert bool(said) == (number == 2)
    assert missing("data … changed … aaa … trial 0 … bbb … trial 2", said) == []
    assert said in study.report()


def test_public_weights_that_changed_while_a_study_went_on_are_told_of(tmp_path):
    study = Fabricated(tmp_path)
    for number, signature in enumerate(("aaa", "bbb")):
        record = study.complete(5.0 + number)
        record.run.write_summary({**record.run.read_summary(), "inputs": {"data": "same", "weights": signature}})
    said = changed_inputs(study.study.plan, study.records)
    assert missing("pretrain.weights … changed … aaa … trial 0 … bbb … trial 1", said) == []


def test_trials_that_ask_for_other_data_may_have_them(tmp_path):
    space = {"data.label": {"choice": [1, 2]}, **RATES}
    study = Fabricated(tmp_path, space)
    for _ in range(6):
        record = study.complete(5.0)
        _score_with(record, str(record.values["data.label"]))
    assert changed_inputs(study.study.plan, study.records) == ""


def test_the_table_of_samplers_has_precision_and_recall(made):
    sweep = made()
    record = sweep.complete(4.0)
    summary = json.loads((record.run.path / "summary.json").read_text())
    summary["scores"]["ddim_5_trailing"] = {"eval/precision_digits": 0.551, "eval/recall_digits": 0.919}
    record.run.write_summary(summary)
    text = " ".join(require_self_contained(sweep.report()).text.split())
    assert re.search(r"DDIM[^)]*\) 5 3\.36 0\.551 0\.919", text)
    assert re.search(r"trial 0 5 4\.00 0\.2 0\.167", text)
