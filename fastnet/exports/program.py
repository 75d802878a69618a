"""What is exported: a model, or a model behind the pixels of a photo, with the sizes that stay free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastnet.exports.pixels import Preprocessed
from fastnet.loading.view import View
from fastnet.model import EfficientNet
from kernels.launch import MAX_ROWS

Compute = Callable[[Tensor], Tensor]


def program_of(model: EfficientNet, view: View, preprocessing: bool) -> nn.Module:
    return Preprocessed(model, view).eval() if preprocessing else model


def names_of(module: nn.Module) -> tuple[str, str]:
    """Of the input and the output."""
    return ("photo", "probabilities") if isinstance(module, Preprocessed) else ("images", "logits")


def free_sizes(module: nn.Module, example: Tensor) -> Any:
    """What of the input's shape a file leaves open: a photo's size, or the number of images as far as the kernels'
    index arithmetic goes, 2**30 pixels in the stem's output."""
    Dim = torch.export.Dim
    if isinstance(module, Preprocessed):
        return ({0: Dim("height", min=1, max=65535), 1: Dim("width", min=1, max=65535)},)
    return ({0: Dim("batch", max=MAX_ROWS // (-(-example.shape[-1] // 2)) ** 2)},)


def exported(module: nn.Module, example: Tensor) -> Any:
    return torch.export.export(module, (example,), dynamic_shapes=free_sizes(module, example))
