"""Actors through which a command and its trials or workers talk.

Nothing heavy is imported here: an actor has a process of its own, and PyTorch would take seconds of it.
"""

import asyncio

_POLL_SECONDS = 0.5


class Mailbox:
    """A Ray actor between the driver and the trials: orders one way, heartbeats and notes the other."""

    def __init__(self) -> None:
        self._orders: set[int] = set()
        self._beats: dict[int, tuple[str, int, int]] = {}
        self._notes: list[tuple[int, str]] = []

    def order(self, numbers: list[int]) -> None:
        """Tell trials to save and return."""
        self._orders.update(numbers)

    def beat(self, number: int, phase: str, step: int, total: int) -> bool:
        """A trial says how far it is; returns whether it should stop."""
        self._beats[number] = (phase, step, total)
        return number in self._orders

    def note(self, number: int, text: str) -> None:
        """A trial has something to say to a person."""
        self._notes.append((number, text))

    def collect(self) -> tuple[dict[int, tuple[str, int, int]], list[tuple[int, str]]]:
        """Beats and notes since the last call."""
        beats, self._beats = self._beats, {}
        notes, self._notes = self._notes, []
        return beats, notes


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
