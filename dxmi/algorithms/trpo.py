"""TRPO on the steps of the policy (Schulman et al., arXiv 1502.05477).

The policy maximizes the surrogate E[sum_t A_t pi(x_{t+1} | x_t) / pi_old(x_{t+1} | x_t)] within a trust region:
KL(old || new) of a trajectory is at most max_kl nats. One `update` is one iteration:

    1. roll out the policy, and compute the advantages of its actions
    2. g: gradient of the surrogate
    3. direction: F^-1 g by conjugate gradients    F is the Fisher matrix of the policy at the states of the rollout
    4. step: the longest that max_kl allows        its length is corrected by the measured divergence
    5. line search: shorten the step until the surrogate has improved
    6. baseline: fit V(x_t, t) to r                if it is learned

The Fisher matrix of Gaussian steps is a Gauss-Newton matrix: F v = E sum_t J' (J v) / sigma_t^2 for the means, plus
2 D for the log sigmas. A product takes one Jacobian-vector and one vector-Jacobian product, and F is never built.

Logged metrics (means over the batch):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/zero_std_ratio    share of the groups whose samples all have the same reward: they have no gradient
    policy/kl                measured KL(old || new) of the step, of a trajectory in nats
    policy/gain              improvement of the surrogate, in units of reward
    policy/backtracks        number of times that the step was shortened
    policy/residual          |F d - g| / |g| of the direction d, with the damping
    policy/grad_norm         norm of the gradient of the surrogate
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
    value/error              root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dxmi.algorithms.base import Metrics, Parts
from dxmi.algorithms.configs import RewardGradientConfig, TrpoConfig
from dxmi.algorithms.policy_gradient import Actions
from dxmi.algorithms.ppo import Experience
from dxmi.algorithms.reward_gradient import RewardGradient, kl_per_seed
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.trajectory import GaussianStep
from dxmi.distributed import mean_over
from dxmi.optim.config import PolicyOptimizerConfig
from dxmi.rewards.base import rewards_of
from dxmi.tensors import batch_rows, chunks, per_sample

TOLERANCE = 0.01
"""Relative excess of the measured divergence over max_kl that is accepted."""
_SHORTER, _CORRECTIONS = 0.7, 2
_FORWARD_MODE = threading.Lock()
"""PyTorch's levels of forward-mode differentiation are shared by all threads of a process."""


