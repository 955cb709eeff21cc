"""Stored states: which of the states that a batch of trajectories went through an update uses."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dxmi.data.batch import Condition, Streams
from dxmi.diffusion.trajectory import Trajectory
from dxmi.distributed import Share


def draw_states(streams: Streams, name: str, num_steps: int, num: int, *, every: bool) -> tuple[Tensor, ...]:
    """Indices into the T x B states of `num` trajectories, time-major: B of them, or every one in T minibatches.

    Each minibatch is in ascending order, so that the samples of one step are next to each other.

    Args:
        streams: of which `name` draws on the host.
        name: of the stream.
        num_steps: T.
        num: B, the trajectories of all processes together.
        every: use every state.

    Returns:
        Minibatches [K, B].
    """
    shuffled = streams.draw(name, lambda own: torch.randperm(num_steps * num, generator=own))
    draws = torch.split(shuffled, num, dim=1) if every else (shuffled[:, :num],)
    return tuple(drawn.sort(dim=1).values for drawn in draws)


@dataclass(frozen=True)
class StoredStates:
    """One process's part of a minibatch of states in which the policy acted, in ascending order of the step.

    Attributes:
        x: states, [K, b, *event].
        x_next: the states that followed, [K, b, *event].
        t: their steps, [K, b].
        row: the trajectory of each, among this process's own, [K, b].
        condition: of each, [K, b, ...].
        num: states of the whole minibatch, of all processes together.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    row: Tensor
    condition: Condition
    num: int
    _t_host: Tensor
    _own: Tensor | None
    _last: int

    @classmethod
    def gather(
        cls, trajectory: Trajectory, condition: Condition, drawn: Tensor, share: Share, *, with_next: bool = False
    ) -> "StoredStates":
        """The states that `draw_states` chose.

        Args:
            trajectory: this process's trajectories, x [K, T+1, b, *event].
            condition: of each trajectory, [K, b, ...].
            drawn: indices into the T x B states of all processes, [K, B], on the host.
            share: this process's part of the trajectories.
            with_next: gather the states that followed too; otherwise `x_next` is empty.
        """
        x, device = trajectory.x, trajectory.x.device
        t, row, own = drawn // share.num, drawn % share.num - share.start, None
        if share.count < share.num:  # the number of a process's own states differs from draw to draw
            own = ((row >= 0) & (row < share.count))[0].nonzero()[:, 0]
            t, row = t[:, own], row[:, own]
        index = (t * share.count + row).to(device, non_blocking=True)
        row = row.to(device, non_blocking=True)
        return cls(
            x=select_rows(x[:, :-1].flatten(1, 2), index),
            x_next=select_rows(x[:, 1:].flatten(1, 2), index) if with_next else x[:, :0],
            row=row,
            t=t.to(device, non_blocking=True),
            condition=Condition(*(None if c is None else select_rows(c, row) for c in condition)),
            num=drawn.shape[1],
            _t_host=t,
            _own=None if own is None else own.to(device, non_blocking=True),
            _last=x.shape[1] - 2,
        )

    def own(self, drawn: Tensor | None) -> Tensor | None:
        """This process's rows of what was drawn for the whole minibatch, [K, num, ...]."""
        return drawn if drawn is None or self._own is None else drawn[:, self._own]

    def split(self, rows: slice) -> Mapping[str, int]:
        """How many of these rows are known to lead to t < T and to T, for `Value.forward_timesteps`.

        The counts are taken on the host, so that nothing waits for the device. Where seeds differ, the rows between are
        at T for some of them only.
        """
        steps = self._t_host[:, rows]
        ends = (steps == self._last).sum(1)
        return {"num_nonterminal": steps.shape[1] - int(ends.max()), "num_terminal": int(ends.min())}


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[k, index[k]] for every seed k: [K, b, ...]."""
    if len(x) == 1:
        return x[0][index[0]].unsqueeze(0)
    return torch.stack([own[rows] for own, rows in zip(x, index, strict=True)])
