"""A rollout recorded as a CUDA graph: the host says "again" instead of launching some hundred kernels."""

import torch
from torch import Tensor

from dxmi.diffusion.policy import Policy
from dxmi.diffusion.trajectory import Trajectory

_WARM_UP = 3
"""Rollouts before the recording, in which libraries choose their algorithms and take their workspaces."""


class GraphedRollout:
    """`Policy.rollout`, recorded at the first call for a shape and replayed at later ones.

    A replay reads the policy's parameters where they lie, so that whatever changes them in place, an optimiser or a
    checkpoint, is seen. It writes the same memory every time: a trajectory lasts until the next call.

    Args:
        policy: on a CUDA device; what its network computes must not depend on values that the host reads.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor | None, ...] = ()
        self._trajectory: Trajectory | None = None

    def __call__(self, noise: Tensor, labels: Tensor | None = None, latents: Tensor | None = None) -> Trajectory:
        """As `Policy.rollout`."""
        given = (noise, labels, latents)
        if self._graph is None or [_shape(x) for x in given] != [_shape(x) for x in self._given]:
            self._record(given)
        assert self._graph is not None
        assert self._trajectory is not None
        for kept, new in zip(self._given, given, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        self._graph.replay()
        return self._trajectory

    def _record(self, given: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        noise, labels, latents = given[0].clone(), _cloned(given[1]), _cloned(given[2])
        self._given = (noise, labels, latents)
        device = noise.device
        stream, present = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(present)
        with torch.cuda.stream(stream):  # recording must not be the first use of a kernel
            for _ in range(_WARM_UP):
                self._policy.rollout(noise, labels, latents)
        present.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._trajectory = self._policy.rollout(noise, labels, latents)


def _shape(x: Tensor | None) -> torch.Size | None:
    return None if x is None else x.shape


def _cloned(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()
