"""The value V(x, t): the expected cost-to-go from x at step t, lower is better. V(x, T) is the energy."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dxmi.critics.energy import Energy
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.networks.base import TimedCritic


class Value(nn.Module, ABC):
    """V(x, t), with V(., T) = E.

    Attributes:
        energy: The energy E.
    """

    energy: Energy

    @abstractmethod
    def forward(self, x: Tensor, t: int, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Compute V(x, t) of `x` [B, *event], with all samples at step `t`: [B]."""

    @abstractmethod
    def forward_timesteps(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        num_nonterminal: int = 0,
        num_terminal: int = 0,
    ) -> Tensor:
        """Compute V(x_i, t_i), where samples may be at different steps, [B].

        With the default numbers, the energy and the network before T both evaluate all samples. The computation then
        does not depend on the values in `t`, as a CUDA graph requires.

        Args:
            x: Samples, [B, *event].
            t: Step of each sample, in ascending order, [B].
            condition: Condition of each sample.
            num_nonterminal: Number of samples at the beginning that are known to be before T.
            num_terminal: Number of samples at the end that are known to be at T.
        """

    def gradient(self, x: Tensor, t: int, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Compute the gradient dV(x, t)/dx of each sample: [B, *event]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(x, t, condition).sum(), x)
        return gradient


class SharedValue(Value):
    """A time-independent value V(x, t) = E(x), which shares the energy's network; the paper's choice for images."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, t: int, condition: Condition = UNCONDITIONAL) -> Tensor:  # noqa: ARG002
        """E(x) at every step."""
        return self.energy(x, condition)  # type: ignore[no-any-return]

    def forward_timesteps(
        self,
        x: Tensor,
        t: Tensor,  # noqa: ARG002
        condition: Condition = UNCONDITIONAL,
        *,
        num_nonterminal: int = 0,  # noqa: ARG002
        num_terminal: int = 0,  # noqa: ARG002
    ) -> Tensor:
        """E(x) at every step."""
        return self.energy(x, condition)  # type: ignore[no-any-return]


class SeparateValue(Value):
    """A time-conditioned value: a separate network before T, the energy at T.

    This is the paper's choice for 2D data and anomaly detection.

    Args:
        energy: The energy, which is V(., T).
        network: Network of V(., t) for t < T.
        num_steps: Number of policy steps, T.
    """

    def __init__(self, energy: Energy, network: TimedCritic, num_steps: int) -> None:
        super().__init__()
        self.energy = energy
        self.network = network
        self.num_steps = num_steps
        self.register_buffer("steps", torch.arange(num_steps), persistent=False)

    steps: Tensor

    def forward(self, x: Tensor, t: int, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Evaluate the network if t < T, and the energy if t = T."""
        if t == self.num_steps:
            return self.energy(x, condition)  # type: ignore[no-any-return]
        return self._nonterminal(x, self.network.embed(self.steps[t : t + 1]), condition)

    def forward_timesteps(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        num_nonterminal: int = 0,
        num_terminal: int = 0,
    ) -> Tensor:
        """Compute V(x_i, t_i), [B]; network and energy each evaluate only the samples that may need them."""
        start, end = num_nonterminal, len(x) - num_terminal
        if end == 0:
            return self.energy(x, condition)  # type: ignore[no-any-return]
        steps = t[:end] if start == end else t[:end].clamp(max=self.num_steps - 1)
        early = self._nonterminal(x[:end], self.network.embed(self.steps)[steps], condition.rows(slice(end)))
        if start == len(x):
            return early
        late = self.energy(x[start:], condition.rows(slice(start, None)))
        if start == end:
            return torch.cat((early, late))
        between = torch.where(t[start:end] == self.num_steps, late[: end - start], early[start:])
        return torch.cat((early[:start], between, late[end - start :]))

    def _nonterminal(self, x: Tensor, embedding: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network before T, [B]; it receives the labels if it is class-conditional."""
        labels = (condition.labels,) if self.network.classes else ()
        value: Tensor = self.network(x, embedding, *labels)
        return value.float()


class TwinValue(Value):
    """The larger, that is more pessimistic, of two separately trained values (arXiv 1802.09477).

    Args:
        first: A value.
        second: Another value, with other initial weights.
    """

    def __init__(self, first: SeparateValue, second: SeparateValue) -> None:
        super().__init__()
        self.first = first
        self.second = second

    @property
    def energy(self) -> Energy:  # type: ignore[override]
        """The energy of the first value."""
        return self.first.energy

    def both(self, x: Tensor, t: int, condition: Condition = UNCONDITIONAL) -> tuple[Tensor, Tensor]:
        """Compute both values at step `t`, [B] each."""
        return self.first(x, t, condition), self.second(x, t, condition)

    def forward(self, x: Tensor, t: int, condition: Condition = UNCONDITIONAL) -> Tensor:
        """Compute the larger value at step `t`: [B]."""
        return torch.maximum(*self.both(x, t, condition))

    def forward_timesteps(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition = UNCONDITIONAL,
        *,
        num_nonterminal: int = 0,
        num_terminal: int = 0,
    ) -> Tensor:
        """Compute the larger value, where samples may be at different steps: [B]."""
        split = {"num_nonterminal": num_nonterminal, "num_terminal": num_terminal}
        one, other = (value.forward_timesteps(x, t, condition, **split) for value in (self.first, self.second))
        return torch.maximum(one, other)

    def timed_parameters(self) -> list[nn.Parameter]:
        """The parameters of both values before T."""
        return [*self.first.network.parameters(), *self.second.network.parameters()]

    def energy_parameters(self) -> list[nn.Parameter]:
        """The parameters of both energies."""
        return [*self.first.energy.parameters(), *self.second.energy.parameters()]
