"""Batches with their labels, and batches of samples that stay where they are."""

import threading

import pytest
import torch

from dxmi.data import dataset
from dxmi.data.dataset import BatchStream
from dxmi.distributed import Share, Workers
from dxmi.seeds import generator
from dxmi.tensors import from_uint8

PIXELS = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1)
LABELS = torch.arange(10) * 7


class Member(Workers):
    """One of several workers, of which only the share counts here."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, tensors):
        raise NotImplementedError

    def gather(self, block):
        raise NotImplementedError

    def _agree(self, content):
        raise NotImplementedError


def stream(batch_size: int = 4, **settings: object) -> BatchStream:
    return BatchStream(PIXELS, batch_size, generator(0, "order"), **settings)


@pytest.fixture
def too_large(monkeypatch) -> None:
    """No samples are moved as a whole."""
    monkeypatch.setattr(dataset, "RESIDENT_BYTES", 0)


def test_labels_come_with_their_samples():
    labelled = stream(labels=LABELS)
    for _ in range(3):
        x = labelled.next()
        assert torch.equal(x, from_uint8((labelled.labels // 7).to(torch.uint8)).view(-1, 1, 1, 1))


def test_half_of_the_images_are_mirrored():
    pixels = torch.arange(10 * 6, dtype=torch.uint8).view(10, 1, 2, 3)
    plain = from_uint8(pixels)
    mirrored = BatchStream(pixels, 10, generator(0, "order"), torch.arange(10), flip=True)
    flips = []
    for _ in range(200):
        x = mirrored.next()
        flips.append((x == plain[mirrored.labels].flip(-1)).flatten(1).all(dim=1))
        assert torch.equal(torch.where(flips[-1][:, None, None, None], x.flip(-1), x), plain[mirrored.labels])
    assert abs(torch.cat(flips).float().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    saved = mirrored.state()
    expected = mirrored.next()
    again = BatchStream(pixels, 10, generator(1, "order"), torch.arange(10), flip=True)
    again.load_state(saved)
    assert torch.equal(again.next(), expected)


def test_samples_are_the_same_with_and_without_labels():
    plain, labelled = stream(), stream(labels=LABELS)
    for _ in range(5):
        assert torch.equal(plain.next(), labelled.next())
    assert plain.labels is None


@pytest.mark.usefixtures("too_large")
def test_samples_that_stay_where_they_are_come_in_the_same_order(monkeypatch):
    fetching = stream(labels=LABELS)
    assert not fetching.resident
    monkeypatch.setattr(dataset, "RESIDENT_BYTES", 2**20)
    resident = stream(labels=LABELS)
    for _ in range(12):
        assert torch.equal(fetching.next(), resident.next())
        assert torch.equal(fetching.labels, resident.labels)


@pytest.mark.usefixtures("too_large")
def test_a_fetching_stream_goes_on_from_its_state():
    whole, cut = stream(3), stream(3)
    for _ in range(4):
        whole.next(), cut.next()
    resumed = stream(3)
    resumed.next()  # has fetched ahead what is not to come
    resumed.load_state(cut.state())
    for _ in range(9):
        assert torch.equal(resumed.next(), whole.next())


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
        expected, parts = whole.next(), [member.next() for member in members]
        assert all(part.shape == expected.shape for part in parts)
        for rank, part in enumerate(parts):
            share: Share = Member(rank, size).share(4)
            assert torch.equal(share.of(part), share.of(expected))
        read = torch.cat([Member(rank, size).share(4).of(part) for rank, part in enumerate(parts)])
        assert torch.equal(read, expected)
        assert all(int((part != -1.0).sum()) <= Member(rank, size).share(4).count for rank, part in enumerate(parts))
