"""Settings of the algorithms. Nothing here imports PyTorch."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from dxmi.config import require_choice
from dxmi.optim.config import OptimizerConfig, PolicyOptimizerConfig, require_rate
from dxmi.persistence.files import PLACE

STEP_COSTS = ("none", "linear", "sigmoid")
RUNNING_COSTS = ("transition", "noise")
PRESETS = ("as_released", "objective")
VALUES = ("shared", "separate")
BASELINES = ("learned", "leave_one_out", "mean", "none")
GROUPS = ("batch", "condition")
SPREADS = ("none", "group", "batch")
LOG_RATIOS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The settings that all kinds of algorithms share."""

    kind: str = "dxmi"
    """Kind of the algorithm: its key in `dxmi.algorithms.registry`."""

    needs_reward: ClassVar[bool] = False
    """Whether it maximizes the reward chosen by the setting `reward`, which is then the run's score."""

    needs_gradient: ClassVar[bool] = False
    """Whether it backpropagates the reward, which must then be differentiable."""

    @property
    def needs_teacher(self) -> bool:
        """Whether it starts from a part of `pretrain.teacher`."""
        return False

    def check(self, num_steps: int) -> None:
        """Check the settings against the T steps of the schedule.

        Raises:
            ValueError: a setting does not match T; the message begins with its name.
        """


def require_decay(name: str, decay: float | None) -> None:
    """Raise a ValueError unless `decay` is the decay of a moving average, or null."""
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"{name} is {decay}: it must be in [0, 1), or null")


def require_per_step(name: str, numbers: tuple[float, ...] | None, num_steps: int) -> None:
    """Raise a ValueError unless `numbers` is null, one number for all steps, or one for each of the T steps."""
    if numbers is not None and len(numbers) not in (1, num_steps):
        raise ValueError(
            f"{name} has {len(numbers)} entries: it takes one number, or one for each of the "
            f"{num_steps} steps of schedule.num_steps"
        )


