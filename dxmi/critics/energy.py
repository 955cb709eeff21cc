"""The energy E(x), which is low on data; -E(x) acts as the reward of a sample."""

from torch import Tensor, nn

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.networks.base import Critic


class Energy(nn.Module):
    """An energy, computed by a network.

    Args:
        network: A time-independent critic.
    """

    def __init__(self, network: Critic) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Compute E(x) of `x` [B, *event], conditioned on the labels if the network is class-conditional: [B]."""
        energy: Tensor = self.network(x, condition.labels) if self.network.classes else self.network(x)
        return energy.float()  # under autocast the score is bfloat16
