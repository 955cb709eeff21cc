"""What an update is given: batches, conditions and named random streams, with the seeds in front."""

import pytest
import torch
from torch import Tensor

from dxmi.data.batch import UNCONDITIONAL, Batch, Condition, Streams
from dxmi.distributed import Share


def batch(start: int, *, labels: bool = True) -> Batch:
    x = torch.arange(start, start + 6.0).view(3, 2)
    return Batch.single(x, 3, Condition(torch.arange(start, start + 3)) if labels else UNCONDITIONAL)


def test_a_batch_of_one_seed_has_it_in_front():
    one = batch(0)
    assert one.x.shape == (1, 3, 2)
    assert one.condition.labels.tolist() == [[0, 1, 2]]
    assert one.condition[1:] == (None, None)
    assert one.share == Share(0, 3, 3)
    assert Batch.single(None, 5) == Batch(None, UNCONDITIONAL, Share(0, 5, 5))


def test_stacked_batches_are_rows_in_their_order():
    stacked = Batch.stacked([batch(0), batch(10), batch(20)])
    assert torch.equal(stacked.x, torch.cat([batch(start).x for start in (0, 10, 20)]))
    assert stacked.condition.labels.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert stacked.condition[1:] == (None, None)
    assert stacked.share == Share(0, 3, 3)


def test_a_single_batch_is_not_copied():
    one = batch(0)
    assert Batch.stacked([one]) is one


def test_what_no_batch_has_no_stack_has():
    assert Batch.stacked([batch(0, labels=False), batch(1, labels=False)]).condition == UNCONDITIONAL
    assert Batch.stacked([Batch.single(None, 3), Batch.single(None, 3)]).x is None


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0])], ids=["slice", "indices"])
def test_rows_of_a_condition_are_those_of_each_field(rows):
    condition = Condition(torch.arange(4), torch.randn(4, 2, 3))
    found = condition.rows(rows)
    assert torch.equal(found.labels, condition.labels[rows])
    assert torch.equal(found.embeddings, condition.embeddings[rows])
    assert found.prompts is None


def generators(seed: int) -> dict[str, torch.Generator]:
    return {name: torch.Generator().manual_seed(100 * seed + k) for k, name in enumerate(("noise", "states"))}


@pytest.mark.parametrize("seeds", [(5,), (0, 3, 7)])
def test_each_seed_draws_from_its_own_streams(seeds):
    """What one seed draws does not depend on the others, and the streams of a seed are independent."""
    streams = Streams([generators(seed) for seed in seeds])
    alone = [generators(seed) for seed in seeds]

    def drawn(own: torch.Generator) -> Tensor:
        return torch.randint(1000, (4,), generator=own)

    for _ in range(2):  # they go on from where they are
        noise, states = streams.normal("noise", (2, 3)), streams.draw("states", drawn)
        assert noise.shape == (len(seeds), 2, 3)
        assert states.shape == (len(seeds), 4)
        for k, own in enumerate(alone):
            assert torch.equal(noise[k], torch.randn(2, 3, generator=own["noise"]))
            assert torch.equal(states[k], drawn(own["states"]))


def test_an_unknown_stream_is_an_error():
    with pytest.raises(KeyError, match="latents"):
        Streams([generators(0)]).normal("latents", (1,))
