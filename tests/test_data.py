"""Data: real digits, IDX files as they lie on disk, the order in which they are read."""

import gzip

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from dxmi.data.dataset import BatchStream
from dxmi.data.idx import read_idx
from dxmi.data.images import data_root
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.errors import UserError
from dxmi.seeds import generator
from dxmi.tensors import from_uint8
from support import idx_bytes, stating

NUM_IMAGES = 30


@pytest.fixture
def mnist_folder(tmp_path, monkeypatch):
    """A small MNIST in the published layout: images of random pixels, labels 0..9 in turn."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (NUM_IMAGES, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes((np.arange(NUM_IMAGES) % 10).astype(np.uint8)))
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    return raw


def test_digits_are_those_that_scikit_learn_loads():
    images, theirs = load(DATA_SETS.config("digits")), sklearn.datasets.load_digits()
    assert torch.equal(images.labels, torch.from_numpy(theirs.target).long())
    assert torch.equal(images.pixels[:, 0].double(), (torch.from_numpy(theirs.images) * 255.0 / 16.0).round())


def test_digits_are_the_1797_real_ones():
    images = load(DATA_SETS.config("digits"))
    assert images.pixels.shape == (1797, 1, 8, 8)
    assert images.pixels.dtype == torch.uint8
    assert (int(images.pixels.min()), int(images.pixels.max())) == (0, 255)
    assert len(images.pixels.unique()) == 17
    assert images.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's counts


def test_a_label_keeps_that_class_only_and_changes_the_signature():
    everything, threes = load(DATA_SETS.config("digits")), load(DATA_SETS.config("digits", label=3))
    assert len(threes) == 183
    assert threes.labels.unique().tolist() == [3]
    assert threes.signature != everything.signature


def test_idx_files_are_read_plain_or_gzipped(mnist_folder):
    plain = load(DATA_SETS.config("mnist", accept_unknown_files=True))
    assert plain.event == (1, 28, 28)
    path = mnist_folder / "train-images-idx3-ubyte"
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert torch.equal(load(DATA_SETS.config("mnist", accept_unknown_files=True)).pixels, plain.pixels)


def test_mnist8_is_antialiased_bilinear(mnist_folder):
    """Pillow's bilinear filter, a second implementation, agrees to one gray level."""
    small = load(DATA_SETS.config("mnist8", accept_unknown_files=True)).pixels[:, 0].numpy().astype(int)
    large = read_idx(mnist_folder / "train-images-idx3-ubyte")
    pillow = [np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.BILINEAR), dtype=int) for i in large]
    assert np.abs(small - np.stack(pillow)).max() <= 1


def test_a_missing_file_is_named_with_where_it_was_looked_for_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    with pytest.raises(UserError) as missing:
        load(DATA_SETS.config("fashion_mnist"))
    sentence = str(missing.value)
    assert "train-images-idx3-ubyte" in sentence
    assert str(tmp_path / "FashionMNIST" / "raw") in sentence
    assert "torchvision.datasets.FashionMNIST" in sentence


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda raw: raw[:-1], "where its header announces"),
        (lambda raw: raw[:6], "cut short"),
        (lambda raw: b"PK" + raw[2:], "not an IDX file"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "not an IDX file of bytes"),
        (lambda raw: b"\0\0\x08\x04" + b"\0\1\0\0" * 4, "of 4 dimensions"),
        (lambda raw: b"\0\0\x08\x03" + b"\x80\0\0\0" * 3, "holds 0 bytes where its header announces 9903520"),
        (lambda raw: b"\0\0\x08\0", "of 0 dimensions"),
    ],
)
def test_a_damaged_file_is_named(mnist_folder, damage, sentence):
    path = mnist_folder / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=sentence) as refused:
        load(DATA_SETS.config("mnist", accept_unknown_files=True))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("shape", [(0, 28, 28), (NUM_IMAGES, 0, 28), (NUM_IMAGES, 784), (NUM_IMAGES + 1, 28, 28)])
def test_files_that_hold_no_labeled_images_are_named(mnist_folder, shape):
    path = mnist_folder / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(np.zeros(shape, np.uint8)))
    if shape[0] == 0:
        (mnist_folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(0, np.uint8)))
    with pytest.raises(UserError, match=stating(f"{mnist_folder} … not match")):
        load(DATA_SETS.config("mnist", accept_unknown_files=True))


def test_default_folder_is_in_the_home_cache(monkeypatch):
    monkeypatch.delenv("DXMI_DATA", raising=False)
    assert data_root().parts[-2:] == (".cache", "dxmi")


def stream(batch_size: int, count: int = 10) -> BatchStream:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return BatchStream(pixels, batch_size, generator(0, "order"))


def test_an_epoch_shows_every_image_once():
    batches = stream(5)
    first_epoch = torch.cat([batches.next().x[0], batches.next().x[0]]).flatten()
    assert torch.equal(first_epoch.sort().values, from_uint8(torch.arange(10, dtype=torch.uint8)))


def test_a_batch_may_be_larger_than_the_data():
    assert stream(25).next().x[0].shape == (25, 1, 1, 1)


def test_a_stream_goes_on_from_its_state():
    whole, cut = stream(4), stream(4)
    for _ in range(3):
        whole.next(), cut.next()
    state = cut.state()
    resumed = stream(4)
    resumed.load_state(state)
    for _ in range(7):
        assert torch.equal(resumed.next().x, whole.next().x)
