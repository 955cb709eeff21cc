"""Files of public checkpoints: find the state of the network in a file, and restore its original names.

Training codes store a network in many ways: as a state_dict or as one of several, in a list, next to its moving
average, or with the prefixes of wrappers. `read_public` takes the average if there is one, reports what it took and
what it ignored, and returns the tensors under the names of the network's own state_dict, which
`dxmi.networks.pretrained.layouts` expects.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dxmi.errors import UserError
from dxmi.networks.pretrained.layouts import SIGMAS, is_known
from dxmi.persistence.tensor_files import printable, read_tensor_file, require_dense

_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
"""Infixes that torch.compile, FSDP, activation checkpointing and Fabric insert anywhere in a name."""
_WRAPPERS = (
    *("module.", "model.", "net.", "diffusion_model.", "unet.", "denoise_fn.", "denoiser.", "network.", "score_model."),
    *("online_model.", "generator.", "netG.", "model_fn."),
)
"""Prefixes of modules that contain the network."""
_AVERAGE_WORDS = {"ema", "emas", "shadow", "averaged", "average", "avg", "swa", "polyak", "emamodel", "modelema"}
_NOT_WEIGHTS = {"optimizer", "optimizers", "optimiser", "optim", "scheduler", "scaler", "rng", "backup", "collected"}
_COUNTERS = {"n_averaged", "initted", "step", "decay", "num_updates", "num_batches_tracked"}
"""Scalars that implementations of moving averages save among the weights."""
_FEWEST = 4
"""Minimum number of tensors of an average next to other tensors; a layer that is merely named like one has fewer."""
_BUFFERS = ("num_batches_tracked", "running_mean", "running_var", "resample_filter", "sigmas", "betas", "freqs")
_DEPTH = 8
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SHOWN = 8


@dataclass(frozen=True)
class PublicWeights:
    """A network's weights in a public layout.

    Attributes:
        tensors: tensors by their names in the network's own state_dict.
        path: the file or folder that was read.
        taken: location of the tensors within the file; empty if it holds nothing else.
        note: a sentence that states what was taken and what was ignored; empty if nothing was ignored.
        keys: the keys that the file holds, for messages.
        folder: diffusers folder whose config.json describes the network; None for other files.
    """

    tensors: dict[str, Tensor]
    path: Path
    taken: str
    note: str
    keys: str
    folder: Path | None = None


@dataclass(frozen=True)
class _State:
    """The tensors at one location of a file.

    Attributes:
        place: sequence of keys that leads to the location.
        tensors: tensors by name, or by index if the file holds a list.
        average: whether they are a moving average.
        named: whether the file holds their names.
    """

    place: tuple[str, ...]
    tensors: dict[str, Tensor]
    average: bool
    named: bool = True

    @property
    def name(self) -> str:
        return ".".join(self.place)


def read_public(path: Path) -> PublicWeights:
    """Read the weights of a public checkpoint: a file of PyTorch or safetensors, or a folder of diffusers.

    Raises:
        UserError: the checkpoint cannot be read, or holds no state_dict.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.name.endswith(".json") and ".index." in path.name:
        found = PublicWeights(_shards(path), path, "", "", "the shards of an index")
    else:
        found = _of_content(read_tensor_file(path), path)
    folder = path.parent if (path.parent / "config.json").is_file() and path.name.startswith(_STEM) else None
    return replace(found, tensors=_with_new_names(found.tensors), folder=folder)


# ----------------------------------------------------------------------------
# Single files: find all states, and choose one.