@dataclass(frozen=True, kw_only=True)
class DxMIConfig(AlgorithmConfig):
    """Settings of DxMI."""

    preset: str = "as_released"
    """as_released: entropy and cost enter only the policy update; objective: also the value's target (m_v = 1)."""
    entropy_coef: float = 0.1
    """tau: weight of the policy's entropy, per dimension."""
    cost_coef: float = 0.01
    """Weight of the running cost, per dimension."""
    energy_l2: float = 1.0
    """Weight of the squared-energy regularizer."""
    energy_noise: float = 0.0
    """Standard deviation of noise that is added to data and samples in the energy's update, so that the energy cannot
    single out the training data."""
    energy_gradient_penalty: float = 0.0
    """Weight of the squared norm of the energy's gradient at data and samples."""
    running_cost: str = "transition"
    """transition: (x_{t+1} - x_t)^2 / (2 s_t^2), as in the paper; noise: half the squared standardized noise, as in the
    public MNIST reproduction."""
    step_cost: str = "none"
    """Time-dependent cost that is added to the TD target: none, linear or sigmoid."""
    step_cost_scale: float = 1.0
    """Factor of the step cost; unused with step_cost=none."""
    reference_var: tuple[float, ...] | None = None
    """Initial s_t^2: null for the schedule's eta, one number for all steps, or T numbers."""
    reference_var_ema: float = 0.99
    """Decay of the adaptive s_t^2 (AVR); 1 keeps the initial values. Unused with running_cost=noise."""
    value_mask: tuple[float, ...] | None = None
    """m_v, weight of entropy and cost in the value's target: null for the preset's, one number, or T numbers."""
    policy_mask: tuple[float, ...] = (1.0,)
    """m_p, weight of entropy and cost in the policy update: one number for all steps, or T numbers."""
    value: str = "shared"
    """shared: the energy is also the value; separate: the value has its own, time-conditioned network."""
    teacher_energy: bool = False
    """Start from the energy of pretrain.teacher instead of an untrained one."""
    energy_updates: int = 1
    """Energy steps per iteration; more than one helps if the T value steps smooth a shared energy too much."""
    value_updates: int = 1
    """Sweeps of the value over t = T-1 .. 0 per iteration; may be 0 if policy_horizon is null."""
    policy_updates: int = 1
    """Draws of stored states per iteration."""
    policy_start: int = 0
    """Iteration from which the policy is trained; before it, only energy and value are."""
    policy_horizon: int | None = 1
    """Steps of the policy through which its loss is differentiated before the value is evaluated: 1 in the paper; null
    for all that are left, which backpropagates the energy through the trajectory and makes no use of the value."""
    all_states: bool = False
    """Use all T x B stored states in each draw, in minibatches of B, instead of only B of them."""
    resample_next: bool = False
    """Sample a new next state for the TD target instead of using the stored one."""
    target_ema: float | None = None
    """Decay of the Polyak-averaged value used in the TD target, from the first iteration on; null for none. A published
    Polyak coefficient of .005 corresponds to .995."""
    policy_ema: float | None = 0.999
    """Decay of the moving average of the policy, which is evaluated instead of the policy; null for none."""
    guidance: float = 0.0
    """Scale of the value guidance with which the policy is sampled in evaluations; training does not use it."""
    policy: PolicyOptimizerConfig = field(default_factory=PolicyOptimizerConfig)
    """Optimizer of the denoiser and the log sigmas."""
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the value, and of the energy if value=shared."""
    energy: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the energy if value=separate; otherwise unused."""

    def __post_init__(self) -> None:
        named = {"preset": PRESETS, "running_cost": RUNNING_COSTS, "step_cost": STEP_COSTS, "value": VALUES}
        for name, choices in named.items():
            require_choice(name, getattr(self, name), choices)
        coefficients = ("entropy_coef", "cost_coef", "energy_l2", "energy_noise", "energy_gradient_penalty")
        for name in (*coefficients, "step_cost_scale"):
            require_rate(name, getattr(self, name))
        self._require_counts()
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}: it must be a finite number")
        if not 0.0 <= self.reference_var_ema <= 1.0:
            raise ValueError(f"reference_var_ema is {self.reference_var_ema}: it must be in [0, 1]")
        for name in ("target_ema", "policy_ema"):
            require_decay(name, getattr(self, name))
        if self.running_cost == "noise" and self.reference_var is not None:
            raise ValueError("reference_var has no effect with running_cost=noise: leave it null")
        for number in self.reference_var or ():
            require_rate("reference_var", number, positive=True)
        for name in ("value_mask", "policy_mask"):
            for number in getattr(self, name) or ():
                require_rate(name, number)

    def _require_counts(self) -> None:
        """Check the numbers of updates, and that a value that is used is trained."""
        counts = {"energy_updates": 1, "value_updates": int(self.needs_value), "policy_updates": 1}
        for name, least in {**counts, "policy_horizon": 1, "policy_start": 0}.items():
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(f"{name} is {number}: it must be at least {least}")
        if self.guidance and not self.trains_value:
            raise ValueError(
                f"guidance is {self.guidance}, but value_updates is 0: it must be 0 without a trained value"
            )

    @property
    def needs_value(self) -> bool:
        """Whether the policy's update evaluates the value before T."""
        return self.policy_horizon is not None

    @property
    def trains_value(self) -> bool:
        """Whether the value before T is trained, as a shared value is with the energy."""
        return self.value == "shared" or self.value_updates > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether it starts from the energy of `pretrain.teacher`."""
        return self.teacher_energy

    def check(self, num_steps: int) -> None:
        """Check that each table has one entry, or one for each of the T steps."""
        for name in ("reference_var", "value_mask", "policy_mask"):
            require_per_step(name, getattr(self, name), num_steps)
        if self.policy_horizon is not None and self.policy_horizon > num_steps:
            raise ValueError(
                f"policy_horizon is {self.policy_horizon}: it must be at most the {num_steps} steps of "
                "schedule.num_steps, or null for all of them"
            )


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Settings of the pretraining."""

    iterations: int = 10_000
    """Optimizer steps; with 0, the denoiser stays random unless `weights` is given."""
    batch_size: int = 128
    """Samples per step."""
    ema: float = 0.999
    """Decay of the moving average of the weights; the average is the pretrained model."""
    weights: str | None = field(default=None, metadata=PLACE)
    """Public checkpoint to start from, a file or a folder of diffusers; iterations=0 uses it unchanged."""
    teacher: str | None = field(default=None, metadata=PLACE)
    """Folder of a run whose policy is distilled into the steps of this run's schedule, in place of pretraining; null
    for pretraining."""
    seed: int | None = None
    """Seed of the pretraining; null for that of the run. If it is given, all seeds of a study share one pretrained
    model, and their spread does not include that of pretraining."""
    shipped: bool = True
    """Use the result of exactly this pretraining that ships with the package, if there is one; `--from-scratch` sets it
    to false."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    """Optimizer of the denoiser."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it must be 0 or greater")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema is {self.ema}: it must be in [0, 1)")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^63 - 1, or null for the seed of the run")
        if self.teacher is not None and self.weights is not None:
            raise ValueError("teacher and weights are both set: the student starts from the teacher, so leave out one")


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(AlgorithmConfig):
    """The settings that the algorithms with a score-function policy gradient share."""

    entropy_coef: float = 0.0
    """Weight of the policy's entropy, per dimension: the bonus is entropy_coef * mean log sigma_t of the actions."""
    last_step: bool = False
    """Whether the last step counts as an action. Its sigma, schedule.final_sigma, is so small that its log-probability
    dominates all others; if false, the last step only decodes the last state."""
    policy_ema: float | None = 0.999
    """Decay of the moving average of the policy, which is evaluated instead of the policy; null for none."""
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the learned baseline, the expected cost or reward V(x, t)."""

    def __post_init__(self) -> None:
        require_rate("entropy_coef", self.entropy_coef)
        require_decay("policy_ema", self.policy_ema)

    def check(self, num_steps: int) -> None:
        """Check that at least one step counts as an action."""
        if num_steps == 1 and not self.last_step:
            raise ValueError("last_step is false, but schedule.num_steps is 1: no step is left to learn from")


@dataclass(frozen=True, kw_only=True)
class PolicyOptimizerFields:
    """The optimizer of the policy, for algorithms that have one."""

    policy: PolicyOptimizerConfig = field(default_factory=PolicyOptimizerConfig)
    """Optimizer of the denoiser and the log sigmas."""


@dataclass(frozen=True, kw_only=True)
class RewardGradientConfig(PolicyGradientConfig):
    """The settings that the policy-gradient algorithms with a scalar reward share."""

    baseline: str = "leave_one_out"
    """Subtracted from the reward: learned (V(x_t, t) of a value network), leave_one_out (mean reward of the other
    samples of the group), mean (mean reward of the group, which scales the gradient by 1 - 1/N), or none."""
    baseline_updates: int = 1
    """Optimizer steps of the learned baseline per iteration."""
    groups: str = "batch"
    """Samples that are compared with each other: those of the batch, or those of the batch with the same condition."""
    spread: str = "none"
    """Standard deviation by which the advantages are divided: none, group, or batch. Dividing by that of the group
    changes the objective: a condition whose rewards differ little gets a larger weight."""
    buffer: int = 0
    """Number of recent rewards of each group whose mean and standard deviation are used instead of those of the batch;
    0 for those of the batch."""
    min_count: int = 16
    """Number of recorded rewards below which a group uses the statistics of the batch; unused with buffer=0."""
    advantage_clip: float | None = None
    """Upper limit of the magnitude of an advantage; null for none."""
    kl_coef: float = 0.0
    """Weight of KL(policy || pretrained policy), summed over the actions of a trajectory, in units of reward per nat.
    It is the exact KL divergence of Gaussians at the states of the rollout."""
    first_step: int = 0
    """First step that counts as an action. Early steps decide which mode a sample belongs to, and late ones its
    details: with first_step > 0, the reward changes details only, as far as the network separates the steps."""

    needs_reward: ClassVar[bool] = True

    def check(self, num_steps: int) -> None:
        """Check that at least one step counts as an action."""
        super().check(num_steps)
        last = num_steps - 1 - (not self.last_step)
        if self.first_step > last:
            raise ValueError(
                f"first_step is {self.first_step}, but {last} is the last step that counts as an action with "
                f"schedule.num_steps={num_steps} and last_step={str(self.last_step).lower()}: make it smaller"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("baseline", self.baseline, BASELINES)
        require_choice("groups", self.groups, GROUPS)
        require_choice("spread", self.spread, SPREADS)
        for name, least in {"baseline_updates": 1, "buffer": 0, "min_count": 1, "first_step": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.buffer and self.baseline != "mean":
            raise ValueError(f"buffer is {self.buffer}, but baseline is {self.baseline}: a buffer needs baseline=mean")
        if self.buffer and self.spread == "batch":
            raise ValueError(f"buffer is {self.buffer}, but spread is batch: a buffer needs spread=group or none")
        if self.advantage_clip is not None:
            require_rate("advantage_clip", self.advantage_clip, positive=True)
        require_rate("kl_coef", self.kl_coef)


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(PolicyOptimizerFields, RewardGradientConfig):
    """Settings of REINFORCE with a scalar reward."""

    kind: str = "reinforce"
    baseline: str = "learned"


@dataclass(frozen=True, kw_only=True)
class RatioConfig(PolicyOptimizerFields, RewardGradientConfig):
    """The settings of the algorithms that take several steps with the probability ratio of new and old policy."""

    epochs: int = 2
    """Number of times that the actions of a rollout are used, each time in another order."""
    minibatches: int = 2
    """Number of parts into which the actions are divided in each epoch; there is one optimizer step for each part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RatioConfig):
    """Settings of PPO (arXiv 1707.06347) on the steps of the policy, DDPO-IS (arXiv 2305.13301)."""

    kind: str = "ppo"
    clip: float = 0.2
    """Interval [1 - clip, 1 + clip] of the probability ratio outside of which an action has no gradient."""
    dual_clip: float | None = 2.0
    """Upper limit of the ratio of actions with a negative advantage, at least 1 + clip; null for none. Without it, a
    few actions whose ratio is large dominate the gradient."""
    log_ratio: str = "sum"
    """Log ratio of an action: sum over the dimensions, the true one; or mean, the root of the true ratio of order D, as
    in the public code of DDPO."""
    target_kl: float | None = None
    """KL(old || new) of a trajectory in nats above which the remaining optimizer steps of the iteration are skipped;
    null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("log_ratio", self.log_ratio, LOG_RATIOS)
        require_rate("clip", self.clip, positive=True)
        if self.dual_clip is not None and not self.dual_clip >= 1.0 + self.clip:
            raise ValueError(f"dual_clip is {self.dual_clip}: it must be at least 1 + clip, or null")
        if self.target_kl is not None:
            require_rate("target_kl", self.target_kl, positive=True)


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(PpoConfig):
    """Settings of GRPO (arXiv 2402.03300): PPO whose advantages compare samples of the same condition."""

    kind: str = "grpo"
    baseline: str = "mean"
    groups: str = "condition"
    spread: str = "group"


@dataclass(frozen=True, kw_only=True)
class DpokConfig(RatioConfig):
    """Settings of DPOK (arXiv 2305.16381): a policy gradient with a learned baseline and a KL penalty."""

    kind: str = "dpok"
    baseline: str = "learned"
    baseline_updates: int = 5
    kl_coef: float = 1e-3
    """Weight of KL(policy || pretrained policy), summed over the actions of a trajectory, in units of reward per nat.
    Only the divergence of each step itself is differentiated, not its effect on later ones, as published."""
    clip: float = 0.2
    """Interval [1 - clip, 1 + clip] to which the probability ratio is limited; outside, an action has no gradient,
    whether its advantage is positive or negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate("clip", self.clip, positive=True)


