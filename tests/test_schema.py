"""Runs and studies of schema 1, as dxmi 0.1 wrote them, can be read but not continued.

tests/schema_1 holds a run, a sweep over schedule.method and an ablation of it, written by version 0.1.0 with
experiment=digits debug=smoke and networks of one hidden layer of 8 units; of the studies' trials the checkpoints are
left out.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.config import SCHEMA, ExperimentConfig
from dxmi.training.loading import load_run
from dxmi.training.run import train
from dxmi.training.schema import config_tree, read_config, upgrade
from support import stating
from tune.api.ablation import Ablation
from tune.api.sweep import Sweep
from tune.cli.main import main
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import ranked
from tune.studies.study import Study

RECORDED = Path(__file__).parent / "schema_1"


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    shutil.copytree(RECORDED / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def studies(tmp_path) -> Path:
    shutil.copytree(RECORDED / "studies", tmp_path / "studies")
    return tmp_path / "studies"


# ----------------------------------------------------------------------------
# A run


def test_its_config_is_upgraded_and_its_signature_is_by_the_old_rule(run):
    stored = read_config(run.read_config())
    summary, meta = run.read_summary(), json.loads(next(run.checkpoints.glob("*/meta.json")).read_text())
    assert stored.schema == 1
    assert stored.signature == summary["signature"] == meta["signature"]
    assert (stored.config.data.kind, stored.config.schedule.kind, stored.config.schedule.shape) == (
        *("digits", "var"),
        "quadratic",
    )
    assert stored.config.network.denoiser.hidden == 8
    assert stored.config.signature != stored.signature


def test_its_checkpoint_is_loaded_and_sampled_from(run):
    trained = load_run(run, read_config(run.read_config()), "last")
    assert trained.step == 2
    assert trained.states(3, None, 0.0).shape == (3, 3, 1, 8, 8)


def test_an_edited_config_is_still_noticed(run):
    tree = run.read_config()
    tree["seed"] = 5
    with pytest.raises(UserError, match=stating("signature … restore")):
        load_run(run, read_config(tree), "last")


def test_it_is_scored_again(run, capsys):
    assert main(["evaluate", str(run.path), "--checkpoint", "last"]) == 0
    assert "fid_digits" in capsys.readouterr().out


def test_its_folder_takes_no_run_of_now_even_of_the_same_settings(run):
    stored = read_config(run.read_config())
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=stating("schema 1 … 2 … data.name … data.kind … read … another name")):
        train(Experiment(stored.config), out=run.path)
    assert run.config.read_bytes() == before


def test_it_is_not_resumed(run, capsys):
    assert main(["train", "--resume", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert "schema 1" in error
    assert "Traceback" not in error


def test_its_config_may_begin_a_new_run(run, tmp_path, capsys):
    """Whose settings are the same ones."""
    assert main(["train", "--config", str(run.config), f"out={tmp_path / 'new'}"]) == 0
    tree = RunDirectory(tmp_path / "new").read_config()
    assert tree["schema"] == SCHEMA
    assert read_config(tree).config == read_config(run.read_config()).config


# ----------------------------------------------------------------------------
# Studies


def test_a_sweep_is_read_with_the_present_names_of_its_settings(studies):
    study = Study.read(StudyFolder(studies / "methods"))
    assert study.plan.signature == yaml.safe_load((studies / "methods/study.yaml").read_text())["signature"]
    assert [axis.path for axis in study.plan.axes] == ["schedule.kind"]
    records = study.records()
    assert [record.values for record in records] == [{"schedule.kind": "var"}, {"schedule.kind": "step"}]
    for record in records:  # each trial's config is that of its run, and its signature was computed from that
        stored = read_config(record.run.read_config())
        assert study.config(record) == stored.config
        assert record.signature == stored.signature
    assert len(ranked(study.plan, records)) == 2


def test_an_ablation_is_read_with_its_arms(studies):
    study = Study.read(StudyFolder(studies / "steps"))
    assert [dict(arm.changes) for arm in study.plan.arms] == [{}, {"schedule.kind": "step"}]
    assert [study.config(record) for record in study.records()] == [
        read_config(record.run.read_config()).config for record in study.records()
    ]


@pytest.mark.parametrize("name", ["methods", "steps"])
def test_a_report_of_a_study_is_written(studies, name, capsys):
    assert main(["report", name, "--studies", str(studies)]) == 0
    folder = StudyFolder(studies / name)
    assert "schedule.kind" in folder.leaderboard.read_text() or name == "steps"
    assert folder.report.exists()
    assert main(["studies", "--studies", str(studies)]) == 0
    assert name in capsys.readouterr().out


def test_the_best_config_of_a_sweep_is_of_the_present_schema(studies):
    assert main(["report", "methods", "--studies", str(studies)]) == 0
    tree = yaml.safe_load(StudyFolder(studies / "methods").best.read_text())
    assert tree["schema"] == SCHEMA
    assert read_config(tree).config.data.kind == "digits"


@pytest.mark.parametrize(("name", "kind"), [("methods", Sweep), ("steps", Ablation)])
def test_a_study_is_not_resumed(studies, name, kind):
    before = (studies / name / "study.yaml").read_bytes()
    with pytest.raises(UserError, match=stating("schema 1 … 2 … schedule.method … schedule.kind … read")):
        kind.resume(name, studies=studies)
    assert (studies / name / "study.yaml").read_bytes() == before


def test_a_study_of_now_does_not_go_into_the_folder(studies):
    sweep = Sweep("sweep=demo", "experiment=digits", name="methods", studies=studies)
    with pytest.raises(UserError, match=stating("methods … schema 1 … 2")):
        sweep.check()


def test_an_edited_study_is_still_noticed(studies):
    path = studies / "methods/study.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 7", 1))
    with pytest.raises(UserError, match=stating("study.yaml … edited")):
        StudyFolder(studies / "methods").read_plan()


# ----------------------------------------------------------------------------
# Trees


def test_a_tree_of_now_is_as_it_is_and_one_of_tomorrow_is_refused():
    tree = config_tree(ExperimentConfig())
    assert read_config(tree).schema == SCHEMA
    assert read_config(tree).signature == ExperimentConfig().signature
    for schema in (SCHEMA + 1, 0, "2", None, True):
        with pytest.raises(UserError, match=stating(f"schema is {schema!r}")):
            read_config({**tree, "schema": schema})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "moons", "num_points": 7, "label": None, "folder": None}, {"kind": "moons", "num_points": 7}),
        (
            {"name": "mnist", "label": 3, "num_points": 50_000, "flip": True, "accept_unknown_files": True},
            {"kind": "mnist", "label": 3, "flip": True, "accept_unknown_files": True},
        ),
        (
            {"name": "image_folder", "folder": "x", "size": 8, "class_folders": True, "num_points": 1},
            {"kind": "image_folder", "folder": "x", "size": 8, "class_folders": True},
        ),
    ],
)
def test_a_flat_data_group_becomes_the_block_of_its_kind(data, expected):
    assert upgrade({"data": data}, 1) == {"data": expected}


def test_what_is_wrong_in_an_old_tree_is_said_of_its_present_name():
    with pytest.raises(UserError, match=stating("data.kind is 'nowhere' … digits")):
        read_config({"data": {"name": "nowhere"}})
