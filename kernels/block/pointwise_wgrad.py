"""The weight gradient of the 1×1 convolutions, `dW = g(dY)ᵀ f(X)`, with f and g two of
`kernels.block.pointwise_operand`.

The sum runs over M = B H W rows and the result is small, so the rows are split: each program owns a block of dW,
walks its run of rows with the accumulator in registers and writes one fp32 partial; `batch_norm.sum_partials` adds them
in a fixed order. Both operands are made as they load, nothing of them is kept from forward but what they are made from.
Rows past the end are zero in one operand.

The operand whose channels are the expanded ones is "wide": a program takes 64 of them and up to 128 of the other's,
so in B0 to B7 a wide tile is made at most five times and the narrow one comes out of L2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import aot, configs
from kernels import launch as L
from kernels.batch_norm import sum_partials, sum_traffic
from kernels.block.pointwise_blocks import BARRIERS, in_place, needs_where
from kernels.block.pointwise_operand import (
    GRADIENTS,
    VECTORS,
    Prologue,
    area_of,
    bound,
    operand,
    operand_vectors,
    product,
    span_for,
    vector_width,
    widened,
)
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl


@L.jit
def _pointwise_wgrad_kernel(
    wide_ptr,  # [M, A]
    wide_x_ptr,
    wide_norm_ptr,
    narrow_ptr,  # [M, B]
    narrow_x_ptr,
    narrow_norm_ptr,
    gate_ptr,  # of the wide operand
    drop_scale_ptr,  # of the narrow one
    partial_ptr,  # [S, C_out, C_in]
    area,
    row_count,
    rows_per_program,
    wide_vec,
    narrow_vec,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE_IS_INPUT: tl.constexpr,
    WIDEN: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wide_count = wide_vec * VEC
    narrow_count = narrow_vec * VEC
    wide_blocks = tl.cdiv(wide_count, BLOCK_W)
    blocks = wide_blocks * tl.cdiv(narrow_count, BLOCK_N)
    split = tl.program_id(0) // blocks
    w0 = tl.program_id(0) % wide_blocks * BLOCK_W
    n0 = tl.program_id(0) % blocks // wide_blocks * BLOCK_N
    start = split * rows_per_program
    end = tl.minimum(start + rows_per_program, row_count)
    wide_vectors = operand_vectors(wide_norm_ptr, w0, wide_count, WIDE, BLOCK_W)
    narrow_vectors = operand_vectors(narrow_norm_ptr, n0, narrow_count, NARROW, BLOCK_N)
    acc = tl.zeros([BLOCK_W, BLOCK_N], tl.float32)
    for row in tl.range(bound(start), bound(end), BLOCK_M, num_stages=STAGES):
        wide = operand(
            wide_ptr, wide_x_ptr, gate_ptr, None, wide_vectors, row, end, row_count, area, w0, wide_count,
            WIDE, SPAN, BLOCK_M, BLOCK_W,
        )  # fmt: skip
        narrow = operand(
            narrow_ptr, narrow_x_ptr, None, drop_scale_ptr, narrow_vectors, row, end, row_count, area, n0, narrow_count,
            NARROW, SPAN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if NARROW != "none":
            narrow = tl.where(row + tl.arange(0, BLOCK_M)[:, None] < end, narrow, 0.0).to(narrow.dtype)
        acc = product(tl.trans(wide), narrow, acc, WIDEN)
    w = w0 + tl.arange(0, BLOCK_W)[:, None]
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    offsets = n * wide_count + w if WIDE_IS_INPUT else w * narrow_count + n
    mask = (w < wide_count) & (n < narrow_count)
    tl.store(partial_ptr + split.to(tl.int64) * wide_count * narrow_count + offsets, acc, mask=mask)


@dataclass(frozen=True)
class Blocks:
    """Steps of `m` rows for a block of `wide` by `narrow` channels; a launch has up to `programs` for each
    multiprocessor. `maxnreg` bounds registers."""

    m: int
    wide: int
    narrow: int
    num_warps: int
    stages: int
    programs: int = 2
    maxnreg: int | None = None

    def constexprs(self) -> dict[str, int]:
        return {"STAGES": self.stages, "BLOCK_M": self.m, "BLOCK_W": self.wide, "BLOCK_N": self.narrow}

    def bounds(self) -> dict[str, Any]:
        """A launch's bound on registers, if any."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}


