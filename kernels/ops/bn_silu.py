"""`y = silu(batch_norm(x))`, normalising and activating in one pass.

With N = B*H*W, x̂ = (x - mean) / sqrt(var + eps), z = weight x̂ + bias and s = 1 / (1 + exp(-z)):

    y  = z s                               σ' = dy/dz = s + z s (1 - s)
    dz = dy σ'                             dbias = Σ dz            dweight = Σ dz x̂
    dx = weight / sqrt(var + eps) (dz - (dbias + x̂ dweight) / N)   statistics of x itself
    dx = weight / sqrt(var + eps) dz                               statistics given (evaluation mode)

The two extra terms are the gradient through mean and var: with r = 1 / sqrt(var + eps), dx̂ = weight dz, dvar = Σ
dx̂ (x - mean) (-r³ / 2) and dmean = -r Σ dx̂ (var's own dependence on mean vanishes, Σ (x - mean) being 0), so dx =
dx̂ r + 2 dvar (x - mean) / N + dmean / N = r (dx̂ - Σ dx̂ / N - x̂ Σ dx̂ x̂ / N).

Saved for backward: x and the [C] vectors; x̂, z and s are computed again. In passes over the image: forward 2 reads
and 1 write (1 + 1 in evaluation mode), backward 4 reads and 1 write. Unfused PyTorch: forward 3 + 2 (batch norm 2 +
1, SiLU 1 + 1), backward 6 + 2 (SiLU 2 + 1, batch norm 4 + 1), and it saves two images, x and z.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import aot, reference
from kernels import launch as L
from kernels.batch_norm import (
    bn_vectors,
    channel_vector,
    check_batch_norm,
    fold,
    locate,
    partial_plan,
    sigmoid,
    silu_and_dsilu,
    statistics,
    store_channels,
    sum_partials,
    sum_traffic,
    tile_at,
)
from kernels.batch_norm import traffic as statistics_traffic
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl
from kernels.operation import once_differentiable, operation
from kernels.sync import all_reduce_sums


@L.jit
def _bn_silu_fwd_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    row_count,
    c_vec,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    offsets, mask = tile_at(part * (UNROLL * ROWS), row_count, c0, channels, UNROLL * ROWS, BLOCK_C)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, _, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
    z = (x - mean) * bn_scale + bias
    tl.store(y_ptr + offsets, (z * sigmoid(z)).to(y_ptr.dtype.element_ty), mask=mask)


@L.jit
def _bn_silu_reduce_kernel(
    dy_ptr,
    x_ptr,
    partial_ptr,  # [2, P, C]: sums of dz and of dz x̂
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
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
    mean, rstd, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
    sum_dz = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_dz_centred = tl.zeros([ROWS, BLOCK_C], tl.float32)
    while row < end:
        offsets, mask = tile_at(row, end, c0, channels, UNROLL * ROWS, BLOCK_C)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = x - mean
        _, dsilu = silu_and_dsilu(centred * bn_scale + bias)
        dz = dy * dsilu
        sum_dz += fold(dz, UNROLL, ROWS, BLOCK_C)
        sum_dz_centred += fold(dz * centred, UNROLL, ROWS, BLOCK_C)
        row += UNROLL * ROWS
    store_channels(partial_ptr + part * channels, tl.sum(sum_dz, axis=0), c0, channels, BLOCK_C)
    sum_dz_xhat = tl.sum(sum_dz_centred * rstd, axis=0)
    store_channels(partial_ptr + (partials + part) * channels, sum_dz_xhat, c0, channels, BLOCK_C)


@L.jit
def _bn_silu_dx_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    sums_ptr,  # [2, C]: dbias, dweight
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    inverse_rows,
    row_count,
    c_vec,
    TRAINING: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    offsets, mask = tile_at(part * (UNROLL * ROWS), row_count, c0, channels, UNROLL * ROWS, BLOCK_C)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, rstd, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
    centred = x - mean
    _, dsilu = silu_and_dsilu(centred * bn_scale + bias)
    dz = dy * dsilu
    if TRAINING:
        dz -= channel_vector(sums_ptr, c0, channels, BLOCK_C) * inverse_rows
        dz -= centred * (channel_vector(sums_ptr + channels, c0, channels, BLOCK_C) * rstd * inverse_rows)
    tl.store(dx_ptr + offsets, (dz * bn_scale).to(dx_ptr.dtype.element_ty), mask=mask)


@operation("bn_silu")
def bn_silu_op(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, training: bool, group: str
) -> Tensor:
    """`training` says that mean and var are the statistics of x, of all ranks' in a `group`: their gradient then
    reaches x in backward."""
    x = L.nhwc(x)
    y = L.empty_image(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    tile, vec = L.tile_for(channels), L.vector_width(channels)
    grid = (L.cdiv(rows, tile.height) * L.cdiv(channels, tile.block_c),)
    L.launch(
        _bn_silu_fwd_kernel, grid, x, y, mean, var, weight, bias, eps, rows, channels // vec,
        like=x, num_warps=tile.num_warps, **tile.constexprs(vec),
    )  # fmt: skip
    return y


@operation("bn_silu_backward")
def bn_silu_backward_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    training: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    """dx and [dbias, dweight] as [2, C]."""
    dy, x = L.nhwc(dy), L.nhwc(x)
    dx = L.empty_image(x)
    channels = x.shape[1]
    rows = x.numel() // channels
    vec = L.vector_width(channels)
    tile, blocks, step, partials = partial_plan(rows, channels, L.gpu(x.device))
    partial = L.empty((2, partials, channels), like=x)
    L.launch(
        _bn_silu_reduce_kernel, (blocks * partials,), dy, x, partial, mean, var, weight, bias, eps,
        rows, step, partials, channels // vec,
        like=x, num_warps=tile.num_warps, **tile.constexprs(vec),
    )  # fmt: skip
    sums = sum_partials(partial)
    joint = all_reduce_sums(sums, rows, group)
    half = tile.halved()
    L.launch(
        _bn_silu_dx_kernel, (L.cdiv(rows, half.height) * blocks,), dy, x, dx, joint, mean, var, weight, bias, eps,
        1.0 / rows, rows, channels // vec,
        like=x, num_warps=half.num_warps, TRAINING=training, **half.constexprs(vec),
    )  # fmt: skip
    return dx, sums


@bn_silu_op.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return L.empty_image(x)


@bn_silu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return L.empty_image(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, sums = bn_silu_backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, sums[1], sums[0], None, None, None


bn_silu_op.register_autograd(_backward, setup_context=_setup_context)
once_differentiable(bn_silu_backward_op, "bn_silu")


def bn_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    group: str = "",
    impl: L.Impl = "auto",
) -> Tensor:
    """SiLU of the batch norm of `x` [B, C, H, W], in the dtype of `x`; parameters and statistics are fp32 [C].

    In training the statistics are the batch's and the running ones move in place, `momentum` being the weight of
    the new value as in `nn.BatchNorm2d`; with the name of a process group the batch is that of all its ranks. On the
    Triton path an `x` that is not channels_last is copied first. Raises ValueError or TypeError for a wrong shape,
    dtype or device, RuntimeError where `impl="triton"` cannot run.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var, training)
    if L.resolve(impl, x) == "torch":
        return reference.bn_silu(
            x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, group=group
        )
    mean, var = statistics(x, running_mean, running_var, training, momentum, group)
    return bn_silu_op(x, mean, var, weight, bias, eps, training, group)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    yield from aot.tile_specs(_bn_silu_fwd_kernel, "elementwise", ["x_ptr", "y_ptr"])
    yield from aot.tile_specs(_bn_silu_reduce_kernel, "reduction", ["dy_ptr", "x_ptr"])
    yield from aot.tile_specs(
        _bn_silu_dx_kernel,
        "elementwise",
        ["dy_ptr", "x_ptr", "dx_ptr"],
        variants=[{"TRAINING": True}, {"TRAINING": False}],
        halved=True,
    )


def traffic(
    shape: tuple[int, int, int, int], dtype: torch.dtype, training: bool = True, gpu: Gpu = REFERENCE
) -> dict[str, int]:
    """Bytes read and written by each kernel, forward and backward, of one call."""
    b, c, h, w = shape
    rows = b * h * w
    image = rows * c * dtype.itemsize
    tile, _, _, partials = partial_plan(rows, c, gpu)
    tiles, halves = L.cdiv(rows, tile.height), L.cdiv(rows, tile.halved().height)
    return {
        **(statistics_traffic(shape, dtype, gpu) if training else {}),
        "_bn_silu_fwd_kernel": 2 * image + 16 * c * tiles,
        "_bn_silu_reduce_kernel": 2 * image + (16 + 8) * c * partials,
        "_sum_partials_kernel": sum_traffic(2, partials, c),
        "_bn_silu_dx_kernel": 3 * image + (24 if training else 16) * c * halves,
    }
