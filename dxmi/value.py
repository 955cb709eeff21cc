"""The value V(x, t): expected cost-to-go from x at step t, low is good. V(x, T) is the energy."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dxmi.energy import Energy
from dxmi.networks import TimedCritic


class Value(nn.Module, ABC):
    """V(x, t), with V(., T) = E.

    Attributes:
        energy: E.
    """

    energy: Energy

    @abstractmethod
    def forward(self, x: Tensor, t: int) -> Tensor:
        """V(x, t) of `x` [B, *event] at one step for the batch: [B]."""

    @abstractmethod
    def at_steps(self, x: Tensor, t: Tensor, num_final: int, num_open: int = 0) -> Tensor:
        """V(x_i, t_i), [B].

        Args:
            x: [B, *event].
            t: the step of each sample in ascending order, [B].
            num_final: how many of them, at the end, are at T; the caller knows it without asking the device.
            num_open: how many before those may be at T: of one member of a stack so, of another not.
        """

    def gradient(self, x: Tensor, t: int) -> Tensor:
        """dV(x, t)/dx for each sample: [B, *event]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x, t).sum(), x)
        return gradient


class SharedValue(Value):
    """Time-independent: one network is energy and value, V(x, t) = E(x). The paper's choice for images."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, t: int) -> Tensor:  # noqa: ARG002
        """E(x), whatever the step."""
        return self.energy(x)  # type: ignore[no-any-return]

    def at_steps(self, x: Tensor, t: Tensor, num_final: int, num_open: int = 0) -> Tensor:  # noqa: ARG002
        """E(x), whatever the steps."""
        return self.energy(x)  # type: ignore[no-any-return]


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

    def forward(self, x: Tensor, t: int) -> Tensor:
        """The network before T, the energy at T."""
        if t == self.num_steps:
            return self.energy(x)  # type: ignore[no-any-return]
        value: Tensor = self.network(x, self.network.embed(self.steps[t : t + 1]))
        return value.float()

    def at_steps(self, x: Tensor, t: Tensor, num_final: int, num_open: int = 0) -> Tensor:
        """Each network sees only the samples that are, or may be, its own."""
        end = len(x) - num_final
        start = end - num_open
        if end == 0:
            return self.energy(x)  # type: ignore[no-any-return]
        steps = t[:end].clamp(max=self.num_steps - 1) if num_open else t[:end]
        early = self.network(x[:end], self.network.embed(self.steps)[steps]).float()
        if start == len(x):
            return early  # type: ignore[no-any-return]
        late = self.energy(x[start:])
        if num_open == 0:
            return torch.cat((early, late))
        between = torch.where(t[start:end] == self.num_steps, late[:num_open], early[start:])
        return torch.cat((early[:start], between, late[num_open:]))
