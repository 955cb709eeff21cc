"""Results that are worse than those of a training-free sampler with at most as many network evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass

from dxmi.evaluation.scored_references import ScoredReference, best_reference
from dxmi.formatting import score_text
from dxmi.metrics.keys import MINIMIZE, is_better
from tune.messages import listed


@dataclass(frozen=True)
class Outdone:
    """A result that is worse than a training-free sampler's with at most as many network evaluations.

    Attributes:
        subject: Name of the trial or arm.
        score: Score of the trial or arm.
        label: Human-readable name of the sampler.
        reference: Score of the sampler.
    """

    subject: str
    score: float
    label: str
    reference: float


def outdone(
    subject: str,
    score: float,
    references: Iterable[ScoredReference],
    evaluations: int,
    direction: str = MINIMIZE,
) -> Outdone | None:
    """Compare a result with the best training-free sampler that needs at most as many network evaluations.

    Returns:
        The comparison if the sampler is better in the digits that are shown, else None.
    """
    best = best_reference(references, evaluations, direction)
    if best is None or not is_better(best.score, score, direction) or score_text(best.score) == score_text(score):
        return None
    return Outdone(subject, score, best.label, best.score)


def outdone_sentences(metric: str, found: Iterable[Outdone | None]) -> list[str]:
    """Sentences about results that are worse than a sampler without fine-tuning, one per sampler."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        if one is not None:
            subjects = groups.setdefault((one.label, score_text(one.reference)), [])
            subjects.append(f"{one.subject} ({score_text(one.score)})")
    name = metric.removeprefix("eval/")
    return [
        f"Without any fine-tuning, {label} reaches {name} {score}, which is better than "
        f"{listed(subjects)}, with no more network evaluations."
        for (label, score), subjects in groups.items()
    ]