def _of_content(content: object, path: Path) -> PublicWeights:
    """The state of the network in the content of a file, preferably a moving average.

    Raises:
        UserError: there is no state_dict in the file.
    """
    found = [state for state in _states(content) if state.tensors]
    if not found:
        raise UserError(
            f"Checkpoint {path} holds no state_dict: save that of a network with torch.save or safetensors. "
            f"It holds {_keys_of(content)}."
        )
    candidates = [part for state in _with_names(found, path) for part in _parts(state, path)]
    candidates = _with_average_of_list(candidates, content)
    chosen = _chosen(candidates)
    raw = next((c for c in candidates if not c.average and chosen.tensors.keys() < c.tensors.keys()), None)
    tensors = {**(raw.tensors if raw is not None and chosen.average else {}), **chosen.tensors}
    tensors = {name: require_dense(tensor, name, path) for name, tensor in tensors.items()}
    note = _note(path, chosen, candidates, content)
    if len(tensors) > len(chosen.tensors):
        note += f" {len(tensors) - len(chosen.tensors)} tensors that it lacks were taken from the raw weights."
    return PublicWeights(tensors, path, chosen.name, note, _keys_of(content))


def _states(content: object, place: tuple[str, ...] = ()) -> Iterator[_State]:
    """Yield all dictionaries and lists of tensors, except those of optimizers."""
    if len(place) > _DEPTH or (place and _words(place[-1]) & _NOT_WEIGHTS):
        return
    average = any(_is_average(key) for key in place)
    if isinstance(content, Mapping) and "param_groups" not in content:
        yield _State(place, {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}, average)
        for key, value in content.items():
            yield from _states(value, (*place, str(key)))
    elif isinstance(content, list | tuple):
        if content and all(isinstance(value, Tensor) for value in content):
            yield _State(place, {str(n): value for n, value in enumerate(content)}, average, named=False)
        else:
            for number, value in enumerate(content):
                yield from _states(value, (*place, f"[{number}]"))


def _words(key: str) -> set[str]:
    """The words of a snake_case or camelCase key, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)}


def _is_average(key: str) -> bool:
    return bool(_words(key) & _AVERAGE_WORDS)


def _with_names(states: list[_State], path: Path) -> list[_State]:
    """Give lists of averaged parameters the names of the raw ones, which are in the same order.

    Raises:
        UserError: a list does not match any state_dict of the file.
    """
    raw = [state for state in states if state.named and not state.average]
    named = [state for state in states if state.named]
    for state in states:
        if state.named or not state.average:
            continue
        named.append(_named_like(state, raw, path))
    return named


def _named_like(state: _State, raw: Sequence[_State], path: Path) -> _State:
    values = list(state.tensors.values())
    for other in raw:
        for buffers in ((), _BUFFERS):
            names = [name for name in other.tensors if not name.endswith(buffers)]
            shapes = [other.tensors[name].shape for name in names]
            if shapes == [value.shape for value in values]:
                return replace(state, tensors=dict(zip(names, values, strict=True)), named=True)
    raise UserError(
        f"Checkpoint {path}: {state.name} is a list of {len(values)} averaged tensors without names, and no state_dict "
        "in the file has as many of the same shapes. Load it with the code that wrote it, and save the average's "
        "state_dict."
    )


def _parts(state: _State, path: Path) -> Iterator[_State]:
    """Strip wrappers from a state, and split averages off the raw weights that they are stored with."""
    tensors = {_without_infixes(name): tensor for name, tensor in state.tensors.items()}
    tensors = {name: t for name, t in tensors.items() if t.numel() != 1 or name.rpartition(".")[2] not in _COUNTERS}
    tensors = _unwrapped(tensors)
    heads = dict.fromkeys(head for head, dot, _ in (name.partition(".") for name in tensors) if dot)
    sizes = Counter(name.partition(".")[0] for name in tensors)
    averages = [head for head in heads if _is_average(head) and sizes[head] >= _FEWEST]
    raw = {name: t for name, t in tensors.items() if not name.startswith(tuple(f"{head}." for head in averages))}
    for head in averages:
        part = {name.removeprefix(f"{head}."): t for name, t in tensors.items() if name.startswith(f"{head}.")}
        place = (*state.place, head)
        yield _State(place, _focused(_with_dots(part, raw, ".".join(place), path)), average=True)
    if raw:
        yield _State(state.place, _focused(raw), state.average)


def _without_infixes(name: str) -> str:
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


def _with_dots(part: dict[str, Tensor], raw: Mapping[str, Tensor], place: str, path: Path) -> dict[str, Tensor]:
    """Restore the raw names of an average that was saved without the dots in its names, as in latent diffusion.

    Raises:
        UserError: a name without dots matches no raw name, or more than one.
    """
    if any("." in name for name in part):
        return part
    names: dict[str, list[str]] = {}
    for name in raw:
        for inner in {name, name.partition(".")[2]}:
            names.setdefault(inner.replace(".", ""), []).append(inner)
    if any(len(names.get(name, [])) != 1 for name in part):
        raise UserError(
            f"Checkpoint {path}: {place} is an average whose names have no dots, and they cannot be matched with the "
            "names of the raw weights. Load it with the code that wrote it, and save the average's state_dict."
        )
    return {names[name][0]: tensor for name, tensor in part.items()}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers that all names share."""
    while True:
        wrapped = [name for name in tensors if name not in SIGMAS]
        prefix = next((p for p in _WRAPPERS if wrapped and all(name.startswith(p) for name in wrapped)), None)
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _focused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the network's own tensors if the state also holds other modules and tables."""
    tensors = _unwrapped(tensors)
    if is_known(tensors):
        return tensors
    for prefix in _WRAPPERS:
        inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        found = _focused(inner) if 0 < len(inner) < len(tensors) else {}
        if is_known(found):
            return {**found, **{name: t for name, t in tensors.items() if name in SIGMAS}}
    return tensors


