"""PPO on the steps of the policy (Schulman et al., arXiv 1707.06347), DDPO-IS (Black et al., arXiv 2305.13301).

One `update` is one iteration:

    1. roll out the policy                       without gradient
    2. reward of the samples                     r(x_T, c), which need not be differentiable
    3. replay the steps of the rollout           in the minibatches of the first epoch, without gradient
    4. policy: epochs x minibatches of actions   one optimizer step each, on the clipped surrogate of the ratio
    5. baseline: fit V(x_t, t) to r              one optimizer step (or baseline_updates), if it is learned

The ratio rho = pi(x_{t+1} | x_t) / pi_old(x_{t+1} | x_t) is that of the densities, whose logarithm is summed over the
dimensions. Step 3 computes pi_old with the same operations on the same rows as step 4, so that the ratio is exactly 1
before the first step, in any precision.

Differences from the published code. It averages the log-probability over the dimensions, so that its ratio is the true
one to the power of 1/D; `algorithm=ppo_as_released` has its settings (log_ratio=mean, clip=1e-4). It clips the ratio of
actions with a negative advantage from below only; here, `dual_clip` limits it from above, too. An optimizer step there
uses all actions of some trajectories, and here a random part of all actions. Classifier-free guidance is not used.

Logged metrics (means over the batch and over the optimizer steps of the iteration, except for the reward's):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/zero_std_ratio    share of the groups whose samples all have the same reward: they have no gradient
    policy/ratio             mean of the ratio rho; its expectation under the old policy is 1
    policy/ratio_std         standard deviation of the ratio
    policy/clipped_high      share of the actions with a positive advantage and a ratio above 1 + clip
    policy/clipped_low       share of the actions with a negative advantage and a ratio below 1 - clip
    policy/kl                largest KL(old || new) of a trajectory in nats, measured before each optimizer step
    policy/steps             number of optimizer steps that were taken
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
    value/error              root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dxmi.algorithms.base import DEVICE, HOST, Metrics
from dxmi.algorithms.configs import PpoConfig, RatioConfig
from dxmi.algorithms.losses import clipped_surrogate
from dxmi.algorithms.policy_gradient import Actions
from dxmi.algorithms.reward_gradient import RewardGradient, kl_per_seed
from dxmi.algorithms.states import StoredStates, draw_minibatches, select_rows
from dxmi.data.batch import Batch, Streams
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.optim.optimizer import StepResult
from dxmi.rewards.base import rewards_of
from dxmi.tensors import map_tensors


class Experience(NamedTuple):
    """The actions of a rollout, in the order of `PolicyGradient.actions`.

    Attributes:
        old: Steps of the policy that took the actions, [K, T' * b, ...].
        reference: Steps of the pretrained policy from the same states; None with kl_coef=0.
        advantage: Advantage of each action, [K, T' * b].
    """

    old: GaussianStep
    reference: GaussianStep | None
    advantage: Tensor


class RatioAlgorithm(RewardGradient):
    """Base class of algorithms that take several optimizer steps with the ratio of new and old policy.

    Args:
        config: Settings that these algorithms share.
        parts: Components from which the algorithm is built.
    """

    streams: ClassVar[Mapping[str, str]] = {"noise": DEVICE, "states": HOST}
    config: RatioConfig

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        drawn = [self._draw(batch, streams) for _ in range(self.config.epochs)]
        trajectory = self.rollout(batch, streams)
        reward = rewards_of(self.reward, trajectory.x[:, -1], batch.condition, iteration, self._workers)
        actions, num = self.actions(trajectory, batch.condition), self.num_rows(batch)

        old = self._replay(trajectory, drawn[0], batch)
        reference = self.reference_steps(actions)
        kl = None if reference is None else kl_per_seed(old, reference)
        advantage, metrics = self.advantage_of(reward, actions, kl, batch)

        minibatches = (part for epoch in drawn for part in epoch)
        metrics |= self.optimize(trajectory, Experience(old, reference, advantage), minibatches, batch)
        metrics |= self.fit_baseline(actions, reward, num)
        metrics["policy/entropy"] = self.mean_log_sigma()
        self.update_averages()
        return metrics

    def optimize(
        self, trajectory: Trajectory, experience: Experience, minibatches: Iterator[Tensor], batch: Batch
    ) -> Metrics:
        """Step 4: take one optimizer step for each of the minibatches of actions; returns the means of the metrics."""
        totals: list[Metrics] = []
        for drawn in minibatches:
            states = self.gathered(trajectory, drawn, batch)
            actions = Actions(states.x, states.x_next, states.t, states.condition)
            chosen = self.select(experience, states, batch)
            result = self.optimizers["policy"].minimize(self.losses, actions, chosen, num=states.num)
            totals.append(result.metrics("policy"))
        metrics = {name: torch.stack([one[name] for one in totals]).mean(0) for name in totals[0]}
        del metrics["policy/loss"]  # only the gradient of a surrogate loss has a meaning
        return metrics

    @abstractmethod
    def losses(self, actions: Actions, experience: Experience) -> Mapping[str, Tensor]:
        """The `loss` of each action of one seed, and other values that are logged, [b] each."""

    def _draw(self, batch: Batch, streams: Streams) -> tuple[Tensor, ...]:
        """Draw the minibatches of an epoch."""
        total = self.num_rows(batch)
        return draw_minibatches(streams, "states", total, -(-total // self.config.minibatches))

    def gathered(self, trajectory: Trajectory, drawn: Tensor, batch: Batch) -> StoredStates:
        """This process's actions of a minibatch, given by indices into all actions."""
        states = drawn + self.first_action * batch.share.num
        return StoredStates.gather(trajectory, batch.condition, states, batch.share, with_next=True)

    def _index(self, states: StoredStates, batch: Batch) -> Tensor:
        """The places of actions in the order of `PolicyGradient.actions`, [K, b]."""
        return (states.t - self.first_action) * batch.share.count + states.row

    @torch.no_grad()
    def _replay(self, trajectory: Trajectory, minibatches: Sequence[Tensor], batch: Batch) -> GaussianStep:
        """The steps of the current policy for all actions, computed in the given minibatches: [K, T' * b, ...]."""
        parts, order = [], []
        for drawn in minibatches:
            states = self.gathered(trajectory, drawn, batch)
            parts.append(self.in_pieces(self.policy, states.x, states.t, states.condition))
            order.append(self._index(states, batch))
        index = torch.cat(order, dim=1).argsort(dim=1)
        mean, sigma = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        return GaussianStep(select_rows(mean, index), select_rows(sigma, index))

    def select(self, experience: Experience, states: StoredStates, batch: Batch) -> Experience:
        """The experience of the actions of a minibatch, [K, b, ...]."""
        index = self._index(states, batch)
        return map_tensors(lambda x: select_rows(x, index), experience)  # type: ignore[no-any-return]


class Ppo(RatioAlgorithm):
    """PPO, with all state that training changes.

    Args:
        config: Settings of PPO.
        parts: Components from which it is built.
    """

    panels: ClassVar[Sequence[str]] = ("policy/clipped_high", "policy/clipped_low", *RatioAlgorithm.panels)
    config: PpoConfig

    def optimize(
        self, trajectory: Trajectory, experience: Experience, minibatches: Iterator[Tensor], batch: Batch
    ) -> Metrics:
        """Take one optimizer step for each minibatch, until the divergence from the old policy exceeds `target_kl`."""
        target, optimizer = self.config.target_kl, self.optimizers["policy"]
        takes = torch.ones(self.seeds.size, device=trajectory.x.device)  # 1 for seeds that take the next step
        sums: dict[str, Tensor] = {}
        largest = torch.zeros_like(takes)
        for drawn in minibatches:
            if target is not None and not bool(takes.any()):
                optimizer.skip()
                continue
            states = self.gathered(trajectory, drawn, batch)
            result = self._step(states, self.select(experience, states, batch), takes)
            kl = result.means["kl"]
            largest = torch.where(takes > 0.0, torch.maximum(largest, kl), largest)
            takes = takes if target is None else takes * (kl <= target)
            values = {**result.metrics("policy"), "policy/steps": torch.ones_like(takes)}
            sums = {name: takes * value + sums.get(name, 0.0) for name, value in values.items()}
        steps = sums.pop("policy/steps")
        means = {name: value / steps for name, value in sums.items()}
        offset = means["policy/ratio"] - 1.0
        spread = (means.pop("policy/offset_square") - offset.square()).clamp_min(0.0).sqrt()
        del means["policy/loss"]  # only the gradient of this surrogate loss has a meaning
        return {**means, "policy/ratio_std": spread, "policy/kl": largest, "policy/steps": steps}

    def _step(self, states: StoredStates, experience: Experience, takes: Tensor) -> StepResult:
        config = self.config

        def stays_close(means: Mapping[str, Tensor]) -> Tensor:
            return (takes > 0.0) & (means["kl"] <= (config.target_kl or 0.0))

        inputs = (Actions(states.x, states.x_next, states.t, states.condition), experience)
        decides = None if config.target_kl is None else stays_close
        return self.optimizers["policy"].minimize(self.losses, *inputs, num=states.num, takes=decides)

    def losses(self, actions: Actions, experience: Experience) -> Mapping[str, Tensor]:
        """The clipped surrogate of each action, and statistics of its ratio, [b] each."""
        config = self.config
        x, x_next, t, condition = actions
        old, reference, advantage = experience
        step = self.policy(x, t, condition)
        log_ratio = step.log_prob(x_next) - old.log_prob(x_next)
        if config.log_ratio == "mean":
            log_ratio = log_ratio / x_next[0].numel()
        ratio = log_ratio.exp()
        surrogate = clipped_surrogate(ratio, advantage, config.clip, config.dual_clip)
        return {
            "loss": self.action_loss(surrogate, step, reference),
            "kl": self.num_actions * old.kl(step),
            "ratio": ratio,
            "offset_square": (ratio - 1.0).square(),  # without the cancellation of rho^2 - 1
            "clipped_high": ((ratio > 1.0 + config.clip) & (advantage > 0.0)).float(),
            "clipped_low": ((ratio < 1.0 - config.clip) & (advantage < 0.0)).float(),
        }
