"""Reference samplers as read from a summary, for tables, leaderboards and reports, without importing PyTorch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dxmi.metrics.keys import MINIMIZE, sign_of

SHORTENED, DATA = "shortened", "data"


class Role(StrEnum):
    """What a reference shows."""

    FULL = "full"
    """The quality of the pretrained model with many steps."""
    FEW = "few"
    """The quality of a training-free sampler with as many network evaluations as the policy, or one fewer."""
    FURTHER = "further"
    """The quality with another number of evaluations, requested by `evaluate.reference_steps`."""
    SHORTENED = SHORTENED
    """The quality of the policy before fine-tuning."""


@dataclass(frozen=True)
class ScoredReference:
    """A reference with its score, as read from a summary.

    Attributes:
        key: key in the summary.
        label: readable description.
        sampler: readable name of the sampler, without the number of steps.
        role: what the reference shows.
        evaluations: number of network evaluations per sample.
        score: score by the primary metric of the summary.
    """

    key: str
    label: str
    sampler: str
    role: Role
    evaluations: int
    score: float

    @property
    def kind(self) -> tuple[str, str]:
        """Identifies the corresponding references of policies with another number of steps."""
        return (self.role, self.sampler if self.role is Role.FEW else self.key)


def scored_references(summary: Mapping[str, Any]) -> list[ScoredReference]:
    """The references in a summary, in table order: many steps, further numbers, few steps, before fine-tuning."""
    told, num_steps = summary.get("samplers") or {}, summary["num_steps"]
    found = [
        ScoredReference(key=key, score=score, **_described(key, told.get(key) or _earlier(key, num_steps)))
        for key, score in summary["reference"].items()
        if key != DATA
    ]
    order = (Role.FULL, Role.FURTHER, Role.FEW, Role.SHORTENED)
    return sorted(found, key=lambda reference: (order.index(reference.role), reference.evaluations))


def _described(key: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    label = tree.get("label", key)
    return {
        "label": label,
        "sampler": tree.get("sampler", label),
        "role": Role(tree.get("role", Role.FURTHER)),
        "evaluations": tree["evaluations"],
    }


def data_label(summary: Mapping[str, Any]) -> str:
    """The label of the floor in a summary: real data scored in place of samples."""
    floor = (summary.get("scored_with") or {}).get("floor")
    return f"real data ({floor})" if floor else "the data itself"


_EARLIER = {
    "ddpm": "DDPM, small variance",
    "ddim": "DDIM, evenly over 0..999",
    "dpm_solver": "DPM-Solver++(2M)",
    "ancestral": "ancestral",
    "euler": "Euler",
}


def _earlier(key: str, num_steps: int) -> dict[str, Any]:
    """Describe a reference by its key, for old summaries that do not contain descriptions."""
    match = re.fullmatch(r"(\w+?)_(\d+)", key)
    if match is None or match[1] not in _EARLIER:
        return {
            "label": f"{num_steps} steps, before",
            "sampler": "before",
            "role": Role.SHORTENED,
            "evaluations": num_steps,
        }
    sampler, evaluations = _EARLIER[match[1]], int(match[2])
    role = Role.FULL if match[1] in ("ddpm", "ancestral") else Role.FEW if evaluations == num_steps else Role.FURTHER
    return {"label": f"{evaluations} steps ({sampler})", "sampler": sampler, "role": role, "evaluations": evaluations}


def best_reference(
    found: Iterable[ScoredReference], evaluations: int, direction: str = MINIMIZE
) -> ScoredReference | None:
    """The best reference with at most this number of network evaluations."""
    return _best([reference for reference in found if reference.evaluations <= evaluations], direction)


def best_of_parent(found: Iterable[ScoredReference], direction: str = MINIMIZE) -> ScoredReference | None:
    """The best training-free sampler of the pretrained model, with any number of evaluations."""
    return _best([reference for reference in found if reference.role is not Role.SHORTENED], direction)


def full_reference(found: Iterable[ScoredReference], direction: str = MINIMIZE) -> ScoredReference | None:
    """The best reference that samples with many steps of the pretrained model."""
    return _best([reference for reference in found if reference.role is Role.FULL], direction)


def _best(found: Sequence[ScoredReference], direction: str) -> ScoredReference | None:
    return min(found, key=lambda reference: sign_of(direction) * reference.score, default=None)


def highlights(found: Sequence[ScoredReference], num_steps: int, direction: str = MINIMIZE) -> list[ScoredReference]:
    """The references to draw in a figure: the best with many and with few steps, and the policy before fine-tuning.

    Others may have such bad scores that the curves would be flattened.
    """
    best = (full_reference(found, direction), best_reference(found, num_steps, direction))
    return [r for r in found if r.role is Role.SHORTENED or r in best]


def pictured(found: Sequence[ScoredReference], num_steps: int, direction: str = MINIMIZE) -> dict[str, ScoredReference]:
    """The references of which samples are drawn, by the name of their picture (`RunDirectory.reference_picture`).

    The best with many steps, the best with few, and then the others with few, best first.
    """
    few = best_reference(found, num_steps, direction)
    others = [reference for reference in found if reference.role is Role.FEW and reference is not few]
    others.sort(key=lambda reference: sign_of(direction) * reference.score)
    named = {"full": full_reference(found, direction), "few": few, **{other.key: other for other in others}}
    return {name: reference for name, reference in named.items() if reference is not None}


def evaluations_text(number: int) -> str:
    """Format a number of network evaluations."""
    return f"{number} network evaluation{'s' if number > 1 else ''}"
