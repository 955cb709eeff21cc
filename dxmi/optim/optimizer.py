"""Optimisers: one config for each network, learning-rate schedules, gradient clipping, and the moving average.

Gradients come from `torch.autograd.grad`, never from `backward`: a loss then reaches only the parameters that it is
asked for, and nothing has to be zeroed or frozen.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from dxmi.compat import spare_dynamo
from dxmi.distributed import ALONE, Workers
from dxmi.errors import UserError
from dxmi.optim.config import OptimizerConfig, lr_factor
from dxmi.tensors import laid_out_as


class Part(NamedTuple):
    """Some rows' part of a loss, and of what is to be logged beside it: scalars that are summed over all parts."""

    loss: Tensor
    logged: tuple[Tensor, ...] = ()


class Descent(NamedTuple):
    """One optimiser step: the whole loss before it, the whole of what was logged, and the gradient norm before clipping
    if it clips.
    """

    loss: Tensor
    logged: tuple[Tensor, ...]
    norm: Tensor | None


class Optimizer:
    """A torch optimiser with its learning-rate schedule and clipping, stepped by gradients that are handed to it.

    Args:
        config: which one, and how.
        groups: (parameters, learning rate) of each group.
        total: the iteration at which a decay ends.
        workers: over which gradients are summed.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        groups: Sequence[tuple[Iterable[nn.Parameter], float]],
        total: int,
        workers: Workers = ALONE,
    ) -> None:
        spare_dynamo()
        self.config = config
        self.total = total
        self.workers = workers
        self.rates = [rate for _, rate in groups]
        param_groups = [{"params": list(parameters), "lr": rate} for parameters, rate in groups]
        self.parameters: list[nn.Parameter] = [p for group in param_groups for p in group["params"]]  # type: ignore[attr-defined]
        betas = (config.beta1, config.beta2)
        if config.kind == "radam":
            self.torch: torch.optim.Optimizer = torch.optim.RAdam(
                param_groups, betas=betas, weight_decay=config.weight_decay, foreach=True
            )
        else:
            family = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
            self.torch = family(param_groups, betas=betas, weight_decay=config.weight_decay, fused=True)
        self._step = inspect.unwrap(type(self.torch).step)  # what wraps it imports TorchDynamo, as in `spare_dynamo`

    def schedule(self, iteration: int) -> None:
        """Set the learning rates of `iteration`."""
        factor = lr_factor(self.config, iteration, self.total)
        for group, rate in zip(self.torch.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def descend(self, parts: Iterable[Part]) -> Descent:
        """One step down the sum of all parts of a loss, this worker's and the others'.

        Args:
            parts: made one after the other, so that only one graph is in memory at a time.
        """
        grads, (loss, *logged) = self._summed(parts)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = laid_out_as(grad, parameter)  # torch's fused optimisers read the memory of both as it lies
        norm = None if self.config.max_grad_norm is None else self._clip(self.config.max_grad_norm)
        with torch.no_grad():
            self._step(self.torch)
        return Descent(loss, tuple(logged), norm)

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.parameters)

    def _clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that all together have at most this norm; returns the norm before."""
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def _summed(self, parts: Iterable[Part]) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients, and loss with logged numbers, over all parts and workers: one bucket, one all-reduce."""
        total: list[Tensor] = []
        for part in parts:
            grads = self._gradients(part.loss)
            numbers = [*grads, part.loss.detach(), *part.logged]
            total = [a + b for a, b in zip(total, numbers, strict=True)] if total else numbers
        total = self.workers.sum(total)
        return total[: len(self.parameters)], total[len(self.parameters) :]

    def state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, keyed by parameter number and name."""
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in self.torch.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`; moments are laid out as their parameters, as torch makes them.

        Raises:
            UserError: the tensors are those of other parameters.
        """
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            own = self.parameters[int(index)] if int(index) < len(self.parameters) else None
            if own is None or (value.dim() and value.shape != own.shape):
                raise UserError(
                    f"The optimizer's state {key} in the checkpoint fits no parameter: it was written by another "
                    "version of dxmi. Choose another out, or delete the run's folder."
                )
            state.setdefault(int(index), {})[name] = (laid_out_as(value, own) if value.dim() else value).clone()
        self.torch.load_state_dict({"state": state, "param_groups": self.torch.state_dict()["param_groups"]})


class MovingAverage:
    """An exponential moving average of a module's parameters, kept in a second module of the same shape.

    Args:
        sources: what is averaged.
        targets: hold the average.
        decay: of the average.
        warm_up: let the decay of update i (from 0) be min(decay, (1 + i) / (10 + i)), so that an average which is
            evaluated early is not stuck at the start. A target network, whose lag is the point of it, has none.
    """

    def __init__(self, sources: list[Tensor], targets: list[Tensor], decay: float, *, warm_up: bool = True) -> None:
        self.decay = decay
        self.warm_up = warm_up
        self.sources = sources
        self.targets = targets

    @classmethod
    def between(cls, source: nn.Module, target: nn.Module, decay: float, *, warm_up: bool = True) -> Self:
        """The average of `source`, which begins now, in `target`."""
        target.load_state_dict(source.state_dict())
        target.requires_grad_(False)
        return cls(list(source.parameters()), list(target.parameters()), decay, warm_up=warm_up)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Move the average towards the source."""
        decay = min(self.decay, (1.0 + iteration) / (10.0 + iteration)) if self.warm_up else self.decay
        torch._foreach_lerp_(self.targets, self.sources, 1.0 - decay)