def _with_average_of_list(states: list[_State], content: object) -> list[_State]:
    """Mark the average in a list: the last state whose names all occur in the first state.

    Training codes derived from ermongroup/ddim and pesser/pytorch_diffusion write
    [model, optimizer, epoch, step, average].
    """
    if not isinstance(content, list | tuple) or any(state.average for state in states):
        return states
    first = states[0]
    last = next((s for s in reversed(states[1:]) if s.tensors.keys() <= first.tensors.keys()), None)
    return [replace(state, average=True) if state is last else state for state in states]


def _chosen(states: list[_State]) -> _State:
    """An average in a known layout, else raw weights in a known layout, else the largest state."""
    known = [state for state in states if is_known(state.tensors)]
    pool = known or [max(states, key=lambda state: (_size(state), state.average))]
    averages = [state for state in pool if state.average]
    return max(averages, key=lambda state: _decay(state.name)) if averages else pool[0]


def _size(state: _State) -> int:
    return sum(tensor.numel() for tensor in state.tensors.values())


def _decay(name: str) -> float:
    """The decay in the name of an average, 0 if there is none; the average with the largest decay is taken."""
    numbers = re.findall(r"0?\.\d+", name)
    return float(numbers[-1]) if numbers else 0.0


def _note(path: Path, chosen: _State, states: Sequence[_State], content: object) -> str:
    """A sentence that states what was taken and what was ignored; empty if the file holds nothing else."""
    others = [state.name or "the weights at the top" for state in states if state is not chosen]
    top = list(content) if isinstance(content, Mapping) else [f"[{n}]" for n in range(len(content))]  # type: ignore[arg-type]
    optimizers = [str(key) for key in top if _words(str(key)) & _NOT_WEIGHTS]
    aside = [*dict.fromkeys(others), *optimizers]
    if not aside and not (chosen.average and chosen.place):
        return ""
    what = "an average of the weights" if chosen.average else "the raw weights, since it holds no average"
    left = f"; left aside: {_listed(aside)}" if aside else ""
    return f"of {path}, {chosen.name or 'the weights at the top'} was taken, {what}{left}."


