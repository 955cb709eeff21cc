"""The entropy of the classes of the samples."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.classifier import load_classifier
from dxmi.metrics.configs import ClassEntropyConfig


class ClassEntropy(Metric):
    """-sum_c p(c) log p(c), where p(c) is the mean probability that a classifier assigns to class c.

    Args:
        config: names the classifier.

    Raises:
        UserError: the classifier's file is not the one that was shipped.
    """

    def __init__(self, config: ClassEntropyConfig) -> None:
        self._classifier = load_classifier(config.classifier)

    @torch.no_grad()
    def observe(self, samples: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (metrics share a signature)
        """The class probabilities of each sample, [n, 10]."""
        logits: Tensor = self._classifier.to(samples.device)(samples)
        return logits.softmax(dim=1).cpu()

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The entropy in nats."""
        p = evidence.rows.double().mean(0)
        return {"eval/class_entropy": -float(torch.special.xlogy(p, p).sum())}
