"""`Optimizer.minimize`: the mean over the whole batch, however its rows are divided, and nothing but its parameters."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dxmi.distributed import SingleProcess
from dxmi.optim.config import KINDS, OptimizerConfig
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer

ROWS = 7
X = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) + 0.5


def network() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(3, 2)


def optimizer(module: nn.Module, kind: str = "adam", **settings: Any) -> Optimizer:
    config = OptimizerConfig(kind=kind, lr=0.05, max_grad_norm=0.5)
    return Optimizer(config, [(module.parameters(), 0.05)], 10, **settings)


def minimized(own: Optimizer, module: nn.Module, rows: slice = slice(None), num: int = ROWS) -> dict[str, float]:
    """The metrics of one step on weighted squares, whose inputs are nested and partly None."""

    def loss(x: Tensor, nested: tuple[Tensor, None]) -> Mapping[str, Tensor]:
        weights, nothing = nested
        assert nothing is None
        squares = weights * module(x).square().sum(1)
        return {"loss": squares, "size": x.square().sum(1)}

    result = own.minimize(loss, X[None, rows], (WEIGHTS[None, rows], None), num=num)
    return {name: float(value) for name, value in result.metrics("step").items()}


def by_hand(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients on all rows."""
    loss = (WEIGHTS * module(X).square().sum(1)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2, 3, ROWS, 20])
def test_micro_batches_change_rounding_only(kind, accumulate):
    """They differ in size, so that a mean of their means would be another number."""
    whole, pieces = network(), network()
    loss, grads = by_hand(whole)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    expected = {"step/loss": float(loss), "step/size": float(X.square().sum(1).mean()), "step/grad_norm": float(norm)}
    one, many = optimizer(whole, kind), optimizer(pieces, kind, accumulate=accumulate)
    for first in (True, False, False):
        told, ours = minimized(one, whole), minimized(many, pieces)
        assert ours == pytest.approx(told, rel=1e-5)
        if first:
            assert told == pytest.approx(expected, rel=1e-5)
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Adding(SingleProcess):
    """A process with another that has the remaining rows: adds what the other computed."""

    def __init__(self) -> None:
        self.others: list[Tensor] = []

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(tensors, self.others, strict=True)]


class Recording(SingleProcess):
    """Keeps what a process would send."""

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        self.sent = [tensor.clone() for tensor in tensors]
        return tensors


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_with_some_rows_each_take_the_step_of_the_whole_batch(accumulate):
    """`num` is the whole batch's: each contributes its part of the mean, not a mean of its own."""
    whole, part, other = network(), network(), network()
    expected = minimized(optimizer(whole), whole)
    recording, adding = Recording(), Adding()
    minimized(optimizer(other, workers=recording, accumulate=accumulate), other, slice(5, None))
    adding.others = recording.sent
    found = minimized(optimizer(part, workers=adding, accumulate=accumulate), part, slice(5))
    assert found == pytest.approx(expected, rel=1e-5)
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_of_its_own_parameters_only():
    module, other = network(), network()
    own = Optimizer(OptimizerConfig(), [([module.weight], 0.1)], 1)
    own.minimize(lambda x: {"loss": other(module(x) @ torch.ones(2, 3)).sum(1)}, X[None], num=ROWS)
    assert module.weight.grad is not None
    assert module.bias.grad is None
    assert all(parameter.grad is None for parameter in other.parameters())


def test_without_clipping_there_is_no_norm():
    module = network()
    own = Optimizer(OptimizerConfig(max_grad_norm=None), [(module.parameters(), 0.1)], 1)
    result = own.minimize(lambda x: {"loss": module(x).sum(1)}, X[None], num=ROWS)
    assert result.grad_norm is None
    assert result.metrics("policy").keys() == {"policy/loss"}


def test_static_arguments_are_asked_for_by_the_rows_they_are_of():
    module, asked, given = network(), [], []

    def loss(x: Tensor, *, count: int) -> Mapping[str, Tensor]:
        given.append((len(x), count))
        return {"loss": module(x).sum(1)}

    def static(rows: slice) -> Mapping[str, int]:
        asked.append((rows.start, rows.stop))
        return {"count": rows.stop - rows.start}

    optimizer(module, accumulate=3).minimize(loss, X[None], num=ROWS, static=static)
    assert asked == [(0, 2), (2, 4), (4, 7)]
    assert given == [(2, 2), (2, 2), (3, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_is_one_tensor_that_changes_in_place(kind):
    """A step that was recorded for a GPU reads the same memory again."""
    config = OptimizerConfig(kind=kind, lr=0.1, warmup=4)
    own = Optimizer(config, [([nn.Parameter(torch.ones(1))], 0.1), ([nn.Parameter(torch.ones(1))], 0.02)], 10)
    rates = [group["lr"] for group in own.torch.param_groups]
    for iteration, factor in ((0, 0.25), (1, 0.5), (7, 1.0)):
        own.schedule(iteration)
        assert all(group["lr"] is rate for group, rate in zip(own.torch.param_groups, rates, strict=True))
        assert [float(rate) for rate in rates] == [0.1 * factor, 0.02 * factor]


def test_the_decay_of_an_average_is_one_tensor_that_changes_in_place():
    source, target = network(), network()
    average = MovingAverage.between(source, target, 0.9)
    weight = average._weight
    for iteration, decay in ((0, 0.1), (8, 0.5), (1000, 0.9)):
        average.schedule(iteration)
        assert average._weight is weight
        assert float(weight) == pytest.approx(1.0 - decay)
