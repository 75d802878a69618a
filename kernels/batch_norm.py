"""Batch statistics of an image tensor, and the pieces that every kernel with a batch norm in it shares.

Statistics of x over the N = B*H*W rows of channel c, as Chan, Golub and LeVeque (1979) merge them: for disjoint
parts i with count n_i, mean m_i and M2_i = Σ (x - m_i)²,

    m = Σ n_i m_i / n        M2 = Σ M2_i + Σ n_i (m_i - m)²        var = M2 / N

at three levels: the eight or thirty-two values that a thread holds, the rows of a program, the programs. No sum of
squares about a far-away origin is ever taken, and nothing is added atomically, so a result repeats bit for bit.
Sums over rows for the backward pass take the same road: threads, programs (`partial [K, P, C]`), then
`_sum_partials_kernel`.

Bytes: x is read once; P partials of C means and M2s are written and read, some hundredth of x. `F.batch_norm` reads
x once more to normalise, and cannot do anything else in that pass. Nothing is saved but mean and var, [C] each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.launch import IN_INTERPRETER, tl
from kernels.operation import operation
from kernels.sync import all_gather_stats

MERGE_CHANNELS = 8
MERGE: dict[str, Any] = {"BLOCK_P": L.MAX_PARTIALS, "BLOCK_C": MERGE_CHANNELS}
MERGE_WARPS = 8


@L.helper
def locate(channels, BLOCK_C: tl.constexpr):
    """Which part of the rows this program takes and its first channel; the blocks of a row run side by side."""
    blocks = tl.cdiv(channels, BLOCK_C)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_C


@L.helper
def tile_at(row, end, c0, channels, HEIGHT: tl.constexpr, BLOCK_C: tl.constexpr):
    """64-bit element offsets and mask [HEIGHT, BLOCK_C] of the tile of rows row..end and channels c0..."""
    rows = row + tl.arange(0, HEIGHT)[:, None]
    cols = c0 + tl.arange(0, BLOCK_C)[None, :]
    return rows.to(tl.int64) * channels + cols, (rows < end) & (cols < channels)


@L.helper
def fold(x, UNROLL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[UNROLL * ROWS, BLOCK_C] summed over UNROLL, whose values share a thread: no data moves."""
    return tl.sum(tl.reshape(x, [UNROLL, ROWS, BLOCK_C]), axis=0)


@L.helper
def channel_vector(ptr, c0, channels, BLOCK_C: tl.constexpr):
    """[1, BLOCK_C] of a vector over channels, zero past its end."""
    cols = c0 + tl.arange(0, BLOCK_C)[None, :]
    return tl.load(ptr + cols, mask=cols < channels, other=0.0)


@L.helper
def store_channels(ptr, value, c0, channels, BLOCK_C: tl.constexpr):
    cols = c0 + tl.arange(0, BLOCK_C)
    tl.store(ptr + cols, value, mask=cols < channels)


@L.helper
def inverse_std(var, eps):
    return tl.rsqrt(var + eps)


@L.helper
def bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C: tl.constexpr):
    """mean, r = 1 / sqrt(var + eps), weight r and bias of a channel block: x̂ = (x - mean) r, z = (x - mean) weight r +
    bias."""
    mean = channel_vector(mean_ptr, c0, channels, BLOCK_C)
    rstd = inverse_std(channel_vector(var_ptr, c0, channels, BLOCK_C), eps)
    weight = channel_vector(weight_ptr, c0, channels, BLOCK_C)
    bias = channel_vector(bias_ptr, c0, channels, BLOCK_C)
    return mean, rstd, rstd * weight, bias


@L.helper
def ex2(x):
    """2^x within 2 units in the last place (the PTX ISA on ex2.approx); the interpreter, which knows no assembly,
    rounds."""
    if IN_INTERPRETER:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@L.helper
def rcp(x):
    """1 / x within 1 unit in the last place (the PTX ISA on rcp.approx)."""
    if IN_INTERPRETER:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@L.helper
def sigmoid(z):
    """Two special-function operations, an add and a multiply; `kernels.tolerance` says what they lose.

    tl.exp and / guard against subnormal numbers with seven instructions more, and here there are none to guard: 1 + e
    is at least 1, and an e or quotient flushed to zero is right to far below a unit in the last place.
    """
    return rcp(1.0 + ex2(z * -1.4426950408889634))


