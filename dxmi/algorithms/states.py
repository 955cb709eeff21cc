"""Selection of the stored states of a batch of trajectories that an update uses."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dxmi.data.batch import Condition, Streams
from dxmi.diffusion.trajectory import Trajectory
from dxmi.distributed import Share


def draw_states(streams: Streams, name: str, num_steps: int, num: int, *, every: bool) -> tuple[Tensor, ...]:
    """Draw indices into the T x B states of `num` trajectories, time-major: B of them, or all in T minibatches.

    Args:
        streams: Random streams.
        name: Name of the stream to draw from, which is on the host.
        num_steps: T.
        num: B, the number of trajectories of all processes together.
        every: Whether to use every state.

    Returns:
        Minibatches [K, B], see `draw_minibatches`.
    """
    return draw_minibatches(streams, name, num_steps * num, num)[: None if every else 1]


def draw_minibatches(streams: Streams, name: str, total: int, size: int) -> tuple[Tensor, ...]:
    """Draw all indices below `total` in random order, in minibatches of `size`; the last one may be smaller.

    Each minibatch is sorted in ascending order, so that samples of the same step are adjacent.

    Args:
        streams: Random streams.
        name: Name of the stream to draw from, which is on the host.
        total: Number of indices.
        size: Number of indices of a minibatch.

    Returns:
        Minibatches [K, size].
    """

    def sample(own: torch.Generator) -> Tensor:
        shuffled = torch.randperm(total, generator=own)
        return torch.cat([part.sort().values for part in torch.split(shuffled, size)])

    return torch.split(streams.draw(name, sample), size, dim=1)


@dataclass(frozen=True)
class StoredStates:
    """One process's part of a minibatch of states in which the policy acted, in ascending order of the step.

    Attributes:
        x: States, [K, b, *event].
        x_next: Next states, [K, b, *event]; empty if they were not gathered.
        t: Step of each state, [K, b].
        row: Index of each state's trajectory among those of this process, [K, b].
        condition: Condition of each state, [K, b, ...].
        num: Number of states in the whole minibatch, of all processes together.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    row: Tensor
    condition: Condition
    num: int
    _t_host: Tensor | None
    _own: Tensor | None
    _last: int

    @classmethod
    def gather(
        cls,
        trajectory: Trajectory,
        condition: Condition,
        drawn: Tensor,
        share: Share,
        *,
        with_next: bool = False,
        on_host: bool = True,
    ) -> "StoredStates":
        """Gather the states chosen by `draw_states`.

        Args:
            trajectory: Trajectories of this process, x [K, T+1, b, *event].
            condition: Condition of each trajectory, [K, b, ...].
            drawn: Indices into the T x B states of all processes, [K, B].
            share: This process's part of the trajectories.
            with_next: Whether to gather the next states as well; otherwise `x_next` is empty.
            on_host: Whether `drawn` is on the host, where the states of each step are counted. Otherwise, each state
                may be at any step, and there must be a single process.
        """
        x, device = trajectory.x, trajectory.x.device
        t, row, own = drawn // share.num, drawn % share.num - share.start, None
        if share.count < share.num:  # the number of states of a process varies from draw to draw
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
            _t_host=t if on_host else None,
            _own=None if own is None else own.to(device, non_blocking=True),
            _last=x.shape[1] - 2,
        )

    def own(self, drawn: Tensor | None) -> Tensor | None:
        """This process's rows of a tensor that was drawn for the whole minibatch, [K, num, ...]."""
        return drawn if drawn is None or self._own is None else drawn[:, self._own]

    def split(self, rows: slice, horizon: int = 1) -> Mapping[str, int]:
        """Count the `rows` that are known to be before T, and at T, after some steps, for `Value.forward_timesteps`.

        The counts are computed on the host, without synchronizing with the device. If seeds differ, the rows between
        the two groups are at T for some of the seeds only.

        Args:
            rows: Rows of this process.
            horizon: Number of steps that are taken from each state, unless T comes first.
        """
        if self._t_host is None:  # one step may be left from each state, or T
            all_end = horizon > self._last
            return {"num_nonterminal": 0, "num_terminal": self._count(rows) if all_end else 0}
        ends = (self._steps_left(self._t_host, rows) <= horizon).sum(1)
        return {"num_nonterminal": self._count(rows) - int(ends.max()), "num_terminal": int(ends.min())}

    def acting(self, rows: slice, horizon: int) -> tuple[int, ...]:
        """Count, for each of `horizon` steps, the first of the `rows` that are not yet at T for every seed.

        Steps that no row takes are left out.
        """
        if self._t_host is None:
            return (self._count(rows),) * min(horizon, self._last + 1)
        left = self._steps_left(self._t_host, rows)
        counts = (int((left > k).sum(1).max()) for k in range(horizon))
        return tuple(num for k, num in enumerate(counts) if num > 0 or k == 0)

    def _steps_left(self, t: Tensor, rows: slice) -> Tensor:
        """The number of steps from each state to T, in descending order, [K, b]."""
        return self._last + 1 - t[:, rows]

    def _count(self, rows: slice) -> int:
        """The number of `rows`."""
        return len(range(*rows.indices(self.x.shape[1])))


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """Select x[k, index[k]] for every seed k: [K, b, ...]."""
    if len(x) == 1:
        return x[0][index[0]].unsqueeze(0)
    return torch.stack([own[rows] for own, rows in zip(x, index, strict=True)])
