"""The matrix product of the 1×1 convolutions, `Y = f(A) W`, with f and what happens to Y chosen at compile time.

A is an image `[B, K, H, W]` in channels_last, read as `[M, K]` with M = B H W, W a weight in the storage dtype, Y
`[M, N]`; products are summed in fp32. f is one of `kernels.block.pointwise_operand`, applied as A loads. Epilogues:

    "none"          Y
    "statistics"    and mean and M2 of each program's rows for `kernels.batch_norm`'s merge, of Y as stored
    "residual"      Y + residual
    "bias"          Y + bias (+ residual)
    "gate_sums"     and, with a = silu(z(d)), σ' = silu'(z(d)) and x̂ of an image d like Y, each image's Σ Y a, Σ Y σ',
                    Σ Y σ' x̂, of Y as stored, as `kernels.ops.excite` wants them

A program owns BLOCK_N columns and walks a run of row tiles. It keeps its statistics in registers, so partials are
few, and where K fits in one block (`SINGLE`) it loads W once and streams A. With "gate_sums" tiles are aligned to
images, so that a sum belongs to one; everything else walks all rows. Programs of the same rows and other columns run
side by side and find A in L2. With "residual_add" those of the first columns store f(A), which others still need.
Nothing is added atomically.

bf16 and fp16 feed the tensor cores (HGMMA on sm_90), fp32 multiplies in IEEE arithmetic: three tf32 products drop
terms of 2**-22, which the tolerance rule does not allow for short sums. Under the interpreter, which has no bf16
product, bf16 operands are widened after their rounding.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.batch_norm import channel_vector, locate, silu_and_dsilu, store_channels, tile_at
from kernels.block.pointwise_blocks import Blocks, Epilogue, Plan, Prologue, needs_where, plan, selectable, shared_bytes
from kernels.block.pointwise_operand import (
    GRADIENTS,
    VECTORS,
    area_of,
    bound,
    operand,
    operand_vectors,
    product,
    span_for,
    vector_width,
    widened,
)
from kernels.block.strips import empty_nhwc
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl


@L.helper
def weight_tile(w_ptr, k0, k_count, n0, n_count, DGRAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a weight stored [N, K], or [K, N] for DGRAD."""
    if DGRAD:
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        return tl.trans(tl.load(w_ptr + k * n_count + n, mask=(k < k_count) & (n < n_count), other=0.0))
    else:
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        return tl.load(w_ptr + n * k_count + k, mask=(k < k_count) & (n < n_count), other=0.0)


@L.helper
def column(ptr, c0, channels, BLOCK_C: tl.constexpr):
    """[BLOCK_C, 1] of a vector over channels."""
    return tl.trans(channel_vector(ptr, c0, channels, BLOCK_C))


