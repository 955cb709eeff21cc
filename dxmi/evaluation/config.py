"""Settings of the evaluation. Nothing here imports PyTorch."""

from dataclasses import dataclass, field

from dxmi.config import NO_SCORE, require_choice
from dxmi.diffusion.schedules.configs import NUM_DIFFUSION_STEPS
from dxmi.metrics.configs import CLASSIFIER_SETS, MetricConfig
from dxmi.metrics.registry import METRICS
from dxmi.registry import chosen_from

SELECTION, REPORT, CONFIRMATION = "selection", "report", "confirmation"
"""Noise streams: a run's best checkpoint is chosen on the first and scored on the second; the best trial of a sweep,
which is chosen by the second, is scored once more on the third. Each run has its own draw: see `stream_of`."""
PICTURES = "pictures"
"""The noise of the sample grids, which is the same for every run, so that their pictures can be compared."""
SCORING_VERSION = 2
"""Raised whenever a change of the code changes a score, so that cached references are scored again."""
RESULTS = ("best", "last")
CLASSIFIER, INCEPTION = FEATURES = ("classifier", "inception")
_MIN_SUBSET, _SEEDS = 2, 2**32
MIN_SAMPLES = 4
"""Precision and recall look at a sample's third neighbor."""
NUM_SAMPLES_KEY = "eval/num_samples"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is scored, from how many samples, how often."""

    every: int = field(default=150, metadata=NO_SCORE)
    """Iterations between evaluations."""
    num_samples: int = 5_000
    """Samples of every score: of the curve, of the references and of the final report alike."""
    batch_size: int = 1_000
    """Samples generated at once."""
    seed: int = 0
    """Seed of the noise, together with the run's own seed: runs that share both are compared on the same noise."""
    kid_subsets: int = 20
    """Random subsets that KID averages over."""
    kid_subset_size: int = 1_000
    """Their size."""
    projections: int = 128
    """Directions of the sliced Wasserstein distance."""
    grid: int = field(default=64, metadata=NO_SCORE)
    """Images in a sample grid, or points in a picture of samples."""
    generations: int = field(default=1, metadata=NO_SCORE)
    """Independent draws of the report's noise on which the best checkpoint is scored; their mean is the score."""
    result: str = field(default="best", metadata=NO_SCORE)
    """The checkpoint that counts as the best: best, which has the best score of the samples on noise of its own; or
    last, where that score is not all that matters, as in the plane, where the energy has to be right too."""
    features: str | None = field(default=None, metadata=NO_SCORE)
    """Features of images: classifier, the small one that ships for some data sets; or inception, InceptionV3. null for
    the former where there is one, else the latter."""
    reference_images: int | None = field(default=None, metadata=NO_SCORE)
    """Number of images of the data, drawn once, that samples are compared with; null for all of them."""
    full_reference: bool = field(default=True, metadata=NO_SCORE)
    """Score the pretrained model with all of its steps too, to which end hundreds of evaluations of the network are
    needed for each sample."""
    reference_steps: tuple[int, ...] | None = field(default=None, metadata=NO_SCORE)
    """Numbers of network evaluations of further references, or null: with each, all samplers that a policy with so many
    steps is compared with. 1000 adds the 1000-step sampler with the large variance."""

    metrics: tuple[MetricConfig, ...] | None = field(default=None, metadata=chosen_from(METRICS))
    """Further metrics, by their kinds, like [class_entropy], or as groups of settings; null for none."""
    primary: str | None = field(default=None, metadata=NO_SCORE)
    """The score by which checkpoints and trials are compared; null for the reward where the algorithm maximizes one,
    else for the distance to the data."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "kid_subsets", "kid_subset_size", "projections", "grid", "generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        require_choice("result", self.result, RESULTS)
        require_choice("features", self.features, FEATURES, or_null=True)
        if not all(1 <= steps <= NUM_DIFFUSION_STEPS for steps in self.reference_steps or ()):
            raise ValueError(f"reference_steps is {self.reference_steps}: each must be in 1..{NUM_DIFFUSION_STEPS}")
        if len(set(self.reference_steps or ())) < len(self.reference_steps or ()):
            raise ValueError(f"reference_steps is {self.reference_steps}: it names a number twice")
        if self.kid_subset_size < _MIN_SUBSET:
            raise ValueError(f"kid_subset_size is {self.kid_subset_size}: it must be at least {_MIN_SUBSET}")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^32 - 1")
        for name in ("num_samples", "reference_images"):
            number = getattr(self, name)
            if number is not None and number < MIN_SAMPLES:
                raise ValueError(f"{name} is {number}: it must be at least {MIN_SAMPLES}")


def features_of(name: str, config: EvaluateConfig) -> str:
    """What gives the features of the images of data set `name`.

    Raises:
        ValueError: a classifier is asked for that does not exist.
    """
    features = config.features or (CLASSIFIER if name in CLASSIFIER_SETS else INCEPTION)
    if features == CLASSIFIER and name not in CLASSIFIER_SETS:
        known = ", ".join(CLASSIFIER_SETS)
        raise ValueError(f"features is classifier, but there is none for {name}, only for {known}: make it null")
    return features
