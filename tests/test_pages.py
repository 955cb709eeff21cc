"""MLflow shows a study's curves at the addresses that are printed; the report fits into a window."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from browser import Browser
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import tune.cli.sweeps
import tune.cli.ui
import tune.reporting.pages
from dxmi.persistence.checkpoint import path_of
from dxmi.training.schema import config_tree
from dxmi.visualization.pictures import save_grid
from support import TINY, drawn_figures, free_port, missing
from tune.api.sweep import SweepResult
from tune.cli.main import main
from tune.config.ablation import parse_ablation
from tune.config.compose import compose_experiment
from tune.config.sweep import BudgetConfig, SamplerConfig, SweepConfig, TrackingConfig
from tune.integrations.mlflow_store import KIND_TAG, TRAINING_KIND, MlflowWriter, experiment_id, open_store, open_writer
from tune.integrations.mlflow_tracker import Tracker
from tune.plans.ablation import AblationPlan, ablation_plan
from tune.plans.arms import arms
from tune.plans.sweep import Plan
from tune.reporting.html import write_report
from tune.reporting.pages import artifact_page, curves_page, newest_pages, study_pages, trials_page
from tune.reporting.tables import HtmlTable, breakable
from tune.studies.folder import StudyFolder
from tune.studies.records import completed
from tune.studies.study import Study

RATE = {"algorithm.policy.lr": {"log_uniform": [1.0e-6, 1.0e-3]}}
SERVER = "http://127.0.0.1:5000"


def sweep_plan(name: str = "lr-1", *, experiment: str = "digits", space: dict | None = None, **tracking) -> Plan:
    settings = SweepConfig(sampler=SamplerConfig(kind="sobol"), budget=BudgetConfig(trials=20))
    config = compose_experiment([f"experiment={experiment}", *TINY[1:]]).experiment
    return Plan(name, config, settings, space or RATE, TrackingConfig(**tracking))


def ablation(name: str, variants: dict, **given) -> AblationPlan:
    experiment = compose_experiment(TINY).experiment
    config = parse_ablation({"hypothesis": "Something matters.", "variants": variants, "seeds": 2, **given})
    return ablation_plan(name, experiment, config, arms(config, experiment), tracking=TrackingConfig())


def played(root: Path, plan: Plan, trials: int = 1000, *, tracked: bool = True) -> Study:
    """A study whose trials end with made-up scores: 9, 8, 7 ..."""
    folder = StudyFolder(root / plan.name)
    folder.path.mkdir(parents=True)
    study = Study.drive(folder, plan)
    while len(study.records()) < trials and (record := study.add()) is not None:
        _end(study, record.number, 9.0 - record.number)
    if tracked:
        tracker = Tracker(folder, plan, pytest.fail)
        tracker.start()
        tracker.update(study.records(), running=())
        assert tracker.finish("") == 0
    write_report(study, study.records())
    return study


def _end(study: Study, number: int, value: float) -> None:
    run = study.record(number).run
    run.create()
    run.write_config(config_tree(study.config(study.record(number))))
    run.append([{"step": step, study.plan.metric: value + 40.0 - step} for step in (0, 20, 40)])
    path_of(run.checkpoints, 40).mkdir()
    (path_of(run.checkpoints, 40) / "meta.json").write_text("{}")
    pixels = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    save_grid(run.samples / "step_000040.png", pixels)
    best = {"value": value, "step": 40, "checkpoint": "checkpoints/step_00000040"}
    summary = {
        "scores": {"best": {study.plan.metric: value}}, "best": best, "last": best, "num_steps": 5, "num_samples": 64,
        "reference": {"ddpm_1000": 5.0}, "seconds": {"finetune": 1.0}, "device": "cpu", "threads": 1,
        "git_revision": None, "versions": {}, "signature": study.record(number).signature, "metric": study.plan.metric,
    }  # fmt: skip
    run.write_summary(summary)
    study.finish(number, completed(study.plan, summary))


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """A sweep of three trials, an ablation of three arms and two seeds, one in the plane, and one without record."""
    root = tmp_path_factory.mktemp("my studies, 50% #1 é")
    arms = {"no_entropy": {"algorithm.entropy_coef": 0}, "free": {"algorithm.cost_coef": 0}}
    with drawn_figures():
        played(root, sweep_plan(), 3)
        played(root, ablation("terms", arms))
        played(root, sweep_plan("plane", experiment="moons"), 2)
        played(root, sweep_plan("silent", uri="none"), 1)
    return root


def pages_of(root: Path, name: str) -> tune.reporting.pages.StudyPages:
    study = Study.read(StudyFolder(root / name))
    pages = study_pages(study.folder, study.plan, study.records(), SERVER)
    assert pages is not None
    return pages


def state(address: str) -> dict[str, str]:
    """What stands behind the # of an address."""
    return {key: value for key, (value,) in parse_qs(urlsplit(address).fragment.partition("?")[2]).items()}


