"""Small classifiers of gray images, whose 64 penultimate features replace InceptionV3's where those are unsuitable.

Their weights ship with the package as safetensors (float16). Each was trained by
`python -m dxmi.metrics.train_classifier NAME`. The metadata of a file states the held-out accuracy, and `CLASSIFIERS`
the sha256, which is verified at every load.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from dxmi.errors import UserError

NUM_FEATURES = 64
NUM_CLASSES = 10


@dataclass(frozen=True)
class ShippedClassifier:
    """A classifier that ships with the package.

    Attributes:
        size: height and width of the input.
        accuracy: accuracy of the shipped float16 weights on held-out images.
        sha256: checksum of the file.
    """

    size: int
    accuracy: float
    sha256: str


CLASSIFIERS = {
    "digits": ShippedClassifier(8, 0.9861, "b60f14f42d39b544cd2f32893a4508e8548a81780c2aa8896f7f5c63604a0562"),
    "mnist8": ShippedClassifier(8, 0.9752, "95d1f698faf06eef8cc40cfb70d5e692b71beff00a0228a52b9f8d086916a0b2"),
    "mnist": ShippedClassifier(28, 0.9916, "59a70eb3608796c6f01d48202fa4f1537ba1d908b3a904f1d2475d096f9e0036"),
    "fashion_mnist": ShippedClassifier(28, 0.9096, "9238d63692cf725469bef7be1972960bdaaf1a1a80b658b033b87226e77d2401"),
}


class SmallClassifier(nn.Module):
    """Two strided convolutions, 64 features, 10 classes.

    Args:
        size: height and width of the input, a multiple of 4.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        first_stride = 2 if size > 8 else 1
        side = size // (2 * first_stride)
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=first_stride, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side * side, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Features [N, 64] of uint8 pixels [N, 1, size, size]."""
        return self.body(pixels.float().div(255.0))  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [N, 10] of uint8 pixels [N, 1, size, size]."""
        return self.head(self.features(pixels))  # type: ignore[no-any-return]


def load_classifier(name: str) -> SmallClassifier:
    """Load the shipped classifier of the data set `name`, in evaluation mode.

    Raises:
        UserError: the file is not the one that was shipped.
    """
    shipped = CLASSIFIERS[name]
    raw = (files("dxmi.metrics") / "weights" / f"{name}.safetensors").read_bytes()
    if hashlib.sha256(raw).hexdigest() != shipped.sha256:
        raise UserError(f"The weights of the {name} classifier in the dxmi package were altered: install dxmi again.")
    classifier = SmallClassifier(shipped.size)
    classifier.load_state_dict({key: value.float() for key, value in load_safetensors(raw).items()})
    return classifier.eval().requires_grad_(False)
