"""The value V(x, t): expected cost-to-go from x at step t, low is good. V(x, T) is the energy."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dxmi.critics.energy import Energy
from dxmi.networks.base import TimedCritic


class Value(nn.Module, ABC):
    """V(x, t), with V(., T) = E.

    Attributes:
        energy: E.
    """

    energy: Energy

    @abstractmethod
    def forward(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """V(x, t) of `x` [B, *event] at one step for the batch, with labels [B] where there are classes: [B]."""

    @abstractmethod
    def at_steps(self, x: Tensor, t: Tensor, num_final: int, num_open: int = 0, labels: Tensor | None = None) -> Tensor:
        """V(x_i, t_i), [B].

        Args:
            x: [B, *event].
            t: the step of each sample in ascending order, [B].
            num_final: how many of them, at the end, are at T; the caller knows it without asking the device.
            num_open: how many before those may be at T: of one member of a stack so, of another not.
            labels: the class of each, [B], where there are classes.
        """

    def gradient(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """dV(x, t)/dx for each sample: [B, *event]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x, t, labels).sum(), x)
        return gradient


class SharedValue(Value):
    """Time-independent: one network is energy and value, V(x, t) = E(x). The paper's choice for images."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """E(x), whatever the step."""
        return self.energy(x, labels)  # type: ignore[no-any-return]

    def at_steps(self, x: Tensor, t: Tensor, num_final: int, num_open: int = 0, labels: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """E(x), whatever the steps."""
        return self.energy(x, labels)  # type: ignore[no-any-return]


class SeparateValue(Value):
    """Time-conditioned: its own network before T, the energy at T. The paper's choice for 2D and anomaly detection.

    Args:
        energy: V(., T).
        network: V(., t) for t < T.
        num_steps: T.
    """

    def __init__(self, energy: Energy, network: TimedCritic, num_steps: int) -> None:
        super().__init__()
        self.energy = energy
        self.network = network
        self.num_steps = num_steps
        self.register_buffer("steps", torch.arange(num_steps), persistent=False)

    steps: Tensor

    def forward(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """The network before T, the energy at T."""
        if t == self.num_steps:
            return self.energy(x, labels)  # type: ignore[no-any-return]
        return self._early(x, self.network.embed(self.steps[t : t + 1]), labels)

    def at_steps(self, x: Tensor, t: Tensor, num_final: int, num_open: int = 0, labels: Tensor | None = None) -> Tensor:
        """Each network sees only the samples that are, or may be, its own."""
        end = len(x) - num_final
        start = end - num_open
        if end == 0:
            return self.energy(x, labels)  # type: ignore[no-any-return]
        steps = t[:end].clamp(max=self.num_steps - 1) if num_open else t[:end]
        early = self._early(x[:end], self.network.embed(self.steps)[steps], None if labels is None else labels[:end])
        if start == len(x):
            return early
        late = self.energy(x[start:], None if labels is None else labels[start:])
        if num_open == 0:
            return torch.cat((early, late))
        between = torch.where(t[start:end] == self.num_steps, late[:num_open], early[start:])
        return torch.cat((early[:start], between, late[num_open:]))

    def _early(self, x: Tensor, embedding: Tensor, labels: Tensor | None) -> Tensor:
        """The network's value before T, [B]; it is told the labels if it knows classes."""
        value: Tensor = self.network(x, embedding, labels) if self.network.classes else self.network(x, embedding)
        return value.float()
