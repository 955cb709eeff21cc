"""Settings of the algorithms. Nothing here imports PyTorch."""

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


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The part of an algorithm's config that all kinds share."""

    kind: str = "dxmi"
    """Which algorithm: its key in `dxmi.algorithms.registry`."""

    needs_reward: ClassVar[bool] = False
    """Whether it maximizes the reward that `reward` names, which is then the run's score."""

    def check(self, num_steps: int) -> None:
        """Check the settings against the T steps of the schedule.

        Raises:
            ValueError: one of them does not fit; the message begins with its name.
        """


def require_per_step(name: str, numbers: tuple[float, ...] | None, num_steps: int) -> None:
    """Raise a ValueError unless there is one number for all steps, one for each of the T steps, or null."""
    if numbers is not None and len(numbers) not in (1, num_steps):
        raise ValueError(
            f"{name} has {len(numbers)} entries: it takes one number, or one for each of the "
            f"{num_steps} steps of schedule.num_steps"
        )


@dataclass(frozen=True, kw_only=True)
class DxMIConfig(AlgorithmConfig):
    """Everything that one DxMI iteration depends on."""

    preset: str = "as_released"
    """as_released: entropy and cost enter only the policy update; objective: the value's target too (m_v = 1)."""
    entropy_coef: float = 0.1
    """tau: weight of the policy's entropy, per dimension."""
    cost_coef: float = 0.01
    """Weight of the running cost, per dimension."""
    energy_l2: float = 1.0
    """Weight of the squared-energy regularizer."""
    running_cost: str = "transition"
    """transition: (x_{t+1} - x_t)^2 / (2 s_t^2), the method's; noise: of the standardised noise, the reproduction's."""
    step_cost: str = "none"
    """Time-dependent cost in the TD target: none, linear or sigmoid."""
    step_cost_scale: float = 1.0
    """Height of the step cost; without one it has nothing to scale."""
    reference_var: tuple[float, ...] | None = None
    """s_t^2 at the start: null for the schedule's eta, one number for all steps, or T numbers."""
    reference_var_ema: float = 0.99
    """Decay of the adaptive s_t^2 (AVR); 1 keeps the start. There is no s_t^2 with running_cost=noise."""
    value_mask: tuple[float, ...] | None = None
    """m_v: null for the preset's, one number for all steps, or T numbers."""
    policy_mask: tuple[float, ...] = (1.0,)
    """m_p: one number for all steps, or T numbers."""
    value: str = "shared"
    """shared: the energy is the value; separate: a time-conditioned network of its own."""
    energy_updates: int = 1
    """Energy steps in an iteration; more than one where the T value steps smooth a shared energy too much."""
    value_updates: int = 1
    """Sweeps over t = T-1 .. 0 in an iteration."""
    policy_updates: int = 1
    """Draws of stored states in an iteration."""
    all_states: bool = False
    """Use all T x B stored states in minibatches of B in each draw, not only B of them."""
    resample_next: bool = False
    """Take a fresh next state for the TD target instead of the stored one."""
    target_ema: float | None = None
    """Decay of the Polyak-averaged value used in the TD target, from the first iteration on; null for none. The
    published Polyak .005 is .995."""
    policy_ema: float | None = 0.999
    """Decay of the policy's moving average, which is what is evaluated; null to evaluate the policy itself."""
    policy: PolicyOptimizerConfig = field(default_factory=PolicyOptimizerConfig)
    """Optimizer of the denoiser and the log sigmas."""
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the value; of the energy too when it is shared."""
    energy: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of a separate energy; unused when it is shared."""

    def __post_init__(self) -> None:
        named = {"preset": PRESETS, "running_cost": RUNNING_COSTS, "step_cost": STEP_COSTS, "value": VALUES}
        for name, choices in named.items():
            require_choice(name, getattr(self, name), choices)
        for name in ("entropy_coef", "cost_coef", "energy_l2", "step_cost_scale"):
            require_rate(f"{name}", getattr(self, name))
        for name in ("energy_updates", "value_updates", "policy_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0.0 <= self.reference_var_ema <= 1.0:
            raise ValueError(f"reference_var_ema is {self.reference_var_ema}: it must be in [0, 1]")
        for name in ("target_ema", "policy_ema"):
            decay = getattr(self, name)
            if decay is not None and not 0.0 <= decay < 1.0:
                raise ValueError(f"{name} is {decay}: it must be in [0, 1), or null")
        if self.running_cost == "noise" and self.reference_var is not None:
            raise ValueError("reference_var has no effect with running_cost=noise: leave it null")
        for number in self.reference_var or ():
            require_rate("reference_var", number, positive=True)
        for number in (*(self.value_mask or ()), *self.policy_mask):
            require_rate("a mask of the algorithm", number)

    def check(self, num_steps: int) -> None:
        """Check that each table has one entry, or one for each of the T steps."""
        for name in ("reference_var", "value_mask", "policy_mask"):
            require_per_step(name, getattr(self, name), num_steps)


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Pretraining."""

    iterations: int = 10_000
    """Optimizer steps; 0 starts from a random network."""
    batch_size: int = 128
    """Images in each."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is the pretrained model."""
    weights: str | None = field(default=None, metadata=PLACE)
    """A public checkpoint to start from, with `iterations=0` to go no further: a file, or a folder of diffusers."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    """Optimizer of the denoiser."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it must be 0 or greater")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema is {self.ema}: it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(AlgorithmConfig):
    """What the algorithms share whose policy gradient is the score function's."""

    entropy_coef: float = 0.0
    """Weight of the policy's entropy, per dimension: a bonus of entropy_coef * mean_t log sigma_t."""
    last_step: bool = False
    """Count the last step as an action too. Its sigma of schedule.final_sigma is so small that its log-probability
    drowns all others; without it, the last step decodes the last state."""
    policy_ema: float | None = 0.999
    """Decay of the policy's moving average, which is what is evaluated; null to evaluate the policy itself."""
    policy: PolicyOptimizerConfig = field(default_factory=PolicyOptimizerConfig)
    """Optimizer of the denoiser and the log sigmas."""
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the learned baseline, the expected cost or reward V(x, t)."""

    def __post_init__(self) -> None:
        require_rate("entropy_coef", self.entropy_coef)
        if self.policy_ema is not None and not 0.0 <= self.policy_ema < 1.0:
            raise ValueError(f"policy_ema is {self.policy_ema}: it must be in [0, 1), or null")

    def check(self, num_steps: int) -> None:
        """Check that there is a step that counts as an action."""
        if num_steps == 1 and not self.last_step:
            raise ValueError("last_step is false, but schedule.num_steps is 1: no step is left to learn from")


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(PolicyGradientConfig):
    """REINFORCE on a scalar reward."""

    kind: str = "reinforce"
    baseline: str = "learned"
    """Subtracted from the reward: learned (a value network's V(x_t, t)), leave_one_out (the mean of the other samples),
    mean (of all samples, which shrinks the gradient by 1 - 1/B), or none."""
    baseline_updates: int = 1
    """Optimizer steps of the learned baseline in an iteration."""

    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("baseline", self.baseline, BASELINES)
        if self.baseline_updates < 1:
            raise ValueError(f"baseline_updates is {self.baseline_updates}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SftPgConfig(PolicyGradientConfig):
    """SFT-PG (arXiv 2301.13362): a learned critic as the cost, policy gradient on the summed log-probability."""

    kind: str = "sft_pg"
    gradient_penalty: float = 10.0
    """Weight of (|grad f| - 1)^2 between data and samples, which keeps the critic f 1-Lipschitz; 0 for a network that
    is so by itself, such as one with spectral norm."""
    critic_updates: int = 1
    """Steps of the critic in an iteration."""
    value_updates: int = 1
    """Steps of the value in an iteration."""
    policy_updates: int = 2
    """Draws of B stored states in an iteration, one step of the policy each. The published schedule of 10 after every 5
    critic steps is 2 an iteration."""
    energy: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the critic f, which is the energy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate("gradient_penalty", self.gradient_penalty)
        for name in ("critic_updates", "value_updates", "policy_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
