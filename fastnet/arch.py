"""The network as data: what EfficientNet's variants are made of, stage by stage and block by block (Tan & Le 2019,
table 1; for Lite the reference implementation's `efficientnet_lite_builder.py`).

Everything that has to know a network's stages, widths or costs reads them here: the model, weights of other libraries,
feature maps, Grad-CAM, freezing, the summary and the benchmarks. Free of torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast, get_args

Variant = Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "lite0", "lite1", "lite2", "lite3", "lite4"]
Scaling = Literal["published", "compound"]
Padding = Literal["symmetric", "same"]
Activation = Literal["silu", "relu6"]
Kernels = Literal["auto", "triton", "triton-ops", "native", "torch"]
Style = Literal["fastnet", "torchvision", "timm", "timm_tf", "efficientnet_pytorch"]
"""Whose names a file of weights has."""

SE_RATIO = 4


class Stage(NamedTuple):
    """One row of the paper's table 1, before scaling."""

    expand_ratio: int
    kernel_size: int
    stride: int
    channels: int
    repeats: int


@dataclass(frozen=True)
class Family:
    """What the variants of one kind share; width and depth scale it.

    fixed_ends: stem and head keep their widths and the first and last stage their repeats, whatever the scaling.
    """

    stages: tuple[Stage, ...] = (
        Stage(1, 3, 1, 16, 1),
        Stage(6, 3, 2, 24, 2),
        Stage(6, 5, 2, 40, 2),
        Stage(6, 3, 2, 80, 3),
        Stage(6, 5, 1, 112, 3),
        Stage(6, 5, 2, 192, 4),
        Stage(6, 3, 1, 320, 1),
    )
    stem: int = 32
    head: int = 1280
    squeeze_excite: bool = True
    activation: Activation = "silu"
    fixed_ends: bool = False

    @property
    def has_kernels(self) -> bool:
        """Otherwise PyTorch computes it under every choice of kernels."""
        return self.squeeze_excite and self.activation == "silu"


EFFICIENTNET = Family()
LITE = Family(squeeze_excite=False, activation="relu6", fixed_ends=True)


@dataclass(frozen=True)
class Coefficients:
    """A variant's published coefficients. resolution: side in pixels of its ImageNet training."""

    width: float
    depth: float
    resolution: int
    dropout: float
    drop_connect_rate: float
    family: Family = EFFICIENTNET


# Width, depth and resolution are those of the reference implementation's `efficientnet_params`.
_VARIANTS: dict[str, Coefficients] = {
    "b0": Coefficients(1.0, 1.0, 224, 0.2, 0.2),
    "b1": Coefficients(1.0, 1.1, 240, 0.2, 0.2),
    "b2": Coefficients(1.1, 1.2, 260, 0.3, 0.3),
    "b3": Coefficients(1.2, 1.4, 300, 0.3, 0.3),
    "b4": Coefficients(1.4, 1.8, 380, 0.4, 0.4),
    "b5": Coefficients(1.6, 2.2, 456, 0.4, 0.4),
    "b6": Coefficients(1.8, 2.6, 528, 0.5, 0.5),
    "b7": Coefficients(2.0, 3.1, 600, 0.5, 0.5),
    "lite0": Coefficients(1.0, 1.0, 224, 0.2, 0.2, LITE),
    "lite1": Coefficients(1.0, 1.1, 240, 0.2, 0.2, LITE),
    "lite2": Coefficients(1.1, 1.2, 260, 0.3, 0.2, LITE),
    "lite3": Coefficients(1.2, 1.4, 280, 0.3, 0.2, LITE),
    "lite4": Coefficients(1.4, 1.8, 300, 0.3, 0.2, LITE),
}
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def register(name: str, variant: Coefficients) -> str:
    """Make a network of your own known by a name, wherever a variant is named; returns the name.

    Raises ValueError where the name means another network already.
    """
    if _VARIANTS.setdefault(name, variant) != variant:
        raise ValueError(f"{name!r} is already the name of another variant: choose another.")
    return name


def coefficients(name: str) -> Coefficients:
    """The coefficients of a variant. Raises ValueError for an unknown name."""
    if name not in _VARIANTS:
        raise ValueError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}.")
    return _VARIANTS[name]


