"""Named random streams: distinct names, distinct numbers."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from dxmi import seeds
from dxmi.errors import UserError
from dxmi.seeds import continue_stream, generator

ALIKE = (97, "report/157"), (143, "report/142")
"""Two streams whose hashes begin with the same 32 bits, which is all that `manual_seed` keeps."""


def drawn(seed: int, stream: str) -> list[float]:
    return torch.rand(8, generator=generator(seed, stream), dtype=torch.float64).tolist()


def hash_of(seed: int, stream: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little", signed=True)


def test_streams_that_share_32_bits_of_their_hash_differ():
    first, second = (torch.Generator().manual_seed(hash_of(*name)) for name in ALIKE)
    assert torch.equal(torch.rand(8, generator=first), torch.rand(8, generator=second))
    assert not set(drawn(*ALIKE[0])) & set(drawn(*ALIKE[1]))


@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_seeds_2_to_the_32_apart_differ(draw):
    assert not torch.equal(
        *(draw(8, generator=generator(seed, "finetune/noise")) for seed in (5, 5 + 2**32)),
    )
    assert torch.equal(*(draw(8, generator=generator(5, "finetune/noise")) for _ in range(2)))


def test_many_streams_have_as_many_states():
    names = itertools.product(range(60), ("weights/energy", "pretrain/noise", *(f"report/{k}" for k in range(8))))
    states = {generator(*name).get_state().numpy().tobytes() for name in names}
    assert len(states) == 60 * 10


def test_a_stream_is_numpys_mersenne_twister_from_the_hash_of_its_name():
    twister = np.random.MT19937()
    key = np.frombuffer(hashlib.shake_256(b"3/finetune/states").digest(4 * 624), dtype="<u4")
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    ours = torch.empty(2000, dtype=torch.int64).random_(0, 2**24, generator=generator(3, "finetune/states"))
    assert ours.tolist() == (twister.random_raw(2000) % 2**24).tolist()


def test_the_numbers_are_uniform_from_the_first_on():
    """Mean and variance of the first number of 2,000 streams, within four standard errors."""
    first = np.array([drawn(seed, "noise")[0] for seed in range(2000)])
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(first.var() - 1 / 12) < 4 * (1 / 180 / 2000) ** 0.5


def test_an_unknown_layout_of_the_state_is_refused(monkeypatch):
    monkeypatch.setattr(seeds, "_FIRST_BYTE", 32)
    seeds._check_layout.cache_clear()
    with pytest.raises(UserError, match=f"PyTorch {torch.__version__.split('+', maxsplit=1)[0]}.*2.13"):
        generator(0, "noise")
    seeds._check_layout.cache_clear()


def test_a_stream_goes_on_from_its_state_and_from_a_gpus_with_other_numbers():
    """A GPU's state is 16 bytes: its seed and its offset."""
    saved = generator(0, "noise")
    torch.randn(5, generator=saved)
    own = generator(0, "other")
    assert continue_stream(own, saved.get_state())
    assert torch.equal(torch.randn(9, generator=own), torch.randn(9, generator=saved))

    def draws(state: list[int]) -> torch.Tensor:
        foreign = generator(0, "noise")
        assert not continue_stream(foreign, torch.tensor(state, dtype=torch.uint8))
        return torch.randn(9, generator=foreign)

    first = draws([1] * 16)
    assert torch.equal(first, draws([1] * 16))
    for other in (draws([1] * 15 + [2]), torch.randn(9, generator=generator(0, "noise"))):
        assert not torch.isin(first, other).any()
