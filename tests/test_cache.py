"""The cache: one computes, the others wait and read; a killed writer leaves nothing behind."""

import subprocess
import sys
import time

import pytest
import torch

from dxmi.errors import UserError
from dxmi.metrics.gaussians import Gaussian
from dxmi.persistence.cache import cached
from support import FirstOfTwo

WORKER = """
import sys, time, torch
from pathlib import Path
from dxmi.persistence.cache import cached
folder = Path(sys.argv[1])
def compute():
    with (folder / "computed").open("a") as log:
        log.write("x")
    time.sleep(float(sys.argv[2]))
    return {"x": torch.arange(5)}
print(cached(folder / "result.safetensors", compute)["x"].sum().item())
"""


def worker(folder, seconds):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(seconds)], stdout=subprocess.PIPE)


def test_of_three_processes_one_computes_and_all_read(tmp_path):
    workers = [worker(tmp_path, 1.0) for _ in range(3)]
    assert [int(w.communicate(timeout=60)[0]) for w in workers] == [10, 10, 10]
    assert (tmp_path / "computed").read_text() == "x"


def test_a_killed_writer_holds_up_nobody(tmp_path):
    killed = worker(tmp_path, 60)
    while not (tmp_path / "computed").exists():
        time.sleep(0.02)
    killed.kill()
    killed.communicate(timeout=60)
    assert int(worker(tmp_path, 0).communicate(timeout=60)[0]) == 10
    assert (tmp_path / "computed").read_text() == "xx"


def test_a_second_call_does_not_compute(tmp_path):
    path = tmp_path / "result.safetensors"
    cached(path, lambda: {"x": torch.ones(2)})
    again = cached(path, lambda: pytest.fail("computed twice"))
    assert torch.equal(again["x"], torch.ones(2))


def test_what_was_computed_is_what_will_be_read(tmp_path):
    """To the bit and the stride: BLAS takes another path for a matrix that lies column by column."""

    def compute() -> dict[str, torch.Tensor]:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        return {
            "transposed": x.T,
            "factor": torch.linalg.cholesky(x.T.cov().double()),
            "slice": x[:, 1::2],
            "expanded": x[:1].expand(5, 4),
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "learned": torch.nn.Parameter(x.clone()),
            "row": x[:, :1].T,
            "half": x.bfloat16().T,
        }

    path = tmp_path / "result"
    computed, read = cached(path, compute), cached(path, lambda: pytest.fail("computed twice"))
    assert list(computed) == list(read)
    for name, x in computed.items():
        y = read[name]
        assert (x.shape, x.stride(), x.dtype, x.requires_grad) == (y.shape, y.stride(), y.dtype, y.requires_grad)
        assert torch.equal(x, y)


def test_a_distance_to_a_cached_reference_is_that_to_the_fitted_one(tmp_path):
    """Equal bits, whether the covariance has full rank, has none, or there are fewer samples than features."""
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    for number, features in enumerate((x, x * (torch.arange(12) > 3), x[:7])):
        fitted = Gaussian.of(features)
        read = cached(tmp_path / str(number), lambda fitted=fitted: {"mean": fitted.mean, "root": fitted.root})
        assert read["root"].stride() == fitted.root.stride()
        assert Gaussian(read["mean"], read["root"]).distance(x + 1.0) == fitted.distance(x + 1.0)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "result"
    cached(path, lambda: {"x": torch.ones(2)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(cached(path, lambda: {"x": torch.zeros(2)})["x"], torch.zeros(2))


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x00" * 100])
def test_a_damaged_result_is_computed_again(tmp_path, content):
    path = tmp_path / "result.safetensors"
    path.write_bytes(content)
    assert torch.equal(cached(path, lambda: {"x": torch.ones(2)})["x"], torch.ones(2))


def test_a_group_reads_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.cached"
    computed = cached(path, lambda: {"x": torch.arange(3)})
    monkeypatch.setattr("dxmi.persistence.cache.lock_for", lambda _: pytest.fail("there is nothing to wait for"))
    found = cached(path, lambda: pytest.fail("it is there"), workers=FirstOfTwo())
    assert torch.equal(found["x"], computed["x"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="DXMI_CACHE"):
        cached(tmp_path / "file" / "sub" / "result.safetensors", lambda: {"x": torch.ones(2)})
