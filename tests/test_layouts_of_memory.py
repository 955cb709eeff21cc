"""Training does not depend on how tensors lie in memory: gradients and restored states are laid out as parameters."""

import pytest
import torch
from torch import Tensor, nn

from dxmi.distributed import SingleProcess
from dxmi.errors import UserError
from dxmi.optim.config import KINDS, OptimizerConfig
from dxmi.optim.optimizer import Optimizer
from dxmi.optim.seeds import StackedSeeds
from dxmi.tensors import laid_out_as, pack, unpack
from support import descend, stating


class RowMajor(SingleProcess):
    """Sums as those of a group are: views of one bucket."""

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.contiguous().clone() for tensor in tensors]


def convolution(*, channels_last: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    return layer.to(memory_format=torch.channels_last) if channels_last else layer  # type: ignore[call-overload]


def optimizer(kind: str, layer: nn.Module, **settings: object) -> Optimizer:
    return Optimizer(OptimizerConfig(kind=kind, lr=0.05), [(layer.parameters(), 0.05)], 10, **settings)  # type: ignore[arg-type]


def run(own: Optimizer, layer: nn.Module, first: int, last: int) -> None:
    for i in range(first, last):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(i))
        descend(own, lambda x=x: (layer(x) - 1.0).square().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_restored_optimizer_ends_equal_to_the_bit(kind, channels_last):
    straight, layer = (convolution(channels_last=channels_last) for _ in range(2))
    run(optimizer(kind, straight), straight, 0, 8)
    before = optimizer(kind, layer)
    run(before, layer, 0, 4)
    saved = unpack(pack(before.state()))
    after = optimizer(kind, layer)
    after.load_state(saved)
    for parameter in layer.parameters():
        state = after.torch.state[parameter]
        assert all(moment.stride() == parameter.stride() for moment in state.values() if moment.dim())
    run(after, layer, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_another_layout_give_the_same_steps(kind):
    """Those that a group has summed are row-major, whatever their parameters are."""
    alone, together = convolution(), convolution()
    run(optimizer(kind, alone), alone, 0, 4)
    run(optimizer(kind, together, workers=RowMajor()), together, 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), together.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_changes_rounding_alone(kind):
    last, first = convolution(), convolution(channels_last=False)
    for layer in (last, first):
        run(optimizer(kind, layer), layer, 0, 4)
    torch.testing.assert_close(last.weight, first.weight, rtol=1e-4, atol=1e-5)


def test_a_stacks_tables_are_row_major():
    stack = StackedSeeds([convolution(), convolution()])
    assert all(table.is_contiguous() for table in stack.tables.values())


def test_a_state_of_other_parameters_is_refused():
    state = optimizer("adam", convolution())
    with pytest.raises(UserError, match=stating("0.exp_avg … fits no parameter")):
        state.load_state({"0.exp_avg": torch.zeros(7)})
    with pytest.raises(UserError, match=stating("9.step … fits no parameter")):
        state.load_state({"9.step": torch.zeros(())})


def test_a_tensor_of_the_right_layout_is_not_copied():
    x = torch.randn(4, 3)
    assert laid_out_as(x, torch.empty(4, 3)) is x
    turned = laid_out_as(x, torch.empty(3, 4).T)
    assert turned.stride() == (1, 4)
    assert torch.equal(turned, x)
