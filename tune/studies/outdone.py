"""Results that a training-free sampler beats with no more network evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dxmi.formatting import score_text
from dxmi.metrics.keys import MINIMIZE, is_better
from tune.messages import listed

if TYPE_CHECKING:
    from dxmi.evaluation.references import ScoredReference


@dataclass(frozen=True)
class Outdone:
    """A result that a training-free sampler beats with no more network evaluations.

    Attributes:
        subject: whose result.
        score: of the result.
        label: the sampler in words.
        reference: its score.
    """

    subject: str
    score: float
    label: str
    reference: float


def outdone(
    subject: str,
    score: float,
    references: "Iterable[ScoredReference]",
    evaluations: int,
    direction: str = MINIMIZE,
) -> Outdone | None:
    """The best training-free sampler with no more network evaluations than a result has, if it is better than that."""
    from dxmi.evaluation.references import best_reference  # noqa: PLC0415  (it imports PyTorch)

    best = best_reference(references, evaluations, direction)
    if best is None or not is_better(best.score, score, direction):
        return None
    return Outdone(subject, score, best.label, best.score)


def outdone_sentences(metric: str, found: Iterable[Outdone | None]) -> list[str]:
    """Which results are worse than a sampler that needs no fine-tuning: a sentence a sampler."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        if one is not None:
            subjects = groups.setdefault((one.label, score_text(one.reference)), [])
            subjects.append(f"{one.subject} ({score_text(one.score)})")
    name = metric.removeprefix("eval/")
    return [
        f"Without any fine-tuning, {label} has {name} {score}: better than {listed(subjects)}, with no more network "
        "evaluations."
        for (label, score), subjects in groups.items()
    ]
