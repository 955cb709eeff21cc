"""Prompts: sentences that name a class of the data, on which samples are conditioned.

A network with classes only knows the class that a prompt names. Prompts decide which classes are asked for, how often,
and which are held out from training.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.data.configs import PromptsConfig
from dxmi.errors import UserError
from dxmi.persistence.files import require_target, user_path

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = {
    "digits": _DIGITS,
    "mnist8": _DIGITS,
    "mnist": _DIGITS,
    "fashion_mnist": (
        *("T-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""Words for the classes of data sets whose files only number them, by the kind of the data set."""
_ANY = "{}"


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: Its text.
        label: The class that it names.
        weight: How often it is drawn, relative to the others.
    """

    text: str
    label: int
    weight: int = 1


class Prompts(NamedTuple):
    """The prompts of a run.

    Attributes:
        trained: Prompts to train on.
        held_out: Prompts that are only evaluated.
    """

    trained: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...] = ()

    @property
    def labels(self) -> Tensor:
        """The class of each prompt to train on, as often as its weight says, int64 [N]."""
        return torch.tensor([prompt.label for prompt in self.trained for _ in range(prompt.weight)])

    @property
    def held_out_labels(self) -> frozenset[int]:
        """The classes of the held-out prompts."""
        return frozenset(prompt.label for prompt in self.held_out)

    def counts(self, classes: int) -> Tensor:
        """The number of evaluated samples of each class, relative to each other, int64 [classes]; all prompts count."""
        held_out = torch.tensor([prompt.label for prompt in self.held_out], dtype=torch.int64)
        return torch.bincount(torch.cat((self.labels, held_out)), minlength=classes)


def read_prompts(config: PromptsConfig, words: Sequence[str]) -> Prompts:
    """Find the class of each prompt.

    Args:
        config: Settings with prompts.
        words: The word for each class, in order.

    Raises:
        UserError: a prompt names no class or several, the classes of a held-out prompt and another one are the same, or
            the file cannot be read.
    """
    held_out = tuple(Prompt(text, _label(text, words, "prompts.held_out")) for text in config.held_out or ())
    withheld = {prompt.label for prompt in held_out}
    texts = config.texts or ()
    weighted = [
        *(
            (text, weight, "prompts.texts")
            for text, weight in zip(texts, config.weights or (1,) * len(texts), strict=True)
        ),
        *((line, 1, f"prompts.file, line {number},") for number, line in _lines(config.file)),
    ]
    trained = tuple(
        prompt for text, weight, place in weighted for prompt in _expanded(text, weight, words, withheld, place)
    )
    for prompt in trained:
        if prompt.label in withheld:
            raise UserError(
                f'prompts.held_out has the class of the prompt "{prompt.text}", {words[prompt.label]}, and the network '
                "only knows classes: leave out one of the two."
            )
    return Prompts(trained, held_out)


def _expanded(text: str, weight: int, words: Sequence[str], withheld: set[int], place: str) -> list[Prompt]:
    """The prompt or, if it has {} for the word, one for every class that is not held out."""
    if _ANY not in text:
        return [Prompt(text, _label(text, words, place), weight)]
    return [
        Prompt(text.replace(_ANY, word), label, weight) for label, word in enumerate(words) if label not in withheld
    ]


def _label(text: str, words: Sequence[str], place: str) -> int:
    """The class whose word a prompt at a place has; of "ankle boot" and "boot", the longer one counts.

    Raises:
        UserError: it has none, or several.
    """
    found, rest = [], text
    for label in sorted(range(len(words)), key=lambda label: -len(words[label])):
        pattern = rf"(?<![\w-]){re.escape(words[label])}(?![\w-])"
        if re.search(pattern, rest, re.IGNORECASE):
            found.append(label)
            rest = re.sub(pattern, "", rest, flags=re.IGNORECASE)
    if len(found) != 1:
        named = " and ".join(f'"{words[label]}"' for label in sorted(found)) or "none"
        raise UserError(
            f'{place} has "{text}", which must have the word for a single class and has {named}: the words are '
            f"{', '.join(words)}."
        )
    return found[0]


def _lines(file: str | None) -> list[tuple[int, str]]:
    """The numbers and texts of the lines of a file that are neither empty nor comments, which begin with #.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    if file is None:
        return []
    path = require_target(user_path(file, "prompts.file"), "prompts.file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"prompts.file is {file}, which cannot be read: {reason}.") from error
    found = [(number, line) for number, line in enumerate(lines, start=1) if line and not line.startswith("#")]
    if not found:
        raise UserError(f"prompts.file is {file}, which has no prompts: write one per line.")
    return found
