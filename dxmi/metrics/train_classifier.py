"""Train one of the shipped feature classifiers: `python -m dxmi.metrics.train_classifier mnist8 --out FOLDER`.

The optimizer is AdamW with cosine decay; 28x28 images are augmented by shifts of one pixel. MNIST, its 8x8 version and
Fashion-MNIST are tested on their 10,000 test images. The digits have no test split and are tested on a fifth of the
data, which is excluded from training.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from dxmi.data.images import LOADERS
from dxmi.metrics.classifier import SmallClassifier

_HELD_OUT = 5
_BATCH = 128


def split(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load training pixels and labels, and held-out pixels and labels."""
    pixels, labels = LOADERS[name](train=True)
    if name == "digits":
        held_out = torch.arange(len(labels)) % _HELD_OUT == 0
        return pixels[~held_out], labels[~held_out], pixels[held_out], labels[held_out]
    return pixels, labels, *LOADERS[name](train=False)


def train(pixels: Tensor, labels: Tensor, *, epochs: int, seed: int) -> SmallClassifier:
    """Train a classifier on uint8 pixels [N, 1, S, S]."""
    torch.manual_seed(seed)
    classifier = SmallClassifier(pixels.shape[-1])
    batches = epochs * (len(pixels) // _BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    for _ in range(epochs):
        for drawn in torch.split(torch.randperm(len(pixels)), _BATCH)[: len(pixels) // _BATCH]:
            logits = classifier(shifted(pixels[drawn]))
            loss = nn.functional.cross_entropy(logits, labels[drawn], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return classifier.eval()


def shifted(pixels: Tensor) -> Tensor:
    """Shift a batch of 28x28 images by at most one pixel, but not 8x8 ones, whose strokes are one pixel wide."""
    if pixels.shape[-1] <= 8:
        return pixels
    down, right = (int(i) for i in torch.randint(-1, 2, (2,)))
    return pixels.roll((down, right), (2, 3))


def accuracy(classifier: SmallClassifier, pixels: Tensor, labels: Tensor) -> float:
    """The fraction of `pixels` that are classified as `labels`."""
    with torch.no_grad():
        return float((classifier(pixels).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, evaluate and write a classifier, and print its entry for `CLASSIFIERS`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=LOADERS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pixels, labels, held_out_pixels, held_out_labels = split(args.name)
    classifier = train(pixels, labels, epochs=args.epochs, seed=args.seed).half().float()
    score = accuracy(classifier, held_out_pixels, held_out_labels)
    command = f"python -m dxmi.metrics.train_classifier {args.name} --epochs {args.epochs} --seed {args.seed}"
    metadata = {"command": command, "held_out_accuracy": f"{score:.4f}", "held_out_images": str(len(held_out_labels))}
    raw = save_safetensors({k: v.half() for k, v in classifier.state_dict().items()}, metadata)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.safetensors").write_bytes(raw)
    size, digest = pixels.shape[-1], hashlib.sha256(raw).hexdigest()
    print(f'    "{args.name}": ShippedClassifier({size}, {score:.4f}, "{digest}"),')


if __name__ == "__main__":
    main()
