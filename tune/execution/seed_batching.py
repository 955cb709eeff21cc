"""Chooses how many seeds of an arm are trained in one program: as configured, as recorded, or the fastest number.

Since the number affects results by rounding, it is measured only once and then recorded in the study's plan.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from dxmi.config import build, to_tree
from dxmi.diffusion.cuda_graphs import WARM_UP
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.fit import Group, TrainingPhase
from tune.execution.slots import Slots
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan

_MOST_ON_CPU, _MOST_ON_GPU = 8, 64
_MIN_GAIN = 1.05
"""Minimum speedup over training one seed after another for which seeds are stacked."""
_ITERATIONS = 4
"""Iterations in one timing; the shortest of several timings is used."""
_REPEATS = 3
_POLL_SECONDS = 0.25
_ENOUGH_SECONDS = 5.0
"""Maximum time spent on timing one number of seeds."""


def seeds_together(plan: Plan, slots: Slots, on_wait: Callable[[], None] = lambda: None) -> int | None:
    """Return how many seeds each program of a study trains, measuring it in a Ray task if necessary.

    A configured or recorded number is used on any machine. A measured number is limited such that every slot is used.

    Args:
        plan: the study's plan.
        slots: how trials share the devices.
        on_wait: called several times a second during the measurement; may raise to give up.

    Returns:
        The number of seeds, or None if the measurement failed, in which case each trial is trained separately.
    """
    resources, known = plan.experiment.resources, known_stack(plan)
    if known is not None:
        return known
    most = min(plan.seeds_at_once, math.ceil(plan.num_trials / slots.concurrent), _most(slots))
    if most == 1:
        return 1
    measure = ray.remote(num_cpus=slots.threads, num_gpus=slots.gpu_share)(_seconds_by_number)
    tree = to_tree(replace(plan.experiment, resources=replace(resources, threads=slots.threads)))
    measured = measure.remote(tree, _numbers(most))
    while not ray.wait([measured], timeout=_POLL_SECONDS)[0]:
        on_wait()
    try:
        seconds: dict[int, float] = ray.get(measured)
    except RayError:  # each trial will encounter the same error and report it
        return None
    return fastest(seconds)


def known_stack(plan: Plan) -> int | None:
    """Return how many seeds each program of a study trains, or None if it has to be measured."""
    asked = plan.experiment.resources.stack_seeds
    if not plan.experiment.resources.can_stack_seeds:
        return 1
    if asked is not None:
        return min(asked, plan.seeds_at_once)
    return plan.stacked if isinstance(plan, AblationPlan) else None


def _most(slots: Slots) -> int:
    return _MOST_ON_GPU if slots.gpu_share else _MOST_ON_CPU


def _numbers(most: int) -> list[int]:
    """Return the numbers of seeds to time: 1, `most`, and half of `most` if that is at least 2."""
    return sorted({1, most, *([most // 2] if most >= 4 else [])})


def fastest(seconds: dict[int, float]) -> int:
    """Return the number of seeds with the least time per seed, or 1 if the gain is too small.

    Args:
        seconds: time of one iteration of all seeds, by the number of seeds.
    """
    best = min(seconds, key=lambda number: seconds[number] / number)
    return best if seconds[1] * best > _MIN_GAIN * seconds[best] else 1


def _seconds_by_number(tree: dict[str, Any], numbers: Sequence[int]) -> dict[int, float]:
    """Time one iteration for each number of seeds in one program; infinite if out of memory."""
    config = build(ExperimentConfig, tree)
    return {number: _seconds(config, number) for number in numbers}


def _seconds(config: ExperimentConfig, number: int) -> float:
    try:
        phases = [_phase(Experiment(replace(config, seed=config.seed + k))) for k in range(number)]
        group = Group(dict(enumerate(phases)))
        for iteration in range(1 + WARM_UP if phases[0].recorded else 1):
            group.update(iteration)
        times, began = [], time.perf_counter()
        for _ in range(_REPEATS):
            _wait(phases[0])
            start = time.perf_counter()
            for iteration in range(_ITERATIONS):
                group.update(iteration)
            _wait(phases[0])
            times.append((time.perf_counter() - start) / _ITERATIONS)
            if time.perf_counter() - began > _ENOUGH_SECONDS:
                break
        return min(times)
    except torch.OutOfMemoryError:
        return math.inf


def _phase(experiment: Experiment) -> TrainingPhase:
    experiment.use_threads()
    experiment.choose_kernels()
    algorithm, state = experiment.build_finetuning(experiment.build_denoiser())
    return TrainingPhase(
        algorithm=algorithm,
        state=state,
        start=0,
        total=_ITERATIONS,
        precision=experiment.precision,
        joined=lambda _: None,
        after_iteration=lambda _, __: None,
        recorded=experiment.records(algorithm),
    )


def _wait(phase: TrainingPhase) -> None:
    """Wait until the device has completed all queued work."""
    if next(phase.algorithm.parameters()).is_cuda:
        torch.cuda.synchronize()
