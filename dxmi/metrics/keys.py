"""The keys of all scores, and whether each is minimized or maximized. All other code takes them from here."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Direction = Literal["minimize", "maximize"]
MINIMIZE: Direction = "minimize"
MAXIMIZE: Direction = "maximize"
DIRECTIONS: tuple[Direction, ...] = (MINIMIZE, MAXIMIZE)


class ScoreKey(NamedTuple):
    """The key of a score.

    Attributes:
        name: name under which it is logged, such as `eval/fid_digits`.
        direction: whether it is minimized or maximized.
        primary: whether checkpoints and trials are compared by it; a run has exactly one primary score.
    """

    name: str
    direction: Direction = MINIMIZE
    primary: bool = False


REWARD_KEY = ScoreKey("eval/reward", MAXIMIZE)
"""The mean reward of samples; of those whose prompts are trained on, if some are held out."""

HELD_OUT_REWARD_KEY = ScoreKey("eval/reward_held_out_prompts", MAXIMIZE)
"""The mean reward of the samples whose prompts are held out."""

KL_KEY = ScoreKey("eval/kl_reference")
"""KL divergence of a policy from the pretrained one, in nats per trajectory."""


def with_primary(keys: Sequence[ScoreKey], name: str) -> list[ScoreKey]:
    """Return `keys` with the key `name` as the only primary one.

    Raises:
        ValueError: no key has that name.
    """
    names = [key.name for key in keys]
    if name not in names:
        raise ValueError(f"primary is {name!r}, which is not a score of this run: it must be one of {', '.join(names)}")
    return [key._replace(primary=key.name == name) for key in keys]


def primary_key(keys: Sequence[ScoreKey]) -> ScoreKey:
    """The key of the score by which checkpoints and trials are compared."""
    return next(key for key in keys if key.primary)


def sign_of(direction: str) -> float:
    """1 if lower is better, else -1."""
    return 1.0 if direction == MINIMIZE else -1.0


def better_text(direction: str) -> str:
    """The direction as text for captions."""
    return "lower is better" if direction == MINIMIZE else "higher is better"


def is_better(score: float, other: float, direction: str) -> bool:
    """Whether `score` is strictly better than `other`."""
    return sign_of(direction) * score < sign_of(direction) * other


def best_score(scores: Sequence[float], direction: str) -> float:
    """The best of `scores`."""
    return max(scores) if direction == MAXIMIZE else min(scores)


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every score that all mappings have, in the order of the first."""
    shared = [key for key in scores[0] if all(key in each for each in scores)]
    return {key: sum(each[key] for each in scores) / len(scores) for key in shared}


def classifier_keys(name: str) -> list[ScoreKey]:
    """The keys for images that are scored with the features of the shipped classifier `name`."""
    return [
        ScoreKey(f"eval/fid_{name}", primary=True),
        ScoreKey(f"eval/kid_{name}"),
        ScoreKey(f"eval/precision_{name}", MAXIMIZE),
        ScoreKey(f"eval/recall_{name}", MAXIMIZE),
        ScoreKey("eval/sliced_wasserstein"),
    ]


def inception_keys(num_samples: int) -> list[ScoreKey]:
    """The keys for `num_samples` images that are scored with InceptionV3's features."""
    size = count_name(num_samples)
    return [
        ScoreKey(f"eval/fid_{size}", primary=True),
        ScoreKey("eval/fid_infinity"),
        ScoreKey("eval/kid"),
        ScoreKey(f"eval/precision_{size}", MAXIMIZE),
        ScoreKey(f"eval/recall_{size}", MAXIMIZE),
    ]


def inception_score_key(num_samples: int) -> ScoreKey:
    """The key of the Inception Score, which needs weights with a classification layer."""
    return ScoreKey(f"eval/inception_score_{count_name(num_samples)}", MAXIMIZE)


def planar_keys() -> list[ScoreKey]:
    """The keys for points in the plane and for the energy."""
    return [
        ScoreKey("eval/sliced_wasserstein", primary=True),
        ScoreKey("eval/energy_auc", MAXIMIZE),
        ScoreKey("eval/energy_kl"),
        ScoreKey("eval/energy_beta"),
    ]


def count_name(num: int) -> str:
    """A number of samples as it is written in a key: 5000 as 5k, 1234 as 1234."""
    return f"{num // 1000}k" if num % 1000 == 0 else str(num)
