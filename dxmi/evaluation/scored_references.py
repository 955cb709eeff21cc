"""Reference samplers as a summary describes them, for tables, leaderboards and reports; this imports no PyTorch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dxmi.metrics.keys import MINIMIZE, sign_of

SHORTENED, DATA = "shortened", "data"


class Role(StrEnum):
    """What a reference is compared for."""

    FULL = "full"
    """What the pretrained model can do with all of its steps."""
    FEW = "few"
    """As many network evaluations as the policy has, or one fewer."""
    FURTHER = "further"
    """Another number of steps, which `evaluate.reference_steps` asks for."""
    SHORTENED = SHORTENED
    """The policy before it is fine-tuned."""


@dataclass(frozen=True)
class ScoredReference:
    """A reference with its score, as read from a summary.

    Attributes:
        key: its name in the summary.
        label: in words.
        sampler: in words, without the number of steps.
        role: what it is compared for.
        evaluations: of the network, a sample.
        score: the summary's metric.
    """

    key: str
    label: str
    sampler: str
    role: Role
    evaluations: int
    score: float

    @property
    def kind(self) -> tuple[str, str]:
        """What it has in common with those of policies with another number of steps."""
        return (self.role, self.sampler if self.role is Role.FEW else self.key)


def scored_references(summary: Mapping[str, Any]) -> list[ScoredReference]:
    """The samplers in a summary, in the order of a table: all steps, few steps, and the policy before fine-tuning."""
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


_EARLIER = {
    "ddpm": "DDPM, small variance",
    "ddim": "DDIM, evenly over 0..999",
    "dpm_solver": "DPM-Solver++(2M)",
    "ancestral": "ancestral",
    "euler": "Euler",
}


def _earlier(key: str, num_steps: int) -> dict[str, Any]:
    """Of a summary that was written before references told of themselves."""
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
    """The best of those with no more network evaluations than these."""
    return _best([reference for reference in found if reference.evaluations <= evaluations], direction)


def full_reference(found: Iterable[ScoredReference], direction: str = MINIMIZE) -> ScoredReference | None:
    """The best of those that show what the pretrained model can do."""
    return _best([reference for reference in found if reference.role is Role.FULL], direction)


def _best(found: Sequence[ScoredReference], direction: str) -> ScoredReference | None:
    return min(found, key=lambda reference: sign_of(direction) * reference.score, default=None)


def highlights(found: Sequence[ScoredReference], num_steps: int, direction: str = MINIMIZE) -> list[ScoredReference]:
    """Those worth a line in a figure: all steps, the best one as cheap as the policy, and the policy before.

    Other samplers with few steps can be so bad that they would press the curves flat.
    """
    best = best_reference(found, num_steps, direction)
    return [r for r in found if r.role in (Role.FULL, Role.SHORTENED) or r is best]


def evaluations_text(number: int) -> str:
    """A number of network evaluations in words."""
    return f"{number} network evaluation{'s' if number > 1 else ''}"
