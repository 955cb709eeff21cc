"""Computations recorded as CUDA graphs: one launch from the host instead of several hundred."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.trajectory import Trajectory
from dxmi.tensors import map_tensors, tensors_of

Result = TypeVar("Result")
WARM_UP = 3
"""Number of executions before a recording; libraries choose their algorithms and allocate workspaces in them."""


def on_side_stream(function: Callable[[], Result], device: torch.device) -> Result:
    """Call `function` on a stream of its own, as is required before it is recorded."""
    side, present = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(present)
    with torch.cuda.stream(side):
        result = function()
    present.wait_stream(side)
    return result


def record(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record the kernels of `function`, which are not executed.

    Another thread may use the device meanwhile, as the one that reads batches in advance.

    Returns:
        The graph, and the tensors to which each of its replays writes the results.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph, result


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
        self._inputs = kept = map_tensors(torch.clone, inputs)
        for _ in range(WARM_UP):
            on_side_stream(lambda: self._policy.rollout(*kept), kept[0].device)
        self._graph, self._trajectory = record(lambda: self._policy.rollout(*kept))


def _shapes(inputs: object) -> list[object]:
    """The shapes of the tensors in `inputs`."""
    shapes: list[object] = []
    map_tensors(lambda x: shapes.append(x.shape), inputs)
    return shapes
