"""Public checkpoints: read from files, put into networks and written back; the numbers are in test_unet and others."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from public import Public, adm, ddpm
from safetensors.torch import save_file
from torch import Tensor

from dxmi.errors import UserError
from dxmi.networks.configs import EdmUnetConfig, MlpConfig, UnetConfig
from dxmi.networks.pretrained.layouts import digest, load_public, public_log_sigma, to_public
from dxmi.networks.pretrained.public_files import read_public
from dxmi.networks.registry import build_denoiser
from dxmi.networks.unet import Unet
from support import stating

SHAPE = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "groups": 8}
EVENT = (3, 8, 8)


def unet(config: UnetConfig | None = None) -> Unet:
    return build_denoiser(config or UnetConfig(**SHAPE), EVENT, torch.Generator().manual_seed(0))


def ddpm_state() -> dict[str, Tensor]:
    """Names, shapes and random values of a small network in the layout of the CIFAR-10 checkpoints."""
    public = Public()
    ddpm(public, torch.zeros(1, *EVENT, dtype=torch.float64), torch.zeros(1), **SHAPE)
    return public.floats()


def adm_state(classes: int = 0) -> dict[str, Tensor]:
    public = Public()
    style = {"head_channels": 8, "classes": classes, "scale_shift": True, "resample_in_blocks": True}
    labels = torch.zeros(1, dtype=torch.int64) if classes else None
    adm(public, torch.zeros(1, *EVENT, dtype=torch.float64), torch.zeros(1), labels, **SHAPE, **style)
    return public.floats()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------
# There and back.


def test_a_ddpm_checkpoint_survives_the_way_into_a_network_and_back():
    state, network = ddpm_state(), unet()
    assert load_public(network, state) == "ddpm"
    assert equal(to_public(network, "ddpm"), state)


@pytest.mark.parametrize("classes", [0, 4])
def test_an_adm_checkpoint_survives_the_way_into_a_network_and_back(classes):
    state = adm_state(classes)
    network = unet(EdmUnetConfig(**SHAPE, head_channels=8, classes=classes))
    assert load_public(network, state) == "adm"
    assert equal(to_public(network, "adm"), state)


def test_half_precision_weights_become_single_precision():
    """The large networks are kept in float16."""
    state = {name: tensor.half() for name, tensor in ddpm_state().items()}
    network = unet()
    load_public(network, state)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert torch.equal(network.conv_in.weight, state["conv_in.weight"].float())


def test_the_sigmas_of_the_dxmi_release_are_read_beside_the_weights():
    """It plants log sigma on the network as `log_betas`, and the schedule's sigmas, whose last counts, as `std`."""
    log_betas, std = torch.tensor([-0.2, -1.0, -2.0]), torch.tensor([0.8, 0.4, 0.001])
    release = {**ddpm_state(), "log_betas": log_betas, "std": std}
    assert load_public(unet(), release) == "ddpm"
    torch.testing.assert_close(
        public_log_sigma(release), torch.tensor([-0.2, -1.0, np.log(0.001)], dtype=torch.float32)
    )
    assert log_betas[-1] == -2.0
    assert torch.equal(public_log_sigma({"log_betas": log_betas}), log_betas)
    assert public_log_sigma(ddpm_state()) is None


def test_a_digest_is_of_names_shapes_and_numbers():
    state = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.arange(6.0)}
    others = [{**state, "a": torch.arange(6.0).view(2, 3)}, {**state, "b": torch.zeros(2).half()}, {"a": state["a"]}]
    assert digest(state) == digest(same)
    assert len({digest(other) for other in [state, *others]}) == 4


# ----------------------------------------------------------------------------
# Refusals.


