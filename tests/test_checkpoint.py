"""Checkpoints: whole or refused, and never executed."""

import hashlib
import json
import os
import pickle
import struct

import pytest
import torch

from dxmi.persistence import checkpoint
from dxmi.persistence.checkpoint import DamagedCheckpointError
from dxmi.persistence.files import write_atomic

GROUPS = {
    "algorithm": {"weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "empty": torch.empty(0)},
    "state": {"generator": torch.Generator().get_state(), "step": torch.tensor(3.0)},
}


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, 7, GROUPS, {"best": None})


def test_what_is_saved_is_loaded_bitwise(saved):
    loaded = checkpoint.load(saved)
    assert loaded.step == 7
    assert loaded.meta["best"] is None
    for name, group in GROUPS.items():
        assert loaded.groups[name].keys() == group.keys()
        for key, value in group.items():
            assert torch.equal(loaded.groups[name][key], value)
            assert loaded.groups[name][key].dtype == value.dtype


@pytest.mark.parametrize("name", ["algorithm.safetensors", "state.safetensors", "meta.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    ],
    ids=["missing", "truncated", "emptied", "one bit flipped"],
)
def test_a_damaged_file_is_named(saved, name, damage):
    damage(saved / name)
    with pytest.raises(DamagedCheckpointError) as refused:
        checkpoint.load(saved)
    assert name in str(refused.value)
    assert str(saved) in str(refused.value)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"{", b'{"meta.json": 3}', b'{"../secret": "0"}', json.dumps({"a": "b"}).encode(), b"\xff"],
)
def test_a_damaged_manifest_is_named(saved, manifest):
    (saved / "manifest.json").write_bytes(manifest)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        checkpoint.load(saved)


def test_a_link_is_refused(saved, tmp_path):
    outside = tmp_path / "outside"
    (saved / "meta.json").rename(outside)
    (saved / "meta.json").symlink_to(outside)
    with pytest.raises(DamagedCheckpointError, match="link"):
        checkpoint.load(saved)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    "weights",
    [pickle.dumps(Bomb()), struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{]", b"\x80\x04"],
    ids=["a pickle", "a header longer than the file", "a header that is no JSON", "cut pickle"],
)
def test_weights_that_are_no_safetensors_are_refused_even_with_a_matching_manifest(saved, weights):
    (saved / "algorithm.safetensors").write_bytes(weights)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["algorithm.safetensors"] = hashlib.sha256(weights).hexdigest()
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"algorithm\.safetensors"):
        checkpoint.load(saved)


def test_newest_falls_back_to_the_one_before_and_says_why(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, GROUPS, {})
    (checkpoint.path_of(tmp_path, 3) / "state.safetensors").unlink()
    found, complaints = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert len(complaints) == 1
    assert "step_00000003" in complaints[0]


def test_newest_of_nothing_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    checkpoint.save(tmp_path, 1, GROUPS, {"n": 1})
    checkpoint.save(tmp_path, 1, GROUPS, {"n": 2})
    assert checkpoint.load(checkpoint.path_of(tmp_path, 1)).meta["n"] == 2


def test_prune_keeps_what_it_is_told_and_clears_half_written_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, GROUPS, {})
    (tmp_path / ".step_00000004.99.part").mkdir()
    checkpoint.prune(tmp_path, {1, 3})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, GROUPS, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, GROUPS, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
