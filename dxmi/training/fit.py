"""The training loop: the iterations of one run, or of several runs that differ only in their seeds, as one program."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from dxmi.algorithms.base import Algorithm
from dxmi.data.batch import Batch
from dxmi.training.recording import update_of
from dxmi.training.state import TrainingState


@dataclass(frozen=True)
class TrainingPhase:
    """The iterations of one algorithm that a run still has to compute.

    Attributes:
        algorithm: algorithm whose `update` computes an iteration.
        state: training state with the random streams and the data order.
        start: first iteration.
        total: one more than the last iteration.
        precision: creates the autocast context of an update.
        recorded: whether to record the iterations as CUDA graphs.
        began: called with the seconds of the first iteration of each program, in which networks are compiled.
        joined: called with the number of runs that are trained together, whenever a run joins or leaves them.
        after_iteration: called with the number of completed iterations and the metrics of the last one; an exception
            that it raises ends the run.
    """

    algorithm: Algorithm
    state: TrainingState
    start: int
    total: int
    precision: Callable[[], AbstractContextManager[object]]
    joined: Callable[[int], None]
    after_iteration: Callable[[int, Mapping[str, Tensor]], None]
    recorded: bool = False
    began: Callable[[float], None] = lambda _: None


def fit(phases: Sequence[TrainingPhase]) -> list[Exception | None]:
    """Compute the iterations of several phases of the same kind and length, in one program where these coincide.

    A phase that was resumed at a later iteration joins the others when they reach that iteration. A phase that ends
    with an error leaves the group.

    Returns:
        For each phase, the exception that its `after_iteration` raised, or None.
    """
    errors: dict[int, Exception] = {}
    group = Group({})
    for iteration in range(
        min((phase.start for phase in phases), default=0), max((p.total for p in phases), default=0)
    ):
        members = {
            number: phase
            for number, phase in enumerate(phases)
            if phase.start <= iteration < phase.total and number not in errors
        }
        if not members:
            continue
        if members.keys() != group.members.keys():
            group = Group(members)
        metrics = group.update(iteration)
        errors |= group.after_iteration(iteration + 1, metrics)
    return [errors.get(number) for number in range(len(phases))]


class Group:
    """Phases at the same iteration, trained as one program.

    Args:
        members: phases by their indices.
    """

    def __init__(self, members: Mapping[int, TrainingPhase]) -> None:
        self.members = members
        phases = list(members.values())
        algorithms = [phase.algorithm for phase in phases]
        if len(algorithms) > 1:
            self._algorithm = type(algorithms[0]).stacked(algorithms)
        elif algorithms:
            self._algorithm = algorithms[0]
        self._states = [phase.state for phase in phases]
        if phases:
            generators, first = [state.generators for state in self._states], phases[0]
            self._update = update_of(self._algorithm, generators, first.precision, recorded=first.recorded)
        for phase in phases:
            phase.joined(len(phases))
        self._has_begun = False

    def update(self, iteration: int) -> Mapping[str, Tensor]:
        """Compute one iteration of all members; returns metrics of shape [K]."""
        batch = Batch.stacked([state.stream.next() for state in self._states])
        start = time.perf_counter()
        metrics = self._update(batch, iteration)
        if not self._has_begun:
            self._has_begun = True
            for phase in self.members.values():
                phase.began(time.perf_counter() - start)
        return metrics

    def after_iteration(self, done: int, metrics: Mapping[str, Tensor]) -> dict[int, Exception]:
        """Call `after_iteration` of each member with its own metrics; returns the exceptions that were raised."""
        columns = {name: values.unbind() for name, values in metrics.items()}
        errors: dict[int, Exception] = {}
        for k, (number, phase) in enumerate(self.members.items()):
            try:
                phase.after_iteration(done, {name: values[k] for name, values in columns.items()})
            except Exception as error:  # noqa: BLE001  (it ends this member only, and is returned)
                errors[number] = error
        return errors
