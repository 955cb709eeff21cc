"""The config of a student: the policy of a finished run, distilled into fewer steps and then fine-tuned."""

from dataclasses import replace
from pathlib import Path

from dxmi.algorithms.configs import DxMIConfig
from dxmi.config import build, to_tree
from dxmi.diffusion.schedules.configs import VarScheduleConfig
from dxmi.errors import UserError
from dxmi.training.config import ExperimentConfig

_LEVEL = 0.2
"""Signal level at which the student starts: its first step divides by the root of this level."""
_KAPPA = 0.1
"""Scale of the student's initial sigmas, which are small, since it learns a deterministic map."""
_ITERATIONS = 10_000
_RATE, _WARMUP = 0.2, 100
"""Factor of the policy's learning rate, and warm-up: the energy has seen no samples of the student yet, and at the full
rate the policy leaves the data before the energy has followed."""


def student_config(teacher: ExperimentConfig, run: Path, num_steps: int) -> ExperimentConfig:
    """The config of the student of a run: distillation in place of pretraining, and the run's algorithm with few steps.

    DxMI starts from the teacher's energy, with a lower learning rate of the policy. Settings for each step are reset to
    their defaults.

    Args:
        teacher: Config of the run.
        run: Folder of the run.
        num_steps: Number of steps of the student.

    Raises:
        UserError: the run's model does not belong to DDPM's family, has no more steps than the student, or was
            trained by an algorithm that cannot train so few steps.
    """
    schedule = teacher.schedule
    if schedule.family != "ddpm":
        raise UserError(
            f"{run} has schedule.kind={schedule.kind}: only policies of DDPM's family (var, step) can be distilled."
        )
    if num_steps >= schedule.num_steps:
        raise UserError(
            f"--steps is {num_steps}, but the policy in {run} has {schedule.num_steps} steps: the student must have "
            "fewer."
        )
    algorithm = teacher.algorithm
    if isinstance(algorithm, DxMIConfig):
        policy = replace(algorithm.policy, lr=_RATE * algorithm.policy.lr, warmup=_WARMUP)
        per_step = {"reference_var": None, "value_mask": None, "policy_mask": [1.0]}
        own = {**to_tree(algorithm), **per_step, "teacher_energy": True, "policy": to_tree(policy)}
        algorithm = build(DxMIConfig, own)
    student = VarScheduleConfig(shape="linear", num_steps=num_steps, last_level=_LEVEL, kappa=_KAPPA)
    tree = {
        **to_tree(teacher),
        "name": f"{teacher.name}-t{num_steps}",
        "schedule": to_tree(student),
        "algorithm": to_tree(algorithm),
        "pretrain": {**to_tree(teacher.pretrain), "weights": None, "teacher": str(run), "iterations": _ITERATIONS},
    }
    return build(ExperimentConfig, tree)
