"""Copy of a study at `resources.storage_path`, through which nodes without a common file system exchange runs.

Everything else reads the driver's folder. A trial writes to its own node and to the copy; the driver fetches the run
from the copy when the trial reports, and uploads its own files. A study can be resumed from the copy only.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from dxmi.errors import UserError
from tune.integrations.object_store import Remote, join, light, whole
from tune.studies.folder import StudyFolder

_SEND_EVERY = 5.0
"""Seconds between two uploads of the study's own files."""
_LEASE_SECONDS = 30.0
_LEASE = ".driver.json"
_POLL_SECONDS = 1.0
Complain = Callable[[str], None]


class StudySync:
    """Synchronization of a study that is driven by this process; does nothing without a storage path.

    Args:
        folder: Folder of the study.
        storage_path: Where studies are kept, or None.
        complain: Called with a message when the copy cannot be updated.

    Raises:
        UserError: the storage path is not a valid address.
    """

    def __init__(self, folder: StudyFolder, storage_path: str | None, complain: Complain) -> None:
        self._folder = folder
        self._address = None if storage_path is None else join(storage_path, folder.path.name)
        self._study = None if self._address is None else Remote(self._address)
        self._trials: dict[int, Remote] = {}
        self._complain = complain
        self._sent = -_SEND_EVERY
        self._failing = False
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}

    def address(self, number: int) -> str | None:
        """Where a trial's run is kept; None without a storage path."""
        return None if self._address is None else join(self._address, "trials", f"{number:04d}")

    def begin(self) -> None:
        """Acquire the lease for driving the study, and fetch the files that only the copy has.

        Raises:
            UserError: another process drives the study, or folder and copy have diverged.
        """
        if self._study is None:
            return
        self._await_lease(self._study)
        theirs, ours = self._study.read(self._folder.journal.name) or b"", _read(self._folder)
        if not theirs.startswith(ours) and not ours.startswith(theirs):
            raise UserError(
                f"The study in {self._folder.path} and its copy at {self._address} were continued separately: delete "
                "the one that you do not want to keep, or choose another name."
            )
        if len(theirs) >= len(ours) and theirs:
            self._study.pull(self._folder.path)

    def fetch(self, number: int, *, ended: bool) -> None:
        """Download a trial's records and images, and also its checkpoints if it has ended."""
        if self._study is not None:
            self._remote(number).pull(self._folder.run(number).path, whole if ended else light)

    def send(self, number: int) -> None:
        """Update the copy of an ended trial from its run folder, in which surplus checkpoints have been deleted."""
        if self._study is not None:
            self._remote(number).push(self._folder.run(number).path)

    def send_study(self) -> None:
        """Upload the study's own files, at most every few seconds; a failure is reported once and retried later."""
        if self._study is not None and time.monotonic() - self._sent > _SEND_EVERY:
            self._send(self._study)

    def finish(self) -> None:
        """Upload the remaining files and release the lease."""
        if self._study is None:
            return
        self._send(self._study)
        if self._failing:
            self._complain(
                f"the copy at {self._address} is incomplete, but the study in {self._folder.path} is complete."
            )
            return
        self._study.delete(_LEASE)

    def _remote(self, number: int) -> Remote:
        address = self.address(number)
        if number not in self._trials and address is not None:
            self._trials[number] = Remote(address)
        return self._trials[number]

    def _send(self, study: Remote) -> None:
        self._sent = time.monotonic()
        try:
            study.push(self._folder.path, _own)
            self._hold_lease(study)
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._complain(f"the study cannot currently be copied to {self._address} ({error}); it continues here.")
            self._failing = True

    # ------------------------------------------------------------------------
    # Lease for a single driver, in a store without locks

    def _await_lease(self, study: Remote) -> None:
        """Wait until the lease of the last driver has expired, unless it was released.

        Raises:
            UserError: another process renews the lease.
        """
        held, since = study.read(_LEASE), time.monotonic()
        while held is not None and time.monotonic() - since < _LEASE_SECONDS:
            time.sleep(_POLL_SECONDS)
            now = study.read(_LEASE)
            if now is not None and now != held:
                raise UserError(
                    f"Another process is running the study at {self._address} ({_holder(now)}): wait, or choose "
                    "another name."
                )
            held = now
        self._hold_lease(study)

    def _hold_lease(self, study: Remote) -> None:
        study.write(_LEASE, json.dumps({**self._me, "time": time.time()}).encode())


def _own(name: str) -> bool:
    """Select the study's own files, without those of its trials."""
    return whole(name) and not name.startswith("trials/")


def _read(folder: StudyFolder) -> bytes:
    try:
        return folder.journal.read_bytes()
    except FileNotFoundError:
        return b""


def _holder(lease: bytes) -> str:
    try:
        tree: dict[str, Any] = json.loads(lease)
        return f"process {tree['pid']} on {tree['host']}"
    except (ValueError, KeyError, TypeError):
        return "unknown process"
