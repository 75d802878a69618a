"""Depthwise convolution, k 3 or 5, stride 1 or 2, that activates as it loads and takes statistics as it stores.

For x [B, H, W, C] and weight w [C, k, k], with the batch norm and SiLU of the layer before (`norm`) or without (a = x):

    a = silu(batch_norm(x)), zero outside the image
    y[o, p] = Σ_{ky, kx} w[ky, kx] a[o s + ky - top, p s + kx - left]

and, where asked for, count, mean and M2 of y as stored, per channel and program, for Chan's merge (see
`kernels.batch_norm`). The backward is derived in `kernels.block.depthwise_backward`. Nothing but x is saved.

Bytes, in passes over the images: x is read and y written, 1 + 1. Unfused PyTorch moves batch norm 1 + 1 (its statistics
1 + 0 more), SiLU 1 + 1, the convolution 1 + 1 and the next statistics 1 + 0: 5 reads and 3 writes.

The shape of the kernel. A tile is [UNITS, BLOCK_C]: UNITS strips of COLUMNS outputs, side by side and running on into
the next images, by BLOCK_C channels, two a lane. All strips slide down the rows together: an input row is loaded as
(COLUMNS - 1) s + k columns, activated once, and added into the ⌈k / s⌉ output rows that it reaches, which live in
registers as a tuple of accumulators; the finished row is stored and the tuple moves up by renaming. So an element is
activated (COLUMNS + k - 1) / COLUMNS times at stride 1 instead of k², and what a neighbouring strip loads again lies in
the first-level cache. Where the images give too few programs, rows are cut into bands, each of which starts with k - 1
rows that its neighbour reads too.

Predicted, not measured: k 3 moves as fast as memory; k 5 issues some 60 instructions an output and lane, half of them
for activations, and is bound by that. Wider strips would activate less often, but their accumulators spill.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated, unreachable"
# (Triton's kernels take no annotations but constexpr; a tuple grows under one name.)
# ruff: noqa: RUF005
# (Its compiler joins tuples by + alone.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.batch_norm import bn_vectors, locate, sigmoid, store_channels
from kernels.block.depthwise_backward import NO_INPUT_VECTORS
from kernels.block.strips import (
    FORWARD,
    NUM_WARPS,
    Geometry,
    empty_nhwc,
    forward_plan,
    inside,
    load_weights,
    pack_weight,
    strip_specs,
    weight_bytes,
)
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl
from kernels.vectors import NO_NORM, Norm


@L.helper
def store_line(
    y_ptrs, values, stop, in_channels, channels, n, lines, more, mean, m2, STATS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store COLUMNS outputs side by side, those left of `stop`, and, where `more` is 1, merge the `n` of them as stored
    into mean and M2 of the `lines` lines before."""
    stored = ()
    total = tl.zeros_like(mean)
    for i in tl.static_range(COLUMNS):
        y = values[i].to(y_ptrs.dtype.element_ty)
        tl.store(y_ptrs + i * channels, y, mask=(i < stop) & in_channels)
        if STATS:
            y = tl.where(i < stop, y.to(tl.float32), 0.0)
            stored = stored + (y,)
            total += y
    if STATS:
        line_mean = total / tl.maximum(n, 1.0)
        share = more / (lines + 1.0)
        delta = line_mean - mean
        mean += delta * share
        m2 += delta * delta * (n * (lines * share))
        for i in tl.static_range(COLUMNS):
            deviation = tl.where(i < stop, stored[i] - line_mean, 0.0)
            m2 += deviation * deviation
        lines += more
    return lines, mean, m2


