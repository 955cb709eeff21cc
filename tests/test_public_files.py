"""Public checkpoints as files: which weights are taken of what trainers write, and what is refused in a sentence."""

import argparse
import gzip
import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dxmi.data.configs import DataConfig
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.diffusion.schedules.ddpm import forward_betas
from dxmi.errors import UserError
from dxmi.networks.configs import EdmUnetConfig, UnetConfig
from dxmi.networks.pretrained.diffusers_folder import (
    require_same_model,
    require_same_noise,
    scheduler_of_folder,
    write_folder,
)
from dxmi.networks.pretrained.layouts import digest, load_public, public_log_sigma, to_public
from dxmi.networks.pretrained.public_files import read_public
from dxmi.networks.registry import build_denoiser
from dxmi.networks.unet import Unet
from support import fuzzed, idx_bytes, missing, stating

EVENT = (1, 4, 4)
CONFIG = UnetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=None, groups=4)


def unet(seed: int = 0, config: UnetConfig = CONFIG) -> Unet:
    network = build_denoiser(config, EVENT, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    assert isinstance(network, Unet)
    return network


RAW = to_public(unet(0), "ddpm")
AVERAGE = to_public(unet(1), "ddpm")
ADM = EdmUnetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=None, groups=4, head_channels=4)
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def lit_ema() -> dict[str, Tensor]:
    """Latent diffusion's: an average under names without dots."""
    raw, average = (to_public(unet(seed, ADM), "adm") for seed in (0, 1))
    flat = {name.replace(".", ""): t for name, t in under("diffusion_model.", average).items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    other = {"betas": torch.zeros(3), "first_stage_model.conv.weight": torch.zeros(2)}
    return {**under("model.diffusion_model.", raw), **under("model_ema.", flat), **counters, **other}


WITH_AVERAGE = {
    **{
        key: {"model": RAW, key: AVERAGE, "optimizer": OPTIMIZER}
        for key in (
            *("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema"),
            *("model_ema_state_dict", "averaged_model", "shadow", "modelEMA", "swa_model", "netG_ema"),
        )
    },
    "beside state_dict": {"state_dict": RAW, "state_dict_ema": AVERAGE, "epoch": 3},
    "beside params": {"params": RAW, "params_ema": AVERAGE},
    "list": [RAW, OPTIMIZER, 5, 100, AVERAGE],
    "list of wrapped": [under("module.", RAW), OPTIMIZER, 5, 100, AVERAGE],
    "nested shadow": {"model": RAW, "ema": {"decay": 0.999, "num_updates": 3, "shadow": AVERAGE, "backup": {}}},
    "shadow_params": {
        "model": under("module.", RAW) | {"sigmas": torch.zeros(5)},
        "ema": {"decay": 0.9, "shadow_params": list(AVERAGE.values()), "collected_params": list(RAW.values())},
    },
    "prefix": {**under("online_model.", RAW), **under("ema_model.", AVERAGE), "initted": torch.tensor(True)},
    "lucidrains": {"step": 3, "model": RAW, "ema": {**under("ema_model.module.", AVERAGE), "step": torch.tensor([3])}},
    "averaged model": {"raw": RAW, "avg": {"n_averaged": torch.tensor(9), **under("module.", AVERAGE)}},
    "compiled": {"model": under("_orig_mod.", RAW), "ema": under("module._orig_mod.", AVERAGE)},
    "fsdp": {"model": RAW, "ema": under("_fsdp_wrapped_module.", AVERAGE)},
    "lightning": {"state_dict": {**under("model.net.", RAW), **under("ema_model.net.", AVERAGE)}, "hparams": {}},
    "decays": {"ema_0.99": RAW, "ema_0.9999": AVERAGE},
    "all averaged": under("ema_model.", AVERAGE),
    "namespace": {"args": argparse.Namespace(lr=1.0), "model": RAW, "ema": AVERAGE},
}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# ----------------------------------------------------------------------------
# Averages.


@pytest.mark.parametrize("kind", WITH_AVERAGE)
def test_the_average_is_taken_and_said(kind, tmp_path):
    weights = read_public(write(tmp_path / "a.pt", WITH_AVERAGE[kind]))
    assert equal(weights.tensors, AVERAGE)
    assert "an average of the weights" in weights.note
    assert weights.taken in weights.note
    if "optimizer" in WITH_AVERAGE[kind]:
        assert "left aside: model, optimizer" in weights.note


def test_an_average_without_dots_gets_those_of_the_raw_names(tmp_path):
    weights = read_public(write(tmp_path / "a.ckpt", {"state_dict": lit_ema()}))
    network = unet(5, ADM)
    assert load_public(network, weights.tensors) == "adm"
    assert equal(to_public(network, "adm"), to_public(unet(1, ADM), "adm"))
    assert "model_ema" in weights.note


def test_what_an_average_lacks_is_the_raw_one(tmp_path):
    """Keepers of averages know parameters that are trained; buffers and frozen layers are in the raw weights alone."""
    partial = {name: tensor for name, tensor in AVERAGE.items() if not name.startswith("conv_out")}
    weights = read_public(write(tmp_path / "a.pt", {"model": RAW, "ema": partial}))
    assert torch.equal(weights.tensors["conv_out.weight"], RAW["conv_out.weight"])
    assert torch.equal(weights.tensors["conv_in.weight"], AVERAGE["conv_in.weight"])
    assert missing("2 … raw", weights.note) == []


@pytest.mark.parametrize(
    "content",
    [
        {"model": RAW, "optimizer": OPTIMIZER},
        {"discriminator_ema": {"fc.weight": torch.zeros(4)}, "model": RAW},
        {"state_dict": under("model._orig_mod.", RAW), "optimizer_states": [OPTIMIZER]},
    ],
)
def test_raw_weights_are_taken_where_no_average_is_theirs(content, tmp_path):
    weights = read_public(write(tmp_path / "a.pt", content))
    assert equal(weights.tensors, RAW)
    assert "raw weights" in weights.note or not weights.note


def test_a_file_of_nothing_but_weights_has_no_note(tmp_path):
    assert read_public(write(tmp_path / "a.pt", RAW)).note == ""
    assert read_public(write(tmp_path / "b.pt", {"state_dict": RAW, "epoch": 3})).note == ""


def test_averages_that_cannot_be_named_are_refused(tmp_path):
    shadow = {"model": RAW, "ema": {"shadow_params": list(AVERAGE.values())[:-1]}}
    with pytest.raises(UserError, match=stating(f"ema.shadow_params … {len(AVERAGE) - 1} … names")):
        read_public(write(tmp_path / "a.pt", shadow))
    flat = {name.replace(".", ""): tensor for name, tensor in AVERAGE.items()}
    with pytest.raises(UserError, match=stating("model_ema … names … dots")):
        read_public(write(tmp_path / "b.pt", {**under("model_ema.", flat), "model.other.weight": torch.zeros(2)}))


def test_names_from_a_file_stand_on_one_line(tmp_path):
    for content in ({"a\nb\x1b[31m": 3}, {"model": {"a\nb": torch.zeros(3)}}):
        with pytest.raises(UserError) as refusal:
            load_public(unet(), read_public(write(tmp_path / "a.pt", content)).tensors)
        assert "a?b" in str(refusal.value)


def test_the_keys_of_a_file_without_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=stating("a.pt … state_dict … epoch … config")):
        read_public(write(tmp_path / "a.pt", {"epoch": 3, "config": {}}))
    assert "model, ema" in read_public(write(tmp_path / "b.pt", {"model": RAW, "ema": AVERAGE})).keys


