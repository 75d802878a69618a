"""`python -m fastnet.summary --variant b3`: what a model is made of and what it costs, stage by stage.

MACs are the multiplications of convolutions and linear layers, activations the elements that they put out (the
`macts` of timm's tables, squeeze-and-excitation's included), both for one image's forward pass. Byte-passes are what a
training step on the fused blocks (`--kernels triton`, 16-bit, 128 images) moves through memory, forward and backward,
over two bytes an activation of the whole model: as the kernels' files state it, each convolution's images read and
written once where PyTorch runs it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fastnet.arch import Scaling, StageCost, Variant
from fastnet.commands import parse
from fastnet.errors import UserError, run_command
from fastnet.scaling import Architecture, architecture

if TYPE_CHECKING:
    from kernels.block.traffic import Block

COUNTED_IMAGES = 128
CLASS_COUNTS = (101, 1000)
"""Food-101's and ImageNet's, at which the totals are given."""


@dataclass(frozen=True)
class StageSummary(StageCost):
    byte_passes: float | None


@dataclass(frozen=True)
class Totals:
    """byte_passes: without the classifier, which moves next to nothing; None for a model that has no fused blocks."""

    parameters: int
    macs: int
    activations: int
    byte_passes: float | None


@dataclass(frozen=True)
class ModelSummary:
    """The stages without the classifier, and the totals with it by number of classes."""

    variant: str
    scaling: str
    resolution: int
    width: float
    depth: float
    stages: tuple[StageSummary, ...]
    totals: dict[int, Totals]


def training_blocks(arch: Architecture, resolution: int, images: int) -> list[Block]:
    """Every MBConv of the model in order on `images` images, as it stands in training."""
    from kernels.block.traffic import Block

    side = -(-resolution // 2)  # behind the stem
    blocks = []
    for block in arch.network.blocks:
        shape = block.shape
        blocks.append(
            Block(
                images=images,
                in_channels=shape.in_channels,
                channels=shape.expanded,
                out_channels=shape.out_channels,
                squeezed=shape.squeezed,
                height=side,
                width=side,
                kernel_size=shape.kernel_size,
                stride=shape.stride,
                expands=shape.expand_ratio != 1,
                residual=shape.has_residual,
                scaled=shape.has_residual and block.index > 0,
            )
        )
        side = -(-side // shape.stride)
    return blocks


def _stage_bytes(arch: Architecture, resolution: int) -> list[int]:
    """Bytes of each of the nine stages in a training step, of COUNTED_IMAGES images in bf16."""
    import torch

    from kernels.block import traffic as mbconv_traffic
    from kernels.ops import bn_silu as batch_norm_silu

    dtype, images = torch.bfloat16, COUNTED_IMAGES
    blocks, network = training_blocks(arch, resolution, images), arch.network
    stem, head = network.stem, network.head

    def norm(channels: int, side: int) -> int:
        return sum(batch_norm_silu.traffic((images, channels, side, side), dtype).values())

    first, last = blocks[0].height, -(-blocks[-1].height // blocks[-1].stride)
    # Forward reads x and writes y; the weight's gradient reads both; the head's x has a gradient too.
    pixels, stem_out = 3 * resolution**2, stem * first**2
    head_in, head_out = blocks[-1].out_channels * last**2, head * last**2
    found = [norm(stem, first) + 2 * images * 2 * (pixels + stem_out)]
    moved = [
        sum(count for launches in steps.values() for count in launches.values())
        for steps in mbconv_traffic.model(blocks, dtype, from_memory=True)
    ]
    found += [sum(moved[block.index] for block in stage) for stage in network.by_stage.values()]
    return [*found, norm(head, last) + 2 * images * 3 * (head_in + head_out)]


def summarise(variant: str | Architecture, scaling: Scaling = "published", resolution: int = 0) -> ModelSummary:
    """Count it all; resolution 0 is the variant's own on Food-101. Nothing is allocated or run.

    variant: a name, or an Architecture such as ``CompoundScaler(1.5).architecture()``, which brings its scaling.
    """
    arch = variant if isinstance(variant, Architecture) else architecture(variant, scaling)
    resolution = resolution or arch.resolution
    costs, head = arch.network.costs(resolution), arch.network.head
    one = 2 * COUNTED_IMAGES * sum(cost.activations for cost in costs)
    passes: list[float] | list[None] = [None] * len(costs)
    if arch.network.family.has_kernels:
        passes = [count / one for count in _stage_bytes(arch, resolution)]
    stages = [StageSummary(**asdict(cost), byte_passes=some) for cost, some in zip(costs, passes, strict=True)]
    totals = {
        classes: Totals(
            arch.network.parameters(classes),
            sum(stage.macs for stage in stages) + head * classes,
            sum(stage.activations for stage in stages) + classes,
            sum(map(float, filter(None, passes))) or None,
        )
        for classes in CLASS_COUNTS
    }
    return ModelSummary(arch.name, arch.scaling, resolution, arch.width, arch.depth, tuple(stages), totals)


def summary(
    variant: Variant = "b0",
    scaling: Scaling = "published",
    resolution: int | None = None,
    json: bool = False,
) -> int:
    """Stages, resolution, channels, parameters, MACs, activations and byte-passes of a model.

    Args:
        variant: EfficientNet variant.
        scaling: Width and depth: the published coefficients, or the pure powers of the paper's equation 3.
        resolution: Image side in pixels; default: the variant's on Food-101 (b0 200, b1 232, b4 352, b7 536).
        json: Print JSON instead of a table.
    """
    if resolution is not None and not 32 <= resolution <= 4096:
        raise UserError(f"--resolution {resolution} must lie between 32 and 4096.", exit_status=2)
    found = summarise(variant, scaling, resolution or 0)
    if json:
        _print_json(found)
    else:
        _print_table(found)
    return 0


def _print_json(found: ModelSummary) -> None:
    print(json.dumps(asdict(found), indent=2))


def _print_table(found: ModelSummary) -> None:
    from rich.console import Console
    from rich.table import Table

    scale = f"width {found.width:.3g}, depth {found.depth:.3g}"
    table = Table(title=f"efficientnet_{found.variant} at {found.resolution} px: {scale}", title_justify="left")
    table.add_column("stage")
    table.add_column("operator")
    for name in ("output", "channels", "layers", "parameters", "MACs", "activations", "byte-passes"):
        table.add_column(name, justify="right")
    for stage in found.stages:
        table.add_row(
            str(stage.stage),
            stage.operator,
            f"{stage.resolution} px",
            str(stage.channels),
            str(stage.layers),
            f"{stage.parameters:,}",
            f"{stage.macs / 1e6:,.1f} M",
            f"{stage.activations / 1e6:,.2f} M",
            _two_digits(stage.byte_passes),
        )
    table.add_section()
    for classes, total in found.totals.items():
        table.add_row(
            "",
            f"with {classes} classes",
            "",
            "",
            "",
            f"{total.parameters:,}",
            f"{total.macs / 1e6:,.1f} M",
            f"{total.activations / 1e6:,.2f} M",
            _two_digits(total.byte_passes),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    sys.exit(run_command(lambda: parse(summary, prog="python -m fastnet.summary")))


if __name__ == "__main__":
    main()
