"""Stretches of training: what a run asks to have trained, and who trains it, alone or stacked with others of its kind.

A run is a story, a generator that yields a stretch whenever iterations are to be done, and returns what came out. Told
alone, each stretch is trained as it comes. Told together, stories that wait at the same iteration are trained as one
program (see `dxmi.algorithms.stacked`), in which each keeps its own randomness, records and checkpoints.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dxmi.algorithms.ddpm import DDPM
from dxmi.algorithms.dxmi import DxMI
from dxmi.algorithms.stacked import StackedDDPM, StackedDxMI
from dxmi.training.state import TrainingState

T = TypeVar("T")


@dataclass
class Stretch:
    """Iterations of one algorithm that a story waits for.

    Attributes:
        algorithm: whose `update` is one iteration.
        state: its random streams and data order.
        iteration: the next one.
        total: the iteration after the last.
        precision: makes the context in which updates are computed.
        after: hears of every iteration, with the number of iterations done and its metrics; may raise to end the story.
        stacked: hears how many stories are trained together from here on.
    """

    algorithm: DDPM | DxMI
    state: TrainingState
    iteration: int
    total: int
    precision: Callable[[], AbstractContextManager[object]]
    after: Callable[[int, Mapping[str, Tensor]], None]
    stacked: Callable[[int], None]

    def train_alone(self, until: int) -> None:
        """Do the iterations before `until`."""
        generators, stream = self.state.generators.values(), self.state.stream
        for iteration in range(self.iteration, until):
            with self.precision():
                batch = stream.next()
                metrics = self.algorithm.update(batch, iteration, *generators, labels=stream.labels)
            self.iteration = iteration + 1
            self.after(self.iteration, metrics)


Story = Generator[Stretch, None, T]


def tell(story: Story[T]) -> T:
    """Tell one story to its end and return what came out."""
    try:
        stretch = next(story)
        while True:
            stretch.stacked(1)
            try:
                stretch.train_alone(stretch.total)
            except BaseException as error:  # noqa: BLE001  (it is the story's to deal with)
                stretch = story.throw(error)
            else:
                stretch = next(story)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def tell_together(stories: Sequence[Story[T]]) -> list[T]:
    """Tell several stories, stacked wherever they wait for the same; what came out of each.

    Their algorithms have one config and one shape, and are alone with their batches, in one piece.
    """
    ended: dict[int, T] = {}
    waiting: dict[int, Stretch] = {}

    def go_on(number: int, error: BaseException | None = None) -> None:
        story = stories[number]
        try:
            waiting[number] = next(story) if error is None else story.throw(error)
        except StopIteration as end:
            waiting.pop(number, None)
            ended[number] = end.value

    try:
        for number in range(len(stories)):
            go_on(number)
        while waiting:
            group, until = _next_group(waiting)
            for number, error in train_together(group, until).items():
                go_on(number, error)
            for number, stretch in group.items():
                if waiting.get(number) is stretch and stretch.iteration == stretch.total:
                    go_on(number)
    finally:
        for story in stories:  # what they hold is let go of now, not when somebody collects garbage
            story.close()
    return [ended[number] for number in range(len(stories))]


def _next_group(waiting: Mapping[int, Stretch]) -> tuple[dict[int, Stretch], int]:
    """The stories that are furthest behind, and the iteration at which others join them or they are through.

    Pretraining comes first: then all can be fine-tuned together.
    """
    kind: type = DDPM if any(isinstance(s.algorithm, DDPM) for s in waiting.values()) else DxMI
    same = {number: s for number, s in waiting.items() if isinstance(s.algorithm, kind)}
    least = min(s.iteration for s in same.values())
    group = {number: s for number, s in same.items() if s.iteration == least}
    until = min([s.total for s in group.values()] + [s.iteration for s in same.values() if s.iteration > least])
    return group, until


class _Stack(Protocol):
    def update(self, data: Tensor, iteration: int, *generators: Sequence[torch.Generator]) -> Mapping[str, Tensor]: ...


def train_together(group: Mapping[int, Stretch], until: int) -> dict[int, BaseException]:
    """Do the iterations of a group, all at the same one, before `until` or until one of its stories ends by an error.

    Returns:
        What they raised, by their numbers in `group`.
    """
    for stretch in group.values():
        stretch.stacked(len(group))
    if len(group) == 1:
        ((number, stretch),) = group.items()
        try:
            stretch.train_alone(until)
        except BaseException as error:  # noqa: BLE001
            return {number: error}
        return {}
    stretches = list(group.values())
    if stretches[0].iteration == until:
        return {}
    first, stack = stretches[0], _stack([stretch.algorithm for stretch in stretches])
    generators = list(zip(*(stretch.state.generators.values() for stretch in stretches), strict=True))
    for iteration in range(first.iteration, until):
        batches = torch.stack([stretch.state.stream.next() for stretch in stretches])
        with first.precision():
            metrics = stack.update(batches, iteration, *generators)
        errors = _after_each(group, iteration + 1, metrics)
        if errors:
            return errors
    return {}


def _stack(algorithms: Sequence[DDPM | DxMI]) -> _Stack:
    ddpms = [algorithm for algorithm in algorithms if isinstance(algorithm, DDPM)]
    dxmis = [algorithm for algorithm in algorithms if isinstance(algorithm, DxMI)]
    return StackedDDPM(ddpms) if ddpms else StackedDxMI(dxmis)  # type: ignore[return-value]


def _after_each(group: Mapping[int, Stretch], done: int, metrics: Mapping[str, Tensor]) -> dict[int, BaseException]:
    """Tell every story of its own metrics; errors of those that end by it."""
    columns = {name: values.unbind() for name, values in metrics.items()}
    errors: dict[int, BaseException] = {}
    for k, (number, stretch) in enumerate(group.items()):
        stretch.iteration = done
        try:
            stretch.after(done, {name: values[k] for name, values in columns.items()})
        except Exception as error:  # noqa: BLE001  (that story's own)
            errors[number] = error
    return errors