@dataclass(frozen=True, kw_only=True)
class DraftConfig(PolicyOptimizerFields, AlgorithmConfig):
    """Settings of DRaFT (arXiv 2309.17400): backpropagation of a differentiable reward."""

    kind: str = "draft"
    steps: int | None = None
    """Last steps of the trajectory through which the reward is backpropagated; null for all."""
    kl_coef: float = 0.0
    """Weight of KL(policy || pretrained policy), summed over the actions among these steps, in units of reward per
    nat."""
    last_step: bool = False
    """Whether the last step, whose sigma is very small, counts in the KL divergence."""
    policy_ema: float | None = 0.999
    """Decay of the moving average of the policy, which is evaluated instead of the policy; null for none."""

    needs_reward: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it must be at least 1, or null")
        require_rate("kl_coef", self.kl_coef)
        require_decay("policy_ema", self.policy_ema)

    def check(self, num_steps: int) -> None:
        """Check that the trajectory has as many steps."""
        if self.kl_coef and (self.steps or num_steps) == 1 and not self.last_step:
            raise ValueError(
                f"kl_coef is {self.kl_coef}, but only the last step is trained, which does not count in the "
                "divergence: make steps at least 2, or last_step true"
            )
        if self.steps is not None and self.steps > num_steps:
            raise ValueError(
                f"steps is {self.steps}: it must be at most the {num_steps} steps of schedule.num_steps, or null"
            )


