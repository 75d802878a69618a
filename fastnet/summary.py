"""`python -m fastnet.summary --variant b3`: what a model is made of and what it costs, stage by stage.

MACs are the multiplications of convolutions and linear layers, activations the elements that they put out (the
`macts` of timm's tables, squeeze-and-excitation's included), both for one image's forward pass.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from fastnet.config import Variant
from fastnet.errors import UserError, run_command
from fastnet.scaling import Architecture, architecture, round_filters

CLASS_COUNTS = (101, 1000)
"""Food-101's and ImageNet's, at which the totals are given."""


@dataclass(frozen=True)
class StageSummary:
    """One row of the paper's table 1. resolution: side of the output in pixels; layers: blocks or convolutions."""

    stage: int
    operator: str
    resolution: int
    channels: int
    layers: int
    parameters: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Totals:
    parameters: int
    macs: int
    activations: int


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


def summarise(
    variant: str | Architecture, scaling: Literal["published", "compound"] = "published", resolution: int = 0
) -> ModelSummary:
    """Count it all; resolution 0 is the variant's own on Food-101. Nothing is allocated or run.

    variant: "b0" … "b7", or an Architecture such as ``CompoundScaler(1.5).architecture()``, which brings its scaling.
    """
    import torch

    from fastnet.layers import SE_RATIO
    from fastnet.model import (
        HEAD_CHANNELS,
        STAGES,
        STEM_CHANNELS,
        EfficientNet,
        ModelConfig,
        block_shapes,
        stage_repeats,
    )

    arch = variant if isinstance(variant, Architecture) else architecture(variant, scaling)
    resolution = resolution or arch.resolution
    with torch.device("meta"):
        model = EfficientNet(ModelConfig(width=arch.width, depth=arch.depth))

    def parameters(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    side = -(-resolution // 2)
    stem, head = round_filters(STEM_CHANNELS, arch.width), round_filters(HEAD_CHANNELS, arch.width)
    stages = [
        StageSummary(1, "Conv3x3", side, stem, 1, parameters(model.stem), 27 * stem * side * side, stem * side * side)
    ]
    shapes = list(zip(block_shapes(arch.width, arch.depth), model.blocks, strict=True))
    for number, (row, repeats) in enumerate(zip(STAGES, stage_repeats(arch.depth), strict=True), start=2):
        macs = activations = 0
        blocks, shapes = shapes[:repeats], shapes[repeats:]
        for shape, _ in blocks:
            expanded, squeezed = shape.in_channels * shape.expand_ratio, max(1, shape.in_channels // SE_RATIO)
            if shape.expand_ratio != 1:
                macs += shape.in_channels * expanded * side * side
                activations += expanded * side * side
            side = -(-side // shape.stride)
            macs += expanded * side * side * (shape.kernel_size**2 + shape.out_channels) + 2 * expanded * squeezed
            activations += (expanded + shape.out_channels) * side * side + squeezed + expanded
        stages.append(
            StageSummary(
                number,
                f"MBConv{row.expand_ratio}, k{row.kernel_size}x{row.kernel_size}",
                side,
                blocks[-1][0].out_channels,
                repeats,
                parameters(*(module for _, module in blocks)),
                macs,
                activations,
            )
        )
    before = stages[-1].channels
    stages.append(
        StageSummary(
            9, "Conv1x1", side, head, 1, parameters(model.head), before * head * side * side, head * side * side
        )
    )
    totals = {
        classes: Totals(
            sum(stage.parameters for stage in stages) + (head + 1) * classes,
            sum(stage.macs for stage in stages) + head * classes,
            sum(stage.activations for stage in stages) + classes,
        )
        for classes in CLASS_COUNTS
    }
    return ModelSummary(arch.name, arch.scaling, resolution, arch.width, arch.depth, tuple(stages), totals)


def summary(
    variant: Variant = "b0",
    scaling: Literal["published", "compound"] = "published",
    resolution: int | None = None,
    json: bool = False,
) -> int:
    """Stages, resolution, channels, parameters, MACs and activations of a model.

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
    for name in ("output", "channels", "layers", "parameters", "MACs", "activations"):
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
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> None:
    import tyro

    sys.exit(run_command(lambda: tyro.cli(summary, prog="python -m fastnet.summary")))


if __name__ == "__main__":
    main()
