"""A rollout recorded as a CUDA graph: one launch from the host instead of several hundred."""

import torch
from torch import Tensor

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.trajectory import Trajectory
from dxmi.tensors import map_tensors, tensors_of

_WARM_UP = 3
"""Number of rollouts before the recording; libraries choose their algorithms and allocate workspaces in them."""


class GraphedRollout:
    """`Policy.rollout`, recorded when it is called with new input shapes and replayed while they stay the same.

    A replay reads the policy's parameters in place, so it uses the values that an optimizer step or a checkpoint has
    written. It writes to the same memory every time: a trajectory is valid until the next call.

    Args:
        policy: a policy on a CUDA device; its network must not transfer values of tensors to the host.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Condition, Tensor | None] | None = None
        self._trajectory: Trajectory | None = None

    def __call__(
        self, noise: Tensor, condition: Condition = UNCONDITIONAL, latents: Tensor | None = None
    ) -> Trajectory:
        """Run the policy, with the arguments and the result of `Policy.rollout`."""
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
    """The shapes of the tensors in `inputs`."""
    shapes: list[object] = []
    map_tensors(lambda x: shapes.append(x.shape), inputs)
    return shapes
