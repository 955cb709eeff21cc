"""Settings of the evaluation. Nothing here imports PyTorch."""

import math
from dataclasses import dataclass, field

from dxmi.config import NO_SCORE, require_choice
from dxmi.diffusion.schedules.configs import NUM_DIFFUSION_STEPS
from dxmi.metrics.configs import CLASSIFIER_SETS, MetricConfig
from dxmi.metrics.registry import METRICS
from dxmi.registry import chosen_from

SELECTION, REPORT, CONFIRMATION = "selection", "report", "confirmation"
"""Noise streams: the best checkpoint of a run is chosen on SELECTION and scored on REPORT; the best trial of a sweep,
chosen by its score on REPORT, is scored again on CONFIRMATION. Each seed has its own draw, see `stream_of`."""
PICTURES = "pictures"
"""Noise stream of the sample grids, which is the same for all runs, so that their pictures can be compared."""
FULL_STEPS = (50, 250)
"""Default numbers of network evaluations with which a pretrained DDPM is sampled to show its own quality."""
SCORING_VERSION = 2
"""Increased whenever a change of the code changes a score, so that cached references are scored again."""
RESULTS = ("best", "last")
PRECISIONS = ("float32", "bfloat16")
CLASSIFIER, INCEPTION = FEATURES = ("classifier", "inception")
_MIN_SUBSET, _SEEDS = 2, 2**32
MIN_SAMPLES = 4
"""Precision and recall need the third neighbor of each sample."""
NUM_SAMPLES_KEY = "eval/num_samples"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of the evaluation."""

    every: int = field(default=150, metadata=NO_SCORE)
    """Iterations between evaluations."""
    num_samples: int = 5_000
    """Number of samples of each score: during training, of the references and in the final report."""
    batch_size: int = 1_000
    """Number of samples generated at once."""
    precision: str = "float32"
    """Precision of the networks in sampling, float32 or bfloat16; scores are computed in float32."""
    seed: int = 0
    """Seed of the noise, together with the seed of the run: runs that share both are compared on the same noise."""
    kid_subsets: int = 20
    """Number of random subsets over which KID is averaged."""
    kid_subset_size: int = 1_000
    """Number of samples in each of these subsets."""
    projections: int = 128
    """Number of random directions of the sliced Wasserstein distance."""
    grid: int = field(default=64, metadata=NO_SCORE)
    """Number of images in a sample grid, or of points in a picture of samples."""
    generations: int = field(default=1, metadata=NO_SCORE)
    """Number of draws of the report noise on which the best checkpoint is scored; its score is their mean."""
    result: str = field(default="best", metadata=NO_SCORE)
    """The checkpoint that is reported as the best: best, the one with the best score on the selection noise; or last,
    for data such as points in the plane, where the energy has to be accurate too."""
    features: str | None = field(default=None, metadata=NO_SCORE)
    """Network for features of images: classifier, a small one that is included for some data sets; or inception,
    InceptionV3. null for the classifier if there is one, else InceptionV3."""
    reference_images: int | None = field(default=None, metadata=NO_SCORE)
    """Number of images of the data, drawn once, with which samples are compared; null for all images."""
    full_reference: bool = field(default=True, metadata=NO_SCORE)
    """Also score the pretrained model with many steps, to show its own quality."""
    full_steps: tuple[int, ...] = field(default=FULL_STEPS, metadata=NO_SCORE)
    """Numbers of network evaluations of these references of a DDPM: for each number, DDIM, DPM-Solver++(2M), and DDPM
    with both variances. Unused for other models, and with full_reference=false."""
    reference_steps: tuple[int, ...] | None = field(default=None, metadata=NO_SCORE)
    """Numbers of network evaluations of further references: for each number, all samplers with which a policy of that
    many steps would be compared; null for none."""

    metrics: tuple[MetricConfig, ...] | None = field(default=None, metadata=chosen_from(METRICS))
    """Further metrics, as names of kinds, like [class_entropy], or as groups of settings; null for none."""
    primary: str | None = field(default=None, metadata=NO_SCORE)
    """The score by which checkpoints and trials are compared; null for the reward if the algorithm maximizes one, else
    the distance to the data."""

    constraint: str | None = field(default=None, metadata=NO_SCORE)
    """Score that limits the choice of the best checkpoint, such as eval/fid_digits in a run that maximizes a reward;
    null for no limit."""
    constraint_factor: float = field(default=1.2, metadata=NO_SCORE)
    """A checkpoint may be the best if the constraint's score is at most this factor of that before fine-tuning or, if
    it is maximized, worse by at most as much. Unused with constraint=null."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "kid_subsets", "kid_subset_size", "projections", "grid", "generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        require_choice("result", self.result, RESULTS)
        require_choice("precision", self.precision, PRECISIONS)
        if not 1.0 <= self.constraint_factor < math.inf:
            raise ValueError(f"constraint_factor is {self.constraint_factor}: it must be at least 1")
        if self.constraint is not None and self.result == "last":
            raise ValueError(
                "constraint is set, but result is last: the last checkpoint is not chosen, so leave one out"
            )
        require_choice("features", self.features, FEATURES, or_null=True)
        for name in ("full_steps", "reference_steps"):
            self._check_numbers_of_steps(name, getattr(self, name) or ())
        if not self.full_steps:
            raise ValueError("full_steps is empty: for no such references, set full_reference=false")
        if self.kid_subset_size < _MIN_SUBSET:
            raise ValueError(f"kid_subset_size is {self.kid_subset_size}: it must be at least {_MIN_SUBSET}")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^32 - 1")
        for name in ("num_samples", "reference_images"):
            number = getattr(self, name)
            if number is not None and number < MIN_SAMPLES:
                raise ValueError(f"{name} is {number}: it must be at least {MIN_SAMPLES}")

    @staticmethod
    def _check_numbers_of_steps(name: str, numbers: tuple[int, ...]) -> None:
        if not all(1 <= steps <= NUM_DIFFUSION_STEPS for steps in numbers):
            raise ValueError(f"{name} is {numbers}: each must be in 1..{NUM_DIFFUSION_STEPS}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} is {numbers}: it names a number twice")

    @property
    def full_evaluations(self) -> tuple[int, ...] | None:
        """`full_steps`, or None if these references are not wanted."""
        return self.full_steps if self.full_reference else None


def features_of(name: str, config: EvaluateConfig) -> str:
    """The network for features of the images of data set `name`: CLASSIFIER or INCEPTION.

    Raises:
        ValueError: the settings require a classifier, and there is none for this data set.
    """
    features = config.features or (CLASSIFIER if name in CLASSIFIER_SETS else INCEPTION)
    if features == CLASSIFIER and name not in CLASSIFIER_SETS:
        known = ", ".join(CLASSIFIER_SETS)
        raise ValueError(f"features is classifier, but there is none for {name}, only for {known}: make it null")
    return features
