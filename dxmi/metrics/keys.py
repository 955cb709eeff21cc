"""The keys of scores, and whether each is minimized or maximized: everything else takes them from this list."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Direction = Literal["minimize", "maximize"]
MINIMIZE: Direction = "minimize"
MAXIMIZE: Direction = "maximize"
DIRECTIONS: tuple[Direction, ...] = (MINIMIZE, MAXIMIZE)


class ScoreKey(NamedTuple):
    """A score.

    Attributes:
        name: as it is logged, a path such as `eval/fid_digits`.
        direction: whether lower or higher is better.
        primary: whether checkpoints and trials are compared by it; exactly one of a run's scores is.
    """

    name: str
    direction: Direction = MINIMIZE
    primary: bool = False


REWARD_KEY = ScoreKey("eval/reward", MAXIMIZE)
"""The mean reward of samples."""


def with_primary(keys: Sequence[ScoreKey], name: str) -> list[ScoreKey]:
    """The keys with that one as the primary.

    Raises:
        ValueError: none has that name.
    """
    names = [key.name for key in keys]
    if name not in names:
        raise ValueError(f"primary is {name!r}, which no sample is scored by: it must be one of {', '.join(names)}")
    return [key._replace(primary=key.name == name) for key in keys]


def primary_key(keys: Sequence[ScoreKey]) -> ScoreKey:
    """The score by which checkpoints and trials are compared."""
    return next(key for key in keys if key.primary)


def sign_of(direction: str) -> float:
    """1 if lower is better, else -1."""
    return 1.0 if direction == MINIMIZE else -1.0


def better_text(direction: str) -> str:
    """Which scores are better, for captions."""
    return "lower is better" if direction == MINIMIZE else "higher is better"


def is_better(score: float, other: float, direction: str) -> bool:
    """Whether a score is strictly better than another."""
    return sign_of(direction) * score < sign_of(direction) * other


def best_score(scores: Sequence[float], direction: str) -> float:
    """The best of some scores."""
    return max(scores) if direction == MAXIMIZE else min(scores)


def classifier_keys(name: str) -> list[ScoreKey]:
    """The scores of images by the features of the shipped classifier `name`."""
    return [
        ScoreKey(f"eval/fid_{name}", primary=True),
        ScoreKey(f"eval/kid_{name}"),
        ScoreKey(f"eval/precision_{name}", MAXIMIZE),
        ScoreKey(f"eval/recall_{name}", MAXIMIZE),
        ScoreKey("eval/sliced_wasserstein"),
    ]


def inception_keys(num_samples: int) -> list[ScoreKey]:
    """The scores of that many images by InceptionV3's features."""
    size = count_name(num_samples)
    return [
        ScoreKey(f"eval/fid_{size}", primary=True),
        ScoreKey("eval/fid_infinity"),
        ScoreKey("eval/kid"),
        ScoreKey(f"eval/precision_{size}", MAXIMIZE),
        ScoreKey(f"eval/recall_{size}", MAXIMIZE),
    ]


def inception_score_key(num_samples: int) -> ScoreKey:
    """A further score of images by InceptionV3, if the weights hold its classes."""
    return ScoreKey(f"eval/inception_score_{count_name(num_samples)}", MAXIMIZE)


def planar_keys() -> list[ScoreKey]:
    """The scores of points in the plane, and of the energy."""
    return [
        ScoreKey("eval/sliced_wasserstein", primary=True),
        ScoreKey("eval/energy_auc", MAXIMIZE),
        ScoreKey("eval/energy_kl"),
        ScoreKey("eval/energy_beta"),
    ]


def count_name(num: int) -> str:
    """A number of samples as it appears in a key: 5k, 10k, 50k; 1234."""
    return f"{num // 1000}k" if num % 1000 == 0 else str(num)
