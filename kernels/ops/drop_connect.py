"""`y = residual + drop_scale[b] * x`, alone or with the projection's batch norm on x, in one pass.

The per-sample mask and the 1 / survival factor of stochastic depth (Huang et al. 2016) both come in as `drop_scale`
[B]. Alone:

    dx = drop_scale[b] dy                  dresidual = dy

With z = weight x̂ + bias in place of x, N = B*H*W and r = 1 / sqrt(var + eps), as derived in
`kernels.ops.bn_silu` with drop_scale[b] for σ':

    dz = drop_scale[b] dy                  dbias = Σ dz            dweight = Σ dz x̂
    dx = weight r (dz - (dbias + x̂ dweight) / N)   statistics of x itself;  dx = weight r dz   statistics given

`drop_scale` gets no gradient: it is a draw, not a parameter. Saved for backward: itself alone; with the norm x and [C]
vectors as well. In passes over the image with residual and drop_scale: alone, forward 2 reads and 1 write, backward 1 +
1; with the norm forward 3 + 1 (2 + 1 in evaluation mode), backward 4 + 1. Unfused PyTorch: alone, forward 3 + 2,
backward 1 + 1; with the norm forward 5 + 3, backward 5 + 2.
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
    inverse_std,
    locate,
    partial_plan,
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
def _drop_connect_kernel(
    x_ptr,
    residual_ptr,  # None is zero
    drop_scale_ptr,  # None is one
    y_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    area,
    tiles,  # an image
    c_vec,
    NORM: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    image = part // tiles
    row = image * area + (part % tiles) * (UNROLL * ROWS)
    offsets, mask = tile_at(row, (image + 1) * area, c0, channels, UNROLL * ROWS, BLOCK_C)
    y = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean, _, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
        y = (y - mean) * bn_scale + bias
    if drop_scale_ptr is not None:
        y = y * tl.load(drop_scale_ptr + image)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@L.jit
def _bn_drop_connect_reduce_kernel(
    dy_ptr,
    x_ptr,
    drop_scale_ptr,
    partial_ptr,  # [2, P, C]: sums of dz and of dz x̂
    mean_ptr,
    var_ptr,
    eps,
    area,
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
    mean = channel_vector(mean_ptr, c0, channels, BLOCK_C)
    sum_dz = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_dz_centred = tl.zeros([ROWS, BLOCK_C], tl.float32)
    while row < end:
        offsets, mask = tile_at(row, end, c0, channels, UNROLL * ROWS, BLOCK_C)
        dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if drop_scale_ptr is not None:
            rows = row + tl.arange(0, UNROLL * ROWS)
            dz = dz * tl.load(drop_scale_ptr + rows // area, mask=rows < end, other=0.0)[:, None]
        sum_dz += fold(dz, UNROLL, ROWS, BLOCK_C)
        sum_dz_centred += fold(dz * (x - mean), UNROLL, ROWS, BLOCK_C)
        row += UNROLL * ROWS
    store_channels(partial_ptr + part * channels, tl.sum(sum_dz, axis=0), c0, channels, BLOCK_C)
    # After the loop, which has few registers to spare.
    rstd = inverse_std(channel_vector(var_ptr, c0, channels, BLOCK_C), eps)
    sum_dz_xhat = tl.sum(sum_dz_centred * rstd, axis=0)
    store_channels(partial_ptr + (partials + part) * channels, sum_dz_xhat, c0, channels, BLOCK_C)


@L.jit
def _bn_drop_connect_dx_kernel(
    dy_ptr,
    x_ptr,  # None unless TRAINING
    drop_scale_ptr,
    dx_ptr,
    sums_ptr,  # [2, C]: dbias, dweight
    mean_ptr,
    var_ptr,
    weight_ptr,
    eps,
    inverse_rows,
    area,
    tiles,
    c_vec,
    TRAINING: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    image = part // tiles
    row = image * area + (part % tiles) * (UNROLL * ROWS)
    offsets, mask = tile_at(row, (image + 1) * area, c0, channels, UNROLL * ROWS, BLOCK_C)
    dz = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if drop_scale_ptr is not None:
        dz = dz * tl.load(drop_scale_ptr + image)
    rstd = inverse_std(channel_vector(var_ptr, c0, channels, BLOCK_C), eps)
    if TRAINING:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = x - channel_vector(mean_ptr, c0, channels, BLOCK_C)
        dz -= channel_vector(sums_ptr, c0, channels, BLOCK_C) * inverse_rows
        dz -= centred * (channel_vector(sums_ptr + channels, c0, channels, BLOCK_C) * rstd * inverse_rows)
    dx = dz * (rstd * channel_vector(weight_ptr, c0, channels, BLOCK_C))
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def residual_add(
    x: Tensor, residual: Tensor | None, drop_scale: Tensor | None, norm: tuple[Tensor, ...] | None, eps: float
) -> Tensor:
    """residual + drop_scale[b] * (x, or its normalisation by (mean, var, weight, bias))."""
    x = L.nhwc(x)
    residual = None if residual is None else L.nhwc(residual)
    y = L.empty_image(x)
    images, channels, height, width = x.shape
    area = height * width
    tile, vec = L.tile_for(channels), L.vector_width(channels)
    tiles = L.cdiv(area, tile.height)
    grid = (images * tiles * L.cdiv(channels, tile.block_c),)
    L.launch(
        _drop_connect_kernel, grid, x, residual, drop_scale, y, *(norm or (None,) * 4), eps, area, tiles,
        channels // vec, like=x, num_warps=tile.num_warps, NORM=norm is not None, **tile.constexprs(vec),
    )  # fmt: skip
    return y


def reduce_sums(dy: Tensor, x: Tensor, drop_scale: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Σ dz and Σ dz x̂ of the norm of x, [2, C]; dy and x are channels_last."""
    channels = x.shape[1]
    rows, vec = x.numel() // channels, L.vector_width(channels)
    half, blocks, step, partials = partial_plan(rows, channels, L.gpu(x.device), halved=True)
    partial = L.empty((2, partials, channels), like=x)
    L.launch(
        _bn_drop_connect_reduce_kernel, (blocks * partials,), dy, x, drop_scale, partial, mean, var, eps,
        rows // x.shape[0], rows, step, partials, channels // vec,
        like=x, num_warps=half.num_warps, **half.constexprs(vec),
    )  # fmt: skip
    return sum_partials(partial)