def variant_name(name: str) -> Variant:
    """ "b0" for "b0", "B0" and "efficientnet_b0", and so on. Raises ValueError for an unknown name."""
    short = name.lower().removeprefix("efficientnet_").replace("efficientnet-", "")
    if short not in _VARIANTS:
        coefficients(name)
    return cast(Variant, short)


def family(variant: str) -> Family:
    """What a variant is scaled from; EfficientNet itself for a name such as "phi=1.5"."""
    return _VARIANTS[variant].family if variant in _VARIANTS else EFFICIENTNET


def round_filters(filters: float, width: float, divisor: int = 8) -> int:
    """Channels after width scaling: the nearest multiple of ``divisor``, but not more than 10 % below."""
    if filters <= 0 or width <= 0 or divisor <= 0:
        raise ValueError(f"filters, width and divisor must be positive, got {filters}, {width} and {divisor}.")
    scaled = filters * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Blocks in a stage after depth scaling: rounded up."""
    if repeats <= 0 or depth <= 0:
        raise ValueError(f"repeats and depth must be positive, got {repeats} and {depth}.")
    return math.ceil(repeats * depth)


class BlockShape(NamedTuple):
    """What tells one MBConv from another; equal shapes share a compiled graph."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int
    squeeze_excite: bool = True
    activation: Activation = "silu"

    @property
    def expanded(self) -> int:
        return self.in_channels * self.expand_ratio

    @property
    def squeezed(self) -> int:
        """A quarter of the block's input (not of the expanded) channels, unrounded; 0 without squeeze-and-excite."""
        return max(1, self.in_channels // SE_RATIO) if self.squeeze_excite else 0

    @property
    def has_residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def operator(self) -> str:
        """The paper's name."""
        return f"MBConv{self.expand_ratio}, k{self.kernel_size}x{self.kernel_size}"

    @property
    def parameters(self) -> int:
        """Each convolution's weights with the two vectors of its batch norm; squeeze-and-excite has biases."""
        expansion = (self.in_channels + 2) * self.expanded if self.expand_ratio != 1 else 0
        depthwise = (self.kernel_size**2 + 2) * self.expanded
        squeeze_excite = 2 * self.expanded * self.squeezed + self.squeezed + self.expanded * self.squeeze_excite
        return expansion + depthwise + squeeze_excite + (self.expanded + 2) * self.out_channels

    def macs_and_activations(self, side: int) -> tuple[int, int]:
        """Of one image's forward pass, for an input of side x side."""
        into, out = side**2, (-(-side // self.stride)) ** 2
        expands = self.expand_ratio != 1
        macs = self.in_channels * self.expanded * into * expands
        macs += self.expanded * out * (self.kernel_size**2 + self.out_channels) + 2 * self.expanded * self.squeezed
        activations = self.expanded * into * expands + (self.expanded + self.out_channels) * out
        return macs, activations + self.squeezed + self.expanded * self.squeeze_excite


@dataclass(frozen=True)
class Block:
    """An MBConv in its place. index: from 0. stage: row of the paper's table 1, in which the stem is 1."""

    index: int
    stage: int
    shape: BlockShape


@dataclass(frozen=True)
class StageCost:
    """A row of the paper's table 1 for one image. resolution: side of the output in pixels; layers: blocks or
    convolutions; MACs are the multiplications of convolutions and linear layers, activations the elements that they put
    out (timm's `macts`)."""

    stage: int
    operator: str
    resolution: int
    channels: int
    layers: int
    parameters: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Network:
    """A family after scaling. stem, head: their output channels."""

    family: Family
    stem: int
    blocks: tuple[Block, ...]
    head: int

    @property
    def last_stage(self) -> int:
        """The head's."""
        return len(self.family.stages) + 2

    @functools.cached_property
    def by_stage(self) -> dict[int, tuple[Block, ...]]:
        """The blocks of each stage, from 2."""
        return {stage: tuple(blocks) for stage, blocks in groupby(self.blocks, lambda block: block.stage)}

    @functools.cached_property
    def ends(self) -> dict[int, int]:
        """The last block of each stage -> the stage."""
        return {blocks[-1].index: stage for stage, blocks in self.by_stage.items()}

    def parameters(self, num_classes: int) -> int:
        """Of the whole model."""
        return sum(cost.parameters for cost in self.costs(32)) + (self.head + 1) * num_classes

    def costs(self, resolution: int) -> tuple[StageCost, ...]:
        """Every stage of the network on an image of that side, from the stem to the head's convolution, without the
        classifier."""
        side = -(-resolution // 2)
        stem = self.stem * side**2
        found = [StageCost(1, "Conv3x3", side, self.stem, 1, 29 * self.stem, 27 * stem, stem)]
        for stage, blocks in self.by_stage.items():
            parameters = macs = activations = 0
            for block in blocks:
                parameters += block.shape.parameters
                more = block.shape.macs_and_activations(side)
                macs, activations = macs + more[0], activations + more[1]
                side = -(-side // block.shape.stride)
            last = blocks[-1].shape
            operator = blocks[0].shape.operator
            found.append(
                StageCost(stage, operator, side, last.out_channels, len(blocks), parameters, macs, activations)
            )
        into, out = self.blocks[-1].shape.out_channels, self.head * side**2
        parameters = (into + 2) * self.head
        return (*found, StageCost(self.last_stage, "Conv1x1", side, self.head, 1, parameters, into * out, out))


@functools.cache
def scaled(family: Family, width: float, depth: float) -> Network:
    """The network of a family at multiples of its channels and repeats."""

    def end(channels: int) -> int:
        return channels if family.fixed_ends else round_filters(channels, width)

    stem, blocks = end(family.stem), list[Block]()
    channels = stem
    for stage, row in enumerate(family.stages, start=2):
        fixed = family.fixed_ends and stage in (2, len(family.stages) + 1)
        out = round_filters(row.channels, width)
        for i in range(row.repeats if fixed else round_repeats(row.repeats, depth)):
            stride = row.stride if i == 0 else 1
            shape = BlockShape(
                channels, out, row.kernel_size, stride, row.expand_ratio, family.squeeze_excite, family.activation
            )
            blocks.append(Block(len(blocks), stage, shape))
            channels = out
    return Network(family, stem, tuple(blocks), end(family.head))


@dataclass(frozen=True)
class ModelConfig:
    """Everything that rebuilds a model: ``EfficientNet(ModelConfig(**config.to_dict()))``.

    bn_momentum is torch's: running = (1 − momentum)·running + momentum·batch (TF's 0.99 is 0.01 here).
    padding: "symmetric" is k // 2 on every side; "same" is TF's, which puts an odd pixel right and below.
    kernels: "torch" is plain PyTorch; "triton" fuses whole MBConv blocks and never falls back; "triton-ops" keeps
    PyTorch's convolutions and fuses what lies between them; "native" is "triton" in C++ on a CPU, and never falls back;
    "auto" is "torch" without CUDA, but for blocks that were found right and faster in C++ on the CPU at hand, and on
    CUDA "triton", but for blocks that were found wrong or slower so on the GPU at hand (``fastnet.training.tuning``).
    """

    variant: str = "b0"
    scaling: Scaling = "published"
    width: float = 1.0
    depth: float = 1.0
    num_classes: int = 101
    in_chans: int = 3
    dropout: float = 0.2
    drop_connect_rate: float = 0.2
    bn_eps: float = 1e-3
    bn_momentum: float = 0.01
    padding: Padding = "symmetric"
    kernels: Kernels = "auto"

    @property
    def network(self) -> Network:
        return scaled(family(self.variant), self.width, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """For a file: `ModelConfig(**…)` of it is this one. What every earlier file is silent about is left out."""
        values = asdict(self)
        return values if self.in_chans != 3 else {name: v for name, v in values.items() if name != "in_chans"}

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_chans"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name in ("width", "depth"):
            if not 0.01 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} must be in [0.01, 100], got {getattr(self, name)}.")
        for name in ("dropout", "drop_connect_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not self.bn_eps > 0:
            raise ValueError(f"bn_eps must be positive, got {self.bn_eps}.")
        if not 0 <= self.bn_momentum <= 1:
            raise ValueError(f"bn_momentum must be in [0, 1], got {self.bn_momentum}.")
        if self.padding not in get_args(Padding):
            raise ValueError(f"unknown padding {self.padding!r}: choose one of {', '.join(get_args(Padding))}.")
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"unknown kernels {self.kernels!r}: choose one of {', '.join(get_args(Kernels))}.")
