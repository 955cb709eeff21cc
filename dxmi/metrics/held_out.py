"""The accuracy of a classifier that took no part in training, on the classes that samples were conditioned on."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.data.dataset import Split
from dxmi.errors import UserError
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.configs import HeldOutConfig

_MOST = 10_000
"""Maximum number of training samples that the classifier is fitted to."""


class HeldOut(Metric):
    """The share of samples that a support-vector classifier of raw pixels assigns to the class of their condition.

    A reward can also be maximized by samples that its classifier gets wrong. This classifier has other features and is
    of another family: a kernel machine, fitted to the first 10,000 training samples when it is first needed.

    Args:
        config: Settings: the class, for samples without conditions.
    """

    applies_to_data: ClassVar[bool] = False

    def __init__(self, config: HeldOutConfig) -> None:
        self._label = config.label
        self._classifier: Any = None

    def observe(self, samples: Tensor, condition: Condition) -> Tensor:
        """The values of each sample and, in the last column, its class: [n, D + 1].

        Raises:
            UserError: the samples have no classes.
        """
        labels = condition.labels
        if self._label is not None:
            labels = torch.full((len(samples),), self._label)
        if labels is None:
            raise UserError(
                "evaluate.metrics has held_out, but the denoiser knows no classes: give it the label that is wanted, "
                "or make network.denoiser.classes that of the data."
            )
        return torch.cat((samples.flatten(1).float().cpu(), labels[:, None].float().cpu()), dim=1)

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The accuracy."""
        if self._classifier is None:
            self._classifier = _fitted(evidence.train)
        predicted = torch.from_numpy(self._classifier.predict(evidence.rows[:, :-1].numpy()))
        return {"eval/held_out_accuracy": float((predicted == evidence.rows[:, -1].long()).double().mean())}


def _fitted(train: Split) -> Any:
    """A support-vector classifier with a Gaussian kernel.

    Raises:
        UserError: the data have no classes, or only one.
    """
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415  (its import takes a second)
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415
    from sklearn.svm import SVC  # noqa: PLC0415

    if train.targets is None:
        raise UserError("evaluate.metrics has held_out, but the data have no classes: leave it out.")
    if len(train.targets[:_MOST].unique()) == 1:  # type: ignore[no-untyped-call]
        raise UserError("evaluate.metrics has held_out, but the data have only one class: leave it out.")
    x = train.x[:_MOST].flatten(1).float().numpy()
    scaled = make_pipeline(StandardScaler(with_std=False), SVC(C=10.0, gamma="scale"))
    return scaled.fit(x, train.targets[:_MOST].numpy())