def names_of(root: Path, address: str) -> list[str]:
    """The runs in a chart."""
    client = MlflowClient(open_store(root, "dxmi")[0])
    return [client.get_run(run).info.run_name for run in json.loads(state(address)["runs"])]


# ----------------------------------------------------------------------------
# The experiment's kind


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, TRAINING_KIND),
        ("no_inferred_type", TRAINING_KIND),
        ("genai_development_inferred", TRAINING_KIND),
        ("genai_development", "genai_development"),
        ("finetuning", "finetuning"),
    ],
)
def test_an_experiment_opens_as_model_training_unless_somebody_has_chosen_otherwise(studies, before, after):
    client = MlflowClient(open_store(studies, "dxmi")[0])
    found = client.create_experiment(f"kind {before}", tags={} if before is None else {KIND_TAG: before})
    assert open_store(studies, f"kind {before}")[1] == found
    assert client.get_experiment(found).tags[KIND_TAG] == after


def test_a_new_experiment_opens_as_model_training(studies):
    uri, experiment = open_store(studies, "new")
    assert MlflowClient(uri).get_experiment(experiment).tags[KIND_TAG] == TRAINING_KIND


def test_a_server_that_refuses_the_tag_is_used_without_it():
    class Refusing:
        def get_experiment_by_name(self, _: str) -> None:
            return None

        def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
            return "7"

        def set_experiment_tag(self, *_: str) -> None:
            raise MlflowException("permission denied")

    assert experiment_id(Refusing(), "dxmi") == "7"


# ----------------------------------------------------------------------------
# Addresses


def test_an_address_says_what_it_was_made_of_and_is_one_link():
    runs = ["0" * 32, "f" * 32]
    found = curves_page(f"{SERVER}/", "1", runs, "eval/fid (50 %) & more")
    assert found.startswith(f"{SERVER}/#/metric?")
    told = state(found)
    assert json.loads(told["runs"]) == runs
    assert json.loads(told["experiments"]) == ["1"]
    assert json.loads(told["metric"]) == "eval/fid (50 %) & more"
    assert json.loads(told["plot_metric_keys"]) == ["eval/fid (50 %) & more"]
    assert told["x_axis"] == "step"
    others = (
        trials_page(SERVER, "1", "lr-1", "eval/fid_digits", "minimize"),
        artifact_page(SERVER, "1", runs[0], "a b/c#d"),
    )
    for address in (found, *others):
        assert not set(address) & set(" \"'<>[]{}|\\^`"), "a terminal would end the link there"
        assert address.count("#") == 1
        assert state(address)["workflowType"] == "machine_learning"
    assert unquote(others[1]).partition("?")[0].endswith(f"/runs/{runs[0]}/artifacts/a b/c#d")
    assert state(others[0])["searchFilter"] == "tags.study = 'lr-1' AND tags.trial_id LIKE '%/%'"
    assert state(others[0])["orderByKey"] == "metrics.`best/fid_digits`"
    assert state(others[0])["orderByAsc"] == "true"
    assert state(trials_page(SERVER, "1", "rl", "eval/reward", "maximize"))["orderByAsc"] == "false"


def test_a_sweep_has_a_chart_of_all_trials_and_its_best_checkpoint(studies):
    pages = pages_of(studies, "lr-1")
    assert names_of(studies, pages.curves) == ["lr-1/0002", "lr-1/0001", "lr-1/0000"]
    assert pages.about == "fid_digits of all 3 trials"
    client = MlflowClient(open_store(studies, "dxmi")[0])
    place = urlsplit(pages.best).fragment.partition("?")[0].split("/")
    assert client.get_run(place[4]).data.tags["trial_id"] == "lr-1/0002"
    (file,) = client.list_artifacts(place[4], "/".join(place[6:]))
    assert file.path == "checkpoints/step_00000040/meta.json"


