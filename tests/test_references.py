"""References: which there are, what they cost, how a summary tells of them, and whether one beats the result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.configs import ScheduleConfig, VarScheduleConfig
from dxmi.diffusion.schedules.ddpm import ancestral_schedule
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.evaluation.config import SELECTION, EvaluateConfig
from dxmi.evaluation.references import references
from dxmi.evaluation.sampling import Sampling, generate, preview
from dxmi.evaluation.scored_references import (
    Role,
    best_of_parent,
    best_reference,
    full_reference,
    highlights,
    scored_references,
)
from dxmi.networks.base import Denoiser
from support import missing
from tune.studies.outdone import outdone, outdone_sentences

KARRAS = SCHEDULES.config("karras", num_steps=10)
GAN = SCHEDULES.config("ddgan", num_steps=4)
TRAILING = ["ddim_5_trailing", "dpm_solver_5_trailing", "ddpm_5_trailing", "ddpm_5_trailing_large"]
FEW = [*TRAILING, "ddim_5_log_snr", "dpm_solver_5_log_snr", "dpm_solver_5_log_snr_clipped"]
FULL = [name.replace("5", number) for number in ("50", "250") for name in TRAILING]
EDM_FEW = ["euler_10_trailing", "dpm_solver_10_trailing", "ancestral_10_trailing", "heun_9_trailing"]


class Counting(Denoiser):
    """Predicts nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def embed(self, steps: Tensor) -> Tensor:
        return steps[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        self.calls += 1
        return torch.zeros_like(x)


def keys(config: ScheduleConfig, **kwargs: object) -> list[str]:
    return [reference.key for reference in references(config, **kwargs)]


def test_each_family_has_its_references():
    assert keys(VarScheduleConfig()) == [*FULL, *FEW, "shortened"]
    assert keys(KARRAS) == ["ancestral_250_trailing", "heun_79_trailing", *EDM_FEW, "shortened"]
    assert keys(GAN, steps=(5,)) == ["shortened"]
    assert keys(VarScheduleConfig(), full_steps=None) == [*FEW, "shortened"]
    other = replace(KARRAS, rho=5.0)
    assert keys(other, steps=(250,))[:3] == ["ancestral_250_trailing", "heun_79_trailing", "euler_10_trailing_rho5"]
    assert "ancestral_250_trailing_rho5" in keys(other, steps=(250,))
    assert keys(KARRAS, full_steps=None) == [*EDM_FEW, "shortened"]


@pytest.mark.parametrize("shape", ["linear", "quadratic", "trailing", "log_snr"])
def test_a_policy_on_a_subset_of_the_steps_is_compared_with_the_same_samplers(shape):
    """Whatever the policy's own steps are, the references' are trailing or even in the log-SNR."""
    found = {r.key: r for r in references(SCHEDULES.config("step", shape=shape), full_steps=None)}
    assert [*found] == [*FEW, "shortened"]
    for key in FEW:
        expected = [999, 799, 599, 399, 199] if key in TRAILING else [999, 785, 492, 138, 17]
        assert found[key].schedule.timestep.tolist() == expected


def test_points_have_no_range_to_which_a_prediction_could_be_clipped():
    assert keys(VarScheduleConfig(), full_steps=None, are_images=False) == [*FEW[:-1], "shortened"]


def test_further_numbers_of_steps_have_all_samplers_and_none_is_there_twice():
    more = keys(VarScheduleConfig(), full_steps=None, steps=(5, 7))
    assert more == [*FEW, *(key.replace("5", "7") for key in FEW), "shortened"]
    whole = keys(VarScheduleConfig(), full_steps=(1000,), steps=(50, 1000))
    assert whole == [
        *("ddim_1000", "dpm_solver_1000", "ddpm_1000", "ddpm_1000_large"),
        *FEW,
        *(key.replace("5", "50") for key in TRAILING),
        "shortened",
    ]


@pytest.mark.parametrize("config", [VarScheduleConfig(num_steps=1), SCHEDULES.config("karras", num_steps=1)])
def test_with_one_step_all_samplers_are_one(config):
    assert len(keys(config, full_steps=None)) == 2


def test_with_two_steps_a_solver_of_second_order_is_the_one_of_first_order_and_left_out():
    two = [VarScheduleConfig(num_steps=2), SCHEDULES.config("karras", num_steps=2)]
    assert [keys(config, full_steps=None) for config in two] == [
        [
            *("ddim_2_trailing", "ddpm_2_trailing", "ddpm_2_trailing_large"),
            *("ddim_2_log_snr", "ddim_2_log_snr_clipped", "shortened"),
        ],
        ["euler_2_trailing", "ancestral_2_trailing", "shortened"],
    ]


@pytest.mark.parametrize("config", [VarScheduleConfig(), KARRAS, SCHEDULES.config("karras", num_steps=4), GAN])
def test_each_reference_calls_the_network_as_often_as_it_says(config):
    for reference in references(config, full_steps=(4, 50) if config is KARRAS else None, steps=(2, 3)):
        network = Counting()
        reference.policy(network, reference.schedule, (1,)).sample(2, torch.Generator().manual_seed(0))
        assert network.calls == reference.evaluations, reference.key
        if reference.role is Role.FEW:
            assert config.num_steps - 1 <= reference.evaluations <= config.num_steps


def test_deterministic_references_have_no_noise_and_the_last_step_of_none_adds_any():
    for config in (VarScheduleConfig(), KARRAS):
        for reference in references(config):
            if reference.role is Role.SHORTENED:
                continue
            is_stochastic = reference.key.startswith(("ddpm", "ancestral"))
            assert reference.schedule.sigma.any() == is_stochastic, reference.key
            assert reference.schedule.sigma[-1] == 0.0


def test_labels_name_sampler_spacing_variance_and_further_evaluations():
    labels = {
        r.key: r.label for config in (VarScheduleConfig(), KARRAS) for r in references(config, full_steps=(1000,))
    }
    assert labels["ddim_5_trailing"] == "5 steps (DDIM, trailing)"
    assert labels["ddpm_5_trailing_large"] == "5 steps (DDPM, trailing, large variance)"
    assert labels["dpm_solver_5_log_snr"] == "5 steps (DPM-Solver++(2M), log-SNR)"
    assert labels["dpm_solver_5_log_snr_clipped"] == "5 steps (DPM-Solver++(2M), log-SNR, clipped)"
    assert labels["ddpm_1000"] == "1000 steps (DDPM, small variance)"
    assert labels["heun_9_trailing"] == "5 steps (Heun, trailing, 9 evaluations)"


# ----------------------------------------------------------------------------
# Pictures.


class Telling(Counting):
    """Shows the label and the latent that it was given."""

    classes = 10
    latent = 2

    def embed_labels(self, labels: Tensor) -> Tensor:
        return labels[:, None].float()

    def embed_latent(self, latent: Tensor) -> Tensor:
        return latent[:, :1]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding[:, :, None, None].expand_as(x)


@pytest.mark.parametrize("config", [VarScheduleConfig(), KARRAS])
@pytest.mark.parametrize("num", [3, 4, 6])
def test_a_preview_shows_the_samples_that_the_score_looks_at_and_computes_no_others(config, num):
    evaluate = EvaluateConfig(batch_size=4, num_samples=8)
    for reference in references(config, full_steps=None):
        policy = reference.policy(Counting(), reference.schedule, (1, 4, 4))
        steps = []
        shown = preview(Sampling(policy, SELECTION, on_step=lambda: steps.append(1)), num, evaluate)  # noqa: B023
        assert torch.equal(shown, generate(Sampling(policy, SELECTION), num, evaluate)), reference.key
        assert len(steps) == -(-num // 4) * (reference.schedule.num_steps + 1)


def test_the_first_of_many_samples_keep_the_noise_labels_and_latents_that_they_have_among_all():
    schedule = ancestral_schedule(5, "large")
    policy = Policy(Telling(), schedule, (1, 2, 2))
    policy.draw_classes(torch.ones(10, dtype=torch.int64))
    states = list(policy.sample_states(64, torch.Generator().manual_seed(0)))
    first = list(policy.sample_states(64, torch.Generator().manual_seed(0), first=5))
    assert {len(x) for x in first} == {5}
    for some, everything in zip(first, states, strict=True):
        torch.testing.assert_close(some, everything[:5])


# ----------------------------------------------------------------------------
# Summaries.


def summary(**scores: float) -> dict:
    """Of a run with five steps; the references' scores by key."""
    told = {
        reference.key: reference.tree
        for reference in references(VarScheduleConfig(), full_steps=(1000,), steps=(3, 10))
    }
    return {"num_steps": 5, "reference": scores, "samplers": {key: told[key] for key in scores if key in told}}


SCORES = {
    "ddpm_1000": 8.6, "ddim_1000": 9.6, "ddim_5_trailing": 2.9, "ddpm_5_trailing_large": 90.0, "ddim_10_trailing": 1.5,
    "ddim_3_trailing": 7.0, "shortened": 17.5, "data": 0.1,
}  # fmt: skip


def test_a_summary_tells_of_every_reference_it_has_a_score_of():
    found = scored_references(summary(**SCORES))
    assert {reference.key: reference.score for reference in found} == {k: v for k, v in SCORES.items() if k != "data"}
    assert [found[0].role, found[-1].role] == [Role.FULL, Role.SHORTENED]
    assert (found[-1].label, found[-1].evaluations) == ("5 steps, before", 5)


def test_the_best_reference_is_one_that_is_no_dearer():
    found = scored_references(summary(**SCORES))
    assert best_reference(found, 5).key == "ddim_5_trailing"
    assert best_reference(found, 4).key == "ddim_3_trailing"
    assert best_reference(found, 2) is None
    assert best_of_parent(found).key == "ddim_10_trailing"
    assert full_reference(found).key == "ddpm_1000"
    assert [r.key for r in highlights(found, 5)] == ["ddpm_1000", "ddim_5_trailing", "shortened"]


def test_a_summary_from_before_references_told_of_themselves_can_be_read():
    old = {
        "num_steps": 5,
        "reference": {"ddpm_1000": 8.6, "ddim_5": 3.5, "dpm_solver_10": 1.0, "shortened": 17.5, "data": 0.1},
    }
    found = {reference.key: reference for reference in scored_references(old)}
    assert {key: (r.role.value, r.evaluations) for key, r in found.items()} == {
        "ddpm_1000": ("full", 1000),
        "dpm_solver_10": ("further", 10),
        "ddim_5": ("few", 5),
        "shortened": ("shortened", 5),
    }
    assert found["ddim_5"].label == "5 steps (DDIM, evenly over 0..999)"  # not the spacing of today
    edm = {"num_steps": 10, "reference": {"ancestral_250": 2.0, "euler_10": 3.0, "shortened": 9.0}}
    assert [r.label for r in scored_references(edm)] == [
        "250 steps (ancestral)",
        "10 steps (Euler)",
        "10 steps, before",
    ]


def test_a_result_that_a_free_sampler_beats_is_named_with_both_scores():
    found = scored_references(summary(**SCORES))
    (sentence,) = outdone_sentences("eval/fid_digits", [outdone("this run", 3.52, found, 5)])
    assert missing("5 steps … DDIM … fid_digits … 2.90 … this run … 3.52", sentence) == []
    assert outdone_sentences("eval/fid_digits", [outdone("this run", 2.89, found, 5)]) == []
    assert outdone("this run", 2.9, found, 5) is None  # equal is not better
    assert outdone("this run", 2.9004, found, 5) is None  # nor is what looks equal
    assert outdone("a run with two steps", 99.0, found, 2) is None


def test_results_beaten_by_one_sampler_share_a_sentence():
    found = scored_references(summary(**SCORES))
    results = [outdone("a", 4.0, found, 5), outdone("b", 5.0, found, 5), None, outdone("c", 8.0, found, 4)]
    first, second = outdone_sentences("eval/fid_digits", results)
    assert missing("a … 4.00 … b … 5.00", first) == []
    assert missing("3 steps … DDIM … fid_digits … 7.00 … better … c … 8.00", second) == []


def test_a_summary_with_nothing_but_its_policy_before_is_compared_with_that():
    """A diffusion GAN has no other sampler."""
    told = {reference.key: reference.tree for reference in references(GAN)}
    found = scored_references({"num_steps": 4, "reference": {"shortened": 3.0}, "samplers": told})
    assert outdone("this run", 3.5, found, 4).label == "4 steps, before"
    assert full_reference(found) is None