@operation("drop_connect_add")
def drop_connect_add_op(x: Tensor, residual: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    """residual + drop_scale[b] * x; without a residual it is also its own backward."""
    return residual_add(x, residual, drop_scale, None, 0.0)


@operation("drop_connect_backward")
def drop_connect_backward_op(dy: Tensor, drop_scale: Tensor) -> Tensor:
    """drop_scale[b] * dy."""
    return residual_add(dy, None, drop_scale, None, 0.0)


@operation("bn_drop_connect_add")
def bn_drop_connect_add_op(
    x: Tensor,
    residual: Tensor | None,
    drop_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    training: bool,
    group: str,
) -> Tensor:
    """`training` says that mean and var are the statistics of x: their gradient then reaches x in backward."""
    return residual_add(x, residual, drop_scale, (mean, var, weight, bias), eps)


@operation("bn_drop_connect_backward")
def bn_drop_connect_backward_op(
    dy: Tensor,
    x: Tensor,
    drop_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    eps: float,
    training: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    """dx and [dbias, dweight] as [2, C]."""
    dy, x = L.nhwc(dy), L.nhwc(x)
    sums = reduce_sums(dy, x, drop_scale, mean, var, eps)
    joint = all_reduce_sums(sums, x.numel() // x.shape[1], group)
    dx = L.empty_image(x)
    images, channels, height, width = x.shape
    area, vec = height * width, L.vector_width(channels)
    half = L.tile_for(channels).halved()
    tiles, blocks = L.cdiv(area, half.height), L.cdiv(channels, half.block_c)
    L.launch(
        _bn_drop_connect_dx_kernel, (images * tiles * blocks,), dy, x if training else None, drop_scale, dx, joint,
        mean, var, weight, eps, 1.0 / (images * area), area, tiles, channels // vec,
        like=x, num_warps=half.num_warps, TRAINING=training, **half.constexprs(vec),
    )  # fmt: skip
    return dx, sums


@drop_connect_add_op.register_fake
@drop_connect_backward_op.register_fake
@bn_drop_connect_add_op.register_fake
def _fake(x: Tensor, *others: Any) -> Tensor:
    return L.empty_image(x)


@bn_drop_connect_backward_op.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return L.empty_image(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (drop_scale,) = ctx.saved_tensors
    dx = dy if drop_scale is None else drop_connect_backward_op(dy, drop_scale)
    return dx, dy if ctx.needs_input_grad[1] else None, None


def _bn_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, drop_scale, mean, var, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, drop_scale, mean, var, weight)


def _bn_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, sums = bn_drop_connect_backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return dx, dy if ctx.needs_input_grad[1] else None, None, None, None, sums[1], sums[0], None, None, None


drop_connect_add_op.register_autograd(_backward, setup_context=_setup_context)
bn_drop_connect_add_op.register_autograd(_bn_backward, setup_context=_bn_setup_context)
once_differentiable(drop_connect_backward_op, "drop_connect_add")
once_differentiable(bn_drop_connect_backward_op, "bn_drop_connect_add")


def drop_connect_add(x: Tensor, residual: Tensor, drop_scale: Tensor | None, *, impl: L.Impl = "auto") -> Tensor:
    """`residual + drop_scale[b] * x` for x and residual [B, C, H, W] of one dtype, drop_scale [B] fp32 (None is one).

    `drop_scale` gets no gradient on the Triton path. There an `x` or `residual` that is not channels_last is copied
    first. Raises ValueError or TypeError for a wrong shape, dtype or device, RuntimeError where `impl="triton"`
    cannot run.
    """
    L.check(x, drop_scale=(drop_scale, x.shape[:1]))
    L.check_residual(x, residual)
    if L.resolve(impl, x) == "torch":
        return reference.drop_connect_add(x, residual, drop_scale)
    return drop_connect_add_op(x, residual, drop_scale)


def bn_drop_connect_add(
    x: Tensor,
    residual: Tensor | None,
    drop_scale: Tensor | None,
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
    """`residual + drop_scale[b] * batch_norm(x)`; without a residual it is zero, without a drop_scale one.

    Arguments as in `bn_silu` and `drop_connect_add`, errors too.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var, training, drop_scale=(drop_scale, x.shape[:1]))
    L.check_residual(x, residual)
    if L.resolve(impl, x) == "torch":
        return reference.bn_drop_connect_add(
            x, residual, drop_scale, weight, bias, running_mean, running_var,
            training=training, momentum=momentum, eps=eps, group=group,
        )  # fmt: skip
    mean, var = statistics(x, running_mean, running_var, training, momentum, group)
    return bn_drop_connect_add_op(x, residual, drop_scale, mean, var, weight, bias, eps, training, group)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    no_drop_scale: dict[str, Any] = {"drop_scale_ptr": None}
    no_residual: dict[str, Any] = {"residual_ptr": None}
    no_norm = {**dict.fromkeys(("mean_ptr", "var_ptr", "weight_ptr", "bias_ptr")), "NORM": False}
    norm: dict[str, Any] = {"NORM": True}
    yield from aot.tile_specs(
        _drop_connect_kernel,
        "elementwise",
        ["x_ptr", "residual_ptr", "y_ptr"],
        variants=[{**a, **b, **c} for a in ({}, no_drop_scale) for b in ({}, no_residual) for c in (norm, no_norm)],
    )
    yield from aot.tile_specs(
        _bn_drop_connect_reduce_kernel, "reduction", ["dy_ptr", "x_ptr"], variants=[{}, no_drop_scale], halved=True
    )
    yield from aot.tile_specs(
        _bn_drop_connect_dx_kernel,
        "elementwise",
        ["dy_ptr", "x_ptr", "dx_ptr"],
        variants=[
            {**a, **b} for a in ({}, no_drop_scale) for b in ({"TRAINING": True}, {"TRAINING": False, "x_ptr": None})
        ],
        halved=True,
    )


def traffic(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes read and written by each kernel of one `drop_connect_add` with a scale, ":backward" its second launch."""
    b, c, h, w = shape
    image, tile = b * c * h * w * dtype.itemsize, L.tile_for(c)
    scales = 4 * b * L.cdiv(h * w, tile.height) * L.cdiv(c, tile.block_c)
    return {"_drop_connect_kernel": 3 * image + scales, "_drop_connect_kernel:backward": 2 * image + scales}


def bn_traffic(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    training: bool = True,
    *,
    with_residual: bool = True,
    gpu: Gpu = REFERENCE,
) -> dict[str, int]:
    """Bytes read and written by each kernel of one `bn_drop_connect_add`; `with_residual`: and a drop_scale."""
    b, c, h, w = shape
    rows = b * h * w
    image = rows * c * dtype.itemsize
    half, blocks, _, partials = partial_plan(rows, c, gpu, halved=True)
    tiles, halves = (b * L.cdiv(h * w, t.height) for t in (L.tile_for(c), half))
    return {
        **(statistics_traffic(shape, dtype, gpu) if training else {}),
        "_drop_connect_kernel": (3 if with_residual else 2) * image + (16 * c + 4 * blocks * with_residual) * tiles,
        "_bn_drop_connect_reduce_kernel": 2 * image + 4 * rows * blocks * with_residual + (8 + 8) * c * partials,
        "_sum_partials_kernel": sum_traffic(2, partials, c),
        "_bn_drop_connect_dx_kernel": (3 if training else 2) * image
        + ((20 if training else 8) * c + 4 * blocks * with_residual) * halves,
    }
