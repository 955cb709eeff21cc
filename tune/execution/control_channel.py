"""Actors through which a command and its trials or workers talk.

Nothing heavy is imported here: an actor has a process of its own, and PyTorch would take seconds of it.
"""

import asyncio

_POLL_SECONDS = 0.5


class ControlChannel:
    """A Ray actor between the controller and the trials: stop requests one way, heartbeats and notes the other."""

    def __init__(self) -> None:
        self._stop_requests: set[int] = set()
        self._heartbeats: dict[int, tuple[str, int, int]] = {}
        self._notes: list[tuple[int, str]] = []

    def request_stop(self, numbers: list[int]) -> None:
        """Ask trials to save and return."""
        self._stop_requests.update(numbers)

    def heartbeat(self, number: int, phase: str, step: int, total: int) -> bool:
        """A trial says how far it is; returns whether it should stop."""
        self._heartbeats[number] = (phase, step, total)
        return number in self._stop_requests

    def note(self, number: int, text: str) -> None:
        """A trial has something to say to a person."""
        self._notes.append((number, text))

    def collect(self) -> tuple[dict[int, tuple[str, int, int]], list[tuple[int, str]]]:
        """Heartbeats and notes since the last call."""
        heartbeats, self._heartbeats = self._heartbeats, {}
        notes, self._notes = self._notes, []
        return heartbeats, notes


class Line:
    """An actor between the first worker and the caller of `train_on_workers`: one report at a time, with its answer."""

    def __init__(self) -> None:
        self._asked: asyncio.Queue[tuple[str, asyncio.Future[bool]]] = asyncio.Queue()
        self._open: asyncio.Future[bool] | None = None

    async def ask(self, message: str) -> bool:
        """The first worker reports, and waits for the answer."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._asked.put((message, answer))
        return await answer

    async def next(self) -> str | None:
        """The next report, or None if there is none for a while."""
        try:
            message, self._open = await asyncio.wait_for(self._asked.get(), _POLL_SECONDS)
        except TimeoutError:
            return None
        return message

    async def answer(self, stop: bool) -> None:
        """Answer the report that `next` gave."""
        if self._open is not None and not self._open.done():
            self._open.set_result(stop)
