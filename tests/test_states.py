"""Stored states: those that were drawn, with their steps and conditions, and where they lead to."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dxmi.algorithms.configs import DxMIConfig
from dxmi.algorithms.states import StoredStates, draw_states
from dxmi.data.batch import UNCONDITIONAL, Condition, Streams
from dxmi.diffusion.trajectory import Trajectory
from dxmi.distributed import Share

K, T, B = 2, 4, 6
X = torch.randn(K, T + 1, B, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(K * B).view(K, B)
TRAJECTORY = Trajectory(X, X[:, 1:], torch.ones(K, T, B))


def drawn(*, every: bool = False) -> tuple[Tensor, ...]:
    streams = Streams([{"states": torch.Generator().manual_seed(seed)} for seed in range(K)])
    return draw_states(streams, "states", T, B, every=every)


def gathered(index: Tensor, share: Share = Share(0, B, B), seeds: slice = slice(None)) -> StoredStates:  # noqa: B008
    own = slice(share.start, share.start + share.count)
    trajectory = Trajectory(*(tensor[seeds][..., own, :] for tensor in TRAJECTORY[:2]), TRAJECTORY.sigma[seeds, :, own])
    condition = Condition(LABELS[seeds, own])
    return StoredStates.gather(trajectory, condition, index[seeds], share, with_next=True)


def test_each_state_comes_with_its_step_its_successor_and_its_condition():
    for index in drawn(every=True):
        states = gathered(index)
        assert states.num == B
        for k in range(K):
            for i, place in enumerate(index[k].tolist()):
                t, row = divmod(place, B)
                assert states.t[k, i] == t
                assert torch.equal(states.x[k, i], X[k, t, row])
                assert torch.equal(states.x_next[k, i], X[k, t + 1, row])
                assert states.condition.labels[k, i] == LABELS[k, row]
        assert all((steps.diff() >= 0).all() for steps in states.t)


def test_without_a_condition_states_have_none():
    states = StoredStates.gather(TRAJECTORY, UNCONDITIONAL, drawn()[0], Share(0, B, B))
    assert states.condition == UNCONDITIONAL


@pytest.mark.parametrize("size", [2, 3])
def test_the_processes_have_each_state_once(size):
    """Each gathers the states of its own trajectories, and of what is drawn for all takes the rows of these states."""
    index, one_seed = drawn()[0], slice(0, 1)
    whole, noise = gathered(index, seeds=one_seed), torch.randn(1, B, 3)
    edges = [rank * B // size for rank in range(size + 1)]
    places: list[int] = []
    for start, end in pairwise(edges):
        own = gathered(index, Share(start, end - start, B), one_seed)
        mine = [i for i, place in enumerate(index[0].tolist()) if start <= place % B < end]
        assert own.num == B
        assert torch.equal(own.x, whole.x[:, mine])
        assert torch.equal(own.t, whole.t[:, mine])
        assert torch.equal(own.condition.labels, whole.condition.labels[:, mine])
        assert torch.equal(own.own(noise), noise[:, mine])
        assert own.own(None) is None
        places += mine
    assert sorted(places) == list(range(B))
    assert whole.own(noise) is noise


# The steps of two seeds: 0 0 1 2 3 3 and 0 1 3 3 3 3, of which step 3 leads to T.
INDEX = torch.tensor([[0, 1, 6, 12, 18, 19], [0, 6, 18, 19, 20, 21]])


@pytest.mark.parametrize(
    ("seeds", "rows", "split"),
    [
        (slice(0, 1), slice(0, 6), (4, 2)),
        (slice(1, 2), slice(0, 6), (2, 4)),
        (slice(0, 2), slice(0, 6), (2, 2)),
        (slice(0, 2), slice(0, 3), (2, 0)),
        (slice(0, 2), slice(3, 6), (0, 2)),
        (slice(0, 2), slice(4, 6), (0, 2)),
        (slice(0, 1), slice(0, 2), (2, 0)),
        (slice(0, 1), slice(3, 3), (0, 0)),
    ],
)
def test_the_split_counts_rows_that_all_seeds_agree_on(seeds, rows, split):
    found = gathered(INDEX, seeds=seeds).split(rows)
    assert (found["num_nonterminal"], found["num_terminal"]) == split


@pytest.mark.parametrize(
    ("seeds", "rows", "horizon", "acting"),
    [
        (slice(0, 1), slice(0, 6), 1, (6,)),
        (slice(0, 1), slice(0, 6), 4, (6, 4, 3, 2)),
        (slice(1, 2), slice(0, 6), 4, (6, 2, 2, 1)),
        (slice(0, 2), slice(0, 6), 4, (6, 4, 3, 2)),
        (slice(0, 1), slice(2, 6), 4, (4, 2, 1)),  # no state is at step 0: a network is not given an empty batch
        (slice(0, 2), slice(4, 6), 4, (2,)),
        (slice(0, 1), slice(3, 3), 4, (0,)),
    ],
)
def test_the_states_that_act_in_each_of_several_steps(seeds, rows, horizon, acting):
    assert gathered(INDEX, seeds=seeds).acting(rows, horizon) == acting


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("k", range(K))
def test_a_value_is_the_same_with_and_without_the_split(make_dxmi, kind, k):
    """A recorded update, which cannot know the split, computes what others do."""
    value = make_dxmi(DxMIConfig(value=kind), num_steps=T).value
    states = gathered(INDEX)
    x, t = states.x_next[k], states.t[k] + 1
    split = states.split(slice(0, B))
    known, unknown = value.forward_timesteps(x, t, **split), value.forward_timesteps(x, t)
    torch.testing.assert_close(known, unknown, rtol=1e-6, atol=1e-6)
    expected = torch.cat([value(row[None], int(step)) for row, step in zip(x, t, strict=True)])
    torch.testing.assert_close(unknown, expected, rtol=1e-6, atol=1e-6)