def blocks_for(wide: int, narrow: int, dtype: torch.dtype) -> Blocks:
    """The default. Predicted, not measured: steps of 32 rows stay within one or two images down to 7×7; two stages
    leave room for twice the programs, which share the rows out more finely."""
    if dtype == torch.float32:
        return Blocks(16, 64, 64, 8, 2)
    if vector_width(wide, narrow) == 1:
        return Blocks(32, 64, 32, 4, 1)
    if narrow > 64:
        return Blocks(64, 64, 128, 8, 2)
    return Blocks(32, 64, 64 if narrow > 32 else 32, 4, 2, programs=4)


class Other(NamedTuple):
    """A configuration to try beside the default in bf16 training, where all channels come in eights, for weights whose
    narrow side lies in `narrow`."""

    narrow: range
    blocks: Blocks


# Predicted by a model of the machine code, not measured: best first. A line here is all that another one takes.
OTHERS = (
    # Partials of twice as many rows.
    Other(range(33), Blocks(32, 64, 32, 4, 3)),
    Other(range(33, 65), Blocks(32, 64, 64, 4, 3)),
    # Partials of half as many rows; and columns in halves: half the accumulator.
    Other(range(65, 2**31), Blocks(64, 64, 128, 8, 2, programs=4)),
    Other(range(65, 2**31), Blocks(32, 64, 64, 4, 2, programs=4)),
)