class Trpo(RewardGradient):
    """TRPO with natural-gradient steps, with all state that training changes.

    Args:
        config: Settings of TRPO.
        parts: Components from which it is built.
    """

    config: TrpoConfig
    panels: ClassVar[Sequence[str]] = ("reward/mean", "reward/std", "policy/kl", "policy/gain", "policy/entropy")

    def __init__(self, config: TrpoConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        if not config.train_sigmas:
            optimizer = parts.optimizer(self._policy_settings(config), (self.policy.network.parameters(), 0.0))
            self.optimizers = {**self.optimizers, "policy": optimizer}
        self._uses_groups = any(isinstance(module, nn.GroupNorm) for module in self.policy.modules())
        names = {id(parameter): name for name, parameter in self.policy.named_parameters()}
        self._names = [names[id(parameter)] for parameter in self.optimizers["policy"].parameters]

    @staticmethod
    def _policy_settings(config: RewardGradientConfig) -> PolicyOptimizerConfig:
        """The settings of an optimizer that only holds the parameters, since the steps are computed here."""
        del config
        return PolicyOptimizerConfig(lr=0.0, sigma_lr=0.0, max_grad_norm=None)

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        trajectory = self.rollout(batch, streams)
        reward = rewards_of(self.reward, trajectory.x[:, -1], batch.condition, iteration, self._workers)
        actions, num = self.actions(trajectory, batch.condition), self.num_rows(batch)

        old: GaussianStep = self.in_pieces(self.policy, actions.x, actions.t, actions.condition)
        reference = self.reference_steps(actions)
        kl = None if reference is None else kl_per_seed(old, reference)
        advantage, metrics = self.advantage_of(reward, actions, kl, batch)

        metrics |= self._natural_step(actions, Experience(old, reference, advantage), num)
        metrics |= self.fit_baseline(actions, reward, num)
        metrics["policy/entropy"] = self.mean_log_sigma()
        self.update_averages()
        return metrics

    def _natural_step(self, actions: Actions, experience: Experience, num: int) -> Metrics:
        """Steps 2 to 5."""
        optimizer, config = self.optimizers["policy"], self.config
        grads, means = optimizer.gradients(self._loss, actions, experience, num=num)
        gradient = _flat([optimizer.by_seed(grad) for grad in grads])

        def product(vector: Tensor) -> Tensor:
            return self.fisher_product(vector, actions, num)

        direction, curvature, residual = conjugate_gradients(product, -gradient, config.cg_iterations, config.damping)
        length = (2.0 * config.max_kl / curvature.clamp_min(1e-30)).sqrt()
        start = [optimizer.by_seed(parameter).detach().clone() for parameter in optimizer.parameters]

        def moved(length: Tensor) -> dict[str, Tensor]:
            self._move(start, length[:, None] * direction)
            return self._means(actions, experience, num)

        for _ in range(_CORRECTIONS):
            length = length * (config.max_kl / moved(length)["kl"].clamp_min(1e-30)).sqrt().clamp(0.5, 2.0)
        accepted, backtracks = torch.zeros_like(length, dtype=torch.bool), torch.zeros_like(length)
        for attempt in range(config.backtracks + 1):
            found = moved(length)
            accepted = (found["kl"] <= (1.0 + TOLERANCE) * config.max_kl) & (found["loss"] < means["loss"])
            if attempt == config.backtracks or bool(accepted.all()):
                break
            length = torch.where(accepted, length, _SHORTER * length)
            backtracks = backtracks + (~accepted).float()
        if not bool(accepted.all()):
            found = moved(torch.where(accepted, length, 0.0))
        return {
            "policy/kl": found["kl"],
            "policy/gain": means["loss"] - found["loss"],
            "policy/backtracks": backtracks,
            "policy/residual": residual,
            "policy/grad_norm": gradient.norm(dim=1),
        }

    def _loss(self, actions: Actions, experience: Experience) -> Mapping[str, Tensor]:
        """-surrogate + kl_coef KL(new || reference) - entropy bonus, and KL(old || new), each action [b]."""
        x, x_next, t, condition = actions
        old, reference, advantage = experience
        step = self.policy(x, t, condition)
        ratio = (step.log_prob(x_next) - old.log_prob(x_next)).exp()
        return {"loss": self.action_loss(-advantage * ratio, step, reference), "kl": self.num_actions * old.kl(step)}

    def _means(self, actions: Actions, experience: Experience, num: int) -> dict[str, Tensor]:
        """The means of the values of `_loss` with the current parameters, over all processes, [K] each."""
        found: Mapping[str, Tensor] = self.in_pieces(self._loss, actions, experience)
        summed = self._workers.sum([mean_over(values, num) for values in found.values()])
        return dict(zip(found, summed, strict=True))

    def _move(self, start: Sequence[Tensor], change: Tensor) -> None:
        """Set the parameters to `start` plus a change, [K, P]."""
        optimizer = self.optimizers["policy"]
        pieces = torch.split(change, [tensor[0].numel() for tensor in start], dim=1)
        with torch.no_grad():
            for parameter, own, piece in zip(optimizer.parameters, start, pieces, strict=True):
                optimizer.by_seed(parameter).copy_(own + piece.view_as(own))

    @torch.no_grad()
    def fisher_product(self, vector: Tensor, actions: Actions, num: int) -> Tensor:
        """F v: [K, P], where v' F v / 2 is KL(old || new) of a trajectory to second order, in nats.

        Args:
            vector: v in the order of the policy's parameters, [K, P].
            actions: Actions of this process, at whose states the divergence is averaged.
            num: Number of actions of all processes together.
        """
        optimizer, weight = self.optimizers["policy"], self.num_actions / num
        shapes = [optimizer.by_seed(parameter).shape for parameter in optimizer.parameters]
        pieces = torch.split(vector, [shape[1:].numel() for shape in shapes], dim=1)
        direction = tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))

        def product(direction: tuple[Tensor, ...], x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
            own = dict(self.policy.named_parameters())
            parameters = tuple(own[name].detach() for name in self._names)

            def gaussian(*parameters: Tensor) -> tuple[Tensor, Tensor]:
                named = dict(zip(self._names, parameters, strict=True))
                step = functional_call(self.policy, named, (x, t, condition))
                return step.mean, step.sigma.log()

            (_, log_sigma), pull = torch.func.vjp(gaussian, *parameters)  # type: ignore[misc]
            tangents = self._tangents(gaussian, parameters, direction)
            precision = per_sample((-2.0 * log_sigma).exp(), x)
            dims = x[0].numel()
            return pull((weight * precision * tangents[0], weight * 2.0 * dims * tangents[1]))  # type: ignore[no-any-return]

        total: list[Tensor] = []
        for rows in chunks(actions.x.shape[1], self._accumulate):
            part = self.seeds.map(product, direction, *batch_rows((actions.x, actions.t, actions.condition), rows))
            total = [a + b for a, b in zip(total, part, strict=True)] if total else list(part)
        return _flat(self._workers.sum(total))

    def _tangents(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        parameters: tuple[Tensor, ...],
        direction: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """The Jacobian-vector product of a function of the parameters with a direction.

        PyTorch's forward mode does not support the normalization of groups in every memory format, so for U-Nets the
        product is the gradient of a vector-Jacobian product, which is linear in its vector.
        """
        if not self._uses_groups:
            with _FORWARD_MODE:
                return torch.func.jvp(function, parameters, direction)[1]  # type: ignore[no-any-return]

        def pulled(vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return torch.func.vjp(function, *parameters)[1](vectors)  # type: ignore[no-any-return]

        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # other kernels of attention cannot be derived twice
            zeros = tuple(torch.zeros_like(output) for output in function(*parameters))
            return torch.func.vjp(pulled, zeros)[1](direction)[0]  # type: ignore[no-any-return]


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve (F + d I) x = target for each seed, with d = damping * target' F target / |target|^2.

    Args:
        product: Maps v to F v, [K, P].
        target: Right-hand sides, [K, P].
        iterations: Number of products.
        damping: Damping, relative to the curvature along the target.

    Returns:
        The solutions x [K, P]; x' F x without the damping, [K]; and |(F + d I) x - target| / |target|, [K].
    """
    square = _dot(target, target).clamp_min(1e-30)
    shift = damping * _dot(target, product(target)) / square
    x, residual, search = torch.zeros_like(target), target.clone(), target.clone()
    remaining = square
    for _ in range(iterations):
        image = product(search) + shift[:, None] * search
        alpha = remaining / _dot(search, image).clamp_min(1e-30)
        x = x + alpha[:, None] * search
        residual = residual - alpha[:, None] * image
        previous, remaining = remaining, _dot(residual, residual)
        search = residual + (remaining / previous.clamp_min(1e-30))[:, None] * search
    curvature = _dot(x, target - residual) - shift * _dot(x, x)
    return x, curvature, (remaining / square).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of the rows of [K, P]: [K]."""
    return (a * b).sum(1)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors [K, ...] to [K, P]."""
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
