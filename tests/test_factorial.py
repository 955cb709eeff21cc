"""Two-level designs against the published tables, and against their definition."""

import itertools
import math

import numpy as np
import pytest

from tune.plans.factorial import MAX_FACTORS, TwoLevelDesign, smallest_fraction

LETTERS = "ABCDEFGHJK"

# Montgomery, Design and Analysis of Experiments, table 8.14, and Box, Hunter and Hunter, Statistics for Experimenters,
# chapter 6: from (factors, resolution asked for) to the generators of the smallest such design.
PUBLISHED = {
    (3, 3): ["C=AB"],
    (4, 3): ["D=ABC"],
    (4, 4): ["D=ABC"],
    (5, 3): ["D=AB", "E=AC"],
    (5, 4): ["E=ABCD"],
    (6, 3): ["D=AB", "E=AC", "F=BC"],
    (6, 4): ["E=ABC", "F=BCD"],
    (7, 3): ["D=AB", "E=AC", "F=BC", "G=ABC"],
    (7, 4): ["E=ABC", "F=BCD", "G=ACD"],
    (8, 3): ["E=BCD", "F=ACD", "G=ABC", "H=ABD"],
    (8, 4): ["E=BCD", "F=ACD", "G=ABC", "H=ABD"],
    (9, 3): ["E=ABC", "F=BCD", "G=ACD", "H=ABD", "J=ABCD"],
    (9, 4): ["F=BCDE", "G=ACDE", "H=ABDE", "J=ABCE"],
    (10, 3): ["E=ABC", "F=BCD", "G=ACD", "H=ABD", "J=ABCD", "K=AB"],
    (10, 4): ["F=ABCD", "G=ABCE", "H=ABDE", "J=ACDE", "K=BCDE"],
}
RELATIONS = {
    (3, 3): {"ABC"},
    (4, 4): {"ABCD"},
    (5, 3): {"ABD", "ACE", "BCDE"},
    (5, 4): {"ABCDE"},
    (6, 4): {"ABCE", "BCDF", "ADEF"},
    (7, 3): {
        *("ABD", "ACE", "BCF", "CDG", "BEG", "AFG", "DEF"),
        *("BCDE", "ACDF", "ABEF", "ABCG", "ADEG", "BDFG", "CEFG"),
        "ABCDEFG",
    },
}


def product(words: tuple[str, ...]) -> str:
    """Letters that occur an odd number of times."""
    letters = "".join(words)
    return "".join(letter for letter in LETTERS if letters.count(letter) % 2)


def relation(generators: list[str]) -> set[str]:
    """Every product of one or more generators, which are written as in the tables."""
    words = [generator.replace("=", "") for generator in generators]
    return {product(some) for num in range(1, len(words) + 1) for some in itertools.combinations(words, num)}


def lengths(words: set[str]) -> list[int]:
    return sorted(map(len, words))


def words_of(design: TwoLevelDesign) -> set[str]:
    return {"".join(letter for i, letter in enumerate(LETTERS) if word >> i & 1) for word in design.words}


def fraction(num: int, resolution: int) -> TwoLevelDesign:
    return smallest_fraction(LETTERS[:num], resolution)


def up_to_names(words: set[str], num: int) -> set[frozenset[str]]:
    """The relation under every renaming of the factors."""
    renamed = (dict(zip(LETTERS, names, strict=False)) for names in itertools.permutations(LETTERS[:num]))
    return {frozenset("".join(sorted(names[x] for x in word)) for word in words) for names in renamed}


@pytest.mark.parametrize(("case", "generators"), PUBLISHED.items())
def test_the_smallest_fraction_has_the_published_size_resolution_and_word_lengths(case, generators):
    design = fraction(*case)
    assert design.num_arms == 2 ** (case[0] - len(generators)) == len(design.matrix)
    assert lengths(words_of(design)) == lengths(relation(generators))
    assert design.resolution == min(lengths(relation(generators)))


@pytest.mark.parametrize(("case", "words"), RELATIONS.items())
def test_the_defining_relation_is_the_published_one_but_for_names(case, words):
    assert words == relation(PUBLISHED[case])
    assert frozenset(words_of(fraction(*case))) in up_to_names(words, case[0])