@dataclass(frozen=True, kw_only=True)
class SacConfig(PolicyOptimizerFields, AlgorithmConfig):
    """Settings of SAC (arXiv 1801.01290) along the chain: soft values on a learned surrogate of the reward."""

    kind: str = "sac"
    temperature: float = 0.01
    """Initial weight of the entropy, in units of reward per nat."""
    target_entropy: float | None = None
    """Entropy of the policy minus that of the pretrained one, in nats per dimension and action, towards which the
    temperature adapts; null for a fixed temperature."""
    temperature_lr: float = 1e-3
    """Learning rate of the log temperature; unused with target_entropy=null."""
    kl_coef: float = 0.0
    """Weight of KL(policy || pretrained policy), summed over the actions of a trajectory, in units of reward per
    nat."""
    last_step: bool = False
    """Whether the last step, whose sigma is very small and fixed, counts in entropy and KL divergence."""
    target_ema: float = 0.9
    """Decay of the moving averages of the critics, from which targets are computed; 0.9 is a Polyak coefficient of .1,
    since an iteration has several updates of the values."""
    reward_updates: int = 20
    """Optimizer steps of the surrogate of the reward per iteration. It starts from nothing, and the policy follows it
    from the first iteration on."""
    value_updates: int = 5
    """Sweeps of the values over t = T-1 .. 0 per iteration."""
    policy_updates: int = 1
    """Draws of B stored states per iteration, with one optimizer step of the policy for each."""
    policy_ema: float | None = 0.999
    """Decay of the moving average of the policy, which is evaluated instead of the policy; null for none."""
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the values."""
    energy: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the surrogates of the reward, whose negatives are the energies of the values."""

    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rate("temperature", self.temperature)
        require_rate("temperature_lr", self.temperature_lr)
        require_rate("kl_coef", self.kl_coef)
        for name in ("target_ema", "policy_ema"):
            require_decay(name, getattr(self, name))
        for name in ("reward_updates", "value_updates", "policy_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.target_entropy is not None and not math.isfinite(self.target_entropy):
            raise ValueError(f"target_entropy is {self.target_entropy}: it must be a finite number, or null")
        if self.target_entropy is not None and self.temperature == 0.0:
            raise ValueError("temperature is 0, but target_entropy is set: the temperature must be greater than 0")
        if self.target_entropy is not None and self.policy.sigma_lr == 0.0:
            raise ValueError(
                f"target_entropy is {self.target_entropy}, but policy.sigma_lr is 0: with fixed sigmas the entropy "
                "cannot change, so leave target_entropy null, and use kl_coef"
            )

    def check(self, num_steps: int) -> None:
        """Check that there is a step whose entropy counts."""
        if num_steps == 1 and not self.last_step:
            raise ValueError("last_step is false, but schedule.num_steps is 1: no step has an entropy")


@dataclass(frozen=True, kw_only=True)
class TrpoConfig(RewardGradientConfig):
    """Settings of TRPO (arXiv 1502.05477): a natural-gradient step of a given KL divergence."""

    kind: str = "trpo"
    max_kl: float = 2.0
    """KL(old || new) of a step, summed over the actions of a trajectory, in nats."""
    cg_iterations: int = 10
    """Iterations of conjugate gradients, each with one Fisher-vector product."""
    damping: float = 1e-3
    """Added to the diagonal of the Fisher matrix, relative to the curvature along the gradient."""
    train_sigmas: bool = True
    """Whether the step changes the log sigmas, too."""
    backtracks: int = 10
    """Number of times that a step that does not improve the surrogate is shortened before it is given up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate("max_kl", self.max_kl, positive=True)
        require_rate("damping", self.damping)
        for name, least in {"cg_iterations": 1, "backtracks": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class TrpoPenaltyConfig(RatioConfig):
    """Settings of TRPO with a penalty whose weight adapts (arXiv 1707.06347, section 4)."""

    kind: str = "trpo_penalty"
    max_kl: float = 2.0
    """KL(old || new) of an iteration, summed over the actions of a trajectory, in nats, towards which the weight of the
    penalty adapts."""
    penalty: float = 1e-3
    """Initial weight of the penalty, in units of reward per nat; doubled after iterations with more than 1.5 max_kl,
    and halved after those with less than max_kl / 1.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate("max_kl", self.max_kl, positive=True)
        require_rate("penalty", self.penalty, positive=True)


@dataclass(frozen=True, kw_only=True)
class SftPgConfig(PolicyOptimizerFields, PolicyGradientConfig):
    """Settings of SFT-PG (arXiv 2301.13362): policy gradient with a learned critic as the cost."""

    kind: str = "sft_pg"
    gradient_penalty: float = 10.0
    """Weight of (|grad f| - 1)^2 between data and samples, which keeps the critic f 1-Lipschitz; 0 for a network that
    is 1-Lipschitz by construction, for example through spectral normalization."""
    critic_updates: int = 1
    """Steps of the critic per iteration."""
    value_updates: int = 1
    """Steps of the value per iteration."""
    policy_updates: int = 2
    """Policy steps per iteration, each on a draw of B stored states. The published schedule, 10 policy steps after
    every 5 critic steps, corresponds to 2 per iteration."""
    energy: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the critic f, which is also the energy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate("gradient_penalty", self.gradient_penalty)
        for name in ("critic_updates", "value_updates", "policy_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
