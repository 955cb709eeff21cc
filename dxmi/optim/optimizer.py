"""Optimizers with learning-rate schedules, micro-batches, all-reduce and gradient clipping.

Gradients are computed by `torch.autograd.grad`, never by `backward`, so that they are computed only for the parameters
of the optimizer, and nothing must be zeroed or frozen.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dxmi.compat import spare_dynamo
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup, mean_over
from dxmi.errors import UserError
from dxmi.optim.config import OptimizerConfig, lr_factor
from dxmi.optim.seeds import SINGLE_SEED, Seeds, StackedSeeds
from dxmi.tensors import batch_rows, chunks, laid_out_as, tensors_of

Loss = Callable[..., Mapping[str, Tensor]]
"""Maps some rows of the inputs to unreduced values [b] by name. The mean of the value named `loss` is minimized; the
means of the others are logged."""
Takes = Callable[[Mapping[str, Tensor]], Tensor]
"""Maps the means of the values that the loss returned to the seeds that take the step, bool [K]."""
Static = Callable[[slice], Mapping[str, Any]]
"""Maps a slice of rows to additional keyword arguments of the loss, which are the same for all seeds."""


class StepResult(NamedTuple):
    """The result of one optimizer step, for every seed.

    Attributes:
        means: Means over the batch of the values that the loss returned, before the step, [K] each.
        grad_norm: Norm of the gradient before clipping, [K]; None without clipping.
    """

    means: dict[str, Tensor]
    grad_norm: Tensor | None

    def metrics(self, prefix: str) -> dict[str, Tensor]:
        """The means and the gradient norm by the keys `prefix/name`."""
        named = self.means if self.grad_norm is None else {**self.means, "grad_norm": self.grad_norm}
        return {f"{prefix}/{name}": value for name, value in named.items()}


class Optimizer:
    """A torch optimizer with its learning-rate schedule, micro-batches, all-reduce and clipping.

    Args:
        config: Settings of the optimizer.
        groups: Pairs (parameters, learning rate), one per group.
        total: Iteration at which a learning-rate decay ends.
        workers: Processes over which gradients are summed.
        accumulate: Number of micro-batches into which each process divides its rows.
    """

    seeds: Seeds = SINGLE_SEED

    def __init__(
        self,
        config: OptimizerConfig,
        groups: Sequence[tuple[Iterable[nn.Parameter], float]],
        total: int,
        workers: ProcessGroup = SINGLE_PROCESS,
        accumulate: int = 1,
    ) -> None:
        spare_dynamo()
        self.config = config
        self.total = total
        self.workers = workers
        self.accumulate = accumulate
        self.rates = [rate for _, rate in groups]
        param_groups: list[dict[str, Any]] = [{"params": list(parameters)} for parameters, _ in groups]
        self.parameters: list[nn.Parameter] = [p for group in param_groups for p in group["params"]]
        for group, rate in zip(param_groups, self.rates, strict=True):
            group["lr"] = self._rate_tensor(rate)
        betas = (config.beta1, config.beta2)
        if config.kind == "radam":
            self.torch: torch.optim.Optimizer = torch.optim.RAdam(
                param_groups, betas=betas, weight_decay=config.weight_decay, foreach=True
            )
        else:
            family = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
            self.torch = family(
                param_groups,
                betas=betas,
                weight_decay=config.weight_decay,
                fused=True,
                capturable=self._is_on_gpu,  # otherwise PyTorch refuses to record a step as a CUDA graph
            )
        self._step = inspect.unwrap(type(self.torch).step)  # its wrapper would import TorchDynamo, see `spare_dynamo`

    def _rate_tensor(self, rate: float) -> Tensor:
        """Store a learning rate as a tensor, so that a step recorded as a CUDA graph uses its current value.

        It is float64 on the host, which is exact, except for fused kernels on a GPU, which need float32 on the device.
        """
        if self._is_on_gpu and self.config.kind != "radam":
            return torch.tensor(rate, dtype=torch.float32, device=self.parameters[0].device)
        return torch.tensor(rate, dtype=torch.float64)

    @property
    def _is_on_gpu(self) -> bool:
        return bool(self.parameters) and self.parameters[0].device.type == "cuda"

    @property
    def can_be_recorded(self) -> bool:
        """Whether a step can be recorded as a CUDA graph; RAdam's learning rates are on the host."""
        return self.config.kind != "radam"

    def schedule(self, iteration: int) -> None:
        """Set the learning rates of `iteration`."""
        factor = lr_factor(self.config, iteration, self.total)
        for group, rate in zip(self.torch.param_groups, self.rates, strict=True):
            group["lr"].fill_(rate * factor)

    def minimize(
        self, loss: Loss, *inputs: Any, num: int, static: Static | None = None, takes: Takes | None = None
    ) -> StepResult:
        """Take one step that decreases the mean of a loss over a batch.

        Gradients are computed for one micro-batch at a time, and summed over the micro-batches and the processes.

        Args:
            loss: Computes unreduced values [b] by name, including one named `loss`, from rows of `inputs`.
            inputs: Rows of this process, nested tuples of tensors [K, b, ...].
            num: Number of rows of the whole batch, of all processes together.
            static: Computes additional keyword arguments of `loss` from the slice of rows that it is given.
            takes: Decides which seeds take the step; parameters and moments of the others are left unchanged, but the
                step is counted. With None, all seeds take it.
                All seeds take the optimizer's first step in any case.
        """
        grads, means = self.gradients(loss, *inputs, num=num, static=static)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = laid_out_as(grad, parameter)  # fused optimizers assume equal strides
        norm = None if self.config.max_grad_norm is None else self._clip(self.config.max_grad_norm)
        takers = None if takes is None else takes(means)
        if takers is None or not self.torch.state or bool(takers.all()):
            self._take()
        else:
            before = [tensor.clone() for tensor in self._stepped()]
            self._take()
            self._undo(before, ~takers)
        return StepResult(means, norm)

    @torch.no_grad()
    def _take(self) -> None:
        """Take the step of the torch optimizer."""
        self._step(self.torch)

    def skip(self) -> None:
        """Count a step that no seed takes."""
        for state in self.torch.state.values():
            state["step"] += 1

    def _stepped(self) -> list[Tensor]:
        """The parameters and their moments, which a step changes in place."""
        moments = [value for state in self.torch.state.values() for value in state.values() if value.dim()]
        return [*self.parameters, *moments]

    @torch.no_grad()
    def _undo(self, before: Sequence[Tensor], seeds: Tensor) -> None:
        """Restore the tensors of some seeds, bool [K], after a step."""
        after = self._stepped()
        for tensor, earlier in zip(after, before, strict=True):
            table, saved = self.by_seed(tensor), self.by_seed(earlier)
            table.copy_(torch.where(seeds.view(-1, *[1] * (table.dim() - 1)), saved, table))

    @staticmethod
    def by_seed(tensor: Tensor) -> Tensor:
        """A view of a parameter or moment with a leading seed axis."""
        return tensor.unsqueeze(0)

    def gradients(
        self, loss: Loss, *inputs: Any, num: int, static: Static | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Compute the gradient of each parameter, and the means of the values that the loss returns, [K].

        The arguments are those of `minimize`. Micro-batches and processes are summed, with a single all-reduce.
        """
        names: list[str] = []
        total: list[Tensor] = []
        pieces = chunks(tensors_of(inputs)[0].shape[1], self.accumulate)
        for rows in pieces:
            given = inputs if len(pieces) == 1 else batch_rows(inputs, rows)
            means = self._means(loss, given, num, static(rows) if static else {})
            grads = torch.autograd.grad(means["loss"].sum(), self.parameters)
            names, numbers = list(means), [*grads, *(mean.detach() for mean in means.values())]
            total = [a + b for a, b in zip(total, numbers, strict=True)] if total else numbers
        total = self.workers.sum(total)
        return total[: len(self.parameters)], dict(zip(names, total[len(self.parameters) :], strict=True))

    def _means(self, loss: Loss, inputs: tuple[Any, ...], num: int, static: Mapping[str, Any]) -> dict[str, Tensor]:
        """Compute the contribution of some rows to the mean of each value that the loss returns, [K]."""

        def means(*rows: Any) -> dict[str, Tensor]:
            return {name: mean_over(values, num) for name, values in loss(*rows, **static).items()}

        return self.seeds.map(means, *inputs)  # type: ignore[no-any-return]

    def _clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their joint norm is at most `max_norm`; returns the norm before that, [1]."""
        return nn.utils.clip_grad_norm_(self.parameters, max_norm).unsqueeze(0)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by the keys `number of the parameter.name`."""
        return {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in self.torch.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors returned by `state`; moments get the strides of their parameters, as in PyTorch.

        Raises:
            UserError: the tensors do not match the parameters.
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


class StackedOptimizer(Optimizer):
    """Optimizers of several seeds combined into one; each member has its own moments and is clipped by its own norm.

    Args:
        seeds: Seeds of the modules that are trained.
        members: Optimizers, one per module, all at the same step.
    """

    def __init__(self, seeds: StackedSeeds, members: Sequence[Optimizer]) -> None:
        first = members[0]
        groups = [
            ([seeds.table(parameter) for parameter in group["params"]], rate)
            for group, rate in zip(first.torch.param_groups, first.rates, strict=True)
        ]
        super().__init__(first.config, groups, first.total)  # type: ignore[arg-type]
        self.seeds = seeds
        self._members = members
        self._linked = False
        if first.torch.state:
            self._take_over()

    def _take_over(self) -> None:
        """Take over the moments of the members."""
        for table, *rows in zip(self.parameters, *(member.parameters for member in self._members), strict=True):
            states = [member.torch.state[row] for member, row in zip(self._members, rows, strict=True)]
            self.torch.state[table] = {key: _joined([state[key] for state in states]) for key in states[0]}
        self._link()

    def _link(self) -> None:
        """Make the moments of the members rows of the moments of this optimizer."""
        for k, member in enumerate(self._members):
            for table, row in zip(self.parameters, member.parameters, strict=True):
                state = self.torch.state[table]
                member.torch.state[row] = {key: value if value.dim() == 0 else value[k] for key, value in state.items()}
        self._linked = True

    def minimize(
        self, loss: Loss, *inputs: Any, num: int, static: Static | None = None, takes: Takes | None = None
    ) -> StepResult:
        """Take a step as `Optimizer.minimize` does, for every member."""
        result = super().minimize(loss, *inputs, num=num, static=static, takes=takes)
        if not self._linked:  # the state is created by the first step
            self._link()
        return result

    @staticmethod
    def by_seed(tensor: Tensor) -> Tensor:
        """The tensor itself, whose first axis is that of the seeds."""
        return tensor

    def _clip(self, max_norm: float) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` does, with a separate norm for each member: [K]."""
        grads = [parameter.grad.flatten(1) for parameter in self.parameters if parameter.grad is not None]
        norms: Tensor = torch.stack([grad.norm(dim=1) for grad in grads]).norm(dim=0)
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale[:, None])
        return norms


def _joined(rows: list[Tensor]) -> Tensor:
    """Stack rows into a table; a scalar, the number of steps, is the same in all of them."""
    return rows[0].clone() if rows[0].dim() == 0 else torch.stack(rows)