@L.helper
def silu_and_dsilu(z):
    """SiLU and its derivative s + z s (1 - s), s the sigmoid."""
    s = sigmoid(z)
    a = z * s
    return a, s + a * (1.0 - s)


@L.jit
def _stats_kernel(
    x_ptr,
    partial_ptr,  # [2, P, C]: means, M2s
    row_count,
    rows_per_program,
    partials,
    c_vec,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    row = part * rows_per_program
    end = tl.minimum(row + rows_per_program, row_count)
    lane = tl.arange(0, ROWS)[:, None]
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, BLOCK_C], tl.float32)
    m2 = tl.zeros([ROWS, BLOCK_C], tl.float32)
    while row < end:
        offsets, mask = tile_at(row, end, c0, channels, UNROLL * ROWS, BLOCK_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        n = tl.minimum(tl.maximum((end - row - lane + ROWS - 1) // ROWS, 0), UNROLL).to(tl.float32)
        tile_mean = fold(x, UNROLL, ROWS, BLOCK_C) * (1.0 / tl.maximum(n, 1.0))
        deviation = tl.reshape(x, [UNROLL, ROWS, BLOCK_C]) - tile_mean[None, :, :]
        deviation = tl.where(tl.reshape(mask, [UNROLL, ROWS, BLOCK_C]), deviation, 0.0)
        total = count + n
        share = n / tl.maximum(total, 1.0)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * (count * share)
        count = total
        row += UNROLL * ROWS
    # A mean of means is off by some units in its last place; what the means still lie from it on average corrects that.
    n = tl.sum(count, axis=0)
    mean_of_means = tl.sum(mean * count, axis=0) / n
    delta = mean - mean_of_means[None, :]
    shift = tl.sum(delta * count, axis=0) / n
    m2 += count * (delta - shift[None, :]) * (delta - shift[None, :])
    store_channels(partial_ptr + part * channels, mean_of_means + shift, c0, channels, BLOCK_C)
    store_channels(partial_ptr + (partials + part) * channels, tl.sum(m2, axis=0), c0, channels, BLOCK_C)


@L.jit
def _merge_stats_kernel(
    partial_ptr,  # [2, P, C]
    mean_ptr,
    var_ptr,
    row_count,
    rows_per_program,
    partials,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c0 = tl.program_id(0) * BLOCK_C
    cols = c0 + tl.arange(0, BLOCK_C)[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    mask = (p < partials) & (cols < channels)
    count = tl.where(p < partials, tl.minimum(row_count - p * rows_per_program, rows_per_program), 0).to(tl.float32)
    mean = tl.load(partial_ptr + p * channels + cols, mask=mask, other=0.0)
    m2 = tl.load(partial_ptr + (partials + p) * channels + cols, mask=mask, other=0.0)
    mean_of_means = tl.sum(mean * count, axis=0) / row_count
    delta = tl.where(mask, mean - mean_of_means[None, :], 0.0)
    shift = tl.sum(delta * count, axis=0) / row_count
    m2 += count * (delta - shift[None, :]) * (delta - shift[None, :])
    store_channels(mean_ptr, mean_of_means + shift, c0, channels, BLOCK_C)
    store_channels(var_ptr, tl.sum(m2, axis=0) / row_count, c0, channels, BLOCK_C)


@L.jit
def _sum_partials_kernel(
    partial_ptr,  # [K, P, C]
    sums_ptr,  # [K, C]
    partials,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c0 = tl.program_id(0) * BLOCK_C
    k = tl.program_id(1)
    cols = c0 + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start = 0
    while start < partials:
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < partials) & (cols < channels)
        offsets = (k * partials + p).to(tl.int64) * channels + cols
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        start += BLOCK_P
    store_channels(sums_ptr + k * channels, tl.sum(total, axis=0), c0, channels, BLOCK_C)


# Partials and columns of a tile, predicted, not measured: the rows of a tile are partials, so that their loads wait for
# memory together; few partials leave room for whole lines of columns.
SUM_TILES = ((4, 512), (32, 64), (256, 8))
SUM_WARPS = 4


def sum_tile(partials: int) -> dict[str, int]:
    """The smallest tile that holds all partials, or the largest."""
    rows, columns = next((tile for tile in SUM_TILES if partials <= tile[0]), SUM_TILES[-1])
    return {"BLOCK_P": rows, "BLOCK_C": columns}


def sum_partials(partial: Tensor, site: Site | None = None) -> Tensor:
    """[K, P, C] summed over P in a fixed order; `site` as `launch.launch` takes it."""
    k, partials, channels = partial.shape
    sums, tile = L.empty((k, channels), like=partial), sum_tile(partials)
    L.launch(
        _sum_partials_kernel, (L.cdiv(channels, tile["BLOCK_C"]), k), partial, sums, partials, channels,
        like=partial, num_warps=SUM_WARPS, site=site, **tile,
    )  # fmt: skip
    return sums


def partial_plan(
    rows: int, channels: int, gpu: Gpu = REFERENCE, *, halved: bool = False
) -> tuple[L.Tile, int, int, int]:
    """Tile (halved or not), channel blocks, rows a program and number of partials of a reduction over all rows."""
    tile = L.tile_for(channels)
    tile = tile.halved() if halved else tile
    blocks = L.cdiv(channels, tile.block_c)
    step = L.rows_per_program(rows, tile, blocks, gpu)
    return tile, blocks, step, L.cdiv(rows, step)


@operation("batch_stats")
def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of [B, C, H, W] over B, H, W: two fp32 [C]. Not differentiable by itself."""
    x = L.nhwc(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    tile, blocks, step, partials = partial_plan(rows, channels, L.gpu(x.device))
    vec = L.vector_width(channels)
    partial = L.empty((2, partials, channels), like=x)
    mean, var = L.empty((channels,), like=x), L.empty((channels,), like=x)
    L.launch(
        _stats_kernel, (blocks * partials,), x, partial, rows, step, partials, channels // vec,
        like=x, num_warps=tile.num_warps, **tile.constexprs(vec),
    )  # fmt: skip
    L.launch(
        _merge_stats_kernel, (L.cdiv(channels, MERGE_CHANNELS),), partial, mean, var, rows, step, partials, channels,
        like=x, num_warps=MERGE_WARPS, **MERGE,
    )  # fmt: skip
    return mean, var


@batch_stats.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    vector = x.new_empty((x.shape[1],), dtype=torch.float32)
    return vector, torch.empty_like(vector)


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, training: bool, momentum: float, group: str = ""
) -> tuple[Tensor, Tensor]:
    """The mean and biased variance to normalise by; in training also moves the running ones, as `nn.BatchNorm2d`."""
    if not training:
        return running_mean, running_var
    mean, var = batch_stats(x.detach())
    mean, var, rows = all_gather_stats(mean, var, x.numel() // x.shape[1], group)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (rows / (rows - 1)), momentum)
    return mean, var


def check_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    **others: tuple[Tensor | None, tuple[int, ...]],
) -> None:
    """`launch.check` for the four vectors of a batch norm and `others`."""
    vector = (x.shape[1],) if x.dim() == 4 else ()
    L.check(
        x,
        weight=(weight, vector),
        bias=(bias, vector),
        running_mean=(running_mean, vector),
        running_var=(running_var, vector),
        **others,
    )
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"batch statistics need more than one value per channel, got x of shape {tuple(x.shape)}")


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    yield from aot.tile_specs(_stats_kernel, "reduction", ["x_ptr"])
    yield aot.spec(_merge_stats_kernel, "small", "fp32", dict(MERGE), num_warps=MERGE_WARPS)
    for partials, _ in SUM_TILES:
        yield aot.spec(_sum_partials_kernel, "small", "fp32", sum_tile(partials), num_warps=SUM_WARPS)


def sum_traffic(k: int, partials: int, channels: int) -> int:
    """Bytes that `_sum_partials_kernel` moves."""
    return 4 * k * channels * (partials + 1)


def traffic(shape: tuple[int, int, int, int], dtype: torch.dtype, gpu: Gpu = REFERENCE) -> dict[str, int]:
    """Bytes read and written by each kernel of `batch_stats`."""
    b, c, h, w = shape
    rows = b * h * w
    partials = partial_plan(rows, c, gpu)[3]
    return {
        "_stats_kernel": rows * c * dtype.itemsize + 8 * partials * c,
        "_merge_stats_kernel": 8 * partials * c + 8 * c,
    }