@L.helper
def store_once(y_ptr, tile, row, end, c0, channels, n0, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store a tile of [rows, channels] where n0 is zero."""
    offsets, mask = tile_at(row, end, c0, channels, BLOCK_M, BLOCK_C)
    first = tl.zeros([BLOCK_M, BLOCK_C], tl.int32) + n0 == 0
    tl.store(y_ptr + offsets, tile, mask=mask & first)


@L.jit
def _pointwise_kernel(
    a_ptr,  # [M, K]
    x_ptr,  # [M, K]: the batch norm's input, for the gradients; "residual_add"'s residual, or None
    residual_sum_ptr,  # [M, K]: where "residual_add" goes
    w_ptr,
    y_ptr,  # [M, N]
    norm_ptr,  # [4 or 6, K]
    gate_ptr,  # [B, K]
    drop_scale_ptr,  # [B]; None is one
    image_ptr,  # [M, N]: the residual, or d
    image_norm_ptr,  # [4, N]: d's; [N]: the bias
    partial_ptr,  # statistics [2, P, N]; gate_sums [3, B, chunks, N]
    area,
    row_count,
    rows_per_program,
    parts,  # partials; with gate_sums chunks of an image
    k_vec,
    n_vec,
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    DGRAD: tl.constexpr,
    WIDEN: tl.constexpr,
    SPAN: tl.constexpr,
    SINGLE: tl.constexpr,
    STAGES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k_count = k_vec * VEC
    n_count = n_vec * VEC
    part, n0 = locate(n_count, BLOCK_N)
    if EPILOGUE == "gate_sums":
        image = part // parts
        start = image * area + (part % parts) * rows_per_program
        end = tl.minimum(start + rows_per_program, (image + 1) * area)
        mean = column(image_norm_ptr, n0, n_count, BLOCK_N)
        rstd = column(image_norm_ptr + n_count, n0, n_count, BLOCK_N)
        bn_scale = column(image_norm_ptr + 2 * n_count, n0, n_count, BLOCK_N)
        bias = column(image_norm_ptr + 3 * n_count, n0, n_count, BLOCK_N)
    else:
        start = part * rows_per_program
        end = tl.minimum(start + rows_per_program, row_count)
    # count, mean, M2 of what this program has stored, or its three sums
    count = 0.0
    first = tl.zeros([BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_N], tl.float32)
    third = tl.zeros([BLOCK_N], tl.float32)
    if SINGLE:
        vectors = operand_vectors(norm_ptr, 0, k_count, PROLOGUE, BLOCK_K)
        w = weight_tile(w_ptr, 0, k_count, n0, n_count, DGRAD, BLOCK_K, BLOCK_N)
    for row in tl.range(bound(start), bound(end), BLOCK_M, num_stages=STAGES if SINGLE else 1):
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if SINGLE:
            a = operand(
                a_ptr, x_ptr, gate_ptr, drop_scale_ptr, vectors, row, end, row_count, area, 0, k_count,
                PROLOGUE, SPAN, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if PROLOGUE == "residual_add":
                store_once(residual_sum_ptr, a, row, end, 0, k_count, n0, BLOCK_M, BLOCK_K)
            acc = product(w, tl.trans(a), acc, WIDEN)
        else:
            for k0 in tl.range(0, bound(k_count), BLOCK_K, num_stages=STAGES):
                vectors = operand_vectors(norm_ptr, k0, k_count, PROLOGUE, BLOCK_K)
                a = operand(
                    a_ptr, x_ptr, gate_ptr, drop_scale_ptr, vectors, row, end, row_count, area, k0, k_count,
                    PROLOGUE, SPAN, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                if PROLOGUE == "residual_add":
                    store_once(residual_sum_ptr, a, row, end, k0, k_count, n0, BLOCK_M, BLOCK_K)
                w = weight_tile(w_ptr, k0, k_count, n0, n_count, DGRAD, BLOCK_K, BLOCK_N)
                acc = product(w, tl.trans(a), acc, WIDEN)
        offsets, mask = tile_at(row, end, n0, n_count, BLOCK_M, BLOCK_N)
        if EPILOGUE == "bias":
            acc += column(image_norm_ptr, n0, n_count, BLOCK_N)
        if (EPILOGUE == "residual" or EPILOGUE == "bias") and image_ptr is not None:
            acc += tl.trans(tl.load(image_ptr + offsets, mask=mask, other=0.0)).to(tl.float32)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, tl.trans(y), mask=mask)
        present = row + tl.arange(0, BLOCK_M)[None, :] < end
        if EPILOGUE == "statistics":
            n = tl.minimum(end - row, BLOCK_M).to(tl.float32)
            y = tl.where(present, y.to(tl.float32), 0.0)
            tile_mean = tl.sum(y, axis=1) / n
            deviation = tl.where(present, y - tile_mean[:, None], 0.0)
            share = n / (count + n)
            delta = tile_mean - first
            first += delta * share
            second += tl.sum(deviation * deviation, axis=1) + delta * delta * (count * share)
            count += n
        if EPILOGUE == "gate_sums":
            y = tl.where(present, y.to(tl.float32), 0.0)
            centred = tl.trans(tl.load(image_ptr + offsets, mask=mask, other=0.0)).to(tl.float32) - mean
            activated, dsilu = silu_and_dsilu(centred * bn_scale + bias)
            first += tl.sum(y * activated, axis=1)
            y = y * dsilu
            second += tl.sum(y, axis=1)
            third += tl.sum(y * (centred * rstd), axis=1)
    if EPILOGUE == "statistics":
        store_channels(partial_ptr + part * n_count, first, n0, n_count, BLOCK_N)
        store_channels(partial_ptr + (parts + part) * n_count, second, n0, n_count, BLOCK_N)
    if EPILOGUE == "gate_sums":
        all_parts = row_count // area * parts
        store_channels(partial_ptr + part * n_count, first, n0, n_count, BLOCK_N)
        store_channels(partial_ptr + (all_parts + part) * n_count, second, n0, n_count, BLOCK_N)
        store_channels(partial_ptr + (2 * all_parts + part) * n_count, third, n0, n_count, BLOCK_N)


def gemm(
    a: Tensor,
    weight: Tensor,
    *,
    prologue: Prologue = "none",
    epilogue: Epilogue = "none",
    dgrad: bool = False,
    x: Tensor | None = None,
    residual_sum: Tensor | None = None,
    vectors: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
    other: Tensor | None = None,
    other_vectors: Tensor | None = None,
    site: Site | None = None,
) -> tuple[Tensor, Tensor | None, Plan]:
    """y = f(a) weightᵀ, or f(a) weight with `dgrad`; the partials of the epilogue; how it was cut up.

    a, x and other are images [B, C, H, W] in channels_last, and so is `residual_sum`, which f(a) of "residual_add"
    is written to;
    `weight` is [C_out, C_in] in any floating type (cast here unless it has a's). `site`: where time is counted, if not
    at the product's own.
    """
    images, k = a.shape[:2]
    n = weight.shape[1 if dgrad else 0]
    p = plan(a.shape, k, n, prologue, epilogue, a.dtype, L.gpu(a.device))
    y = empty_nhwc(a, n, *a.shape[2:])
    partial = None
    if epilogue == "statistics":
        partial = L.empty((2, p.parts, n), like=a)
    elif epilogue == "gate_sums":
        partial = L.empty((3, images, p.parts, n), like=a)
    programs = p.column_blocks * p.parts * (images if epilogue == "gate_sums" else 1)
    L.launch(
        _pointwise_kernel, (programs,), L.nhwc(a), None if x is None else L.nhwc(x), residual_sum,
        weight.to(a.dtype).contiguous(), y, vectors, gate, drop_scale, None if other is None else L.nhwc(other),
        other_vectors, partial, area_of(a), a.numel() // k, p.step, p.parts, k // p.vec, n // p.vec,
        like=a, num_warps=p.blocks.num_warps, PROLOGUE=prologue, EPILOGUE=epilogue, DGRAD=dgrad, WIDEN=widened(a.dtype),
        SPAN=span_for(p.blocks.m, area_of(a), p.vec, a.dtype) if prologue == "bn_silu_gate" else 0, VEC=p.vec,
        site=site or p.site, **p.blocks.bounds(), **p.blocks.constexprs(),
    )  # fmt: skip
    return y, partial, p


# What a launch can ask for: prologue, epilogue, dgrad; that with most registers first.
FORMS: tuple[tuple[Prologue, Epilogue, bool], ...] = (
    ("bn_grad", "gate_sums", True),
    ("bn_silu_gate", "statistics", False),
    ("bn_silu_gate", "bias", False),
    ("bn_silu", "statistics", False),
    ("none", "statistics", False),
    ("residual_add", "statistics", False),
    ("none", "none", False),
    ("none", "none", True),
    ("bn_silu_grad", "none", True),
    ("bn_silu_grad", "residual", True),
)
SIZES = (8, 24, 40, 72, 136)  # channel counts that between them select every block


def absent_pointers(prologue: Prologue, epilogue: Epilogue) -> dict[str, Any]:
    """The pointers that a form has no use for."""
    used = {
        "x_ptr": prologue in (*GRADIENTS, "residual_add"),
        "residual_sum_ptr": prologue == "residual_add",
        "norm_ptr": prologue != "none",
        "gate_ptr": prologue == "bn_silu_gate",
        "drop_scale_ptr": prologue in ("bn_grad", "residual_add"),
        "image_ptr": epilogue in ("residual", "bias", "gate_sums"),
        "image_norm_ptr": epilogue in ("bias", "gate_sums"),
        "partial_ptr": epilogue in ("statistics", "gate_sums"),
    }
    return {name: None for name, present in used.items() if not present}


def optional_pointers(prologue: Prologue, epilogue: Epilogue) -> tuple[tuple[str, ...], ...]:
    """What may be absent together in a form that has a use for it."""
    if prologue == "residual_add":  # only a residual has a drop_scale, and the first block's has none
        return (), ("drop_scale_ptr",), ("x_ptr", "drop_scale_ptr")
    if prologue == "bn_grad":
        return (), ("drop_scale_ptr",)
    return ((), ("image_ptr",)) if epilogue == "bias" else ((),)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    images = ("a_ptr", "x_ptr", "residual_sum_ptr", "w_ptr", "y_ptr", "image_ptr")
    for dtype, name in L.STORAGE_DTYPES.items():
        for prologue, epilogue, dgrad in FORMS:
            form = prologue, epilogue
            sizes = [(k, n) for k in SIZES for n in (40, 72)] + [(9, 9)]
            chosen: dict[tuple[Blocks, int], set[tuple[int, int]]] = {}
            for (k, n), capability in itertools.product(sizes, aot.CAPABILITIES):
                for blocks in selectable(k, n, prologue, epilogue, dtype, capability):
                    built = replace(blocks, programs=1), vector_width(k, n)  # the compiler does not see programs
                    chosen.setdefault(built, set()).add(capability)
            for (blocks, vec), where in sorted(chosen.items(), key=lambda c: (-c[0][1], str(c[0]))):
                spans = {span_for(blocks.m, area, vec, dtype) for area in (blocks.m, blocks.m - 1, 1)}
                for span in sorted(spans) if prologue == "bn_silu_gate" else (0,):
                    for without in optional_pointers(prologue, epilogue):
                        constexprs = {
                            **absent_pointers(prologue, epilogue), **dict.fromkeys(without), "PROLOGUE": prologue,
                            "EPILOGUE": epilogue, "DGRAD": dgrad, "WIDEN": False, "SPAN": span, "VEC": vec,
                            **blocks.constexprs(),
                        }  # fmt: skip
                        yield aot.spec(
                            _pointwise_kernel, "gemm", name, constexprs, images=images, num_warps=blocks.num_warps,
                            maxnreg=blocks.maxnreg,
                            shared_bytes=partial(needs_where, where, shared_bytes, blocks, *form, dtype, span),
                        )  # fmt: skip


def gemm_traffic(
    shape: tuple[int, int, int, int],
    n: int,
    dtype: torch.dtype,
    prologue: Prologue = "none",
    epilogue: Epilogue = "none",
    *,
    scaled: bool = False,
    with_residual: bool = False,
    from_memory: bool = False,
    gpu: Gpu = REFERENCE,
) -> int:
    """Bytes that `_pointwise_kernel` reads and writes for a of `shape` and n output channels; `with_residual`:
    "residual_add" has a
    residual; `from_memory` counts what several programs or tiles read once, as where the caches serve the others."""
    images, k, height, width = shape
    rows, area, size = images * height * width, height * width, dtype.itemsize
    p = plan(shape, k, n, prologue, epilogue, dtype, gpu)
    programs = p.parts * (images if epilogue == "gate_sums" else 1)
    written = rows * n * size + 4 * n * programs * {"statistics": 2, "gate_sums": 3}.get(epilogue, 0)
    written += rows * k * size * (prologue == "residual_add")
    once = rows * k * size * (2 if prologue in GRADIENTS or with_residual else 1)
    image = rows * n * size if epilogue in ("residual", "gate_sums") else 0
    if from_memory:
        vectors = 4 * k * VECTORS[prologue] + 4 * images * (k if prologue == "bn_silu_gate" else scaled)
        return written + once + image + k * n * size + vectors + (4 * 4 * n if epilogue == "gate_sums" else 0)
    loads = programs if p.blocks.single else p.tiles  # of W and of the vectors along K, for each block of columns
    moved = written + once * p.column_blocks + image
    moved += k * n * size * loads + 4 * VECTORS[prologue] * k * loads * p.column_blocks
    if prologue == "bn_silu_gate":
        span = span_for(p.blocks.m, area, p.vec, dtype)
        moved += 4 * k * p.column_blocks * (p.tiles * span if span else rows)
    if scaled:
        moved += 4 * rows * p.column_blocks * L.cdiv(k, p.blocks.k)
    return moved + (4 * 4 * n * programs if epilogue == "gate_sums" else 0)
