"""Actors through which a command communicates with its trials or workers.

This module must stay cheap to import: each actor runs in its own process, where importing PyTorch takes seconds.
"""

import asyncio

_POLL_SECONDS = 0.5


class ControlChannel:
    """A Ray actor that carries stop requests from the controller to trials, and heartbeats and notes back."""

    def __init__(self) -> None:
        self._stop_requests: set[int] = set()
        self._heartbeats: dict[int, tuple[str, int, int]] = {}
        self._notes: list[tuple[int, str]] = []

    def request_stop(self, numbers: list[int]) -> None:
        """Ask trials to save and return."""
        self._stop_requests.update(numbers)

    def heartbeat(self, number: int, phase: str, step: int, total: int) -> bool:
        """Record a trial's progress; returns whether the trial should stop."""
        self._heartbeats[number] = (phase, step, total)
        return number in self._stop_requests

    def note(self, number: int, text: str) -> None:
        """Record a message from a trial to the user."""
        self._notes.append((number, text))

    def collect(self) -> tuple[dict[int, tuple[str, int, int]], list[tuple[int, str]]]:
        """Return the heartbeats and notes received since the last call."""
        heartbeats, self._heartbeats = self._heartbeats, {}
        notes, self._notes = self._notes, []
        return heartbeats, notes


class Line:
    """An actor that passes the reports of the rank-zero worker to the caller of `train_on_workers`, one at a time."""

    def __init__(self) -> None:
        self._asked: asyncio.Queue[tuple[str, asyncio.Future[bool]]] = asyncio.Queue()
        self._open: asyncio.Future[bool] | None = None

    async def ask(self, message: str) -> bool:
        """Send a report from the rank-zero worker and wait for the answer."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._asked.put((message, answer))
        return await answer

    async def next(self) -> str | None:
        """Return the next report, or None if none arrives within the polling interval."""
        try:
            message, self._open = await asyncio.wait_for(self._asked.get(), _POLL_SECONDS)
        except TimeoutError:
            return None
        return message

    async def answer(self, stop: bool) -> None:
        """Answer the report last returned by `next`."""
        if self._open is not None and not self._open.done():
            self._open.set_result(stop)
