"""The energy E(x): low on data. The reward of a sample is -E(x)."""

from torch import Tensor, nn

from dxmi.networks.base import Critic


class Energy(nn.Module):
    """A network's score, read as an energy.

    Args:
        network: a time-independent critic.
    """

    def __init__(self, network: Critic) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """E(x), [B]; of the class of each, [B], if the network knows classes."""
        energy: Tensor = self.network(x, labels) if self.network.classes else self.network(x)
        return energy.float()  # under autocast it comes in bfloat16
