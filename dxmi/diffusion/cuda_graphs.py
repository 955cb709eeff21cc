"""A rollout recorded as a CUDA graph: one launch on the host instead of some hundred."""

import torch
from torch import Tensor

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.trajectory import Trajectory
from dxmi.tensors import map_tensors, tensors_of

_WARM_UP = 3
"""Rollouts before the recording, in which libraries choose their algorithms and allocate their workspaces."""


class GraphedRollout:
    """`Policy.rollout`, recorded at the first call for a shape and replayed at later ones.

    A replay reads the policy's parameters in place, so that it sees what an optimizer or a checkpoint has changed. It
    writes the same memory every time: a trajectory is valid until the next call.

    Args:
        policy: on a CUDA device; what its network computes must not depend on values that the host reads.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Condition, Tensor | None] | None = None
        self._trajectory: Trajectory | None = None

    def __call__(
        self, noise: Tensor, condition: Condition = UNCONDITIONAL, latents: Tensor | None = None
    ) -> Trajectory:
        """As `Policy.rollout`."""
        inputs = (noise, condition, latents)
        if self._graph is None or _shapes(inputs) != _shapes(self._inputs):
            self._record(inputs)
        assert self._graph is not None
        assert self._trajectory is not None
        for kept, new in zip(tensors_of(self._inputs), tensors_of(inputs), strict=True):
            kept.copy_(new)
        self._graph.replay()
        return self._trajectory

    def _record(self, inputs: tuple[Tensor, Condition, Tensor | None]) -> None:
        self._inputs = noise, condition, latents = map_tensors(torch.clone, inputs)
        device = noise.device
        stream, present = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(present)
        with torch.cuda.stream(stream):  # recording must not be the first use of a kernel
            for _ in range(_WARM_UP):
                self._policy.rollout(noise, condition, latents)
        present.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._trajectory = self._policy.rollout(noise, condition, latents)


def _shapes(inputs: object) -> list[object]:
    """The shape of every tensor; other values as they are."""
    shapes: list[object] = []
    map_tensors(lambda x: shapes.append(x.shape), inputs)
    return shapes
