"""What can bound each step of a fused block's schedule, as seconds: `python -m bench.limits` prints them for an H200.

Four things are counted: bytes from memory, special-function operations (two a sigmoid: exponential and reciprocal),
floating-point operations of the tensor cores, and, for the depthwise kernels, instructions. The step takes at least
the longest of the four; that is what it is measured against. Idle lanes are counted, since they cost the same.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.launches import describe
from bench.shapes import model_blocks
from fastnet.scaling import SCALED
from kernels import depthwise, depthwise_backward, mbconv_traffic
from kernels.device import REFERENCE, Gpu
from kernels.launch import cdiv
from kernels.mbconv_traffic import Block
from kernels.pointwise_blocks import plan
from kernels.pointwise_operand import SILU, Prologue
from kernels.pointwise_wgrad import split_plan
from kernels.strips import BLOCK_C, geometry

# Of one multiprocessor in a cycle. Dense 16-bit tensor-core operations by compute capability, as the vendor states.
SPECIAL, INSTRUCTIONS = 16, 128
TENSOR = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
# Instructions an element and lane, as the files of the two kernels estimate them: of D forward and of E backward, by
# kernel size. Forward at k 3 is said to keep up with memory.
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = {5: 60}, {3: 100, 5: 130}
SIGMOID = 2


class Work(NamedTuple):
    """What one step of a block asks for."""

    memory: int  # bytes
    special: int = 0
    tensor: int = 0
    instructions: int = 0


class Rates(NamedTuple):
    """What a GPU does in a second, in the units of `Work`."""

    memory: float
    special: float
    tensor: float
    instructions: float


def rates(bandwidth: float, multiprocessors: int, megahertz: float, capability: tuple[int, int]) -> Rates:
    cycles = multiprocessors * megahertz * 1e6
    tensor = TENSOR.get(capability, float("inf"))
    return Rates(bandwidth, SPECIAL * cycles, tensor * cycles, INSTRUCTIONS * cycles)


# 4.3 TB/s is a guess at what a copy reaches; 1755 MHz what the vendor's peak figures are stated at.
H200 = rates(4.3e12, 132, 1755, (9, 0))


def _product(
    shape: tuple[int, int, int, int], n: int, prologue: Prologue, sums: bool, dtype: torch.dtype, gpu: Gpu
) -> Counter[str]:
    images, k, height, width = shape
    p = plan(shape, k, n, prologue, "gate_sums" if sums else "none", dtype, gpu)
    rows = p.tiles * p.blocks.m
    found = Counter(tensor=2 * images * height * width * k * n)
    if prologue in SILU:
        found["special"] = SIGMOID * rows * cdiv(k, p.blocks.k) * p.blocks.k * p.column_blocks
    if sums:
        found["special"] = SIGMOID * rows * p.column_blocks * p.blocks.n
    return found


def _wgrad(
    shape: tuple[int, int, int, int], narrow: int, prologues: tuple[Prologue, Prologue], dtype: torch.dtype, gpu: Gpu
) -> Counter[str]:
    images, wide, height, width = shape
    rows = images * height * width
    split = split_plan(shape, narrow, *prologues, dtype, gpu)
    return Counter(tensor=2 * rows * wide * narrow, special=SIGMOID * rows * split.outputs * split.blocks.wide)


def _arithmetic(block: Block, dtype: torch.dtype, gpu: Gpu) -> dict[str, Counter[str]]:
    b, c, c_in, out, k = block.images, block.channels, block.in_channels, block.out_channels, block.kernel_size
    g = geometry(block.height, block.width, k, block.stride, block.padding)
    narrow, wide = (b, c_in, block.height, block.width), (b, c, block.height, block.width)
    d, p = (b, c, g.out_height, g.out_width), (b, out, g.out_height, g.out_width)
    pixels, out_pixels = b * block.height * block.width, b * g.out_height * g.out_width

    forward, steps = depthwise.forward_plan(wide, dtype, g, norm=block.expands, stats=True, gpu=gpu)
    tile = forward.tile_units * forward.blocks * BLOCK_C
    span = (forward.config.columns - 1) * g.stride + k
    loaded = forward.groups * steps * g.stride * span * tile
    backward, lead = depthwise_backward.backward_plan(wide, dtype, g, norm=block.expands, out_norm=True, gpu=gpu)
    tile = backward.tile_units * backward.blocks * BLOCK_C
    columns = backward.config.columns
    gradients = backward.groups * (lead + backward.band_rows) * (columns + g.lines - 1) * tile
    inputs = backward.groups * backward.band_rows * columns * g.stride**2 * tile
    return {
        "F1 expand": _product(narrow, c, "none", False, dtype, gpu),
        "F2 depthwise": Counter(
            special=SIGMOID * loaded * block.expands, instructions=FORWARD_INSTRUCTIONS.get(k, 0) * out_pixels * c
        ),
        "F3 squeeze": Counter(special=SIGMOID * out_pixels * c),
        "F5 project": _product(d, out, "bn_silu_gate", False, dtype, gpu),
        "B2 project dgrad": _product(p, c, "bn_grad", True, dtype, gpu),
        "B2 project wgrad": _wgrad(d, out, ("bn_silu_gate", "bn_grad"), dtype, gpu),
        "B5 depthwise backward": Counter(
            special=SIGMOID * (gradients + inputs * block.expands), instructions=BACKWARD_INSTRUCTIONS[k] * pixels * c
        ),
        "B7 expand dgrad": _product(wide, c_in, "bn_silu_grad", False, dtype, gpu),
        "B7 expand wgrad": _wgrad(wide, c_in, ("bn_silu_grad", "none"), dtype, gpu),
    }


def block_work(block: Block, dtype: torch.dtype = torch.bfloat16, gpu: Gpu = REFERENCE) -> dict[str, Work]:
    """What each step of the schedule asks for on that card; vector-only steps and joins are bytes alone."""
    moved = mbconv_traffic.forward(block, dtype, from_memory=True, gpu=gpu)
    moved |= mbconv_traffic.backward(block, dtype, from_memory=True, gpu=gpu)
    arithmetic = _arithmetic(block, dtype, gpu)
    return {step: Work(sum(by.values()), **arithmetic.get(step, Counter())) for step, by in moved.items()}


def limits(work: Work, of: Rates) -> dict[str, float]:
    """Seconds that each resource needs for the step by itself."""
    return {name: amount / rate for name, amount, rate in zip(Work._fields, work, of, strict=True)}


def bound(work: Work, of: Rates) -> tuple[str, float]:
    """What limits the step, and the seconds that it then takes at least."""
    found = limits(work, of)
    name = max(found, key=lambda resource: found[resource])
    return name, found[name]


def report(variant: str, resolution: int, batch: int, of: Rates = H200) -> str:
    """Predicted us of every step of every distinct block, and by step the sum over the model and what limits it."""
    counted = Counter(model_blocks(variant, resolution, batch))
    sums: dict[str, Counter[str]] = {}
    lines = [
        f"efficientnet_{variant} at {resolution}, batch {batch}, bf16, H200 at {of.memory / 1e12:.1f} TB/s: predicted"
    ]
    for block, times in counted.items():
        lines.append(f"{describe(block)}{f', {times} times' * (times > 1)}")
        for step, work in block_work(block).items():
            name, seconds = bound(work, of)
            total = sums.setdefault(step, Counter())
            total.update({name: times * seconds, "all": times * seconds, "bytes": times * work.memory / of.memory})
            lines.append(f"  {step:<24}{1e6 * seconds:9.1f} us  {name}")
    lines.append("all blocks")
    for step, total in sorted(sums.items(), key=lambda item: -item[1]["all"]):
        by = ", ".join(f"{n} {t / total['all']:.0%}" for n, t in total.most_common() if n not in ("all", "bytes"))
        lines.append(
            f"  {step:<24}{1e3 * total['all']:9.2f} ms, {1e3 * total['bytes']:6.2f} ms for its bytes; limited by {by}"
        )
    whole, moved = (sum(total[key] for total in sums.values()) for key in ("all", "bytes"))
    lines.append(f"  {'together':<24}{1e3 * whole:9.2f} ms, {1e3 * moved:6.2f} ms for their bytes")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="b0", choices=SCALED)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)
    print(report(options.variant, options.resolution, options.batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
