"""The folder of a study: where its files are, its lock, its plan and its progress."""

import difflib
import json
import os
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
from tune.plans.ablation import AblationPlan, any_plan_from
from tune.plans.sweep import FORMAT, Plan


class StudyFolder:
    """Where a study lives.

    Args:
        path: studies/NAME.
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
        """Whether a study was begun here."""
        return self.plan.exists()

    @property
    def changed(self) -> float:
        """When a trial last began, scored or ended, in seconds since 1970."""
        path = self.journal if self.journal.exists() else self.plan
        return path.stat().st_mtime

    def run(self, number: int) -> RunDirectory:
        """The run folder of a trial."""
        return RunDirectory(self.trials / f"{number:04d}")

    def error(self, number: int) -> Path:
        """Where a crashed trial's traceback is."""
        return self.run(number).path / "error.txt"

    def write_error(self, number: int, error: str) -> None:
        """Keep a crashed trial's traceback."""
        path = self.error(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, error + "\n")

    def lock(self) -> FileLock:
        """The exclusive right to drive this study, held until it is released or the process ends.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        self.require_own()
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is driving the study {self.path.name}: wait for it, or choose another name."
            ) from error
        except OSError as error:
            raise UserError(f"The study folder {self.path} cannot be written: {error.strerror}.") from error
        return lock

    def require_own(self) -> None:
        """Refuse a folder that somebody else owns.

        Raises:
            UserError: it is somebody else's.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.path.stat().st_uid != os.getuid():
                raise UserError(f"The study folder {self.path} belongs to another user: choose another name.")

    def read_plan(self) -> Plan:
        """The plan as it was written when the study began.

        Raises:
            UserError: there is none, it is damaged, or the folder has been renamed.
        """
        self.require_own()
        tree = read_yaml(self.plan, _no_study(self.path))
        if tree.get("format") != FORMAT:
            raise UserError(f"{self.plan} has format {tree.get('format')!r}: this version of dxmi reads {FORMAT}.")
        plan = any_plan_from(tree)
        if plan.name != self.path.resolve().name:
            raise UserError(f"The study in {self.path} is called {plan.name}: name its folder so.")
        if plan.signature != tree.get("signature"):
            raise UserError(f"{self.plan} has been edited, or was written by another version of dxmi: restore it.")
        return plan

    def read_progress(self) -> dict[str, Any]:
        """Seconds so far, and why the last session ended; nothing of a study that has not begun or a damaged file."""
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
        """Record wall seconds, why the session ended if it has, and seconds of trials times the devices they held."""
        tree = {"seconds": float(seconds), "device_seconds": float(device_seconds), "ended": ended}
        write_json(self.progress, tree)

    def begin(self, plan: Plan) -> Plan:
        """Write the plan; if there is one, check that it is the same but for its budget and resources.

        Returns:
            The plan, with what the study has recorded of its own choices.

        Raises:
            UserError: the folder holds another study.
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
        write_atomic(self.plan, yaml.safe_dump(plan.tree(), sort_keys=False, allow_unicode=True))

    def require_same(self, plan: Plan) -> None:
        """Refuse a plan that is not the one that the study was begun with.

        Raises:
            UserError: it is another, and how it differs.
        """
        changed = differences(self.read_plan().identity, plan.identity)
        if changed:
            raise UserError(
                f"The study {plan.name} was begun with other settings ({'; '.join(changed[:5])}). "
                "Choose another name, or delete its folder."
            )


def _no_study(path: Path) -> str:
    """The sentence about a folder without a study, with the names beside it that are nearest."""
    near = difflib.get_close_matches(path.name, [folder.path.name for folder in studies_in(path.parent)])
    hint = f"Did you mean {' or '.join(near)}?" if near else "`dxmi studies` lists those there are."
    return f"There is no study in {path}. {hint}"


def studies_in(root: Path) -> list[StudyFolder]:
    """The studies in a folder, by name."""
    found = (StudyFolder(path) for path in sorted(root.iterdir())) if root.is_dir() else iter(())
    return [folder for folder in found if folder.exists]
