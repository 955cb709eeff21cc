"""The files on which rewards depend, by whose content a run recognizes that its reward has changed."""

import hashlib
from pathlib import Path

from dxmi.data.images import data_root
from dxmi.errors import UserError
from dxmi.persistence.files import require_target, user_path
from dxmi.persistence.run_directory import RunDirectory
from dxmi.rewards.configs import (
    CifarResnetRewardConfig,
    EnergyRewardConfig,
    FunctionRewardConfig,
    RewardConfig,
    SumRewardConfig,
)


def reward_signature(config: RewardConfig) -> str | None:
    """The sha256 of the files that a reward reads; None if it reads none. Nothing in them is executed.

    Raises:
        UserError: a file cannot be read.
    """
    files = _files(config)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"{file}, which the reward reads, cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _files(config: RewardConfig) -> list[Path]:
    if isinstance(config, SumRewardConfig):
        return [file for part in config.parts or () for file in _files(part)]
    if isinstance(config, FunctionRewardConfig):
        return [function_file(config.function)]
    if isinstance(config, CifarResnetRewardConfig):
        return [weights_file(config.file)]
    if isinstance(config, EnergyRewardConfig):
        return [_best_weights(config.run)]
    return []


def function_file(path: str) -> Path:
    """The file below the current folder that has the function with this import path, module:function.

    Raises:
        UserError: there is none.
    """
    root = Path.cwd().resolve()
    file = root.joinpath(*path.partition(":")[0].split(".")).with_suffix(".py")
    if not file.is_file() or not file.resolve().is_relative_to(root):
        raise UserError(f"reward.function is {path}, but there is no file {file.relative_to(root)} in {root}.")
    return file


def weights_file(given: str) -> Path:
    """The file of weights at a path from the current folder or from the data folder.

    Raises:
        UserError: there is none.
    """
    path = user_path(given, "reward.file")
    places = dict.fromkeys((path, data_root() / path))
    for place in places:
        if require_target(place, "reward.file").is_file():
            return place
    raise UserError(
        f"reward.file is {given}, but there is no file {' and no '.join(str(place) for place in places)}: name that of "
        "a ResNet that was trained on CIFAR-10."
    )


def _best_weights(run: str) -> Path:
    """The weights in the best checkpoint of a run.

    Raises:
        UserError: the run does not exist or has not finished.
    """
    folder = RunDirectory(user_path(run, "reward.run"))
    summary = folder.read_summary()
    if summary is None:
        raise UserError(f"reward.run is {run}, which is not the folder of a finished run.")
    return folder.path / str(summary["best"]["checkpoint"]) / "algorithm.safetensors"
