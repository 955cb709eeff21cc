"""What the driver and the trials pass to each other while a sweep runs.

Nothing is imported here: the actor has a process of its own, and PyTorch would take seconds of it.
"""


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