def test_the_chart_is_of_the_studys_own_metric(studies):
    pages = pages_of(studies, "plane")
    assert json.loads(state(pages.curves)["metric"]) == "eval/sliced_wasserstein"
    assert pages.about == "sliced_wasserstein of all 2 trials"


def test_an_ablations_chart_names_arm_and_seed(studies):
    pages = pages_of(studies, "terms")
    assert names_of(studies, pages.curves) == [
        f"terms/{arm}/seed {seed}" for arm in ("baseline", "no_entropy", "free") for seed in (0, 1)
    ]
    assert pages.about == "fid_digits of every arm and seed"


def test_of_too_many_trials_the_best_are_shown_and_of_arms_the_first_seeds(studies, monkeypatch):
    monkeypatch.setattr(tune.reporting.pages, "_MOST_CURVES", 2)
    pages = pages_of(studies, "lr-1")
    assert names_of(studies, pages.curves) == ["lr-1/0002", "lr-1/0001"]
    assert pages.about == "fid_digits of the best 2 of 3 trials"
    monkeypatch.setattr(tune.reporting.pages, "_MOST_CURVES", 5)
    pages = pages_of(studies, "terms")
    assert names_of(studies, pages.curves) == [f"terms/{arm}/seed 0" for arm in ("baseline", "no_entropy", "free")]
    assert pages.about == "fid_digits of the first seeds of the arms (3 runs of 6)"


def test_a_study_on_a_server_has_addresses_there(studies, monkeypatch):
    local = open_writer(studies, "local", "dxmi")
    monkeypatch.setattr(tune.reporting.pages, "open_writer", lambda *_: local)
    study = Study.read(StudyFolder(studies / "lr-1"))
    plan = sweep_plan(uri="https://mlflow.example/lab")
    pages = study_pages(study.folder, plan, study.records(), SERVER)
    for address in (pages.curves, pages.best, pages.trials):
        assert address.startswith("https://mlflow.example/lab/#/")


def test_a_study_that_mlflow_does_not_know_has_no_addresses(studies):
    study = Study.read(StudyFolder(studies / "silent"))
    assert study_pages(study.folder, sweep_plan("silent"), study.records(), SERVER) is None


def test_the_newest_studies_come_first_and_older_ones_are_counted(studies, monkeypatch):
    for place, name in enumerate(("silent", "lr-1", "terms", "plane")):
        os.utime(studies / name / "optuna.journal", (place, place))
    lines = list(newest_pages(studies, SERVER))
    assert [line.rstrip(":") for line in lines if not line.startswith(" ")] == ["plane", "terms", "lr-1", "silent"]
    assert missing("not recorded", lines[-1]) == []
    monkeypatch.setattr(tune.reporting.pages, "_MOST_STUDIES", 1)
    assert missing("3 older … dxmi ui STUDY", list(newest_pages(studies, SERVER))[-1]) == []


# ----------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize(("name", "hint"), [("lr-11", "lr-1"), ("term", "terms"), ("quite-else", "dxmi studies")])
@pytest.mark.parametrize("command", ["ui", "report"])
def test_an_unknown_study_is_refused_with_the_nearest_names(studies, capsys, command, name, hint):
    assert main([command, name, "--studies", str(studies)]) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert name in said


def test_a_study_without_record_has_no_page(studies, capsys):
    assert main(["ui", "silent", "--studies", str(studies)]) == 2
    assert "tracking.uri" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["name", "path"])
def test_dxmi_ui_serves_the_store_and_prints_the_studys_addresses(studies, capsys, monkeypatch, given):
    served = []
    monkeypatch.setattr(tune.cli.ui, "serve", lambda *arguments: served.append(arguments) or 0)
    chosen = ["lr-1", "--studies", str(studies)] if given == "name" else [str(studies / "lr-1")]
    port = free_port()
    assert main(["ui", *chosen, "--port", str(port)]) == 0
    ((store, root, used, _, (home, *lines)),) = served
    assert home.startswith("runs: ")
    assert state(home)["workflowType"] == "machine_learning"
    assert (root, used) == (studies, port)
    assert store.endswith("mlflow.db")
    assert [line.partition(": ")[0] for line in lines] == [
        "fid_digits of all 3 trials",
        "best checkpoint",
        "all metrics",
    ]
    assert all(f": http://127.0.0.1:{port}/#/" in line for line in lines)
    capsys.readouterr()