def _keys_of(content: object) -> str:
    if isinstance(content, Mapping):
        return f"the keys {_listed([str(key) for key in content])}" if content else "an empty dictionary"
    if isinstance(content, list | tuple):
        return f"a list of {len(content)}: {_listed([type(value).__name__ for value in content])}"
    return f"a {type(content).__name__}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
    return ", ".join(printable(name[:100]) for name in names[:_SHOWN]) + more


def _with_new_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of attention blocks as diffusers has done since version 0.15."""

    def new(name: str) -> str:
        head, _, end = name.rpartition(".")
        block, _, layer = head.rpartition(".")
        old = layer in _OLD_ATTENTION and re.search(r"(^|\.)attentions\.\d+$", block)
        return f"{block}.{_OLD_ATTENTION[layer]}.{end}" if old else name

    return {new(name): tensor for name, tensor in tensors.items()}


# ----------------------------------------------------------------------------
# Folders of diffusers.

_STEM = "diffusion_pytorch_model"
_MODELS = ("unet_ema", "unet")
"""Folders in which pipelines and training scripts store the model, the average first."""
_RANKS = {"ema": 0, "": 1, "non_ema": 3}


def _of_folder(path: Path) -> PublicWeights:
    """Read the weights in the folder of a model or of a pipeline.

    Raises:
        UserError: the folder holds no weights, or a shard is missing.
    """
    places = [path, *(path / name for name in _MODELS)]
    found = [place for place in places if _weight_files(place)]
    if not found:
        seen = sorted(entry.name for entry in path.iterdir())
        raise UserError(
            f"{path} is not a folder of diffusers: neither it nor a folder unet in it has {_STEM}.safetensors or .bin. "
            f"It holds {_listed(seen) if seen else 'nothing'}."
        )
    files = _weight_files(found[0])
    chosen = files[0]
    tensors = _shards(chosen) if chosen.suffix == ".json" else _of_content(read_tensor_file(chosen), chosen).tensors
    taken = str(chosen.relative_to(path))
    aside = [str(other.relative_to(path)) for other in (*files[1:], *found[1:])]
    note = f"of {path}, {taken} was taken; left aside: {_listed(aside)}." if aside else ""
    return PublicWeights(_with_new_names(tensors), path, taken, note, taken, found[0])


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a model, or the indices of their shards, in the order of preference.

    Averages come first, then plain files, then other variants such as half precision, and `non_ema` files last.
    """
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.name.startswith(f"{_STEM}.")]
    names = [name for name in names if name.endswith((".safetensors", ".bin", ".json"))]
    return [folder / name for name in sorted(names, key=_preference)]


def _preference(name: str) -> tuple[int, bool, bool, str]:
    words = name.removeprefix(f"{_STEM}.").split(".")
    variant = next((word for word in words if word not in ("safetensors", "bin", "index", "json")), "")
    return _RANKS.get(variant, 2), "bin" in words, "json" in words, name


def _plain(content: object, path: Path) -> dict[str, Tensor]:
    """The content of a file, which must be a mapping from names to tensors.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"Checkpoint {path} holds {_keys_of(content)}: it must hold tensors by name.")
    return {str(k): require_dense(v, str(k), path) for k, v in content.items() if isinstance(v, Tensor)}


def _shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors of all files that an index lists.

    Raises:
        UserError: the index cannot be read, or a file or tensor that it lists is missing.
    """
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = dict.fromkeys(places.values())
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of sharded weights ({type(error).__name__}: {error}).") from error
    if outside:
        raise UserError(
            f"{index} lists {_listed(outside)}, which is outside its folder: download the whole folder again."
        )
    missing = [name for name in files if not (index.parent / name).exists()]
    if missing:
        raise UserError(f"{index} lists {_listed(missing)}, which does not exist: download the missing files.")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= _plain(read_tensor_file(index.parent / name), index.parent / name)
    lacking = [name for name in places if name not in tensors]
    if lacking:
        raise UserError(f"{index} lists {_listed(lacking)}, which its files do not hold: download them again.")
    return tensors