def test_a_checkpoint_of_another_network_is_refused_with_the_first_difference():
    state = ddpm_state()
    lacking = {name: tensor for name, tensor in state.items() if name != "mid.attn_1.q.bias"}
    with pytest.raises(UserError, match=stating("lacks … mid.attn_1.q.bias … config")):
        load_public(unet(), lacking)
    with pytest.raises(UserError, match=stating("no place … more.weight")):
        load_public(unet(), {**state, "more.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=stating("conv_out.weight … (6, 16, 3, 3)")):
        load_public(unet(), {**state, "conv_out.weight": torch.zeros(6, 16, 3, 3)})


def test_a_linear_layer_in_the_place_of_a_1x1_convolution_is_the_same():
    state, networks = ddpm_state(), (unet(), unet())
    load_public(networks[0], state)
    ones = {
        name: tensor[..., 0, 0] for name, tensor in state.items() if name.endswith((".q.weight", ".proj_out.weight"))
    }
    load_public(networks[1], {**state, **ones})
    assert ones
    assert equal(networks[0].state_dict(), networks[1].state_dict())


@pytest.mark.parametrize("part", ["q", "k", "v", "proj_out"])
@pytest.mark.parametrize("change", ["3x3", "wider", "number", "vector", "longer"])
def test_tensors_of_other_shapes_are_refused_in_a_sentence(part, change):
    state = ddpm_state()
    name = next(name for name in state if name.endswith(f".{part}.weight"))
    rows, columns = state[name].shape[:2]
    shape = {
        "3x3": (rows, columns, 3, 3), "wider": (rows, columns + 1, 1, 1), "number": (), "vector": (rows,),
        "longer": (rows + 1, columns, 1, 1),
    }[change]  # fmt: skip
    with pytest.raises(UserError, match=r"of the checkpoint"):
        load_public(unet(), {**state, name: torch.zeros(shape)})


def test_an_unknown_layout_is_refused():
    with pytest.raises(UserError, match=stating("layout … Unet … a, b")):
        load_public(unet(), {"a": torch.zeros(1), "b": torch.zeros(1)})
    mlp = build_denoiser(MlpConfig(), EVENT, torch.Generator())
    with pytest.raises(UserError, match=stating("layout … MlpDenoiser")):
        load_public(mlp, ddpm_state())


# ----------------------------------------------------------------------------
# Files.


def test_plain_wrapped_and_safetensors_files_read_alike(tmp_path: Path):
    state = ddpm_state()
    contents = {
        "plain.ckpt": state,
        "parallel.pth": {f"module.{name}": tensor for name, tensor in state.items()},
        "release.pth": {"state_dict": state, "fid": np.float64(3.19), "epoch": 7},
        "release32.pth": {"state_dict": state, "fid": np.float32(3.19)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        assert equal(read_public(tmp_path / name).tensors, state), name
    save_file(state, tmp_path / "model.safetensors")
    assert equal(read_public(tmp_path / "model.safetensors").tensors, state)


def test_sigmas_without_the_wrappers_prefix_stay_beside_the_weights(tmp_path: Path):
    state = {f"module.{name}": tensor for name, tensor in ddpm_state().items()}
    torch.save({**state, "module.log_betas": torch.zeros(3)}, tmp_path / "a.pth")
    assert "log_betas" in read_public(tmp_path / "a.pth").tensors


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_code_of_a_file_is_executed(tmp_path: Path):
    touched = tmp_path / "touched"
    torch.save({"state_dict": ddpm_state(), "more": _Malicious(touched)}, tmp_path / "a.pth")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(_Malicious(touched), protocol=2))
    for name in ("a.pth", "b.pkl"):
        with pytest.raises(UserError, match=stating("executed")):
            read_public(tmp_path / name)
    assert not touched.exists()


def test_a_file_that_is_missing_damaged_or_without_weights_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=stating("not exist")):
        read_public(tmp_path / "none.pth")
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors in here")
        with pytest.raises(UserError, match=stating(f"{name} … text")):
            read_public(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=stating("no state_dict")):
        read_public(tmp_path / "b.pth")