def ended(root: Path, name: str, **changes) -> SweepResult:
    study = Study.read(StudyFolder(root / name))
    return SweepResult(**{"folder": study.folder, "records": study.records(), "ended": "", "interrupted": False,
                          "undelivered": 0, **changes})  # fmt: skip


def test_the_end_of_a_study_names_its_addresses_and_what_serves_them(studies):
    first, *pages = tune.cli.sweeps.in_mlflow(sweep_plan(), ended(studies, "lr-1"))
    assert f"dxmi ui lr-1 --studies '{studies}'" in first
    assert [line.strip().partition(": ")[0] for line in pages] == [
        "fid_digits of all 3 trials", "best checkpoint", "all metrics",
    ]  # fmt: skip
    assert tune.cli.sweeps.in_mlflow(sweep_plan(uri="none"), ended(studies, "lr-1")) == []


@pytest.mark.parametrize(
    ("name", "about"),
    [("terms", "fid_digits of every arm and seed"), ("plane", "sliced_wasserstein of all 2 trials")],
)
def test_the_end_of_every_kind_of_study_names_them(studies, name, about):
    result = ended(studies, name)
    first, *pages = tune.cli.sweeps.in_mlflow(Study.read(result.folder).plan, result)
    assert f"dxmi ui {name} --studies" in first
    assert [line.strip().partition(": ")[0] for line in pages] == [about, "best checkpoint", "all metrics"]


def test_a_server_that_is_away_costs_the_addresses_only(studies, capsys, monkeypatch):
    def away(*_: object) -> MlflowWriter:
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(tune.reporting.pages, "open_writer", away)
    plan = sweep_plan(uri="http://mlflow.example:5000")
    (line,) = tune.cli.sweeps.in_mlflow(plan, ended(studies, "lr-1"))
    assert "http://mlflow.example:5000" in line
    assert "Connection refused" in capsys.readouterr().err
    for why in ({"interrupted": True}, {"undelivered": 3}):
        assert tune.cli.sweeps.in_mlflow(plan, ended(studies, "lr-1", **why)) == [line]
    assert capsys.readouterr().err == "", "nobody has waited for it"


# ----------------------------------------------------------------------------
# The report's layout


def test_long_names_may_break_and_stay_text():
    assert breakable("algorithm.policy.lr") == "algorithm.<wbr>policy.<wbr>lr"
    assert breakable("<b>_x") == "&lt;b&gt;_x"
    assert breakable("trials/0006/checkpoints") == "trials/0006/<wbr>checkpoints"
    assert breakable("-0.5 [-1.2, 3e-05]") == '-0.5 <span class="interval">[-1.2, 3e-05]</span>'
    assert breakable("5.53e-06") == '<span class="numeral">5.53e-06</span>'


def test_many_columns_are_set_small():
    few, many = (HtmlTable([("a", "", "")] * count, []) for count in (7, 8))
    assert not few.is_wide
    assert many.is_wide


MANY = {
    f"algorithm.{path}": {"log_uniform": [1e-5, 1e-3]}
    for path in ("policy.lr", "policy.sigma_lr", "energy.lr", "entropy_coef", "cost_coef", "energy_l2")
}


def test_more_settings_than_a_page_holds_stand_in_one_column(tmp_path):
    three = {path: MANY[path] for path in list(MANY)[:3]}  # beside precision and recall
    few = played(tmp_path, sweep_plan("three", space=three), 1, tracked=False)
    assert 'title="algorithm.energy.lr"' in few.folder.report.read_text()
    more = three | {"algorithm.policy.weight_decay": {"uniform": [0, 1]}}
    four = played(tmp_path, sweep_plan("four", space=more), 1, tracked=False)
    page = four.folder.report.read_text().replace("<wbr>", "")
    assert 'title="algorithm.energy.lr"' not in page
    assert "energy.lr " in page