def selectable(
    wide: int, narrow: int, wide_prologue: Prologue, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[Blocks, ...]:
    """The default and the others on cards of that capability, whether or not they fit."""
    default = blocks_for(wide, narrow, dtype)
    if capability[0] == 12 and wide_prologue == "bn_silu_grad" and default.num_warps == 8 and dtype != torch.float32:
        # ptxas otherwise trades a few spilled bytes for one more resident program.
        default = replace(default, maxnreg=255)
    if dtype != torch.bfloat16 or vector_width(wide, narrow) == 1 or wide_prologue == "none":
        return (default,)
    others = (other.blocks for other in OTHERS if narrow in other.narrow)
    return default, *(replace(b, maxnreg=default.maxnreg) if b.num_warps == default.num_warps else b for b in others)


def shared_bytes(
    blocks: Blocks, wide: Prologue, narrow: Prologue, dtype: torch.dtype, span: int, capability: tuple[int, int]
) -> int:
    """The most shared memory that a block of the launch takes, derived as in `kernels.block.pointwise_blocks`: what
    a step
    loads for each stage, and a tile for each operand on its way to the tensor cores; the result is stored through one
    of its own when these are free again."""
    b, size = blocks, dtype.itemsize
    sides = ((b.wide, wide), (b.narrow, narrow))
    step = sum(b.m * n * size * (1 + (prologue in GRADIENTS)) for n, prologue in sides)
    step += 4 * b.m * (narrow == "bn_grad") + 4 * b.wide * (span or b.m) * (wide == "bn_silu_gate")
    through = b.m * (b.wide + b.narrow) * size
    return max(step * max(b.stages - 1 + in_place(capability), 1) + through + BARRIERS, 4 * b.wide * b.narrow)


@configs.candidates_of("pointwise_wgrad")
def _candidates(site: Site, gpu: Gpu) -> tuple[Blocks, ...]:
    sizes: tuple[Any, ...] = site.sizes
    _images, height, width, wide, narrow, wide_prologue, narrow_prologue, name = sizes
    dtype, vec = getattr(torch, name), vector_width(wide, narrow)

    def needs(b: Blocks) -> int:
        span = span_for(b.m, height * width, vec, dtype)
        return shared_bytes(b, wide_prologue, narrow_prologue, dtype, span, gpu.capability)

    return configs.fitting(selectable(wide, narrow, wide_prologue, dtype, gpu.capability), needs, gpu)


@dataclass(frozen=True)
class Split:
    """How a weight gradient is cut up: `outputs` blocks of it, each by `splits` programs of `step` rows."""

    site: Site
    blocks: Blocks
    outputs: int
    step: int
    splits: int


def split_plan(
    shape: tuple[int, ...],
    narrow: int,
    wide_prologue: Prologue,
    narrow_prologue: Prologue,
    dtype: torch.dtype,
    gpu: Gpu = REFERENCE,
) -> Split:
    """For a wide operand of `shape`. As many programs a multiprocessor as the blocks say, but only one where partials
    (written and read, 8 bytes) would cost more than a quarter of the operands."""
    images, wide, height, width = shape
    sizes = images, height, width, wide, narrow, wide_prologue, narrow_prologue, L.dtype_name(dtype)
    site = Site("pointwise_wgrad", sizes)
    blocks: Blocks = configs.choose(site, gpu)
    rows = images * height * width
    outputs = L.cdiv(wide, blocks.wide) * L.cdiv(narrow, blocks.narrow)
    affordable = rows * (wide + narrow) * dtype.itemsize // (4 * 8 * wide * narrow)
    fewest, most = (programs * gpu.multiprocessors // outputs for programs in (1, blocks.programs))
    splits = min(most, max(fewest, affordable))
    steps = L.cdiv(rows, blocks.m)
    step = blocks.m * L.cdiv(steps, max(min(splits, steps), 1))
    return Split(site, blocks, outputs, step, L.cdiv(rows, step))


def wgrad(
    wide: Tensor,
    narrow: Tensor,
    *,
    wide_prologue: Prologue = "none",
    narrow_prologue: Prologue = "none",
    wide_is_input: bool = False,
    wide_x: Tensor | None = None,
    narrow_x: Tensor | None = None,
    wide_vectors: Tensor | None = None,
    narrow_vectors: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
    site: Site | None = None,
) -> Tensor:
    """dW [C_out, C_in] in fp32; wide and narrow are images [B, C, H, W] in channels_last, one of dY's channels and one
    of X's. `site`: where time is counted, if not at the gradient's own."""
    a, b = wide.shape[1], narrow.shape[1]
    rows, area = wide.numel() // a, area_of(wide)
    split = split_plan(wide.shape, b, wide_prologue, narrow_prologue, wide.dtype, L.gpu(wide.device))
    blocks, splits = split.blocks, split.splits
    vec = vector_width(a, b)
    size = (b, a) if wide_is_input else (a, b)
    partial = L.empty((splits, *size), like=wide)
    L.launch(
        _pointwise_wgrad_kernel, (split.outputs * splits,), L.nhwc(wide), None if wide_x is None else L.nhwc(wide_x),
        wide_vectors, L.nhwc(narrow), None if narrow_x is None else L.nhwc(narrow_x), narrow_vectors, gate, drop_scale,
        partial, area, rows, split.step, a // vec, b // vec, like=wide, num_warps=blocks.num_warps,
        WIDE=wide_prologue, NARROW=narrow_prologue, WIDE_IS_INPUT=wide_is_input, WIDEN=widened(wide.dtype),
        SPAN=span_for(blocks.m, area, vec, wide.dtype) if gate is not None else 0, VEC=vec, site=site or split.site,
        **blocks.bounds(), **blocks.constexprs(),
    )  # fmt: skip
    return partial[0] if splits == 1 else sum_partials(partial.view(1, splits, -1), site or split.site).view(size)


# Prologue of the wide operand, of the narrow one, and whether the wide one is the input.
FORMS: tuple[tuple[Prologue, Prologue, bool], ...] = (
    ("bn_silu_gate", "bn_grad", True),
    ("none", "none", False),
    ("bn_silu_grad", "none", False),
)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    images = ("wide_ptr", "wide_x_ptr", "narrow_ptr", "narrow_x_ptr")
    for dtype, name in L.STORAGE_DTYPES.items():
        for wide, narrow, wide_is_input in FORMS:
            sizes = [(96, 24), (96, 40), (96, 80), (9, 9)]
            chosen: dict[tuple[Blocks, int], set[tuple[int, int]]] = {}
            for size, capability in itertools.product(sizes, aot.CAPABILITIES):
                for blocks in selectable(*size, wide, dtype, capability):
                    built = replace(blocks, programs=1), vector_width(*size)  # the compiler does not see programs
                    chosen.setdefault(built, set()).add(capability)
            used = {
                "wide_x_ptr": wide == "bn_silu_grad", "wide_norm_ptr": wide != "none",
                "narrow_x_ptr": narrow == "bn_grad", "narrow_norm_ptr": narrow != "none",
                "gate_ptr": wide == "bn_silu_gate", "drop_scale_ptr": narrow == "bn_grad",
            }  # fmt: skip
            absent = {pointer: None for pointer, present in used.items() if not present}
            for (blocks, vec), where in sorted(chosen.items(), key=lambda c: (-c[0][1], str(c[0]))):
                spans = {span_for(blocks.m, area, vec, dtype) for area in (blocks.m, blocks.m - 1, 1)}
                for span in sorted(spans) if wide == "bn_silu_gate" else (0,):
                    for scaled in ({}, {"drop_scale_ptr": None}) if narrow == "bn_grad" else ({},):
                        constexprs = {
                            **absent, **scaled, "WIDE": wide, "NARROW": narrow, "WIDE_IS_INPUT": wide_is_input,
                            "WIDEN": False, "SPAN": span, "VEC": vec, **blocks.constexprs(),
                        }  # fmt: skip
                        yield aot.spec(
                            _pointwise_wgrad_kernel, "gemm", name, constexprs, images=images,
                            num_warps=blocks.num_warps, maxnreg=blocks.maxnreg,
                            shared_bytes=partial(needs_where, where, shared_bytes, blocks, wide, narrow, dtype, span),
                        )  # fmt: skip


def wgrad_traffic(
    shape: tuple[int, int, int, int],
    narrow: int,
    dtype: torch.dtype,
    wide_prologue: Prologue = "none",
    narrow_prologue: Prologue = "none",
    *,
    scaled: bool = False,
    from_memory: bool = False,
    gpu: Gpu = REFERENCE,
) -> dict[str, int]:
    """Bytes that each kernel moves for a wide operand of `shape`; `from_memory` counts what several programs or steps
    read once, as where the caches serve the others."""
    images, wide, height, width = shape
    rows, area = images * height * width, height * width
    split = split_plan(shape, narrow, wide_prologue, narrow_prologue, dtype, gpu)
    blocks, outputs, splits = split.blocks, split.outputs, split.splits
    wide_blocks = L.cdiv(wide, blocks.wide)
    narrow_blocks = outputs // wide_blocks
    wide_once = rows * wide * dtype.itemsize * (2 if wide_prologue in GRADIENTS else 1)
    narrow_once = rows * narrow * dtype.itemsize * (2 if narrow_prologue in GRADIENTS else 1)
    wide_vectors, narrow_vectors = 4 * VECTORS[wide_prologue] * wide, 4 * VECTORS[narrow_prologue] * narrow
    gated = wide_prologue == "bn_silu_gate"
    if from_memory:
        moved = wide_once + narrow_once + wide_vectors + narrow_vectors + 4 * images * (wide * gated + scaled)
    else:
        moved = narrow_blocks * (wide_once + splits * wide_vectors)
        moved += wide_blocks * (narrow_once + splits * narrow_vectors)
        if gated:
            span = span_for(blocks.m, area, vector_width(wide, narrow), dtype)
            moved += 4 * wide * narrow_blocks * (L.cdiv(rows, blocks.m) * span if span else rows)
        if scaled:
            moved += 4 * rows * outputs
    result = {"_pointwise_wgrad_kernel": moved + 4 * splits * wide * narrow}
    return result if splits == 1 else {**result, "_sum_partials_kernel": sum_traffic(1, splits, wide * narrow)}
