"""The energy E(x): low on data. The reward of a sample is -E(x)."""

from torch import Tensor, nn

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.networks.base import Critic


class Energy(nn.Module):
    """A network's score, read as an energy.

    Args:
        network: a time-independent critic.
    """

    def __init__(self, network: Critic) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> Tensor:
        """E(x) of `x` [B, *event], given its class if the network knows classes: [B]."""
        energy: Tensor = self.network(x, condition.labels) if self.network.classes else self.network(x)
        return energy.float()  # under autocast the score is bfloat16
