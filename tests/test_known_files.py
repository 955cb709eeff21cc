"""Published files are known by what they hold: another data set's in their place is refused by its name."""

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from dxmi.data import known_files
from dxmi.data.cifar import BINARY, PYTHON, binary_rows, read_binary_batch
from dxmi.data.images import data_root
from dxmi.data.known_files import CIFAR10, FASHION_MNIST, MNIST, require_published
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.errors import UserError
from support import idx_bytes, stating
from tune.config.compose import compose_experiment

PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


def small_idx(seed: int) -> dict[str, bytes]:
    """Training images and labels in MNIST's layout."""
    rng = np.random.default_rng(seed)
    arrays = (rng.integers(0, 256, (20, 28, 28), np.uint8), rng.integers(0, 10, 20).astype(np.uint8))
    return {part: idx_bytes(array) for part, array in zip(PARTS, arrays, strict=True)}


def small_batch(seed: int) -> bytes:
    rows = np.random.default_rng(seed).integers(0, 256, (4, 3073), np.uint8)
    rows[:, 0] %= 10
    return rows.tobytes()


BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
FILES = {
    MNIST: small_idx(1),
    FASHION_MNIST: small_idx(2),
    CIFAR10: {name: small_batch(seed) for seed, name in enumerate(BATCHES)},
}
FOLDERS = {MNIST: "MNIST/raw", FASHION_MNIST: "FashionMNIST/raw", CIFAR10: BINARY}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Small files of each data set in their places, as if these were the published ones."""
    published = {
        name: {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
        for name, files in FILES.items()
    }
    owners = {md5: (name, file) for name, files in published.items() for file, md5 in files.items()}
    monkeypatch.setattr(known_files, "_PUBLISHED", published)
    monkeypatch.setattr(known_files, "_OWNERS", owners)
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    for name, files in FILES.items():
        (tmp_path / FOLDERS[name]).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / FOLDERS[name] / (f"{file}.bin" if name == CIFAR10 else file)).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "mnist8", "fashion_mnist", "cifar10"])
def test_published_files_are_taken(root, name):
    images = load(DATA_SETS.config(name))
    assert images.notes == ()
    assert str(root) in images.source


def test_gzipped_files_are_known_by_what_they_hold(root):
    for part in PARTS:
        path = root / FOLDERS[MNIST] / part
        path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=7))
        path.unlink()
    assert len(load(DATA_SETS.config("mnist"))) == 20


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_fashion_mnist_in_the_place_of_mnist_is_refused_by_name(root, packed):
    for part in PARTS:
        path, content = root / FOLDERS[MNIST] / part, FILES[FASHION_MNIST][part]
        path.unlink()
        path.with_suffix(".gz" if packed else "").write_bytes(gzip.compress(content) if packed else content)
    for name in ("mnist", "mnist8"):
        with pytest.raises(
            UserError, match=stating("Fashion-MNIST's train-images-idx3-ubyte … not MNIST's")
        ) as refused:
            load(DATA_SETS.config(name))
        assert str(root / FOLDERS[MNIST]) in str(refused.value)
        assert "data.accept_unknown_files=true" in str(refused.value)


def test_labels_of_another_data_set_are_refused(root):
    """The images are right, and nearly every label wrong."""
    (root / FOLDERS[FASHION_MNIST] / PARTS[1]).write_bytes(FILES[MNIST][PARTS[1]])
    with pytest.raises(UserError, match=stating("MNIST's train-labels-idx1-ubyte … not Fashion-MNIST's")):
        load(DATA_SETS.config("fashion_mnist"))


def test_a_batch_in_the_place_of_another_is_refused(root):
    """Twice the same 10,000 images, or some of the test set."""
    for given in ("data_batch_2", "test_batch"):
        (root / BINARY / "data_batch_1.bin").write_bytes(FILES[CIFAR10][given])
        with pytest.raises(UserError, match=stating(f"CIFAR-10's {given} … not CIFAR-10's data_batch_1")):
            load(DATA_SETS.config("cifar10"))


def test_python_batches_are_compared_by_what_they_come_to(root):
    (root / BINARY).rename(root / "elsewhere")
    (root / PYTHON).mkdir()
    for name in BATCHES:
        pixels, labels = read_binary_batch(root / "elsewhere" / f"{name}.bin")
        tree = {"data": pixels.reshape(len(pixels), -1), "labels": labels.tolist()}
        (root / PYTHON / name).write_bytes(pickle.dumps(tree))
    assert len(load(DATA_SETS.config("cifar10"))) == 20
    tree["labels"][0] = (tree["labels"][0] + 1) % 10
    (root / PYTHON / "data_batch_3").write_bytes(pickle.dumps(tree))
    with pytest.raises(UserError, match=stating("not CIFAR-10's data_batch_3 … published … MD5")):
        load(DATA_SETS.config("cifar10"))


def test_a_batch_of_rows_is_written_as_it_was_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(small_batch(0))
    assert binary_rows(read_binary_batch(tmp_path / "a.bin")) == small_batch(0)


def test_one_flipped_bit_is_noticed_and_may_be_accepted(root):
    path = root / FOLDERS[MNIST] / PARTS[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    before = load(DATA_SETS.config("fashion_mnist")).signature
    with pytest.raises(UserError, match=stating("not MNIST's train-images-idx3-ubyte … published")):
        load(DATA_SETS.config("mnist"))
    images = load(DATA_SETS.config("mnist", accept_unknown_files=True))
    assert images.notes == ("not compared with the published files of mnist (data.accept_unknown_files)",)
    assert images.signature != before


def test_accepting_changes_no_identity_but_that_of_the_data(root):
    given = "data.accept_unknown_files=true"
    plain, accepting = (compose_experiment(["data=mnist", *more]).experiment for more in ([], [given]))
    assert plain.data != accepting.data
    assert plain.signature == accepting.signature
    assert load(plain.data).signature == load(accepting.data).signature
    assert "accept_unknown_files" not in accepting.identity["data"]


@pytest.mark.parametrize("name", ["digits", "gaussians8"])
def test_data_that_come_from_no_published_file_have_nothing_to_accept(name):
    with pytest.raises(UserError, match=stating(f"data.accept_unknown_files … {name}")):
        compose_experiment([f"data={name}", "data.accept_unknown_files=true"])


def test_more_than_ten_classes_may_be_accepted(root):
    """EMNIST's letters, say, in MNIST's layout."""
    letters = np.arange(20, dtype=np.uint8) + 3
    (root / FOLDERS[MNIST] / PARTS[1]).write_bytes(idx_bytes(letters))
    images = load(DATA_SETS.config("mnist", accept_unknown_files=True))
    assert (images.num_classes, images.class_names[-1]) == (23, "22")
    assert images.class_counts.tolist() == [0] * 3 + [1] * 20


def test_no_file_stands_for_two():
    sums = [md5 for files in known_files._PUBLISHED.values() for md5 in files.values()]
    assert len(sums) == len(set(sums)) == 14
    with pytest.raises(UserError, match="MD5 d41d8cd98f00b204e9800998ecf8427e"):  # of nothing
        require_published(Path("x"), b"", MNIST, PARTS[0])


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("mnist", "MNIST/raw", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),  # LeCun's page
        ("fashion_mnist", "FashionMNIST/raw", [6000] * 10),
    ],
)
def test_the_real_files_are_the_published_ones(name, folder, counts):
    if not (data_root() / folder).is_dir():
        pytest.skip(f"{folder} is not on this machine")
    images = load(DATA_SETS.config(name))
    assert images.class_counts.tolist() == counts