@L.jit
def _depthwise_kernel(
    x_ptr,
    w_ptr,  # [blocks, K * K, BLOCK_C]
    y_ptr,
    partial_ptr,  # [2, P, C]: means, M2s; None without STATS
    counts_ptr,  # [P]
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    strips,
    bands,
    band_rows,
    steps,
    units,
    groups,
    partials,
    c_vec,
    NORM: tl.constexpr,
    STATS: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    LINES: tl.constexpr = (K - 1) // STRIDE + 1  # output rows that one input row reaches
    SPAN: tl.constexpr = (COLUMNS - 1) * STRIDE + K
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    in_channels = c < channels
    lanes = tl.arange(0, UNITS)[:, None]
    # Of the shape of a tile, so that a lane loads its own weights.
    weights = load_weights(w_ptr + c0 * (K * K) + lanes * 0 + tl.arange(0, BLOCK_C)[None, :], K * K, BLOCK_C)
    if NORM:
        bn_mean, _rstd, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
    if STATS:
        all_count = tl.zeros([UNITS, 1], tl.float32)
        all_mean = tl.zeros([UNITS, BLOCK_C], tl.float32)
        all_m2 = tl.zeros([UNITS, BLOCK_C], tl.float32)
    group = part
    while group < groups:
        unit = group // bands * UNITS + lanes
        image = unit // strips
        begin = group % bands * band_rows
        end = tl.minimum(begin + band_rows, out_height)
        column = (unit % strips) * COLUMNS
        left = column * STRIDE - pad_left
        right = tl.where(unit < units, width - left, 0)
        out_right = tl.where(unit < units, out_width - column, 0)
        row = tl.maximum(begin, pad_top // STRIDE)  # the last output row that the next input rows reach
        x_row = image.to(tl.int64) * height + (row * STRIDE - pad_top)
        x_ptrs = x_ptr + (x_row * width + left) * channels + c
        row -= LINES - 1
        y_row = image.to(tl.int64) * out_height + row
        y_ptrs = y_ptr + (y_row * out_width + column) * channels + c
        # Mean and M2 of this tile alone: all its lines are of one length, so that the weights are scalars.
        n = tl.minimum(tl.maximum(out_right, 0), COLUMNS).to(tl.float32)
        lines = 0.0
        mean = tl.zeros([UNITS, BLOCK_C], tl.float32)
        m2 = tl.zeros([UNITS, BLOCK_C], tl.float32)
        acc = ()
        for _i in tl.static_range(LINES * COLUMNS):
            acc = acc + (tl.zeros([UNITS, BLOCK_C], tl.float32),)
        # Scalars move down the rows: a tile of pointers that a loop carries changes its layout in every step.
        x_below = tl.full([], 0, tl.int64)
        y_below = tl.full([], 0, tl.int64)
        step = 0
        while step < steps:
            for phase in tl.static_range(STRIDE):
                y = (row + LINES - 1) * STRIDE + phase - pad_top
                stop = tl.where((y >= 0) & (y < height), right, 0)
                line = ()
                for j in tl.static_range(SPAN):
                    inside = j < stop
                    if j < K - 1:
                        inside = inside & (j >= -left)
                    x = tl.load(x_ptrs + (x_below + j * channels), mask=inside & in_channels, other=0.0).to(tl.float32)
                    if NORM:
                        z = (x - bn_mean) * bn_scale + bias
                        x = tl.where(inside, z * sigmoid(z), 0.0)
                    line = line + (x,)
                added = ()
                for r in tl.static_range(LINES):
                    for i in tl.static_range(COLUMNS):
                        a = acc[r * COLUMNS + i]
                        if phase + (LINES - 1 - r) * STRIDE < K:
                            for kx in tl.static_range(K):
                                a += line[i * STRIDE + kx] * weights[(phase + (LINES - 1 - r) * STRIDE) * K + kx]
                        added = added + (a,)
                acc = added
                x_below += width * channels
            more = ((row >= begin) & (row < end)).to(tl.float32)
            stop = tl.where((row >= begin) & (row < end), out_right, 0)
            lines, mean, m2 = store_line(
                y_ptrs + y_below, acc, stop, in_channels, channels, n, lines, more, mean, m2, STATS, COLUMNS
            )
            moved = ()
            for i in tl.static_range(LINES * COLUMNS):
                if i < (LINES - 1) * COLUMNS:
                    moved = moved + (acc[i + COLUMNS],)
                else:
                    moved = moved + (tl.zeros([UNITS, BLOCK_C], tl.float32),)
            acc = moved
            row += 1
            y_below += out_width * channels
            step += 1
        for r in tl.static_range(LINES - 1):  # rows whose last inputs lie below the image
            rest = ()
            for i in tl.static_range(COLUMNS):
                rest = rest + (acc[r * COLUMNS + i],)
            more = ((row >= begin) & (row < end)).to(tl.float32)
            stop = tl.where((row >= begin) & (row < end), out_right, 0)
            lines, mean, m2 = store_line(
                y_ptrs + y_below, rest, stop, in_channels, channels, n, lines, more, mean, m2, STATS, COLUMNS
            )
            row += 1
            y_below += out_width * channels
        if STATS:
            count = n * lines
            merged = all_count + count
            share = count / tl.maximum(merged, 1.0)
            delta = mean - all_mean
            all_mean += delta * share
            all_m2 += m2 + delta * delta * (all_count * share)
            all_count = merged
        group += partials
    if STATS:
        # Means are merged as distances from the first unit's, which has seen data: that cancels a large common mean.
        first = tl.sum(tl.where(lanes == 0, all_mean, 0.0), axis=0)
        delta = all_mean - first[None, :]
        shift = tl.sum(delta * all_count, axis=0) / tl.sum(all_count, axis=0)
        all_m2 += all_count * (delta - shift[None, :]) * (delta - shift[None, :])
        store_channels(partial_ptr + part * channels, first + shift, c0, channels, BLOCK_C)
        store_channels(partial_ptr + (partials + part) * channels, tl.sum(all_m2, axis=0), c0, channels, BLOCK_C)
        if c0 == 0:
            tl.store(counts_ptr + part, tl.sum(tl.sum(all_count, axis=0), axis=0))


@L.jit
def _merge_counted_stats_kernel(
    partial_ptr,  # [2, P, C]: means, M2s
    counts_ptr,  # [P]
    mean_ptr,
    var_ptr,
    partials,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c0 = tl.program_id(0) * BLOCK_C
    cols = c0 + tl.arange(0, BLOCK_C)[None, :]
    first = tl.load(partial_ptr + cols, mask=cols < channels, other=0.0)
    count = tl.zeros([BLOCK_P, 1], tl.float32)
    moment = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = 0
    while start < partials:
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < partials) & (cols < channels)
        n = tl.load(counts_ptr + p, mask=p < partials, other=0.0)
        mean = tl.load(partial_ptr + p * channels + cols, mask=mask, other=0.0)
        count += n
        moment += tl.where(mask, mean - first, 0.0) * n
        start += BLOCK_P
    total = tl.sum(count, axis=0)
    shift = tl.sum(moment, axis=0) / total
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = 0
    while start < partials:
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < partials) & (cols < channels)
        n = tl.load(counts_ptr + p, mask=p < partials, other=0.0)
        deviation = tl.load(partial_ptr + p * channels + cols, mask=mask, other=0.0) - first - shift[None, :]
        m2 += n * deviation * deviation
        m2 += tl.load(partial_ptr + (partials + p) * channels + cols, mask=mask, other=0.0)
        start += BLOCK_P
    store_channels(mean_ptr, tl.sum(first, axis=0) + shift, c0, channels, BLOCK_C)
    store_channels(var_ptr, tl.sum(m2, axis=0) / total, c0, channels, BLOCK_C)


def depthwise(
    x: Tensor, weight: Tensor, g: Geometry, norm: Norm = NO_NORM, *, stats: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The convolution of `x` [B, C, H, W] channels_last, activated by `norm` if it has one: y, and with `stats` the
    partial means and M2s [2, P, C] and counts [P] of y that `merge_stats` takes."""
    channels = x.shape[1]
    plan, steps = forward_plan(x.shape, x.dtype, g, norm=norm.mean is not None, stats=stats, gpu=L.gpu(x.device))
    y = empty_nhwc(x, channels, g.out_height, g.out_width)
    partial = L.empty((2, plan.partials, channels), like=x) if stats else None
    counts = L.empty((plan.partials,), like=x) if stats else None
    vec = L.vector_width(channels)
    L.launch(
        _depthwise_kernel, (plan.blocks * plan.partials,), x, pack_weight(weight), y, partial, counts,
        *norm, g.height, g.width, g.out_height, g.out_width, g.pad_top, g.pad_left, plan.strips, plan.bands,
        plan.band_rows, steps, plan.units, plan.groups, plan.partials, channels // vec,
        like=x, num_warps=NUM_WARPS, maxnreg=plan.config.maxnreg, site=plan.site, NORM=norm.mean is not None,
        STATS=stats, K=g.kernel_size, STRIDE=g.stride, **plan.constexprs(vec),
    )  # fmt: skip
    return y, partial, counts


MERGE: dict[str, Any] = {"BLOCK_P": 256, "BLOCK_C": 8}


def merge_stats(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] from means and M2s [2, P, C] of parts with counts [P], by Chan's formula."""
    _, partials, channels = partial.shape
    mean, var = L.empty((channels,), like=partial), L.empty((channels,), like=partial)
    L.launch(
        _merge_counted_stats_kernel, (L.cdiv(channels, MERGE["BLOCK_C"]),), partial, counts, mean, var, partials,
        channels, like=partial, num_warps=NUM_WARPS, **MERGE,
    )  # fmt: skip
    return mean, var


def aot_specs() -> Iterator[aot.KernelSpec]:
    """A block with expansion and one without, in training and in inference (which is the convolution alone where there
    is no expansion): every configuration that they select."""
    alone = {"STATS": False, "partial_ptr": None, "counts_ptr": None}
    norm = {"NORM": True}
    modes = (norm | {"STATS": True}, NO_INPUT_VECTORS | {"STATS": True}, norm | alone, NO_INPUT_VECTORS | alone)
    yield from strip_specs(_depthwise_kernel, ["x_ptr", "y_ptr"], modes, FORWARD, "STATS")
    yield aot.spec(_merge_counted_stats_kernel, "small", "fp32", dict(MERGE), num_warps=NUM_WARPS)


def traffic(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    g: Geometry,
    *,
    norm: bool,
    stats: bool,
    again: bool = True,
    gpu: Gpu = REFERENCE,
) -> dict[str, int]:
    """Bytes read and written by each kernel of one `depthwise` and `merge_stats`; without `again` no element of an
    image or tap a second time by one program or its neighbours, which is what must come from beyond the caches."""
    images, channels = shape[:2]
    plan, steps = forward_plan(shape, dtype, g, norm=norm, stats=stats, gpu=gpu)
    rows = columns = 0
    for band in range(plan.bands):
        row = max(band * plan.band_rows, g.pad_top // g.stride) * g.stride - g.pad_top
        rows += inside(row, row + steps * g.stride, g.height)
    for strip in range(plan.strips):
        left = strip * plan.config.columns * g.stride - g.pad_left
        columns += inside(left, left + (plan.config.columns - 1) * g.stride + g.kernel_size, g.width)
    pixels = (rows * columns if again else g.height * g.width) + g.out_height * g.out_width
    moved = images * channels * dtype.itemsize * pixels
    moved += plan.partials * (
        plan.blocks * weight_bytes(g.kernel_size**2, plan.tile_units, again) + (16 * channels if norm else 0)
    )
    if not stats:
        return {"_depthwise_kernel": moved}
    merge = L.cdiv(channels, MERGE["BLOCK_C"])
    return {
        "_depthwise_kernel": moved + plan.partials * (8 * channels + 4),
        "_merge_counted_stats_kernel": plan.partials * (12 * channels + 8 * merge) + 12 * channels,
    }