# ----------------------------------------------------------------------------
# Tensors that are no weights.


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(number):
    state = {**RAW, "conv_in.weight": RAW["conv_in.weight"].clone()}
    state["conv_in.weight"][0, 0, 0, 0] = number
    with pytest.raises(UserError, match=stating("conv_in.weight … 1 … 72 … not finite")):
        load_public(unet(), state)


def test_weights_beyond_single_precision_are_refused():
    with pytest.raises(UserError, match=stating("conv_in.bias … not finite … float32")):
        load_public(unet(), {**RAW, "conv_in.bias": torch.full((8,), 1e300, dtype=torch.float64)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_types_are_refused(dtype):
    with pytest.raises(UserError, match=stating(f"conv_in.bias … {dtype}")):
        load_public(unet(), {**RAW, "conv_in.bias": torch.zeros(8).to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_precisions_are_read(dtype):
    network = unet(3)
    load_public(network, {name: tensor.to(dtype) for name, tensor in RAW.items()})
    assert torch.equal(network.conv_in.weight, RAW["conv_in.weight"].to(dtype).float())


def test_a_tensor_larger_than_its_memory_is_refused(tmp_path):
    state = {**RAW, "conv_in.bias": torch.zeros(1).expand(10**13)}
    with pytest.raises(UserError, match=stating("a.pt … conv_in.bias … larger")):
        read_public(write(tmp_path / "a.pt", state))
    with pytest.raises(UserError, match=stating("b.pt … conv_in.bias … plain tensor")):
        read_public(write(tmp_path / "b.pt", {**RAW, "conv_in.bias": torch.zeros(8).to_sparse()}))


@pytest.mark.parametrize("sigmas", [{"log_betas": torch.zeros(())}, {"log_betas": torch.full((3,), float("nan"))}])
def test_sigmas_that_are_none_are_refused(sigmas):
    with pytest.raises(UserError, match="log_betas"):
        public_log_sigma({**RAW, **sigmas})
    with pytest.raises(UserError, match=stating("std … 0.0 … noise")):
        public_log_sigma({"log_betas": torch.zeros(3), "std": torch.zeros(3)})


# ----------------------------------------------------------------------------
# Files that are something else.

OTHER_FILES = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "empty": b"",
    "text": b"conv_in.weight: 0.1\n",
    "web page": b"\n <!DOCTYPE html><html><body>Sign in</body></html>",
    "gzip": gzip.compress(b"x"),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "damaged … safetensors": (2**20).to_bytes(8, "little") + b'{"a": 1}',
    "damaged": bytes(range(256)),
}


@pytest.mark.parametrize("what", OTHER_FILES)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_of_another_kind_is_named(what, name, tmp_path):
    (tmp_path / name).write_bytes(OTHER_FILES[what])
    with pytest.raises(UserError, match=stating(f"{tmp_path / name} … {what}")):
        read_public(tmp_path / name)


def test_a_place_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for path, what in (
        (tmp_path / "fifo", "regular file"),
        (Path("/dev/zero"), "regular file"),
        (tmp_path / "link", "link … nowhere … not exist"),
        (tmp_path / "none", "not exist"),
        (tmp_path / "empty", "folder of diffusers … nothing"),
    ):
        with pytest.raises(UserError, match=stating(f"{path} … {what}")):
            read_public(path)


def test_another_archive_and_an_altered_one_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=stating("a.pt … zip archive … torch.save")):
        read_public(tmp_path / "a.pt")
    data = write(tmp_path / "b.pt", RAW).read_bytes()
    place = data.index(RAW["conv_out.weight"].numpy().tobytes()) + 3
    (tmp_path / "b.pt").write_bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
    with pytest.raises(UserError, match=stating("b.pt … checksum")):
        read_public(tmp_path / "b.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "c.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        read_public(tmp_path / "c.pt")


# ----------------------------------------------------------------------------
# Folders of diffusers.


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(unet(1), EVENT, tmp_path / "unet")
    return tmp_path / "unet"


FILE = "diffusion_pytorch_model"
STATE = to_public(unet(1), "diffusers")


def change(path: Path, **values: object) -> None:
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**tree, **values}))