# ----------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def ui(studies):
    """What `dxmi ui` prints, by what it is called; the server runs meanwhile."""
    command = [sys.executable, "-m", "tune.cli.main", "ui", "--studies", str(studies), "--port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        while len(lines) < 17 and (line := process.stdout.readline()):
            lines.append(line.rstrip())
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


CHART = "[...document.querySelectorAll('.js-plotly-plot')][0]"
NAMES = f"[...new Set({CHART}?.data.filter(trace => trace.x.length).map(trace => trace.name))].length"
LINES = f"[...({CHART}?.querySelectorAll('.scatterlayer .js-line') ?? [])]"
DRAWN = f"{LINES}.filter(line => line.getAttribute('d')).length"


def address(lines: list[str], study: str, what: str) -> str:
    mine = lines[lines.index(f"{study}:") + 1 :]
    return next(line for line in mine if what in line).rpartition(": ")[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "what", "curves"),
    [
        ("lr-1", "fid_digits of all 3 trials", 3),
        ("terms", "every arm and seed", 6),
        ("plane", "sliced_wasserstein of all 2 trials", 2),
    ],
)
def test_the_printed_address_shows_a_line_for_every_trial(ui, browser, study, what, curves):
    browser.resize(1300)
    browser.open(address(ui, study, what))
    browser.wait_for(NAMES, curves)
    browser.wait_for(f"{DRAWN} >= {curves}", wanted=True)
    assert "MLflow" in browser.evaluate("document.title")


@pytest.mark.slow
def test_the_other_addresses_show_the_best_checkpoint_and_the_trials_unfolded(ui, browser):
    browser.open(address(ui, "lr-1", "best checkpoint"))
    browser.wait_for("document.body?.innerText.includes('meta.json')", wanted=True)
    browser.open(address(ui, "lr-1", "all metrics"))
    for number in range(3):
        browser.wait_for(f"document.body?.innerText.includes('lr-1/000{number}')", wanted=True)
    browser.wait_for("document.querySelectorAll('.js-plotly-plot').length > 0", wanted=True)


TOO_WIDE = """
[...document.querySelectorAll(".frame, table, figure, svg, pre, p, li, h1, blockquote")].filter((element) => {
  const frame = element.closest(".frame") ?? document.documentElement;
  const right = Math.min(frame.getBoundingClientRect().right, document.documentElement.clientWidth);
  return element.getBoundingClientRect().right > right + 1 || element.scrollWidth > Math.max(element.clientWidth, 1) + 1
    && getComputedStyle(element).display !== "inline" && element.tagName !== "svg";
}).map((element) => element.tagName + ": " + element.textContent.slice(0, 60))
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 800])
def test_nothing_of_a_report_runs_out_of_the_page(tmp_path, browser, width):
    long = "a-study-of-many-settings-with-a-long-name-" + "x" * 50
    nine = {f"arm_{index}_with_a_rather_long_name": {"algorithm.entropy_coef": index / 10} for index in range(1, 10)}
    also = ["eval/kid_digits", "eval/precision_digits", "eval/recall_digits"]
    shown = [
        played(tmp_path, sweep_plan(long, space=MANY), 5, tracked=False),
        played(tmp_path, sweep_plan("three", space={path: MANY[path] for path in list(MANY)[:3]}), 5, tracked=False),
        played(tmp_path, ablation("nine", nine, also=also), tracked=False),
    ]
    browser.resize(width)
    for study in shown:
        browser.open(study.folder.report.as_uri())
        browser.wait_for(
            "document.readyState === 'complete' && document.querySelectorAll('table').length > 1", wanted=True
        )
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(TOO_WIDE) == []


def test_a_server_that_is_away_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    played(tmp_path, sweep_plan("away", uri="http://127.0.0.1:9"), 1, tracked=False)
    assert main(["ui", "away", "--studies", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert missing("MLflow server http://127.0.0.1:9", said) == []
    assert said.count("\n") == 1


def test_the_page_of_all_metrics_has_the_trials_of_that_study_alone(tmp_path):
    for name in ("lr_1", "lr-1"):  # _ stands for any letter where MLflow compares by LIKE
        played(tmp_path, sweep_plan(name), 2)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    chosen = state(pages_of(tmp_path, "lr_1").trials)["searchFilter"]
    found = client.search_runs([client.get_experiment_by_name("dxmi").experiment_id], chosen)
    assert {run.data.tags["trial_id"] for run in found} == {"lr_1/0000", "lr_1/0001"}
