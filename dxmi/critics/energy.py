"""The energy E(x): low on data. The reward of a sample is -E(x)."""

from torch import Tensor, nn

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.networks.base import Critic


class Energy(nn.Module):
    """An energy, given by the score of a network.

    Args:
        network: a time-independent critic.
    """

    def __init__(self, network: Critic) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """E(x) of `x` [B, *event], given the labels if the network is class-conditional: [B]."""
        energy: Tensor = self.network(x, condition.labels) if self.network.classes else self.network(x)
        return energy.float()  # under autocast the score is bfloat16
