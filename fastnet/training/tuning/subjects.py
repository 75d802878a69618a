"""What there is to measure of a model: its distinct blocks and layers on a batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastnet.forms import Place, block_name
from fastnet.layers import BatchNorm, ConvBNAct, MBConv
from fastnet.model import EfficientNet


class Context(NamedTuple):
    """What a block's neighbours and place in the model make of it in training."""

    scaled: bool = False
    """Drop-connect scales its images."""
    pending: tuple[bool, bool] | None = None
    """The block before leaves its residual to this one's expansion: whether that has a residual, and a scale."""


class Subject(NamedTuple):
    """A block or layer of a model on a batch; equal ones share what is measured. `height` and `width` are the
    input's, `training` means batch statistics and, with them, gradients."""

    kind: tuple[int | str, ...]
    images: int
    height: int
    width: int
    dtype: torch.dtype
    training: bool

    @property
    def is_block(self) -> bool:
        return self.kind[0] == "block"

    @property
    def stride(self) -> int:
        return int(self.kind[4])

    @property
    def channels(self) -> tuple[int, int, int]:
        """Of the input, of the widest tensor, of the output."""
        into, out = int(self.kind[1]), int(self.kind[2])
        return into, max(into * int(self.kind[5]) if self.is_block else out, out), out

    @property
    def out_size(self) -> tuple[int, int]:
        return -(-self.height // self.stride), -(-self.width // self.stride)

    def place(self, device: torch.device, compiled: bool) -> Place:
        height, width = (self.height, self.width) if self.is_block else self.out_size
        return Place(self.kind, height, width, self.dtype, device.type, self.training, compiled)

    @property
    def name(self) -> str:
        """For a reader."""
        if self.is_block:
            into, wide, out = self.channels
            name = "block " + block_name(into, wide, out, int(self.kind[3]), self.stride, self.height)
            padding = f", {self.kind[6]}" if self.kind[6] != "symmetric" else ""
        else:
            name, padding = f"layer {self.kind[1]}→{self.kind[2]} k{self.kind[3]} s{self.stride} at {self.height}", ""
        width = f"x{self.width}" if self.width != self.height else ""
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, "fp32")
        return f"{name}{width}{padding}, batch {self.images}, {dtype}, {'training' if self.training else 'inference'}"


@dataclass
class Occurrences:
    count: int = 0
    contexts: Counter[Context] = field(default_factory=Counter)


def subjects(
    model: EfficientNet, resolution: int, images: int, dtype: torch.dtype, *, training: bool
) -> dict[Subject, Occurrences]:
    """Every distinct block and layer of the model on such a batch, in a training step or in evaluation.

    A block whose norms are frozen while gradients flow has one form only, and is left out (`unfused` counts them).
    """
    found: dict[Subject, Occurrences] = {}

    def add(module: ConvBNAct | MBConv, side: int, in_training: bool, context: Context) -> int:
        subject = Subject(module.kind, images, side, side, dtype, in_training)
        occurrences = found.setdefault(subject, Occurrences())
        occurrences.count += 1
        occurrences.contexts[context] += 1
        return subject.out_size[0]

    side = add(model.stem, resolution, training and model.stem.bn.training, Context())
    learns = training and any(p.requires_grad for p in model.stem.parameters())
    before: tuple[bool, bool] | None = None
    for block, scaled in zip(model.blocks, model.droppable, strict=True):
        assert isinstance(block, MBConv)
        norms = [training and norm.training for norm in block.modules() if isinstance(norm, BatchNorm)]
        learns = learns or (training and any(p.requires_grad for p in block.parameters()))
        if all(norms):
            context = Context(scaled, before if block.expand is not None else None)
            side, before = add(block, side, True, context), (block.has_residual, scaled)
        else:
            before = None
            frozen = not (any(norms) or learns)
            side = add(block, side, False, Context()) if frozen else -(-side // block.shape.stride)
    add(model.head, side, training and model.head.bn.training, Context())
    return found


def unfused(model: EfficientNet) -> int:
    """How many blocks can't train fused, because their norms are frozen while gradients flow through them."""
    learns, count = any(p.requires_grad for p in model.stem.parameters()), 0
    for block in model.blocks:
        norms = [norm.training for norm in block.modules() if isinstance(norm, BatchNorm)]
        learns = learns or any(p.requires_grad for p in block.parameters())
        count += not all(norms) and (any(norms) or learns)
    return count
