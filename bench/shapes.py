"""The shapes that each fused operation sees in a variant at a resolution, taken from the model itself.

The model runs once on two random images while every call of a `kernels` function is written down; nothing is listed by
hand.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fastnet.layers
import kernels
from fastnet.model import efficientnet
from fastnet.scaling import architecture
from fastnet.summary import training_blocks
from kernels.block.traffic import Block

CALLED_BY_MODEL = ("bn_silu", "bn_silu_squeeze_excite", "bn_drop_connect_add")
# Operations that the model reaches only inside a larger one see the same shapes as that one.
INSIDE = {"squeeze_excite": "bn_silu_squeeze_excite", "drop_connect_add": "bn_drop_connect_add"}
OPS = (*CALLED_BY_MODEL, *INSIDE)


@dataclass(frozen=True, order=True)
class OpShape:
    """One call: x is [batch, channels, height, width]; squeezed is the SE width (0: no SE in this operation)."""

    op: str
    batch: int
    channels: int
    height: int
    width: int
    squeezed: int = 0
    residual: bool = False
    scaled: bool = False

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.height * self.width

    def __str__(self) -> str:
        extra = f" s{self.squeezed}" if self.squeezed else ""
        extra += " +res" if self.residual else ""
        extra += " *scale" if self.scaled else ""
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}{extra}"


@functools.cache
def model_shapes(variant: str = "b0", resolution: int = 224, batch: int = 128) -> dict[OpShape, int]:
    """Every distinct call in one training step, and how often it is made."""
    calls: Counter[OpShape] = Counter()

    def recorder(op: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(x: Tensor, *args: Any, **options: Any) -> Tensor:
            squeezed, residual, scaled = 0, False, False
            if op == "bn_silu_squeeze_excite":
                squeezed = args[4].shape[0]  # w_reduce [S, C], after batch norm's four vectors
            elif op == "bn_drop_connect_add":
                residual, scaled = args[0] is not None, args[1] is not None
            _, c, h, w = x.shape
            calls[OpShape(op, batch, c, h, w, squeezed, residual, scaled)] += 1
            return original(x, *args, **options)

        return record

    model = efficientnet(variant, kernels="torch").train()
    images = torch.randn(2, 3, resolution, resolution)
    replaced = {op: recorder(op, getattr(kernels, op)) for op in CALLED_BY_MODEL}
    with torch.no_grad(), patch.dict(vars(fastnet.layers), replaced):
        model(images)
    return dict(calls)


def largest(op: str, count: int = 5, variant: str = "b0", resolution: int = 224, batch: int = 128) -> list[OpShape]:
    """The `count` largest distinct shapes of `op` in the model, largest first.

    Raises ValueError for an operation that the model does not have.
    """
    if op not in OPS:
        raise ValueError(f"unknown operation {op!r}: choose one of {', '.join(OPS)}.")
    seen = {
        OpShape(op, s.batch, s.channels, s.height, s.width, s.squeezed, s.residual, s.scaled)
        for s in model_shapes(variant, resolution, batch)
        if s.op == INSIDE.get(op, op) and (op != "drop_connect_add" or s.residual)
    }
    return sorted(seen, key=lambda s: (-s.elements, s))[:count]


def model_blocks(variant: str = "b0", resolution: int = 224, batch: int = 128) -> list[Block]:
    """Every MBConv of the model in order, as it stands in training."""
    return training_blocks(architecture(variant), resolution, batch)


@functools.cache
def activations(variant: str = "b0", resolution: int = 224) -> int:
    """Elements that the convolutions and linear layers of one image's forward pass put out (timm's `macts`, times 1e6),
    at 1000 classes.

    One byte-pass is this, times two bytes, times the images.
    """
    return 1000 + sum(stage.activations for stage in architecture(variant).network.costs(resolution))
