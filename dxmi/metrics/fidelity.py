"""FID, KID, precision, recall and Inception Score by torch-fidelity, and features of the shipped classifiers.

Each classifier is registered with torch-fidelity as the feature extractor `dxmi-NAME`, so that torch-fidelity's own
`calculate_metrics` gives the same numbers. Its reference cache is not used: it is read by running pickled code.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dxmi.metrics.classifier import CLASSIFIERS, load_classifier
from dxmi.metrics.fidelity_import import metric_fid, metric_isc, metric_kid, metric_prc, torch_fidelity, utils
from dxmi.tensors import require_finite

LAYER = "features"
_BATCH = 1000
_SPLITS = 10


class ClassifierExtractor(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]
    """A shipped classifier as torch-fidelity wants it: uint8 [N, 1, H, W] to a tuple of features [N, 64]."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(name.removeprefix("dxmi-"))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """There is one layer."""
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(_metric: str) -> str:
        """And every metric uses it."""
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        """Not worth it at this size."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        """Never asked for."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Features of a batch."""
        return (self.classifier.features(pixels),)


for _name in CLASSIFIERS:
    torch_fidelity.register_feature_extractor(f"dxmi-{_name}", ClassifierExtractor)


class Pixels(Dataset[Tensor]):
    """uint8 images [N, C, H, W], one tensor an item, as torch-fidelity reads them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def classifier_features(name: str, pixels: Tensor) -> Tensor:
    """Features of uint8 `pixels` [N, 1, H, W] by the classifier `name`, float64 on the host, [N, 64]."""
    cuda = pixels.is_cuda
    extractor = utils.create_feature_extractor(f"dxmi-{name}", [LAYER], cuda=cuda, verbose=False)
    features = utils.get_featuresdict_from_dataset(Pixels(pixels), extractor, _BATCH, cuda, True, False)
    return cast(Tensor, features[LAYER]).double()


def _finite(generated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The features themselves, all of them finite."""
    return require_finite(generated, "the features of the samples"), require_finite(reference, "the data's features")


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features [N, D] and [M, D] (FID, arXiv 1706.08500).

    Raises:
        DivergedError: a feature is not finite.
    """
    generated, reference = _finite(generated, reference)
    statistics = metric_fid.fid_features_to_statistics(generated), metric_fid.fid_features_to_statistics(reference)
    return float(metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def kernel_distance(generated: Tensor, reference: Tensor, *, subsets: int, subset_size: int, seed: int) -> float:
    """Mean unbiased squared MMD with the cubic kernel over random subsets (KID, arXiv 1801.01401).

    Subsets are as large as the smaller set where that has fewer than `subset_size` rows.

    Raises:
        DivergedError: a feature is not finite.
    """
    generated, reference = _finite(generated, reference)
    size = min(subset_size, len(generated), len(reference))
    scores = metric_kid.kid_features_to_metric(
        generated, reference, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return float(scores["kernel_inception_distance_mean"])


def precision_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Fractions of each set within the other's 3-nearest-neighbour balls (arXiv 1904.06991).

    Raises:
        DivergedError: a feature is not finite: compared with NaN, every sample would be precise.
    """
    generated, reference = _finite(generated, reference)
    with torch.no_grad():
        scores = metric_prc.prc_features_to_metric(generated, reference, verbose=False, save_cpu_ram=True)
    return float(scores["precision"]), float(scores["recall"])


def inception_score(logits: Tensor, seed: int) -> float:
    """Exponential of the mean KL(p(y | x) | p(y)), a mean over ten parts of the samples (arXiv 1606.03498).

    Args:
        logits: of the classes, [N, C].
        seed: shuffles.

    Raises:
        DivergedError: a logit is not finite.
    """
    logits = require_finite(logits, "the logits of the samples")
    scores = metric_isc.isc_features_to_metric(logits, min(_SPLITS, len(logits)), True, seed)
    return float(scores["inception_score_mean"])