@pytest.mark.parametrize("case", [(3, 3), (4, 4), (5, 3), (5, 4), (7, 3)])
def test_small_designs_have_the_very_generators_of_the_tables(case):
    assert words_of(fraction(*case)) == RELATIONS[case]


@pytest.mark.parametrize("num", range(1, MAX_FACTORS + 1))
@pytest.mark.parametrize("resolution", [3, 4])
def test_a_fraction_is_orthogonal_distinct_and_contains_the_baseline(num, resolution):
    design = fraction(num, resolution)
    matrix = design.matrix.astype(int)
    assert matrix.shape == (design.num_arms, num)
    assert set(matrix.ravel().tolist()) == {1, -1}
    np.testing.assert_array_equal(matrix.T @ matrix, design.num_arms * np.eye(num))
    np.testing.assert_array_equal(matrix.sum(axis=0), 0)
    np.testing.assert_array_equal(matrix[0], 1)
    assert len({tuple(row) for row in matrix.tolist()}) == design.num_arms


@pytest.mark.parametrize("num", range(1, MAX_FACTORS + 1))
@pytest.mark.parametrize("resolution", [3, 4])
def test_resolution_is_the_size_of_the_smallest_set_of_columns_whose_product_is_constant(num, resolution):
    design = fraction(num, resolution)
    assert design.resolution is None or design.resolution >= resolution
    for size in range(1, min(num, resolution) + 1):
        constant = [
            columns
            for columns in itertools.combinations(range(num), size)
            if abs(design.matrix[:, columns].astype(int).prod(axis=1).sum()) == design.num_arms
        ]
        assert bool(constant) == (size == design.resolution)


@pytest.mark.parametrize(("num", "resolution"), [(3, 3), (4, 4), (5, 3), (6, 4), (7, 4), (8, 3), (10, 3)])
def test_aliases_are_the_effects_whose_columns_are_equal(num, resolution):
    """By the definition: two effects are confounded exactly if their contrasts are the same in every arm."""
    design = fraction(num, resolution)

    def contrast(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(design.matrix[:, [LETTERS.index(x) for x in names]].astype(int).prod(axis=1).tolist())

    names = LETTERS[:num]
    effects = [e for order in (1, 2, 3) for e in itertools.combinations(names, order)]
    by_contrast: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
    for effect in effects:
        by_contrast.setdefault(contrast(effect), []).append(effect)
    for order in (2, 3):
        aliases = design.aliases(order)
        assert len(aliases) == num + math.comb(num, 2)
        for effect, confounded in aliases.items():
            equal = [e for e in by_contrast[contrast(effect)] if e != effect and len(e) <= order]
            assert list(confounded) == equal


def test_a_full_factorial_confounds_nothing():
    design = TwoLevelDesign(("a", "b", "c"))
    assert design.resolution is None
    assert design.words == ()
    assert set(design.aliases(3).values()) == {()}
    assert [tuple(row) for row in design.matrix.tolist()] == list(itertools.product((1, -1), repeat=3))
    assert design.describe() == "2^3 design in 8 arms, full\nA = a\nB = b\nC = c"


def test_two_factors_have_no_smaller_fraction():
    assert fraction(2, 3) == TwoLevelDesign(("A", "B"))
    assert fraction(3, 4) == TwoLevelDesign(("A", "B", "C"))


def test_a_design_is_described_with_its_relation_and_its_aliases():
    text = smallest_fraction(["entropy", "cost", "target", "average"], 4).describe()
    assert text.splitlines() == [
        "2^(4-1) design in 8 arms, resolution IV",
        "A = entropy",
        "B = cost",
        "C = target",
        "D = average",
        "I = ABCD",
        "AB is confounded with CD",
        "AC is confounded with BD",
        "AD is confounded with BC",
        "BC is confounded with AD",
        "BD is confounded with AC",
        "CD is confounded with AB",
    ]
    assert "A is confounded with BCD" in smallest_fraction("abcd", 4).describe(3)
