"""What grows with the number of trials, and with the size of a checkpoint. Nothing is trained: curves are replayed.

    python tests/benchmarks/scaling.py                     1,000 trials
    python tests/benchmarks/scaling.py --trials 10000 --tracking none
    python tests/benchmarks/sweep_overhead.py --noop --trials 1000     the same through Ray

Part 1, the driver: trials are begun, report eight scores each, are stopped early or end, 64 at once; milliseconds a
trial by tenths, the driver's memory, the journal, MLflow's store and how far it lags behind, reading it all again.
Part 2: a proposal of each sampler after as many trials. Part 3: copying a checkpoint to where all nodes reach it.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from sweep_overhead import resident_megabytes

from dxmi.training.schema import config_tree
from tune.config.compose import compose_experiment
from tune.config.sweep import BudgetConfig, SamplerConfig, StoppingConfig, SweepConfig, TrackingConfig
from tune.execution.controller import Controller
from tune.execution.slots import Slots
from tune.execution.trial_messages import Finished, Scored, Stopped
from tune.integrations.mlflow_tracker import Tracker
from tune.integrations.object_store import Remote
from tune.plans.sweep import Plan
from tune.reporting.html import write_report
from tune.search.samplers import propose
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import write_leaderboard
from tune.studies.records import TrialRecord
from tune.studies.study import Study

AT_ONCE, SCORES = 64, 8
METRIC = "eval/fid_digits"
SPACE = {
    "algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]},
    "algorithm.critic.lr": {"log_uniform": [1e-5, 1e-2]},
    "algorithm.entropy_coef": {"log_uniform": [1e-3, 10.0]},
    "algorithm.cost_coef": {"log_uniform": [1e-3, 10.0]},
}
CHECKPOINT_MEGABYTES = (4, 150, 600)
"""digits; a CIFAR-10 U-Net with its optimizer, energy and averages; an ImageNet-64 one's policy alone."""


def plan(trials: int, tracking: str) -> Plan:
    """A sweep of many settings with early stopping."""
    overrides = [f"train.iterations={100 * SCORES}", "evaluate.every=100"]
    experiment = compose_experiment(overrides).experiment
    sweep = SweepConfig(
        sampler=SamplerConfig(kind="random"),
        stopping=StoppingConfig(rule="asha", first_step=100, factor=3),
        budget=BudgetConfig(trials=trials),
    )
    return Plan("scaling", experiment, sweep, SPACE, TrackingConfig(uri=tracking))


class Replay:
    """Stands for the trials: plays a curve for each that runs, one score a turn."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._steps: dict[int, int] = {}

    def turn(self) -> None:
        """Fill the slots, then let every running trial report once."""
        while (record := self._controller.next()) is not None:
            self._steps[record.number] = 0
            record.run.create()
            record.run.write_config(config_tree(self._controller.study.config(record)))
            self._controller.started(record.number)
        for number in list(self._controller.running):
            self._report(self._controller.running[number].record)
        self._controller.tick()
        self._controller.take_stop_requests()

    def _report(self, record: TrialRecord) -> None:
        number = record.number
        if self._controller.running[number].stop_reason is not None:
            self._controller.receive(Stopped(number))
            return
        self._steps[number] += 100
        step = self._steps[number]
        score = self._final(record) * (1.0 + 4.0 * math.exp(-step / 200.0))
        record.run.append([{"step": step, METRIC: score}])
        self._controller.receive(Scored(number, step, {METRIC: score}))
        if step == 100 * SCORES:
            record.run.write_summary(self._summary(record, score))
            self._controller.receive(Finished(number, self._summary(record, score)))

    @staticmethod
    def _final(record: TrialRecord) -> float:
        away = sum((math.log10(float(value)) + 2.0 + k) ** 2 for k, value in enumerate(record.values.values()))
        return 3.0 + away * np.random.default_rng(record.number).uniform(0.9, 1.1)

    @staticmethod
    def _summary(record: TrialRecord, score: float) -> dict[str, object]:
        where = {"value": score, "step": 100 * SCORES, "checkpoint": ""}
        return {
            "name": "scaling", "signature": record.signature, "seed": 0, "metric": METRIC, "num_samples": 1,
            "reference": {"ddpm_1000": 5.0}, "best": where, "last": where, "scores": {"best": {METRIC: score}},
            "seconds_per_1000_images": {}, "iterations": 800, "num_steps": 5, "seconds": {"finetune": 1.0},
            "device": "cpu", "threads": 1, "git_revision": None, "versions": {},
        }  # fmt: skip


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long it took."""
    start = time.perf_counter()
    yield
    print(f"  {what:<58}{time.perf_counter() - start:8.2f} s", flush=True)


def megabytes(path: Path) -> float:
    """Of a file, with SQLite's log beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def driver(root: Path, trials: int, tracking: str) -> None:
    """Part 1."""
    folder = StudyFolder(root / "studies" / "scaling")
    with folder.lock():
        study = Study.drive(folder, plan(trials, tracking))
        controller = Controller(study, Slots(cpus=AT_ONCE, gpus=0, threads=1, gpu_share=0.0, concurrent=AT_ONCE))
        tracker = Tracker(folder, study.plan, lambda text: print(text, file=sys.stderr))
        tracker.start()
        _play(controller, tracker, trials)
        with timed("until MLflow has everything"):
            tracker.update(study.records(), running=())
            undelivered = tracker.finish("", patient=True)
    print(f"  undelivered {undelivered}; journal {megabytes(folder.journal):.1f} MB", end="")
    print(f"; MLflow {megabytes(folder.path.parent / 'mlflow.db'):.1f} MB" if tracking == "local" else "")
    with timed("reading the study again"):
        study = Study.read(folder)
    with timed("leaderboard.csv"):
        write_leaderboard(study, study.records())
    with timed("report.html"):
        write_report(study, study.records())
    proposals(study)


def _play(controller: Controller, tracker: Tracker, trials: int) -> None:
    replay, tenth = Replay(controller), max(1, trials // 10)
    start, done = time.perf_counter(), 0
    while not controller.is_over:
        replay.turn()
        tracker.update(controller.study.records(), running=set(controller.running))
        if len(controller.states) >= done + tenth:
            count, done = len(controller.states) - done, len(controller.states)
            now = time.perf_counter()
            each = (now - start) / count * 1e3
            print(f"  until trial {done:6d} {each:7.1f} ms a trial, driver {resident_megabytes():5.0f} MB", flush=True)
            start = now


def proposals(study: Study) -> None:
    """Part 2."""
    history = study.optuna.get_trials(deepcopy=False)
    for kind in ("random", "sobol", "tpe"):
        sweep = replace(study.plan.sweep, sampler=SamplerConfig(kind=kind))
        with timed(f"a proposal by {kind} after {len(history)} trials"):
            propose(sweep, study.plan.axes, study.plan.experiment, history)


def copies(root: Path) -> None:
    """Part 3."""
    for size in CHECKPOINT_MEGABYTES:
        here = root / f"run-{size}" / "checkpoints" / "step_00000100"
        here.mkdir(parents=True)
        (here / "state.safetensors").write_bytes(b"\0" * size * 1_000_000)
        (here / "meta.json").write_text(json.dumps({"step": 100}))
        with timed(f"copying a checkpoint of {size} MB on this disk"):
            Remote(str(root / f"copy-{size}")).push(root / f"run-{size}")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--tracking", default="local", choices=("local", "none"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{args.trials} trials, {SCORES} scores each, {AT_ONCE} at once, tracking {args.tracking}")
        driver(Path(folder), args.trials, args.tracking)
        copies(Path(folder))


if __name__ == "__main__":
    main()
