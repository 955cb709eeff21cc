"""How many trials a machine holds at once, worked out by hand."""

import os

import pytest
import torch

from dxmi.errors import UserError
from dxmi.training.config import ResourcesConfig
from support import stating
from tune.execution.resources import find_slots, share
from tune.execution.slots import Slots


@pytest.mark.parametrize(
    ("cpus", "threads", "max_concurrent", "each", "concurrent"),
    [
        # threads: 0 is one a trial, so every core has one
        (2, 0, None, 1, 2),
        (8, 0, None, 1, 8),
        (1, 0, None, 1, 1),
        (8, 0, 3, 1, 3),
        (8, 0, 8, 1, 8),
        # 8 // 3 = 2, and two cores are left over
        (8, 3, None, 3, 2),
        (8, 4, None, 4, 2),
        (8, 8, None, 8, 1),
        (8, 5, None, 5, 1),
        (8, 2, 1, 2, 1),
        (8, 2, 4, 2, 4),
    ],
)
@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("auto", 0), ("cpu", 4)])
def test_on_a_cpu_trials_share_the_cores(cpus, threads, max_concurrent, each, concurrent, device, gpus):
    slots = share(ResourcesConfig(device=device, threads=threads), max_concurrent, cpus, gpus)
    assert slots == Slots(cpus, gpus=0, threads=each, gpu_share=0.0, concurrent=concurrent)
    assert slots.devices_of_a_trial == each
    assert slots.concurrent * slots.threads <= cpus


@pytest.mark.parametrize(
    ("cpus", "gpus", "part", "threads", "max_concurrent", "each", "concurrent"),
    [
        # a GPU each; the cores are divided by the trials
        (16, 1, 1.0, 0, None, 16, 1),
        (16, 4, 1.0, 0, None, 4, 4),
        (10, 3, 1.0, 0, None, 3, 3),
        (16, 4, 1.0, 0, 2, 8, 2),
        (16, 4, 1.0, 2, None, 2, 4),
        # four on a GPU
        (16, 1, 0.25, 0, None, 4, 4),
        (16, 2, 0.25, 0, None, 2, 8),
        (4, 2, 0.25, 0, None, 1, 4),  # eight would fit on the GPUs, but there are four cores
        (16, 1, 0.25, 8, None, 8, 2),  # and here two trials take all cores
        (16, 1, 0.25, 0, 3, 5, 3),
        (2, 8, 1.0, 0, None, 1, 2),
        # shares that do not divide a GPU: what is left of it stays idle
        (16, 1, 0.5, 0, None, 8, 2),
        (16, 3, 0.5, 0, None, 2, 6),
        (16, 2, 0.4, 0, None, 4, 4),
        (16, 1, 0.7, 0, None, 16, 1),
        (64, 1, 0.1, 0, None, 6, 10),  # 1 / 0.1 is ten, whatever floats say
        (64, 1, 0.2, 0, None, 12, 5),
        (64, 2, 0.3, 0, None, 10, 6),
        (100, 1, 0.01, 0, None, 1, 100),
        # several GPUs each
        (16, 2, 2.0, 0, None, 16, 1),
        (16, 4, 2.0, 0, None, 8, 2),
        (16, 5, 2.0, 0, None, 8, 2),
        (16, 8, 3.0, 0, None, 8, 2),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_beside_gpus_trials_share_these(cpus, gpus, part, threads, max_concurrent, each, concurrent, device):
    slots = share(ResourcesConfig(device=device, threads=threads, gpus=part), max_concurrent, cpus, gpus)
    assert slots == Slots(cpus, gpus, threads=each, gpu_share=part, concurrent=concurrent)
    assert slots.devices_of_a_trial == part
    assert slots.concurrent * slots.threads <= cpus
    assert slots.concurrent * slots.gpu_share <= gpus + 1e-9


@pytest.mark.parametrize(
    ("resources", "max_concurrent", "cpus", "gpus", "sentence"),
    [
        (
            {"device": "cuda"}, None, 8, 0,
            "resources.device is cuda, but PyTorch sees 0 GPUs: use auto or cpu.",
        ),
        (
            {"device": "cuda:0"}, None, 8, 2,
            "resources.device is cuda:0: in a sweep Ray assigns the GPUs; use cuda, auto or cpu.",
        ),
        ({"device": "cuda:3"}, None, 8, 0, "use cuda, auto or cpu."),
        ({"gpus": 4.0}, None, 8, 2, "resources.gpus is 4, but this machine has 2 GPUs."),
        ({"threads": 9}, None, 8, 0, "resources.threads is 9, but this machine has 8 CPU threads."),
        (
            {}, 9, 8, 0,
            "sweep.max_concurrent is 9, but this machine can run 8 trials at once: it has 8 CPU threads and 0 GPUs, "
            "and each trial needs 1 and 0.",
        ),
        ({"threads": 3}, 3, 8, 0, "can run 2 trials at once: it has 8 CPU threads and 0 GPUs, and each trial needs 3"),
        ({"gpus": 0.5}, 3, 16, 1, "can run 2 trials at once"),
        ({"gpus": 2.0}, 2, 16, 3, "can run 1 trials at once"),
        ({"gpus": 0.25}, 5, 4, 2, "can run 4 trials at once"),
    ],
)  # fmt: skip
def test_more_than_there_is_is_refused(resources, max_concurrent, cpus, gpus, sentence):
    with pytest.raises(UserError) as refused:
        share(ResourcesConfig(**resources), max_concurrent, cpus, gpus)
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")


def test_on_a_cpu_a_share_of_a_gpu_means_nothing():
    assert share(ResourcesConfig(gpus=4.0), None, 8, 0).concurrent == 8
    assert share(ResourcesConfig(gpus=4.0, device="cpu"), None, 8, 2).gpu_share == 0.0


@pytest.mark.parametrize("gpus", [0.0, 0.001, -1.0, 1.5, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(gpus):
    with pytest.raises(ValueError, match=stating("0.01..1 … whole number")):
        ResourcesConfig(gpus=gpus)


def test_this_machine_is_looked_at(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})  # a cpuset, not all cores of the machine
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_slots(ResourcesConfig(), None) == Slots(3, 0, 1, 0.0, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_slots(ResourcesConfig(), None) == Slots(3, 1, 3, 1.0, 1)


def test_slots_are_shown_in_words():
    assert str(Slots(8, 0, 2, 0.0, 4)) == "4 at once, each with 2 of 8 CPU threads"
    assert str(Slots(8, 1, 2, 0.25, 4)) == "4 at once, each with 2 of 8 CPU threads and 0.25 of 1 GPUs"
