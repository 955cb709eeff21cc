"""Settings of the optimizers, and the learning-rate schedules that they define."""

import math
from dataclasses import dataclass

from dxmi.config import require_choice

KINDS = ("adam", "adamw", "radam")
DECAYS = ("constant", "linear", "cosine")


def require_rate(name: str, value: float, *, positive: bool = False) -> None:
    """Raise a ValueError unless `value` is finite and at least 0, or greater than 0 if `positive`."""
    if not math.isfinite(value) or value < 0.0 or (positive and value == 0.0):
        bound = "greater than 0" if positive else "0 or greater"
        raise ValueError(f"{name} is {value}: it must be a finite number, {bound}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer of one network."""

    kind: str = "adam"
    """Kind of the optimizer: adam, adamw or radam."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    beta1: float = 0.9
    """Decay of the moving average of the gradient."""
    beta2: float = 0.999
    """Decay of the moving average of the squared gradient."""
    weight_decay: float = 0.0
    """Weight decay: part of the gradient with adam and radam, decoupled from it with adamw."""
    max_grad_norm: float | None = None
    """Upper limit of the joint norm of all gradients of this optimizer; null for no clipping."""
    warmup: int = 0
    """Iterations over which the learning rate rises linearly from lr / warmup to lr."""
    decay: str = "constant"
    """Learning rate after the warm-up: constant, or linear or cosine decay that reaches 0 after the last iteration."""

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_choice("decay", self.decay, DECAYS)
        require_rate("lr", self.lr)
        require_rate("weight_decay", self.weight_decay)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        if self.max_grad_norm is not None:
            require_rate("max_grad_norm", self.max_grad_norm, positive=True)
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}: it must be 0 or greater")


@dataclass(frozen=True, kw_only=True)
class PolicyOptimizerConfig(OptimizerConfig):
    """Settings of the policy's optimizer: denoiser and log sigmas have separate learning rates and a joint norm."""

    lr: float = 1e-5
    sigma_lr: float = 1e-4
    """Learning rate of the log sigmas; 0 keeps them at their initial values."""
    max_grad_norm: float | None = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rate("sigma_lr", self.sigma_lr)


def lr_factor(config: OptimizerConfig, iteration: int, total: int) -> float:
    """Compute the factor of the learning rate in `iteration` (from 0) of `total`."""
    if iteration < config.warmup:
        return (iteration + 1) / config.warmup
    if config.decay == "constant" or total <= config.warmup:
        return 1.0
    progress = min((iteration - config.warmup) / (total - config.warmup), 1.0)
    return 1.0 - progress if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
