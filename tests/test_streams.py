"""Batches with their labels, and batches of samples that stay where they are."""

import threading

import pytest
import torch

from dxmi.data import dataset
from dxmi.data.batch import UNCONDITIONAL
from dxmi.data.dataset import BatchStream
from dxmi.distributed import ProcessGroup, Share
from dxmi.seeds import generator
from dxmi.tensors import from_uint8

PIXELS = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1)
LABELS = torch.arange(10) * 7


class Member(ProcessGroup):
    """One of several workers, of which only the share counts here."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, tensors):
        raise NotImplementedError

    def gather(self, block):
        raise NotImplementedError

    def _broadcast_bytes(self, content):
        raise NotImplementedError


def stream(batch_size: int = 4, **settings: object) -> BatchStream:
    return BatchStream(PIXELS, batch_size, generator(0, "order"), **settings)


@pytest.fixture
def too_large(monkeypatch) -> None:
    """No samples are moved as a whole."""
    monkeypatch.setattr(dataset, "RESIDENT_BYTES", 0)


def test_labels_come_with_their_samples():
    labeled = stream(labels=LABELS)
    for _ in range(3):
        x, condition, _ = labeled.next()
        assert torch.equal(x[0], from_uint8((condition.labels[0] // 7).to(torch.uint8)).view(-1, 1, 1, 1))


def test_half_of_the_images_are_mirrored():
    pixels = torch.arange(10 * 6, dtype=torch.uint8).view(10, 1, 2, 3)
    plain = from_uint8(pixels)
    mirrored = BatchStream(pixels, 10, generator(0, "order"), torch.arange(10), flip=True)
    flips = []
    for _ in range(200):
        batch = mirrored.next()
        x, expected = batch.x[0], plain[batch.condition.labels[0]]
        flips.append((x == expected.flip(-1)).flatten(1).all(dim=1))
        assert torch.equal(torch.where(flips[-1][:, None, None, None], x.flip(-1), x), expected)
    assert abs(torch.cat(flips).float().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    saved = mirrored.state()
    expected = mirrored.next().x
    again = BatchStream(pixels, 10, generator(1, "order"), torch.arange(10), flip=True)
    again.load_state(saved)
    assert torch.equal(again.next().x, expected)


def test_samples_are_the_same_with_and_without_labels():
    plain, labeled = stream(), stream(labels=LABELS)
    for _ in range(5):
        batch = plain.next()
        assert torch.equal(batch.x, labeled.next().x)
        assert batch.condition == UNCONDITIONAL


@pytest.mark.usefixtures("too_large")
def test_samples_that_stay_where_they_are_come_in_the_same_order(monkeypatch):
    fetching = stream(labels=LABELS)
    assert not fetching.resident
    monkeypatch.setattr(dataset, "RESIDENT_BYTES", 2**20)
    resident = stream(labels=LABELS)
    for _ in range(12):
        ours, theirs = fetching.next(), resident.next()
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.condition.labels, theirs.condition.labels)


@pytest.mark.usefixtures("too_large")
def test_a_fetching_stream_goes_on_from_its_state():
    whole, cut = stream(3), stream(3)
    for _ in range(4):
        whole.next(), cut.next()
    resumed = stream(3)
    resumed.next()  # has fetched ahead what is not to come
    resumed.load_state(cut.state())
    for _ in range(9):
        assert torch.equal(resumed.next().x, whole.next().x)


@pytest.mark.usefixtures("too_large")
def test_the_next_batch_is_fetched_while_this_one_is_used(monkeypatch):
    fetched, gathered = threading.Event(), BatchStream._gathered

    def fetch(self: BatchStream, drawn: torch.Tensor) -> torch.Tensor:
        rows = gathered(self, drawn)
        if threading.current_thread() is not threading.main_thread():
            fetched.set()
        return rows

    monkeypatch.setattr(BatchStream, "_gathered", fetch)
    stream().next()
    assert fetched.wait(10.0)


@pytest.mark.usefixtures("too_large")
@pytest.mark.parametrize("size", [2, 3])
def test_workers_read_their_own_rows_alone(size):
    whole, members = stream(), [stream(workers=Member(rank, size)) for rank in range(size)]
    for _ in range(7):
        expected, parts = whole.next().x, [member.next() for member in members]
        for rank, part in enumerate(parts):
            share: Share = Member(rank, size).share(4)
            assert part.share == share
            assert part.x.shape[1] == share.count
            assert torch.equal(part.x, share.of(expected, dim=1))
        assert torch.equal(torch.cat([part.x for part in parts], dim=1), expected)
