"""The log-probability of the desired class according to an included classifier."""

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.metrics.classifier import CLASSIFIERS, load_classifier
from dxmi.rewards.configs import ClassifierRewardConfig
from dxmi.tensors import to_uint8


class ClassifierReward:
    """log p(label | x) in nats, where x is a sample rounded to uint8 pixels.

    Args:
        config: Settings: the classifier and the class.

    Raises:
        UserError: the file of the classifier was modified.
    """

    def __init__(self, config: ClassifierRewardConfig) -> None:
        self._config = config
        self._classifier = load_classifier(config.classifier)
        side = CLASSIFIERS[config.classifier].size
        self._event = (1, side, side)

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
                f"reward.classifier is {self._config.classifier}, which sees images of shape {self._event}, but "
                f"samples have {tuple(x.shape[1:])}: choose the classifier of the run's data or, if there is none, "
                "another reward."
            )

    def _log_probability(self, pixels: Tensor, condition: Condition) -> Tensor:
        logits: Tensor = self._classifier.to(pixels.device)(pixels)
        return logits.log_softmax(dim=1).gather(1, self._labels(pixels, condition)[:, None])[:, 0]

    def _labels(self, x: Tensor, condition: Condition) -> Tensor:
        if self._config.label is not None:
            return torch.full((len(x),), self._config.label, device=x.device)
        if condition.labels is None:
            raise UserError(
                "reward.label is null, but the denoiser knows no classes: name the class that is wanted, in 0..9, or "
                "make network.denoiser.classes 10."
            )
        return condition.labels
