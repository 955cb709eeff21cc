"""Two-level designs, full and fractional: the combinations that are run, and which effects are confounded.

See Box, Hunter and Hunter, Statistics for Experimenters, chapters 5 and 6. A word is a product of factors, represented
by a bit mask: bit i stands for factor i, and the product of two words is their exclusive or, since each factor times
itself is 1. A fraction runs only the combinations in which every defining word is +1, so two effects whose product is
a defining word cannot be distinguished.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MAX_FACTORS = 10
_LETTERS = "ABCDEFGHJK"
"""Letters of the factors; I is reserved for the identity."""


@dataclass(frozen=True)
class TwoLevelDesign:
    """A 2^(k-p) design.

    Attributes:
        factors: Names of the k factors.
        generators: The p words that define the fraction, each of which contains one of the last p factors; empty for a
            full factorial.
    """

    factors: tuple[str, ...]
    generators: tuple[int, ...] = ()

    @property
    def num_arms(self) -> int:
        """Number of arms, 2^(k-p)."""
        return int(2 ** (len(self.factors) - len(self.generators)))

    @cached_property
    def matrix(self) -> NDArray[np.int8]:
        """The combinations [arms, factors]: +1 is a factor's first level, that of the baseline, and -1 its second.

        The first row is the baseline. With the opposite signs, fractions with odd words would not contain it.
        """
        num_basic = len(self.factors) - len(self.generators)
        rows = np.array(list(itertools.product((1, -1), repeat=num_basic)), dtype=np.int8)
        added = [rows[:, _members(word, num_basic)].prod(axis=1, dtype=np.int8) for word in self.generators]
        return np.column_stack([rows, *added])

    @cached_property
    def words(self) -> tuple[int, ...]:
        """The defining relation without I: all products of generators, shortest first."""
        return tuple(sorted(_products(self.generators), key=_order))

    @property
    def resolution(self) -> int | None:
        """Length of the shortest defining word; None for a full factorial, where nothing is confounded."""
        return min((word.bit_count() for word in self.words), default=None)

    def aliases(self, order: int = 2) -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """Aliases of each main effect and each two-factor interaction.

        Args:
            order: Highest order of the interactions that are listed.

        Returns:
            For each effect, given by the names of its factors, the effects confounded with it, shortest first.
        """
        singles = [1 << i for i in range(len(self.factors))]
        pairs = [a | b for a, b in itertools.combinations(singles, 2)]
        return {
            self._names(effect): tuple(map(self._names, self._confounded(effect, order))) for effect in singles + pairs
        }

    def _confounded(self, effect: int, order: int) -> list[int]:
        products = (effect ^ word for word in self.words)
        return sorted((word for word in products if word.bit_count() <= order), key=_order)

    def _names(self, word: int) -> tuple[str, ...]:
        return tuple(self.factors[i] for i in _members(word, len(self.factors)))

    def describe(self, order: int = 2) -> str:
        """Describe the design as text: factors by letter, defining relation, and all aliases up to `order`."""
        num, added = len(self.factors), len(self.generators)
        title = f"2^({num}-{added})" if added else f"2^{num}"
        lines = [f"{title} design in {self.num_arms} arms, " + self._strength()]
        lines += [f"{_LETTERS[i]} = {name}" for i, name in enumerate(self.factors)]
        if self.words:
            lines.append("I = " + " = ".join(map(_letters, self.words)))
        singles = [1 << i for i in range(num)]
        for effect in singles + [a | b for a, b in itertools.combinations(singles, 2)]:
            confounded = self._confounded(effect, order)
            if confounded:
                lines.append(f"{_letters(effect)} is confounded with " + ", ".join(map(_letters, confounded)))
        return "\n".join(lines)

    def _strength(self) -> str:
        names = {3: "III", 4: "IV", 5: "V"}
        resolution = self.resolution
        return "full" if resolution is None else f"resolution {names.get(resolution, resolution)}"


def smallest_fraction(factors: Sequence[str], resolution: int) -> TwoLevelDesign:
    """The two-level design with the fewest arms that has at least the given resolution.

    Among several such designs, the one with the fewest short words (minimum aberration) is chosen.

    Args:
        factors: Names of at most `MAX_FACTORS` factors.
        resolution: Resolution, at least 3.
    """
    num = len(factors)
    for num_basic in range(1, num):
        fractions = _fractions(num, num_basic, resolution)
        if fractions:
            return TwoLevelDesign(tuple(factors), min(fractions, key=lambda generators: _word_lengths(generators, num)))
    return TwoLevelDesign(tuple(factors))


def _fractions(num: int, num_basic: int, resolution: int) -> list[tuple[int, ...]]:
    """Generators of every fraction in which each added factor is an interaction of the basic ones."""
    interactions = sorted((w for w in range(1, 1 << num_basic) if w.bit_count() >= resolution - 1), key=_order)
    found = []
    for chosen in itertools.combinations(interactions, num - num_basic):
        generators = tuple(word | (1 << (num_basic + i)) for i, word in enumerate(chosen))
        if min(word.bit_count() for word in _products(generators)) >= resolution:
            found.append(generators)
    return found


def _products(generators: Sequence[int]) -> list[int]:
    """Every product of one or more generators."""
    words = [0]
    for generator in generators:
        words += [word ^ generator for word in words]
    return words[1:]


def _word_lengths(generators: Sequence[int], num: int) -> tuple[int, ...]:
    """Numbers of defining words of each length from 1 to `num`."""
    lengths = [word.bit_count() for word in _products(generators)]
    return tuple(lengths.count(length) for length in range(1, num + 1))


def _members(word: int, num: int) -> list[int]:
    return [i for i in range(num) if word >> i & 1]


def _letters(word: int) -> str:
    return "".join(_LETTERS[i] for i in _members(word, len(_LETTERS)))


def _order(word: int) -> tuple[int, list[int]]:
    """Sort key: by length, then lexicographically."""
    return word.bit_count(), _members(word, word.bit_length())
