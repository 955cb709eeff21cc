"""The training loop: who is trained together, whose metrics are whose, and who leaves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from dxmi.algorithms.base import Algorithm
from dxmi.data.batch import Batch, Streams
from dxmi.data.dataset import BatchStream
from dxmi.optim.config import OptimizerConfig
from dxmi.optim.optimizer import Optimizer
from dxmi.training.fit import TrainingPhase, fit
from dxmi.training.state import TrainingState

POINTS = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
TOTAL = 8


class Regression(Algorithm):
    """Learns the mean of its samples and of some noise."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((2,), float(seed)))
        self.optimizers = {"mean": Optimizer(OptimizerConfig(lr=0.1), [([self.mean], 0.1)], TOTAL)}

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> dict[str, Tensor]:
        noise = streams.normal("noise", tuple(batch.x.shape[1:]))

        def loss(x: Tensor, noise: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.mean - x - 0.1 * noise).square().mean(1)}

        result = self.optimizers["mean"].minimize(loss, batch.x, noise, num=batch.share.num)
        return {"iteration": torch.full((self.seeds.size,), float(iteration)), **result.means}


class Phase:
    """A phase of one seed, and everything that it was told."""

    def __init__(self, seed: int, ends_at: int | None = None) -> None:
        self.algorithm = Regression(seed)
        generators = {"noise": torch.Generator().manual_seed(10 + seed)}
        stream = BatchStream(POINTS, 6, torch.Generator().manual_seed(seed))
        self.state = TrainingState(self.algorithm, self.algorithm.optimizers, generators, stream)
        self.ends_at = ends_at
        self.together: list[int] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.entered = 0
        self.began: list[float] = []

    @contextmanager
    def precision(self) -> Iterator[None]:
        self.entered += 1
        yield

    def after_iteration(self, done: int, metrics: Mapping[str, Tensor]) -> None:
        self.rows.append((done, {name: float(value) for name, value in metrics.items()}))
        if done == self.ends_at:
            raise ValueError(f"ends at {done}")

    def of(self, start: int = 0, total: int = TOTAL) -> TrainingPhase:
        own = (self.algorithm, self.state, start, total, self.precision, self.together.append, self.after_iteration)
        return TrainingPhase(*own, began=self.began.append)


def by_itself(seed: int) -> Phase:
    phase = Phase(seed)
    assert fit([phase.of()]) == [None]
    return phase


def require_same(phase: Phase, alone: Phase) -> None:
    """The same weights, streams and metrics, but for rounding."""
    torch.testing.assert_close(phase.algorithm.mean, alone.algorithm.mean, rtol=1e-6, atol=1e-6)
    ours, theirs = phase.state.groups()["state"], alone.state.groups()["state"]
    assert torch.equal(ours["generator.noise"], theirs["generator.noise"])
    assert torch.equal(ours["stream.order"], theirs["stream.order"])
    assert [done for done, _ in phase.rows] == [done for done, _ in alone.rows]
    for (_, own), (_, expected) in zip(phase.rows, alone.rows, strict=True):
        assert own == pytest.approx(expected, rel=1e-5)


def test_a_phase_by_itself_is_told_of_every_iteration():
    phase = by_itself(1)
    assert [done for done, _ in phase.rows] == list(range(1, TOTAL + 1))
    assert [row["iteration"] for _, row in phase.rows] == list(range(TOTAL))
    assert phase.together == [1]
    assert phase.entered == TOTAL
    assert len(phase.began) == 1
    assert phase.began[0] > 0.0


def test_metrics_reach_the_phase_that_they_are_of():
    phases = [Phase(seed) for seed in (0, 3, 7)]
    assert fit([phase.of() for phase in phases]) == [None, None, None]
    for phase, seed in zip(phases, (0, 3, 7), strict=True):
        assert phase.together == [3]
        require_same(phase, by_itself(seed))
    assert len({phase.rows[0][1]["loss"] for phase in phases}) == 3


def test_a_phase_that_was_resumed_further_on_joins_the_others_there():
    early, late, other = Phase(0), Phase(3), Phase(7)
    fit([late.of(total=5)])
    late.together.clear()
    assert fit([early.of(), late.of(start=5), other.of()]) == [None, None, None]
    assert (early.together, late.together, other.together) == ([2, 3], [3], [2, 3])
    for phase, seed in ((early, 0), (late, 3), (other, 7)):
        require_same(phase, by_itself(seed))


def test_a_phase_that_raises_leaves_and_the_others_continue():
    phases = [Phase(0), Phase(3, ends_at=4), Phase(7)]
    first, error, last = fit([phase.of() for phase in phases])
    assert (first, last) == (None, None)
    assert isinstance(error, ValueError)
    assert str(error) == "ends at 4"
    assert [phase.together for phase in phases] == [[3, 2], [3], [3, 2]]
    assert [done for done, _ in phases[1].rows] == [1, 2, 3, 4]
    for phase, seed in ((phases[0], 0), (phases[2], 7)):
        require_same(phase, by_itself(seed))


def test_all_that_raise_at_once_leave_at_once():
    phases = [Phase(0, ends_at=2), Phase(3, ends_at=2)]
    assert [str(error) for error in fit([phase.of() for phase in phases])] == ["ends at 2", "ends at 2"]
    assert [len(phase.rows) for phase in phases] == [2, 2]


def test_an_interrupt_ends_all():
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    phases = [Phase(0), Phase(3)]
    phases[0].after_iteration = interrupt
    with pytest.raises(KeyboardInterrupt):
        fit([phase.of() for phase in phases])


def test_iterations_that_nobody_has_to_do_are_passed_over():
    ended, late = Phase(0, ends_at=2), Phase(3)
    fit([late.of(total=5)])
    late.together.clear()
    errors = fit([ended.of(), late.of(start=5)])
    assert [error is None for error in errors] == [False, True]
    assert (ended.together, late.together) == ([1], [1])
    require_same(late, by_itself(3))


def test_without_iterations_nothing_happens():
    phase = Phase(0)
    assert fit([]) == []
    assert fit([phase.of(start=TOTAL)]) == [None]
    assert (phase.together, phase.rows) == ([], [])
