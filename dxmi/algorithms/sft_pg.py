"""SFT-PG: shortcut fine-tuning by policy gradient (Fan and Lee, ICML 2023, arXiv 2301.13362).

A critic f, low on data and high on samples, is learned as a cost in place of a reward. The maximum of
E f(x_T) - E f(x_data) over 1-Lipschitz f is the Wasserstein-1 distance between samples and data, and the policy
descends the gradient of E f(x_T). One `update` is one iteration:

    1. roll out the policy                       without gradient
    2. critic: low on data, high on samples      one optimizer step (or critic_updates)
    3. value: fit v(x_t, t) to f(x_T)            one optimizer step (or value_updates), over all actions
    4. policy: (f(x_T) - v(x_t, t)) log pi       one optimizer step for each of policy_updates draws of B actions

Differences from the published code. It stores the rollouts of five critic steps and then takes ten policy steps; here,
each iteration takes `policy_updates` steps with its own rollout. It averages the log-probability of images over the
dimensions; here, it is the sum, whose gradient differs by a factor that Adam and the clipping of the norm remove. It
does not constrain the critic of images (`gradient_penalty=0`), fixes the sigmas (`policy.sigma_lr=0`), counts the last
step as an action (`last_step=true`), and also trains the critic with the value's loss.

Logged metrics (means over the batch, of the last update of the iteration):

    energy/data_mean     mean f(x_data)
    energy/sample_mean   mean f(x_T)
    energy/loss          loss of step 2, including the penalty
    energy/penalty       mean (|grad f| - 1)^2 between data and samples; absent with gradient_penalty=0
    value/error          root mean squared f(x_T) - v(x_t, t), over all actions
    policy/grad_norm     gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy       mean_t log sigma_t, the per-dimension entropy up to a constant
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import DEVICE, HOST, Metrics, Parts
from dxmi.algorithms.configs import SftPgConfig
from dxmi.algorithms.losses import energy_loss, gradient_penalty
from dxmi.algorithms.policy_gradient import Actions, PolicyGradient, timed_values
from dxmi.algorithms.states import StoredStates, draw_states, select_rows
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.tensors import per_sample


class SftPg(PolicyGradient):
    """SFT-PG, with all state that training changes.

    Args:
        config: Settings of SFT-PG.
        parts: Components from which it is built.
    """

    streams: ClassVar[Mapping[str, str]] = {"noise": DEVICE, "states": HOST}
    panels: ClassVar[Sequence[str]] = ("energy/data_mean", "energy/sample_mean", *PolicyGradient.panels)
    value: SeparateValue

    def __init__(self, config: SftPgConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config
        self.value = SeparateValue(Energy(parts.critic()), parts.timed_critic(), self.policy.num_steps)
        # The critic's offset cancels in its loss: the gradient is rounding noise, so the offset is not trained.
        idle = {id(offset) for offset in self.energy.network.offsets}
        trained = [parameter for parameter in self.energy.parameters() if id(parameter) not in idle]
        self.optimizers = {
            "policy": self.policy_optimizer(config.policy, parts),
            "value": parts.optimizer(config.critic, (self.value.network.parameters(), config.critic.lr)),
            "energy": parts.optimizer(config.energy, (trained, config.energy.lr)),
        }

    @property
    def energy(self) -> Energy:
        """The critic f."""
        return self.value.energy

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:  # noqa: ARG002
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        config = self.config
        draws = [
            draw
            for _ in range(config.policy_updates)
            for draw in draw_states(streams, "states", self.num_actions, batch.share.num, every=False)
        ]

        # 1. Roll out.
        trajectory = self.rollout(batch, streams)
        sample = trajectory.x[:, -1]

        # 2. Critic: low on data, high on samples.
        for _ in range(config.critic_updates):
            metrics = self.update_critic(batch, sample, streams)

        # 3. Value: the expected score f(x_T) of the sample.
        score = self._scores(sample, batch.condition)
        actions, num = self.actions(trajectory, batch.condition), self.num_rows(batch)
        for _ in range(config.value_updates):
            error = self.fit_expected(self._expected, actions, self.per_action(score), num)
        metrics["value/error"] = error.sqrt()

        # 4. Policy: the score-function gradient, estimated from some of the actions.
        for drawn in draws:
            states = StoredStates.gather(trajectory, batch.condition, drawn, batch.share, with_next=True)
            metrics |= self.update_policy(states, score)
        metrics["policy/entropy"] = self.mean_log_sigma()

        self.update_averages()
        return metrics

    def update_critic(self, batch: Batch, sample: Tensor, streams: Streams) -> Metrics:
        """Step 2: minimize mean f(x_data) - mean f(x_T) + gradient_penalty * mean (|grad f(x_between)| - 1)^2."""
        share = batch.share
        between = share.of(
            streams.draw("noise", lambda own: torch.rand(share.num, generator=own, device=own.device)), 1
        )

        def loss(data: Tensor, sample: Tensor, between: Tensor, condition: Condition) -> Mapping[str, Tensor]:
            on_data, on_sample = self.energy(data, condition), self.energy(sample, condition)
            values = {"data_mean": on_data, "sample_mean": on_sample}
            contrast = energy_loss(on_data, on_sample, 0.0)
            if self.config.gradient_penalty == 0.0:
                return {"loss": contrast, **values}
            x = torch.lerp(data, sample, per_sample(between, data))
            gradient = torch.func.grad(lambda x: self.energy(x, condition).sum())(x)
            penalty = gradient_penalty(gradient)
            return {"loss": contrast + self.config.gradient_penalty * penalty, "penalty": penalty, **values}

        result = self.optimizers["energy"].minimize(loss, batch.x, sample, between, batch.condition, num=share.num)
        return {f"energy/{name}": mean for name, mean in result.means.items()}

    @torch.no_grad()
    def _scores(self, sample: Tensor, condition: Condition) -> Tensor:
        """f(x_T) of every trajectory, [K, b]."""
        scores: Tensor = self.seeds.map(self.energy, sample, condition)
        return scores

    def _expected(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v(x_t, t), the expected f(x_T) given states [b, *event] at steps [b]: [b]."""
        return timed_values(self.value.network, self.steps, x, t, condition)

    def update_policy(self, states: StoredStates, score: Tensor) -> Metrics:
        """Step 4: one gradient step that descends (f(x_T) - v(x_t, t)) log pi(x_{t+1} | x_t)."""
        with torch.no_grad():
            expected = self.seeds.map(self._expected, states.x, states.t, states.condition)
        advantage = select_rows(score, states.row) - expected
        actions = Actions(states.x, states.x_next, states.t, states.condition)
        metrics = self.follow_gradient(actions, advantage, states.num).metrics("policy")
        del metrics["policy/loss"]  # only the gradient of this surrogate loss has a meaning
        return metrics
