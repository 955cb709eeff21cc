"""The log-probability of the desired class according to a classifier."""

import torch
from torch import Tensor, nn

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.metrics.classifier import CLASSIFIERS, load_classifier
from dxmi.rewards.configs import ClassifierRewardConfig
from dxmi.tensors import to_uint8


class LogProbabilityReward:
    """log p(label | x) in nats, where x is a sample rounded to pixels.

    Args:
        classifier: Maps pixels in 0..255, of any type, to logits [N, C].
        event: Shape of the images that it sees.
        label: Desired class; None for the class on which each sample was conditioned.
        name: The setting that chose the classifier, with its value, for error messages.
    """

    def __init__(self, classifier: nn.Module, event: tuple[int, ...], label: int | None, name: str) -> None:
        self._classifier = classifier
        self._event = event
        self._label = label
        self._name = name

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample, [B].

        Raises:
            UserError: the samples do not have the shape of the classifier's images, or have no classes.
        """
        self._require_images(x)
        return self._log_probability(to_uint8(x), condition)

    def differentiable(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute log p(label | x) with gradients, [B]; the pixels are clipped, but not rounded."""
        self._require_images(x)
        return self._log_probability(x.clamp(-1.0, 1.0).add(1.0).mul(255.0 / 2.0), condition)

    def _require_images(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self._event:
            raise UserError(
                f"{self._name}, which sees images of shape {self._event}, but samples have {tuple(x.shape[1:])}: "
                "choose the classifier of the run's data or, if there is none, another reward."
            )

    def _log_probability(self, pixels: Tensor, condition: Condition) -> Tensor:
        logits: Tensor = self._classifier.to(pixels.device)(pixels)
        return logits.log_softmax(dim=1).gather(1, self._labels(pixels, condition)[:, None])[:, 0]

    def _labels(self, x: Tensor, condition: Condition) -> Tensor:
        if self._label is not None:
            return torch.full((len(x),), self._label, device=x.device)
        if condition.labels is None:
            raise UserError(
                "reward.label is null, but the denoiser knows no classes: name the class that is wanted, in 0..9, or "
                "make network.denoiser.classes 10."
            )
        return condition.labels


class ClassifierReward(LogProbabilityReward):
    """The log-probability of an included classifier.

    Args:
        config: Settings: the classifier and the class.

    Raises:
        UserError: the file of the classifier was modified.
    """

    def __init__(self, config: ClassifierRewardConfig) -> None:
        side, name = CLASSIFIERS[config.classifier].size, f"reward.classifier is {config.classifier}"
        super().__init__(load_classifier(config.classifier), (1, side, side), config.label, name)
