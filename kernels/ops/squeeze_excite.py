"""`y = x * gate`, `gate = sigmoid(We silu(Wr mean_HW(x) + br) + be)`, and the image passes that its fused form
shares.

Backward, G the gradient of a gate and q what a pixel receives through the mean (`kernels.ops.excite` derives it from
G):

    G[b, c] = Σ_hw dy x            dx = dy gate + q            q = (∂loss/∂mean) / (H W)

Saved for backward: x, the mean, the hidden vector and the gate, [B, C] and [B, S]. In passes over the image:
forward 2 reads and 1 write, backward 3 reads and 1 write (G reads dy and x, dx reads dy). Unfused PyTorch: the same
forward; backward 5 + 3 or more (dy gate, dy x, its sum, the mean's gradient spread out, their sum).

With NORM each kernel takes `a = silu(batch_norm(x))` for x, computed as it loads: see
`kernels.ops.bn_silu_squeeze_excite`.
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
from kernels.batch_norm import bn_vectors, channel_vector, fold, locate, silu_and_dsilu, store_channels, tile_at
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl
from kernels.operation import once_differentiable, operation
from kernels.ops import excite as E
from kernels.vectors import Norm


@L.jit
def _squeeze_kernel(
    x_ptr,
    dy_ptr,  # None in forward
    partial_ptr,  # [1 or 3, B, P, C]
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    images,
    area,
    rows_per_program,
    chunks,
    c_vec,
    NORM: tl.constexpr,
    BACKWARD: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per image and channel: Σ a, Σ σ', Σ σ' x̂ forward, each term times dy in backward; only the first without
    NORM."""
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    image = part // chunks
    start = (part % chunks) * rows_per_program
    row = image * area + start
    end = image * area + tl.minimum(start + rows_per_program, area)
    if NORM:
        mean, rstd, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
        sum_dsilu = tl.zeros([ROWS, BLOCK_C], tl.float32)
        sum_dsilu_centred = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_a = tl.zeros([ROWS, BLOCK_C], tl.float32)
    while row < end:
        offsets, mask = tile_at(row, end, c0, channels, UNROLL * ROWS, BLOCK_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            factor = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            factor = tl.where(mask, 1.0, 0.0)
        if NORM:
            centred = x - mean
            a, dsilu = silu_and_dsilu(centred * bn_scale + bias)
            dsilu = dsilu * factor
            sum_dsilu += fold(dsilu, UNROLL, ROWS, BLOCK_C)
            sum_dsilu_centred += fold(dsilu * centred, UNROLL, ROWS, BLOCK_C)
            sum_a += fold(a * factor, UNROLL, ROWS, BLOCK_C)
        else:
            sum_a += fold(x * factor, UNROLL, ROWS, BLOCK_C)
        row += UNROLL * ROWS
    store_channels(partial_ptr + part * channels, tl.sum(sum_a, axis=0), c0, channels, BLOCK_C)
    if NORM:
        part += images * chunks
        store_channels(partial_ptr + part * channels, tl.sum(sum_dsilu, axis=0), c0, channels, BLOCK_C)
        part += images * chunks
        store_channels(partial_ptr + part * channels, tl.sum(sum_dsilu_centred * rstd, axis=0), c0, channels, BLOCK_C)


@L.jit
def _scale_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
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
    a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = channel_vector(gate_ptr + image * channels, c0, channels, BLOCK_C)
    if NORM:
        mean, _, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
        a, _ = silu_and_dsilu((a - mean) * bn_scale + bias)
    tl.store(y_ptr + offsets, (a * gate).to(y_ptr.dtype.element_ty), mask=mask)


@L.jit
def _scale_backward_kernel(
    dy_ptr,
    x_ptr,  # None without NORM
    dx_ptr,
    gate_ptr,
    q_ptr,
    sums_ptr,  # [2, C]: dbias, dweight; None without NORM
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    inverse_rows,
    area,
    tiles,
    c_vec,
    NORM: tl.constexpr,
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
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = channel_vector(gate_ptr + image * channels, c0, channels, BLOCK_C)
    d = dy * gate + channel_vector(q_ptr + image * channels, c0, channels, BLOCK_C)
    if NORM:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, rstd, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
        centred = x - mean
        _, dsilu = silu_and_dsilu(centred * bn_scale + bias)
        d = d * dsilu
        if TRAINING:
            d -= channel_vector(sums_ptr, c0, channels, BLOCK_C) * inverse_rows
            d -= centred * (channel_vector(sums_ptr + channels, c0, channels, BLOCK_C) * rstd * inverse_rows)
        d = d * bn_scale
    tl.store(dx_ptr + offsets, d.to(dx_ptr.dtype.element_ty), mask=mask)


def image_plan(shape: torch.Size | tuple[int, ...], gpu: Gpu = REFERENCE) -> tuple[L.Tile, int, int, int]:
    """Tile, channel blocks, rows a program and chunks an image of a reduction within images."""
    images, channels, height, width = shape
    tile = L.tile_for(channels)
    blocks = L.cdiv(channels, tile.block_c)
    step = L.rows_per_program(height * width, tile, images * blocks, gpu, E.MAX_CHUNKS)
    return tile, blocks, step, L.cdiv(height * width, step)


def squeeze(x: Tensor, dy: Tensor | None, norm: Norm) -> Tensor:
    """Partial sums [3 (1 without norm), B, P, C] over the pixels of each image, in backward weighted by dy."""
    images, channels, height, width = x.shape
    tile, blocks, step, chunks = image_plan(x.shape, L.gpu(x.device))
    vec = L.vector_width(channels)
    partial = L.empty((1 if norm.mean is None else 3, images, chunks, channels), like=x)
    L.launch(
        _squeeze_kernel, (images * chunks * blocks,), x, dy, partial, *norm, images, height * width, step, chunks,
        channels // vec, like=x, num_warps=tile.num_warps, NORM=norm.mean is not None, BACKWARD=dy is not None,
        **tile.constexprs(vec),
    )  # fmt: skip
    return partial


def scale(x: Tensor, gate: Tensor, norm: Norm) -> Tensor:
    """The activation of x times the gate."""
    images, channels, height, width = x.shape
    tile, vec = L.tile_for(channels), L.vector_width(channels)
    tiles = L.cdiv(height * width, tile.height)
    y = L.empty_image(x)
    L.launch(
        _scale_kernel, (images * tiles * L.cdiv(channels, tile.block_c),), x, y, gate, *norm, height * width, tiles,
        channels // vec, like=x, num_warps=tile.num_warps, NORM=norm.mean is not None, **tile.constexprs(vec),
    )  # fmt: skip
    return y


def scale_backward(
    dy: Tensor, x: Tensor | None, gate: Tensor, q: Tensor, sums: Tensor | None, norm: Norm, training: bool,
    site: Site | None = None,
) -> Tensor:  # fmt: skip
    """dx; `sums` [2, C] are the batch norm's, whose gradient through its statistics counts in training; `site` as
    `launch.launch` takes it."""
    images, channels, height, width = dy.shape
    tile, vec = L.tile_for(channels).halved(), L.vector_width(channels)
    tiles = L.cdiv(height * width, tile.height)
    dx = L.empty_image(dy)
    L.launch(
        _scale_backward_kernel, (images * tiles * L.cdiv(channels, tile.block_c),), dy, x, dx, gate, q, sums, *norm,
        1.0 / (images * height * width), height * width, tiles, channels // vec,
        like=dy, num_warps=tile.num_warps, site=site, NORM=norm.mean is not None, TRAINING=training,
        **tile.constexprs(vec),
    )  # fmt: skip
    return dx


@operation("squeeze_excite")
def squeeze_excite_op(
    x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, pooled [B, C], hidden [B, S], gate [B, C]; only y is differentiable."""
    x = L.nhwc(x)
    partial = squeeze(x, None, Norm())
    pooled, hidden, gate, _ = E.excite(partial, x.shape[2] * x.shape[3], w_reduce, b_reduce, w_expand, b_expand)
    return scale(x, gate, Norm()), pooled, hidden, gate


@operation("squeeze_excite_backward")
def squeeze_excite_backward_op(
    dy: Tensor, x: Tensor, w_reduce: Tensor, w_expand: Tensor, pooled: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dWr, dbr, dWe, dbe."""
    dy, x = L.nhwc(dy), L.nhwc(x)
    partial = squeeze(x, dy, Norm())
    q, _, *parameters = E.excite_backward(
        partial, x.shape[2] * x.shape[3], w_reduce, w_expand, pooled, hidden, gate, None
    )
    dw_reduce, db_reduce, dw_expand, db_expand = parameters
    return scale_backward(dy, None, gate, q, None, Norm(), False), dw_reduce, db_reduce, dw_expand, db_expand


def fake_vectors(x: Tensor, w_reduce: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fake pooled, hidden and gate."""
    wide = x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float32)
    return wide, x.new_empty((x.shape[0], w_reduce.shape[0]), dtype=torch.float32), torch.empty_like(wide)


def fake_parameters(w_reduce: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fake dWr, dbr, dWe, dbe."""
    s, c = w_reduce.shape
    return tuple(w_reduce.new_empty(shape) for shape in ((s, c), (s,), (c, s), (c,)))  # type: ignore[return-value]


@squeeze_excite_op.register_fake
def _(x: Tensor, w_reduce: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return L.empty_image(x), *fake_vectors(x, w_reduce)


@squeeze_excite_backward_op.register_fake
def _(dy: Tensor, x: Tensor, w_reduce: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return L.empty_image(x), *fake_parameters(w_reduce)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_reduce, _, w_expand, _ = inputs
    ctx.save_for_backward(x, w_reduce, w_expand, *output[1:])


def _backward(ctx: Any, dy: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return squeeze_excite_backward_op(dy, *ctx.saved_tensors)


squeeze_excite_op.register_autograd(_backward, setup_context=_setup_context)
once_differentiable(squeeze_excite_backward_op, "squeeze_excite")


def squeeze_vectors(
    x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
    """The squeeze-and-excite arguments with the shapes they must have, for `launch.check`."""
    if x.dim() != 4 or w_reduce.dim() != 2:
        raise ValueError(
            f"x must be [B, C, H, W] and w_reduce [S, C], got {tuple(x.shape)} and {tuple(w_reduce.shape)}"
        )
    s, c = w_reduce.shape[0], x.shape[1]
    return {
        "w_reduce": (w_reduce, (s, c)),
        "b_reduce": (b_reduce, (s,)),
        "w_expand": (w_expand, (c, s)),
        "b_expand": (b_expand, (c,)),
    }


def squeeze_excite(
    x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor, *, impl: L.Impl = "auto"
) -> Tensor:
    """`x` [B, C, H, W] times its squeeze-and-excite gate (Hu et al. 2018), in the dtype of `x`.

    w_reduce [S, C], b_reduce [S], w_expand [C, S] and b_expand [C] are fp32; the Triton path computes the gate in
    fp32, in autocast too. On that path an `x` that is not channels_last is copied first. Raises ValueError or
    TypeError for a wrong shape, dtype or device, RuntimeError where `impl="triton"` cannot run.
    """
    L.check(x, **squeeze_vectors(x, w_reduce, b_reduce, w_expand, b_expand))
    if E.resolve(impl, x, w_reduce.shape[0]) == "torch":
        return reference.squeeze_excite(x, w_reduce, b_reduce, w_expand, b_expand)
    return squeeze_excite_op(x, w_reduce, b_reduce, w_expand, b_expand)[0]


NORM_VECTORS = ("mean_ptr", "var_ptr", "weight_ptr", "bias_ptr")


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch of these kernels can select, with and without the batch norm."""
    plain = {**dict.fromkeys(NORM_VECTORS), "NORM": False}
    for norm in ({"NORM": True}, plain):
        forward, backward = {**norm, "dy_ptr": None, "BACKWARD": False}, {**norm, "BACKWARD": True}
        yield from aot.tile_specs(_squeeze_kernel, "reduction", ["x_ptr", "dy_ptr"], variants=[forward, backward])
        yield from aot.tile_specs(_scale_kernel, "elementwise", ["x_ptr", "y_ptr"], variants=[norm])
    yield from aot.tile_specs(
        _scale_backward_kernel,
        "elementwise",
        ["dy_ptr", "x_ptr", "dx_ptr"],
        variants=[
            {"NORM": True, "TRAINING": True},
            {"NORM": True, "TRAINING": False},
            {**plain, "x_ptr": None, "sums_ptr": None, "TRAINING": False},
        ],
        halved=True,
    )


def traffic(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    squeeze: int,
    norm: bool = False,
    training: bool = True,
    gpu: Gpu = REFERENCE,
) -> dict[str, int]:
    """Bytes read and written by each kernel of one call; "_squeeze_kernel:backward" is its second launch."""
    b, c, h, w = shape
    image = b * c * h * w * dtype.itemsize
    tile, _, _, chunks = image_plan(shape, gpu)
    tiles = L.cdiv(h * w, tile.height)
    k, vector = (3, 4 * b * c) if norm else (1, 4 * b * c)
    vectors = 4 if norm else 0
    return {
        "_squeeze_kernel": image + (vectors + k) * vector * chunks,
        **E.traffic(k, b, chunks, c, squeeze),
        "_scale_kernel": 2 * image + (vectors + 1) * vector * tiles,
        "_squeeze_kernel:backward": 2 * image + (vectors + k) * vector * chunks,
        "_scale_backward_kernel": scale_backward_traffic(shape, dtype, norm=norm, training=training),
    }


def scale_backward_traffic(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, norm: bool, training: bool, again: bool = True
) -> int:
    """Bytes of `scale_backward`; without `again` no element of a vector a second time."""
    b, c, h, w = shape
    tiles = L.cdiv(h * w, L.tile_for(c).halved().height)
    vectors = (4 + 2 * training) * norm
    images = (3 if norm else 2) * b * c * h * w * dtype.itemsize
    return images + 4 * c * (b * tiles * (vectors + 2) if again else vectors + 2 * b)
