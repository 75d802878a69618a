"""What stands in files of weights that other programs wrote: a state dict, and what its training script noted.

Read are plain state dicts, checkpoints of timm's train.py and of torchvision's reference scripts, and folders of the
Hugging Face hub (model.safetensors or pytorch_model.bin, and timm's config.json). Averaged weights count before others.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.files import read_text, refuse_special, words_of

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Foreign:
    """state: tensors under the names of their program. names: what may tell the model's name, the surest first.
    configs: timm's `pretrained_cfg`, the arguments of a training script. classes: names, where the file tells."""

    state: dict[str, Tensor]
    names: tuple[str, ...] = ()
    configs: tuple[Mapping[str, Any], ...] = ()
    classes: tuple[str, ...] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """A safetensors file's header."""


def weights_in(path: Path) -> Path:
    """The file itself, or that of a run's folder or of a hub's.

    Raises ValueError where a folder holds none.
    """
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors", *HUB_FILES):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"the folder {path} holds no best.safetensors, last.safetensors or {' or '.join(HUB_FILES)}.")


def read_pickled(path: Path) -> Foreign:
    """A .pth, .pt, .bin or .tar file; of classes only argparse.Namespace is allowed in it, which runs nothing.

    Raises ValueError where it is no such file.
    """
    try:
        refuse_special(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        said = words_of(error) if isinstance(error, OSError) else str(error)
        reason = said.splitlines()[0] if said else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a file of plain tensors ({reason}): convert it to .safetensors or fetch it "
            "again."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict: save model.state_dict() and load that.")
    arguments = content.get("args")
    config = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    state = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    names = tuple(name for name in (content.get("arch"), config.get("model")) if isinstance(name, str))
    if not (state and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"{path} holds no state dict: save model.state_dict() and load that.")
    return Foreign(_unwrapped(state), names, tuple(one for one in (config, _noted(content)) if one), _classes(content))


def _noted(content: Mapping[str, Any]) -> dict[str, Any]:
    """The view that an export of ours for torchvision notes beside the weights, under torchvision's names."""
    side, crop = content.get("resolution"), content.get("crop_fraction")
    if "class_names" not in content or not side or not crop:
        return {}
    own = {name: content.get(name) for name in ("interpolation", "mean", "std")}
    return {"val_crop_size": side, "val_resize_size": side / crop, **own}


def _classes(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = content.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of DistributedDataParallel, of an average and of torch.compile, and an average's counter."""
    found = {name: value for name, value in state.items() if name != "n_averaged"}
    while found and (prefix := next(iter(found)).partition(".")[0]) in ("module", "_orig_mod"):
        if not all(name.startswith(f"{prefix}.") for name in found):
            break
        found = {name.removeprefix(f"{prefix}."): value for name, value in found.items()}
    return found


def beside(path: Path, foreign: Foreign) -> Foreign:
    """`foreign` with what a hub's config.json beside its file adds.

    Raises ValueError where that is damaged.
    """
    file = path.with_name("config.json")
    if path.name not in HUB_FILES or not file.is_file():
        return foreign
    try:
        config = json.loads(read_text(file))
        architecture, cfg = config["architecture"], config.get("pretrained_cfg") or {}
        labels = config.get("label_names") or cfg.get("label_names")
        tag = cfg.get("tag") or ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a config.json of timm ({type(error).__name__}: {error}): fetch it again."
        ) from None
    return Foreign(
        foreign.state,
        (f"{architecture}.{tag}" if tag else str(architecture), *foreign.names),
        (*foreign.configs, cfg),
        tuple(map(str, labels)) if labels else None,
        foreign.notes,
    )
