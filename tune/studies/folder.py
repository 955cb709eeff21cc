"""The folder of a study: paths of its files, its lock, its plan and its progress."""

import difflib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dxmi.config import differences
from dxmi.errors import UserError
from dxmi.persistence.files import write_atomic, write_json
from dxmi.persistence.run_directory import RunDirectory, read_yaml
from dxmi.training.schema import without_permission
from tune.plans.ablation import AblationPlan, any_plan_from
from tune.plans.sweep import FORMAT, Plan


class StudyFolder:
    """The folder of a study.

    Args:
        path: Path of the folder, studies/NAME.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "study.yaml"
        self.journal = path / "optuna.journal"
        self.trials = path / "trials"
        self.progress = path / "progress.json"
        self.leaderboard = path / "leaderboard.csv"
        self.best = path / "best.yaml"
        self.report = path / "report.html"
        self.scratch = path / ".ray"

    @property
    def exists(self) -> bool:
        """Whether the folder holds a study."""
        return self.plan.exists()

    @property
    def changed(self) -> float:
        """Time of the last start, score or end of a trial, in seconds since the epoch."""
        path = self.journal if self.journal.exists() else self.plan
        return path.stat().st_mtime

    def run(self, number: int) -> RunDirectory:
        """The run folder of a trial."""
        return RunDirectory(self.trials / f"{number:04d}")

    def error(self, number: int) -> Path:
        """Path of a crashed trial's traceback."""
        return self.run(number).path / "error.txt"

    def write_error(self, number: int, error: str) -> None:
        """Write a crashed trial's traceback to its run folder."""
        path = self.error(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, error + "\n")

    def lock(self) -> FileLock:
        """Acquire the exclusive lock for driving this study, held until it is released or the process ends.

        Raises:
            UserError: another process holds it, or the folder is not writable.
        """
        self.require_own()
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is running the study {self.path.name}: wait for it, or choose another name."
            ) from error
        except OSError as error:
            raise UserError(f"The study folder {self.path} cannot be written: {error.strerror}.") from error
        return lock

    def require_own(self) -> None:
        """Check that the folder belongs to the current user.

        Raises:
            UserError: it belongs to another user.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.path.stat().st_uid != os.getuid():
                raise UserError(f"The study folder {self.path} belongs to another user: choose another name.")

    def read_plan(self) -> Plan:
        """Read the plan that was written when the study was created.

        Raises:
            UserError: there is no plan, it is damaged, or the folder has been renamed.
        """
        self.require_own()
        tree = read_yaml(self.plan, _no_study(self.path))
        if tree.get("format") != FORMAT:
            raise UserError(f"{self.plan} has format {tree.get('format')!r}: this version of dxmi reads {FORMAT}.")
        plan = any_plan_from(_without_permission(tree))
        if plan.name != self.path.resolve().name:
            raise UserError(f"The study in {self.path} is called {plan.name}: rename the folder to {plan.name}.")
        if plan.signature != tree.get("signature"):
            raise UserError(f"{self.plan} has been edited, or was written by another version of dxmi: restore it.")
        return plan

    def read_progress(self) -> dict[str, Any]:
        """Read the seconds so far and why the last session ended; default values if the file is missing or damaged."""
        try:
            tree = json.loads(self.progress.read_text())
        except (FileNotFoundError, ValueError):
            tree = None
        nothing: dict[str, Any] = {"seconds": 0.0, "device_seconds": 0.0, "ended": ""}
        if not isinstance(tree, dict):
            return nothing
        return {
            key: tree[key] if isinstance(tree.get(key), type(default)) else default for key, default in nothing.items()
        }

    def write_progress(self, seconds: float, ended: str, device_seconds: float = 0.0) -> None:
        """Write progress.json.

        Args:
            seconds: Wall seconds so far.
            ended: Why the session ended; empty while it runs.
            device_seconds: Sum over trials of their seconds times the number of devices that they held.
        """
        tree = {"seconds": float(seconds), "device_seconds": float(device_seconds), "ended": ended}
        write_json(self.progress, tree)

    def begin(self, plan: Plan) -> Plan:
        """Write the plan. If there already is one, it must be the same except for budget and resources.

        Returns:
            The plan, with the number of seeds per program that the study has recorded.

        Raises:
            UserError: the folder holds a different study.
        """
        if self.exists:
            self.require_same(plan)
            recorded = self.read_plan()
            if isinstance(plan, AblationPlan) and isinstance(recorded, AblationPlan):
                plan = replace(plan, stacked=recorded.stacked)
        self.write_plan(plan)
        return plan

    def write_plan(self, plan: Plan) -> None:
        """Write study.yaml."""
        tree = _without_permission(plan.tree())
        write_atomic(self.plan, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))

    def require_same(self, plan: Plan) -> None:
        """Check that a plan has the same identity as the study's plan.

        Raises:
            UserError: it differs; the message lists the differences.
        """
        own = self.read_plan()
        own.require_present()
        changed = differences(own.settings, plan.settings)
        if changed:
            raise UserError(
                f"The study {plan.name} was started with other settings ({'; '.join(changed[:5])}). "
                "Choose another name, or delete its folder."
            )


def _without_permission(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The content of study.yaml without permission to execute code."""
    experiment = tree.get("experiment")
    return {**tree, "experiment": without_permission(experiment)} if isinstance(experiment, Mapping) else dict(tree)


def _no_study(path: Path) -> str:
    """Error message for a folder without a study, which suggests similar names of studies next to it."""
    near = difflib.get_close_matches(path.name, [folder.path.name for folder in studies_in(path.parent)])
    hint = f"Did you mean {' or '.join(near)}?" if near else "`dxmi studies` lists the existing studies."
    return f"There is no study in {path}. {hint}"


def studies_in(root: Path) -> list[StudyFolder]:
    """The studies in a folder, sorted by name."""
    found = (StudyFolder(path) for path in sorted(root.iterdir())) if root.is_dir() else iter(())
    return [folder for folder in found if folder.exists]
