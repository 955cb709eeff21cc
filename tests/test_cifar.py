"""CIFAR-10 in its two official formats, and pickles that are none."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi.data.cifar import read_binary_batch, read_python_batch
from dxmi.data.images import data_root
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.errors import UserError
from support import stating

ROWS = 6


def fake_batch(seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (ROWS, 3072), dtype=np.uint8), rng.integers(0, 10, ROWS).tolist()


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes of the official files, which Python 2 wrote with protocol 2: text is bytes there."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + value.to_bytes(2, "little")

    raw = pixels.tobytes()
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff" * 1
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    entries = text(b"data") + reconstruct + state + text(b"labels") + listed + text(b"batch_label") + text(b"batch 1")
    return b"\x80\x02}(" + entries + b"u."


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    return tmp_path


NAMES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def write_binary(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        pixels, labels = fake_batch(seed)
        rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def write_python(root: Path, protocol: int | None) -> None:
    """By Python 2 if `protocol` is None."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        pixels, labels = fake_batch(seed)
        tree = {"data": pixels, "labels": labels, "batch_label": name, "filenames": ["a.png"] * ROWS}
        raw = python2_pickle(pixels, labels) if protocol is None else pickle.dumps(tree, protocol)
        (folder / name).write_bytes(raw)


def test_binary_batches_keep_order_planes_and_labels(root):
    write_binary(root)
    images = load(DATA_SETS.config("cifar10", accept_unknown_files=True))
    assert images.pixels.shape == (5 * ROWS, 3, 32, 32)
    assert images.num_classes == 10
    pixels, labels = fake_batch(1)
    assert images.labels[ROWS : 2 * ROWS].tolist() == labels
    red, green, blue = pixels[0, :1024], pixels[0, 1024:2048], pixels[0, 2048:]
    expected = np.stack([plane.reshape(32, 32) for plane in (red, green, blue)])
    assert np.array_equal(images.pixels[ROWS].numpy(), expected)


@pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4])
def test_python_batches_hold_the_same_images(root, protocol):
    write_python(root, protocol)
    from_python = load(DATA_SETS.config("cifar10", accept_unknown_files=True))
    write_binary(root)
    from_binary = load(DATA_SETS.config("cifar10", accept_unknown_files=True))  # which is preferred
    assert torch.equal(from_python.pixels, from_binary.pixels)
    assert torch.equal(from_python.labels, from_binary.labels)
    assert from_python.signature == from_binary.signature


def test_python_2_pickles_are_what_the_pickle_module_reads_too():
    pixels, labels = fake_batch(0)
    tree = pickle.loads(python2_pickle(pixels, labels), encoding="latin1")
    assert np.array_equal(tree["data"], pixels)
    assert tree["labels"] == labels


class Attack:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


class Deep:
    """Hides a name among what may be asked for."""

    def __reduce__(self):
        return np.ndarray.tofile, (np.zeros(3), "attacked")


@pytest.mark.parametrize("attack", [Attack(), Deep(), {"data": Attack(), "labels": [1]}])
def test_a_pickle_that_asks_for_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(attack))
    with pytest.raises(UserError, match=stating("data_batch_1 … do not trust")):
        read_python_batch(path)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"PK\x03\x04 not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
        python2_pickle(*fake_batch(0))[:-500],
        b"\x80\x02cnumpy\nndarray\n(K\x02tR.",
    ],
)
def test_what_is_no_batch_is_refused_in_a_sentence(tmp_path, raw):
    path = tmp_path / "data_batch_1"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=stating("data_batch_1 … Fetch … again")):
        read_python_batch(path)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "holds 0 bytes"),
        (bytes(3073 * 2 - 1), "multiple of 3073"),
        (bytes([10]) + bytes(3072), "a label outside 0..9"),
    ],
)
def test_a_damaged_binary_batch_is_named(tmp_path, raw, sentence):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=sentence) as refused:
        read_binary_batch(path)
    assert str(path) in str(refused.value)


def test_missing_files_are_named_with_where_to_get_them(root):
    with pytest.raises(UserError, match=r"cifar-10-batches-bin.*cifar-10-binary\.tar\.gz"):
        load(DATA_SETS.config("cifar10", accept_unknown_files=True))
    (root / "cifar-10-batches-bin").mkdir()
    with pytest.raises(UserError, match=stating("data_batch_1.bin … read")):
        load(DATA_SETS.config("cifar10", accept_unknown_files=True))


def test_one_class_keeps_that_class_alone(root):
    write_binary(root)
    images = load(DATA_SETS.config("cifar10", accept_unknown_files=True, label=fake_batch(0)[1][0]))
    assert images.labels.unique().tolist() == [fake_batch(0)[1][0]]


def test_the_real_images_are_the_official_ones():
    folder = data_root() / "cifar-10-batches-bin"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not on this machine")
    images = load(DATA_SETS.config("cifar10"))
    assert images.labels.bincount().tolist() == [5000] * 10
    rows = torch.cat([images.labels.to(torch.uint8)[:, None], images.pixels.flatten(1)], dim=1)
    md5 = hashlib.md5(rows[:10_000].numpy().tobytes()).hexdigest()
    assert md5 == "5dd7e06a14cb22eb9f671a540d1b7c25"  # of data_batch_1.bin, as its authors publish it
