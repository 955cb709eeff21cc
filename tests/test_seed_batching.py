"""Several seeds of an arm in one program: who is trained together, what it costs, and what becomes of each."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dxmi.errors import UserError
from dxmi.persistence.checkpoint import load, path_of
from dxmi.training.build import Experiment
from dxmi.training.config import ResourcesConfig
from dxmi.training.run import train
from dxmi.training.schema import read_config
from support import SLOWER, TINY, changed, missing, processes_with, stating, wait_until
from tune import Ablation
from tune.cli.main import main
from tune.config.ablation import parse_ablation
from tune.config.compose import compose_experiment
from tune.config.sweep import TrackingConfig
from tune.execution.controller import Controller
from tune.execution.seed_batching import fastest, seeds_together
from tune.execution.slots import Slots
from tune.execution.trial_messages import Diverged
from tune.plans.ablation import AblationPlan, ablation_plan, any_plan_from
from tune.plans.arms import arms
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialState
from tune.studies.study import Study

VARIANTS = {"no_entropy": {"algorithm.entropy_coef": 0}, "fast": {"algorithm.policy.lr": 3.0e-4}}
TWO_SLOTS = Slots(cpus=2, gpus=0, threads=1, gpu_share=0.0, concurrent=2)


def plan(seeds: int, *overrides: str) -> AblationPlan:
    ablation = parse_ablation({"hypothesis": "Something matters.", "variants": VARIANTS, "seeds": seeds})
    experiment = compose_experiment(changed(TINY, *overrides)).experiment
    return ablation_plan("study", experiment, ablation, arms(ablation, experiment), tracking=TrackingConfig())


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def controller(folder: Path, clock: Clock, seeds: int = 3, stack: int = 2) -> Controller:
    folder = StudyFolder(folder / "study")
    folder.path.mkdir(exist_ok=True, parents=True)
    made = Controller(Study.drive(folder, plan(seeds)), TWO_SLOTS, clock)
    made.stack_seeds(stack)
    return made


def cells(records) -> list[tuple[str, int]]:
    return [(record.values["arm"], record.values["seed"]) for record in records]


def test_a_program_has_seeds_of_one_arm_and_fills_one_slot(tmp_path):
    session = controller(tmp_path, Clock())
    assert cells(session.next_program()) == [("baseline", 0), ("baseline", 1)]
    assert cells(session.next_program()) == [("no_entropy", 0), ("no_entropy", 1)]
    assert session.next_program() == []
    assert sorted(session.running) == [0, 1, 2, 3]
    session.receive(Diverged(0, "made up"))
    assert session.next_program() == []  # its program goes on with the other seed
    session.receive(Diverged(1, "made up"))
    assert cells(session.next_program()) == [("fast", 0), ("fast", 1)]


def test_the_last_program_takes_what_is_left(tmp_path):
    begun = programs(controller(tmp_path, Clock()))
    assert [len(together) for together in begun] == [2, 2, 2, 1, 1, 1]
    assert sorted(cell for together in begun for cell in together) == [
        (arm, seed) for arm in sorted(("baseline", *VARIANTS)) for seed in range(3)
    ]


def test_interrupted_trials_are_stacked_again_with_their_own_arm(tmp_path):
    first = controller(tmp_path, Clock())
    first.next_program()
    first.next_program()
    again = controller(tmp_path, Clock(), stack=8)
    assert cells(again.next_program()) == [("baseline", 0), ("baseline", 1), ("baseline", 2)]
    assert cells(again.next_program()) == [("no_entropy", 0), ("no_entropy", 1), ("no_entropy", 2)]


def test_a_programs_time_is_divided_among_its_trials_and_its_limit_is_not(tmp_path):
    clock = Clock()
    session = controller(tmp_path, clock)
    session.next_program()
    clock.now = 60.0
    assert session.device_seconds == pytest.approx(60.0)
    session.receive(Diverged(0, "made up"))
    assert session.study.record(0).outcome.seconds == pytest.approx(30.0)
    clock.now = 100.0
    session.receive(Diverged(1, "made up"))
    assert session.study.record(1).outcome.seconds == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 8: 1.2}, 8),
        ({1: 1.0, 4: 1.0, 8: 2.1}, 4),
        ({1: 1.0, 8: 7.9}, 1),  # a gain of one percent
        ({1: 1.0, 8: math.inf}, 1),
        ({1: 1.0}, 1),
    ],
)
def test_the_number_with_the_least_time_a_seed_is_taken(seconds, expected):
    assert fastest(seconds) == expected


@pytest.mark.parametrize(
    ("seeds", "overrides", "expected"),
    [
        (8, ["resources.stack_seeds=4"], 4),
        (3, ["resources.stack_seeds=8"], 3),
        (4, ["resources.stack_seeds=1"], 1),
        (4, ["resources.accumulate=2"], 1),
        (4, ["resources.num_workers=2"], 1),
    ],
)
def test_what_is_asked_for_is_taken_as_far_as_there_are_seeds(seeds, overrides, expected):
    assert seeds_together(plan(seeds, *overrides), TWO_SLOTS) == expected


@pytest.mark.parametrize("slots", [TWO_SLOTS, Slots(cpus=64, gpus=0, threads=1, gpu_share=0.0, concurrent=64)])
def test_what_a_study_recorded_is_repeated_whatever_the_machine(slots):
    """Nor is anything measured: no Ray is running."""
    recorded = replace(plan(8), stacked=5)
    assert seeds_together(recorded, slots) == 5
    assert seeds_together(replace(plan(8, "resources.stack_seeds=4"), stacked=5), slots) == 4
    assert seeds_together(replace(plan(8, "resources.accumulate=2"), stacked=5), slots) == 1
    assert any_plan_from(recorded.tree()) == recorded
    assert recorded.signature == plan(8).signature


def test_the_choice_is_kept_in_the_study_and_the_same_command_finds_it(tmp_path):
    first = controller(tmp_path, Clock(), stack=2)
    assert yaml.safe_load(first.study.folder.plan.read_text())["stacked"] == 2
    again = Study.drive(first.study.folder, plan(3))  # a plan as the command makes it, which knows of no choice
    assert again.plan.stacked == 2
    assert Study.read(first.study.folder).plan.stacked == 2
    Controller(again, TWO_SLOTS, Clock()).stack_seeds(3)
    assert first.study.folder.read_plan().stacked == 3


def test_a_recorded_choice_that_is_none_is_refused():
    with pytest.raises(UserError, match=stating("stacked is 'many'")):
        any_plan_from({**plan(3).tree(), "stacked": "many"})


@pytest.mark.parametrize("ended", [(), (1,), (0, 2), (3,)])
def test_a_resumed_study_trains_the_same_seeds_together(tmp_path, ended):
    """Blocks of two: a seed that ended early is not replaced by one of another block."""
    whole = controller(tmp_path / "whole", Clock(), seeds=4)
    blocks = {cell: place for place, cells_of in enumerate(programs(whole)) for cell in cells_of}
    session = controller(tmp_path / "cut", Clock(), seeds=4)
    session.next_program()
    session.next_program()
    for number in ended:
        session.receive(Diverged(number, "made up"))
    for program in programs(controller(tmp_path / "cut", Clock(), seeds=4)):
        assert len({blocks[cell] for cell in program}) == 1


def programs(session: Controller) -> list[list[tuple[str, int]]]:
    """The cells of every program of what is left of a study, in order."""
    begun = []
    while together := session.next_program():
        begun.append(cells(together))
        for record in together:
            session.receive(Diverged(record.number, "made up"))
    return begun


def test_the_dry_run_says_how_many_seeds_share_a_program(tmp_path, capsys):
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({"hypothesis": "Something.", "variants": VARIANTS, "seeds": 3}))

    def text(*overrides: str) -> str:
        where = (f"ablation={path}", "name=study", "--studies", str(tmp_path), "--dry-run")
        assert main(["ablate", *changed(TINY, *overrides), *where]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "trained together" in line)
        return line

    assert missing("measured", text()) == []
    assert missing("2 seeds", text("resources.stack_seeds=2")) == []
    chosen = Ablation(*TINY, f"ablation={path}", name="study", studies=tmp_path)
    chosen.folder.path.mkdir()
    Controller(Study.drive(chosen.folder, chosen.plan), TWO_SLOTS, Clock()).stack_seeds(3)
    assert missing("3 seeds … this study", text()) == []


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"stack_seeds": 0}, "stack_seeds is 0 … 1..1024 … null"),
        ({"stack_seeds": 8, "num_workers": 2}, "stack_seeds is 8 … num_workers is 2"),
        ({"stack_seeds": 8, "accumulate": 2}, "stack_seeds is 8 … accumulate is 2"),
    ],
)
def test_stacks_that_cannot_be_are_refused(tree, sentence):
    with pytest.raises(ValueError, match=stating(sentence)):
        ResourcesConfig(**tree)


@pytest.mark.parametrize("command", [["train"], ["sweep", "sweep=demo"]])
def test_there_is_nothing_to_stack_outside_ablations(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *TINY, "resources.stack_seeds=8"]) == 2
    assert missing("resources.stack_seeds is 8 … dxmi ablate", capsys.readouterr().err) == []
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------
# On Ray


def ablate(folder: Path, *overrides: str, settings: list[str] = TINY, seeds: int = 3) -> list[str]:
    """The command line of an ablation of one variant."""
    path = folder / "ablation.yaml"
    tree = {"hypothesis": "Something.", "variants": {"no_entropy": VARIANTS["no_entropy"]}, "seeds": seeds}
    path.write_text(yaml.safe_dump(tree))
    return ["ablate", *changed(settings, *overrides), f"ablation={path}", "name=real", "--studies", str(folder)]


def require_the_solo_runs(folder: StudyFolder, out: Path) -> None:
    """Every complete trial is the run that its config describes alone."""
    for record in Study.read(folder).records():
        if record.state is not TrialState.COMPLETE:
            continue
        config = read_config(record.run.read_config()).config
        alone = train(Experiment(config), out=out / str(record.number))
        assert record.outcome.score == pytest.approx(alone.best["value"], rel=1e-3)
        ours, theirs = (load(path_of(run / "checkpoints", 40)) for run in (record.run.path, out / str(record.number)))
        for name, tensor in theirs.groups["algorithm"].items():
            assert (ours.groups["algorithm"][name] - tensor).abs().max() < 1e-5, name


def test_a_stacked_ablation_leaves_the_solo_runs_and_one_bad_seed_fails_alone(tmp_path, capsys):
    occupied = tmp_path / "real" / "trials" / "0001"
    occupied.mkdir(parents=True)
    (occupied / "config.yaml").write_text("schema: 2\nname: other\n")
    assert main(ablate(tmp_path, "resources.stack_seeds=2", seeds=2)) == 0
    assert missing("2 seeds … together", capsys.readouterr().out) == []
    folder = StudyFolder(tmp_path / "real")
    assert folder.read_plan().stacked == 2
    records = Study.read(folder).records()
    assert [record.state for record in records].count(TrialState.COMPLETE) == 3
    assert missing("config", records[1].outcome.reason) == []
    members = [json.loads(path.read_text())["members"] for path in folder.trials.glob("*/summary.json")]
    assert sorted(members) == [1, 2, 2]
    require_the_solo_runs(folder, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_program_goes_on_with_all_its_seeds(tmp_path):
    command = ablate(tmp_path, "resources.stack_seeds=3", settings=SLOWER)
    environment = os.environ | {"STACK_TEST": str(tmp_path)}
    program = subprocess.Popen([sys.executable, "-m", "tune.cli.main", *command], env=environment)
    folder = StudyFolder(tmp_path / "real")
    wait_until(lambda: len(list(folder.trials.glob("000[0-2]/checkpoints/step_00000010"))) == 3, 300)
    workers = processes_with(str(tmp_path), "ray::Implicit")
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert program.wait(300) == 0
    records = Study.read(folder).records()
    assert [record.state for record in records] == [TrialState.COMPLETE] * 6


@pytest.mark.slow
def test_the_measurement_is_made_in_a_trials_place(tmp_path):
    """Without being asked for, a number between 1 and that of the seeds is chosen, and the study ends."""
    assert main(ablate(tmp_path)) == 0
    records = Study.read(StudyFolder(tmp_path / "real")).records()
    assert [record.state for record in records] == [TrialState.COMPLETE] * 6
