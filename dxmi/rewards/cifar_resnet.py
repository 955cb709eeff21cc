"""The log-probability of the desired class according to a ResNet for CIFAR-10 (arXiv 1512.03385, section 4.2)."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dxmi.errors import UserError
from dxmi.persistence.tensor_files import read_tensor_file
from dxmi.rewards.classifier import LogProbabilityReward
from dxmi.rewards.configs import CifarResnetRewardConfig
from dxmi.rewards.files import weights_file

EVENT = (3, 32, 32)
_WIDTHS = (16, 32, 64)
_NUM_CLASSES = 10


class _Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); the names are those of public checkpoints."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projects = stride != 1 or inputs != outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(*(projection if projects else ()))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResnet(nn.Module):
    """A ResNet of depth 6 n + 2 with projection shortcuts; its input are pixels, scaled to [0, 1] and not standardized.

    Args:
        blocks: n, the number of blocks of each of the three stages.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(EVENT[0], _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(_Block(inputs if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks)))
            for inputs, width, stride in zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, (1, 2, 2), strict=False)
        )
        self.linear = nn.Linear(_WIDTHS[-1], _NUM_CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels in 0..255, [B, 3, 32, 32], to logits [B, 10]."""
        h = F.relu(self.bn1(self.conv1(pixels.float().div(255.0))))
        h = self.layer3(self.layer2(self.layer1(h)))
        logits: Tensor = self.linear(h.mean(dim=(2, 3)))
        return logits


def load_cifar_resnet(given: str) -> CifarResnet:
    """Load a ResNet, in evaluation mode, whose depth is found from the names of its tensors.

    Args:
        given: Path of the file, from the current folder or from the data folder.

    Raises:
        UserError: there is no such file, or it does not hold such a network.
    """
    path = weights_file(given)
    try:
        state = read_tensor_file(path)
    except UserError as error:
        raise UserError(f"reward.file is {given}. {error}") from error
    try:
        network = CifarResnet(_num_blocks(state))
        network.load_state_dict(state)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"reward.file is {given}, which does not hold a ResNet for CIFAR-10 with the names conv1, "
            f"layer1.0.conv1, linear: {first}"
        ) from error
    return network.eval().requires_grad_(False)


def _num_blocks(state: Any) -> int:
    """The number of blocks of the first stage.

    Raises:
        TypeError: there are none.
    """
    names = list(state) if isinstance(state, Mapping) else []
    found = {match[1] for name in names if (match := re.match(r"layer1\.(\d+)\.", str(name)))}
    if not found:
        raise TypeError("it has no layer1.")
    return len(found)


class CifarResnetReward(LogProbabilityReward):
    """The log-probability of a ResNet in a file of the user's.

    Args:
        config: Settings: the file and the class.

    Raises:
        UserError: there is no such file, or it does not hold such a network.
    """

    def __init__(self, config: CifarResnetRewardConfig) -> None:
        name = f"reward.kind is {config.kind}"
        super().__init__(load_cifar_resnet(config.file), EVENT, config.label, name)
