"""What the tests look for in a message is found in any words, and nothing else is taken for it."""

import re

import pytest

from support import missing, stating

MESSAGE = "sweep.sampler.seed is -1: it must be in 0..2^32 - 1, like 1.5 or 'a b' or null; did you mean seed_plan?"


@pytest.mark.parametrize(
    "facts",
    ["sweep.sampler.seed is -1", "0..2^32 - 1", "seed_plan … sweep.sampler.seed", "1.5", "a b", "'a b'", "None"],
)
def test_facts_are_found_in_any_order(facts):
    assert missing(facts, MESSAGE) == []
    assert re.search(stating(facts), MESSAGE)


@pytest.mark.parametrize(
    "fact", ["seed", "sampler.seed is -1", "sweep.sampler.seed is 1", "5", "sweep.sampler", "seed_pla", "-11"]
)
def test_a_part_of_a_name_or_a_number_is_another_one(fact):
    assert missing(f"{fact} … 1.5", MESSAGE) == [fact]
    assert not re.search(stating(f"1.5 … {fact}"), MESSAGE)