def test_bin_sharded_and_variant_files_are_read(folder):
    whole = folder / f"{FILE}.safetensors"
    names = sorted(STATE)
    whole.rename(folder / f"{FILE}.fp16.safetensors")
    assert equal(read_public(folder).tensors, STATE)
    (folder / f"{FILE}.fp16.safetensors").rename(folder / f"{FILE}.non_ema.safetensors")
    write(folder / f"{FILE}.bin", to_public(unet(2), "diffusers"))
    weights = read_public(folder)
    assert equal(weights.tensors, to_public(unet(2), "diffusers"))
    assert "non_ema" in weights.note
    (folder / f"{FILE}.bin").unlink()
    (folder / f"{FILE}.non_ema.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: STATE[name] for name in part}, folder / f"{FILE}-0000{number}-of-00002.safetensors")
    shard = {name: f"{FILE}-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    index = folder / f"{FILE}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    assert equal(read_public(folder).tensors, STATE)
    assert equal(read_public(index).tensors, STATE)
    (folder / f"{FILE}-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=stating(f"{FILE}-00002-of-00002.safetensors … does not exist")):
        read_public(folder)
    for text in ("[]", "{", '{"weight_map": {"a": "../b"}}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json"):
            read_public(folder)


def test_the_unet_of_a_pipeline_is_found_and_its_average_before_it(folder):
    weights = read_public(folder.parent)
    assert weights.folder == folder
    assert equal(weights.tensors, STATE)
    write_folder(unet(2), EVENT, folder.parent / "unet_ema")
    weights = read_public(folder.parent)
    assert equal(weights.tensors, to_public(unet(2), "diffusers"))
    assert "left aside: unet." in weights.note


def test_the_older_names_of_attention_layers_are_read(tmp_path):
    config = UnetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(2,), groups=4)
    network = unet(1, config)
    old = to_public(network, "diffusers")
    for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in old.items()}
    assert any("proj_attn" in name for name in old)
    again = unet(2, config)
    load_public(again, read_public(write(tmp_path / "a.bin", old)).tensors)
    assert digest(again.state_dict()) == digest(network.state_dict())


def test_a_config_of_the_same_network_is_accepted(folder):
    require_same_model(folder, unet(), EVENT)
    change(folder / "config.json", act_fn="swish", sample_size=None, attention_head_dim=16, dropout=0.3)
    require_same_model(folder, unet(), EVENT)
    write_folder(unet(1, ADM), EVENT, folder)
    require_same_model(folder, unet(0, ADM), EVENT)


@pytest.mark.parametrize(
    "difference",
    [
        *({"attention_head_dim": 8}, {"norm_num_groups": 8}, {"attn_norm_num_groups": 2}, {"freq_shift": 0}),
        *({"flip_sin_to_cos": True}, {"act_fn": "mish"}, {"norm_eps": 1e-5}, {"layers_per_block": 2}),
        *({"resnet_time_scale_shift": "scale_shift"}, {"num_class_embeds": 10}, {"sample_size": 32}),
        *({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, {"downsample_padding": 1}, {"out_channels": 2}),
        *({"time_embedding_type": "fourier"}, {"center_input_sample": True}, {"_class_name": "UNet2DConditionModel"}),
        *({"block_out_channels": 3}, {"down_block_types": [1, 2]}, {"norm_eps": "x"}, {"sample_size": {}}),
    ],
    ids=str,
)
def test_a_config_of_another_network_is_refused_with_the_difference(difference, folder):
    change(folder / "config.json", **difference)
    with pytest.raises(UserError) as refusal:
        require_same_model(folder, unet(), EVENT)
    words = {"attention_head_dim": "heads", "_class_name": "UNet2DConditionModel"}
    (key,) = difference
    wrong_type = missing("config.json … UNet2DModel", str(refusal.value)) == []
    assert wrong_type or words.get(key, key) in str(refusal.value)


def test_resampling_in_blocks_is_told_apart(folder):
    write_folder(unet(1, ADM), EVENT, folder)
    change(folder / "config.json", down_block_types=["DownBlock2D", "DownBlock2D"])
    with pytest.raises(UserError, match=stating("down_block_types … DownBlock2D with conv … DownBlock2D with resnet")):
        require_same_model(folder, unet(0, ADM), EVENT)


def test_a_damaged_config_is_a_sentence(folder):
    for text in ("", "[]", "{" * 100_000, "\ud800".encode(errors="surrogatepass").decode(errors="replace")):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            require_same_model(folder, unet(), EVENT)


BETAS = forward_betas()
DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize(
    ("values", "family"),
    [
        (DDPM, "ddpm"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "ddpm"),
        ({**DDPM, "trained_betas": BETAS.tolist(), "beta_schedule": "scaled_linear"}, "ddpm"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_data": 0.5, "num_train_timesteps": 40}, "edm"),
    ],
)
def test_the_scheduler_of_such_a_model_is_accepted(values, family, folder):
    change(folder / "scheduler_config.json", **values)
    require_same_noise(folder / "scheduler_config.json", family, BETAS)


@pytest.mark.parametrize(
    ("values", "family", "what"),
    [
        ({"prediction_type": "v_prediction"}, "ddpm", "prediction_type='v_prediction'"),
        ({"prediction_type": "sample"}, "ddpm", "prediction_type='sample'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "ddpm", "beta_schedule='squaredcos_cap_v2'"),
        ({"beta_end": 0.012}, "ddpm", "beta_end=0.012"),
        ({"num_train_timesteps": 4000}, "ddpm", "num_train_timesteps=4000"),
        ({"thresholding": True}, "ddpm", "thresholding=True"),
        ({"rescale_betas_zero_snr": True}, "ddpm", "rescale_betas_zero_snr=True"),
        ({"trained_betas": [0.1, 0.2]}, "ddpm", "trained_betas"),
        ({"trained_betas": [[1], "x"]}, "ddpm", "trained_betas"),
        ({}, "edm", "DDPMScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "ddpm", "FlowMatch"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, "edm", "sigma_data=1.0"),
        ({}, "ddgan-4", "does not support"),
    ],
    ids=str,
)
def test_the_scheduler_of_another_model_is_refused(values, family, what, folder):
    path = folder.parent / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    change(path, **{**DDPM, **values})
    assert scheduler_of_folder(folder) == path
    top = path.rename(folder.parent / path.name)
    assert scheduler_of_folder(folder) == top
    top.rename(path)
    with pytest.raises(UserError, match=what):
        require_same_noise(path, family, BETAS)


# ----------------------------------------------------------------------------
# Any file whatever: cut, altered, or of another kind.


NETWORK = unet(7)


def outcome(path: Path) -> str:
    """What comes of a file given as weights: finite weights, or one sentence."""
    try:
        weights = read_public(path)
        digest(weights.tensors)
        load_public(NETWORK, weights.tensors)
        public_log_sigma(weights.tensors)
    except UserError as error:
        sentence = str(error)
    else:
        assert all(bool(parameter.isfinite().all()) for parameter in NETWORK.parameters())
        return "loaded"
    assert path.name in sentence or "checkpoint" in sentence
    assert "\n" not in sentence
    return "refused"


def originals(root: Path) -> list[Path]:
    """One file of each kind that is read."""
    save_file(AVERAGE, root / "a.safetensors")
    torch.save({"model": RAW, "ema": AVERAGE, "optimizer": OPTIMIZER}, root / "a.pt")
    torch.save([RAW, OPTIMIZER, 1, 2, AVERAGE], root / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {name: t.half() for name, t in RAW.items()}, "fid": np.float64(3.0)}, root / "b.ckpt")
    return sorted(root.iterdir())


def fuzz_weights(root: Path, count: int, seed: int) -> dict[str, int]:
    files, rng, seen = originals(root), random.Random(seed), {"refused": 0, "loaded": 0}
    contents = [path.read_bytes() for path in files]
    for number in range(count):
        which = number % len(files)
        path = root / f"fuzzed{files[which].suffix}"
        path.write_bytes(fuzzed(contents[which], rng))
        seen[outcome(path)] += 1
    return seen


def data_of(root: Path, rng: random.Random) -> tuple[DataConfig, Path]:
    """A data set with one file that is to be altered."""
    return rng.choice(
        [
            (DATA_SETS.config("mnist"), root / "MNIST/raw/train-images-idx3-ubyte"),
            (DATA_SETS.config("mnist"), root / "MNIST/raw/train-labels-idx1-ubyte"),
            (DATA_SETS.config("cifar10"), root / "cifar-10-batches-bin/data_batch_1.bin"),
            (DATA_SETS.config("image_folder", folder="pictures", size=8), root / "pictures/1.png"),
        ]
    )


def write_data(root: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("MNIST/raw", "cifar-10-batches-bin", "pictures"):
        (root / folder).mkdir(parents=True)
    images, labels = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    (root / "MNIST/raw/train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (root / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    for number in range(1, 6):
        row = bytes([number]) + rng.integers(0, 256, 3072, dtype=np.uint8).tobytes()
        (root / f"cifar-10-batches-bin/data_batch_{number}.bin").write_bytes(row)
    for number in range(3):
        picture = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        picture.save(root / f"pictures/{number}.png")


def fuzz_data(root: Path, count: int, seed: int) -> None:
    rng, refused = random.Random(seed), []
    write_data(root)
    for _ in range(count):
        config, path = data_of(root, rng)
        whole = path.read_bytes()
        path.write_bytes(fuzzed(whole, rng))
        try:
            data = load(config)
            stored = data.stored[: len(data)]
            assert stored.dtype == torch.uint8
            assert data.classes is None or int(data.classes.min()) >= 0
        except UserError as error:
            refused.append(str(error))
        path.write_bytes(whole)
    assert 0 < len(refused) < count


def test_fuzzed_files_end_in_weights_or_a_sentence(tmp_path):
    seen = fuzz_weights(tmp_path, 60, seed=0)
    assert min(seen.values()) > 3


def test_fuzzed_data_ends_in_images_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    fuzz_data(tmp_path / "data", 20, seed=0)


@pytest.mark.slow
def test_two_thousand_fuzzed_files_end_in_numbers_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").mkdir()
    seen = fuzz_weights(tmp_path / "weights", 1_500, seed=1)
    assert min(seen.values()) > 50
    fuzz_data(tmp_path / "data", 500, seed=1)


def test_a_file_cut_at_any_place_is_a_sentence(tmp_path):
    shares = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999)
    for path in originals(tmp_path):
        data = path.read_bytes()
        for end in sorted({int(share * len(data)) for share in shares} | {1, 8, 9, 63, len(data) - 1}):
            path.write_bytes(data[:end])
            assert outcome(path) == "refused", (path.name, end)
