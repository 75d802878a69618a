"""Gradients of the depthwise convolution: of its input, of its weight, and the sums for the batch norm in front of it.

With y the convolution's output, z = weight ŷ + bias its batch norm over n = B Ho Wo rows, a2 = silu(z), gate g and
pooled gradient q [B, C], and dA the gradient of the gated activation a2 g (x, a, w, s, top: see
`kernels.block.depthwise`):

    dz = (g dA + q) silu'(z)               dy = weight r (dz - (Σ dz + ŷ Σ dz ŷ) / n), as in kernels.ops.bn_silu
    da[i, j] = Σ w[ky, kx] dy[o, p]        over i = o s + ky - top, j = p s + kx - left
    dw[ky, kx] = Σ_{b, o, p} dy[o, p] a[o s + ky - top, p s + kx - left]
    dz1 = da silu'(z1)                     Σ dz1, Σ dz1 x̂ over rows, of da as it is stored

One kernel gives them all. Saved for backward: x, y and vectors; dz, dy, a and every x̂ are computed again as they load.

Bytes, in passes: dA, y and x read, da written, 3 + 1. Unfused PyTorch from the same saved tensors: gate and pooling 2 +
1, SiLU 2 + 1, batch norm 4 + 1, convolution 2 + 1 for da and 2 for dw, SiLU 2 + 1, reduction 2: 16 + 5.

The shape of the kernel. Tiles as in `kernels.block.depthwise`, and gathering: a step brings one row of dy, COLUMNS +
⌈k / s⌉ - 1 columns of it, into a window of ⌈k / s⌉ rows that is all that one row of x (s rows at stride s) depends on.
So da is whole at once and meets x̂ and silu' in registers, where the k² sums of dw grow as well. At stride 2 an input
row's parity selects its weights at compile time, and no product with a structural zero is formed. The weights come
from the first-level cache in every row: with k 5 there is no room for them. A program walks several tiles before it
writes its k² + 2 sums a channel, which `_sum_partials_kernel` adds up in order: no atomics, and a result repeats bit
for bit.

Where `Strips.separate` says so, dy is made by a pass of its own (`squeeze_excite.scale_backward`), rounded once more to
the storage dtype, and read here: 2 + 1 passes over y more, and half of the instructions.

Predicted, not measured: bound by instructions and what hides their waits; `python -m bench.limits` counts them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated, unreachable"
# (Triton's kernels take no annotations but constexpr; a tuple grows under one name.)
# ruff: noqa: RUF005, SIM108
# (Its compiler joins tuples by + alone and chooses at compile time by `if` statements.)

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.batch_norm import (
    bn_vectors,
    channel_vector,
    inverse_std,
    locate,
    silu_and_dsilu,
    store_channels,
    sum_partials,
    sum_traffic,
)
from kernels.block.strips import (
    BACKWARD,
    NUM_WARPS,
    Geometry,
    backward_plan,
    empty_nhwc,
    inside,
    load_weights,
    pack_weight,
    strip_specs,
    weight_bytes,
)
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl
from kernels.ops.squeeze_excite import NORM_VECTORS, scale_backward, scale_backward_traffic
from kernels.vectors import NO_NORM, NO_OUT_NORM, Norm, OutNorm


@L.helper
def gradient_line(
    dy_row, y_row, offsets, left, stop, in_channels, channels, gate, q, mean, bn_scale, bias, grad_offset, grad_slope,
    NORM: tl.constexpr, SPAN: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """One row of the convolution's gradient, SPAN columns of it, zero outside the image."""
    line = ()
    for j in tl.static_range(SPAN):
        inside = j < stop
        if j < LINES - 1:
            inside = inside & (j >= -left)
        d = tl.load(dy_row + j * channels + offsets, mask=inside & in_channels, other=0.0).to(tl.float32)
        if NORM:
            y = tl.load(y_row + j * channels + offsets, mask=inside & in_channels, other=0.0).to(tl.float32)
            centred = y - mean
            _a, dsilu = silu_and_dsilu(centred * bn_scale + bias)
            d = tl.where(inside, (d * gate + q) * dsilu - (centred * grad_slope + grad_offset), 0.0)
        line = line + (d,)
    return line


@L.jit
def _depthwise_backward_kernel(
    dy_ptr,  # gradient of the gated activation; without OUT_NORM of the convolution's output
    y_ptr,  # None without OUT_NORM, as are the next seven
    gate_ptr,
    q_ptr,
    sums_ptr,  # [2, C]: Σ dz, Σ dz x̂ of the output's norm
    out_mean_ptr,
    out_var_ptr,
    out_weight_ptr,
    out_bias_ptr,
    x_ptr,
    mean_ptr,  # None without NORM, as are the next three
    var_ptr,
    weight_ptr,
    bias_ptr,
    w_ptr,  # [blocks, K * K, BLOCK_C]
    dx_ptr,
    partial_ptr,  # [K * K (+ 2), P, C]: sums for the weight's gradient, with NORM Σ dz, Σ dz x̂ of the input's norm
    eps,
    inverse_rows,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    strips,
    bands,
    band_rows,
    lead,
    units,
    groups,
    partials,
    c_vec,
    NORM: tl.constexpr,
    OUT_NORM: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):
    LINES: tl.constexpr = (K - 1) // STRIDE + 1
    SPAN: tl.constexpr = COLUMNS + LINES - 1
    channels = c_vec * VEC
    part, c0 = locate(channels, BLOCK_C)
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    in_channels = c < channels
    lanes = tl.arange(0, UNITS)[:, None]
    w_ptrs = w_ptr + c0 * (K * K) + lanes * 0 + tl.arange(0, BLOCK_C)[None, :]
    if NORM:
        mean, _rstd, bn_scale, bias = bn_vectors(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c0, channels, BLOCK_C)
        sum_dz = tl.zeros([UNITS, BLOCK_C], tl.float32)
        sum_dz_centred = tl.zeros([UNITS, BLOCK_C], tl.float32)
    if OUT_NORM:
        out_mean, out_rstd, out_bn_scale, out_bias = bn_vectors(
            out_mean_ptr, out_var_ptr, out_weight_ptr, out_bias_ptr, eps, c0, channels, BLOCK_C
        )
        grad_offset = out_bn_scale * channel_vector(sums_ptr, c0, channels, BLOCK_C) * inverse_rows
        grad_slope = out_bn_scale * out_rstd * channel_vector(sums_ptr + channels, c0, channels, BLOCK_C) * inverse_rows
    else:
        out_mean, out_bn_scale, out_bias, grad_offset, grad_slope = 0.0, 0.0, 0.0, 0.0, 0.0
    dweights = ()
    for _i in tl.static_range(K * K):
        dweights = dweights + (tl.zeros([UNITS, BLOCK_C], tl.float32),)
    group = part
    while group < groups:
        unit = group // bands * UNITS + lanes
        image = unit // strips
        begin = pad_top // STRIDE + group % bands * band_rows
        end = begin + band_rows  # the last band's rows end with the image
        column = pad_left // STRIDE + (unit % strips) * COLUMNS
        row = begin - lead
        left = column - (LINES - 1)
        y_offsets = ((image.to(tl.int64) * out_height + row) * out_width + left) * channels + c
        if OUT_NORM:
            real = (unit < units) & in_channels
            gate = out_bn_scale * tl.load(gate_ptr + image * channels + c, mask=real, other=0.0)
            q = out_bn_scale * tl.load(q_ptr + image * channels + c, mask=real, other=0.0)
        else:
            gate, q = 1.0, 0.0
        right = tl.where(unit < units, out_width - left, 0)
        x_left = column * STRIDE - pad_left
        x_right = tl.where(unit < units, width - x_left, 0)
        x_row = image.to(tl.int64) * height + (begin * STRIDE - pad_top)
        x_offsets = (x_row * width + x_left) * channels + c
        window = ()
        for _i in tl.static_range((LINES - 1) * SPAN):
            window = window + (tl.zeros([UNITS, BLOCK_C], tl.float32),)
        # Scalars move down the rows: a tile of pointers that a loop carries changes its layout in every step,
        # through shared memory.
        dy_row = dy_ptr
        if OUT_NORM:
            y_row = y_ptr
        else:
            y_row = dy_ptr
        x_below = tl.full([], 0, tl.int64)
        step = 0
        while step < lead:
            stop = tl.where((row >= 0) & (row < out_height), right, 0)
            line = gradient_line(
                dy_row, y_row, y_offsets, left, stop, in_channels, channels, gate, q, out_mean, out_bn_scale, out_bias,
                grad_offset, grad_slope, OUT_NORM, SPAN, LINES,
            )  # fmt: skip
            moved = ()
            for i in tl.static_range((LINES - 1) * SPAN):
                if i < (LINES - 2) * SPAN:
                    moved = moved + (window[i + SPAN],)
                else:
                    moved = moved + (line[i - (LINES - 2) * SPAN],)
            window = moved
            row += 1
            dy_row += out_width * channels
            y_row += out_width * channels
            step += 1
        step = 0
        while step < band_rows:
            stop = tl.where((row >= 0) & (row < out_height), right, 0)
            line = gradient_line(
                dy_row, y_row, y_offsets, left, stop, in_channels, channels, gate, q, out_mean, out_bn_scale, out_bias,
                grad_offset, grad_slope, OUT_NORM, SPAN, LINES,
            )  # fmt: skip
            rows = ()
            for i in tl.static_range(LINES * SPAN):
                if i < (LINES - 1) * SPAN:
                    rows = rows + (window[i],)
                else:
                    rows = rows + (line[i - (LINES - 1) * SPAN],)
            for phase in tl.static_range(STRIDE):
                y = row * STRIDE + phase - pad_top
                stop = tl.where((y >= 0) & (y < height) & (row < end), x_right, 0)
                dxs = ()
                for _j in tl.static_range(COLUMNS * STRIDE):
                    dxs = dxs + (tl.zeros([UNITS, BLOCK_C], tl.float32),)
                for a in tl.static_range((K - 1 - phase) // STRIDE + 1):
                    # Weights stay in the first-level cache and come a row at a time: 25 of them have no room.
                    weights = load_weights(w_ptrs + (phase + a * STRIDE) * (K * BLOCK_C), K, BLOCK_C)
                    added = ()
                    for j in tl.static_range(COLUMNS * STRIDE):
                        dx = dxs[j]
                        for b in tl.static_range((K - 1 - j % STRIDE) // STRIDE + 1):
                            d = rows[(LINES - 1 - a) * SPAN + j // STRIDE + LINES - 1 - b]
                            dx += d * weights[j % STRIDE + b * STRIDE]
                        added = added + (dx,)
                    dxs = added
                inputs = ()
                for j in tl.static_range(COLUMNS * STRIDE):
                    inside = j < stop
                    if j < STRIDE - 1:
                        inside = inside & (j >= -x_left)
                    x = tl.load(
                        x_ptr + (x_offsets + (x_below + j * channels)), mask=inside & in_channels, other=0.0
                    ).to(tl.float32)
                    dx = dxs[j].to(dx_ptr.dtype.element_ty)
                    tl.store(dx_ptr + (x_offsets + (x_below + j * channels)), dx, mask=inside & in_channels)
                    if NORM:
                        centred = x - mean
                        x, dsilu = silu_and_dsilu(centred * bn_scale + bias)
                        x = tl.where(inside, x, 0.0)
                        dz = tl.where(inside, dx.to(tl.float32) * dsilu, 0.0)
                        sum_dz += dz
                        sum_dz_centred += dz * centred
                    inputs = inputs + (x,)
                added = ()
                for ky in tl.static_range(K):
                    for kx in tl.static_range(K):
                        dweight_k = dweights[ky * K + kx]
                        if ky % STRIDE == phase:
                            for i in tl.static_range(COLUMNS):
                                d = rows[(LINES - 1 - ky // STRIDE) * SPAN + i + LINES - 1 - kx // STRIDE]
                                dweight_k += d * inputs[i * STRIDE + kx % STRIDE]
                        added = added + (dweight_k,)
                dweights = added
                x_below += width * channels
            moved = ()
            for i in tl.static_range((LINES - 1) * SPAN):
                moved = moved + (rows[i + SPAN],)
            window = moved
            row += 1
            dy_row += out_width * channels
            y_row += out_width * channels
            step += 1
        group += partials
    for i in tl.static_range(K * K):
        total = tl.sum(dweights[i], axis=0)
        store_channels(partial_ptr + (i * partials + part) * channels, total, c0, channels, BLOCK_C)
    if NORM:
        # Computed again: kept since the beginning it would take two registers where there are none.
        rstd = inverse_std(channel_vector(var_ptr, c0, channels, BLOCK_C), eps)
        part += K * K * partials
        store_channels(partial_ptr + part * channels, tl.sum(sum_dz, axis=0), c0, channels, BLOCK_C)
        part += partials
        store_channels(partial_ptr + part * channels, tl.sum(sum_dz_centred * rstd, axis=0), c0, channels, BLOCK_C)


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, norm: Norm = NO_NORM, out: OutNorm = NO_OUT_NORM
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx in the dtype of x, dweight [C, 1, k, k] fp32 and, with `norm`, its sums Σ dz1, Σ dz1 x̂ [2, C].

    `x` [B, C, H, W] and `dy` [B, C, Ho, Wo] are channels_last and of one dtype. With `norm`, x is raw and dx the
    gradient of its activation. Without `out`, dy is the gradient of the convolution's output itself.
    """
    images, channels = x.shape[:2]
    norms = {"norm": norm.mean is not None, "out_norm": out.y is not None}
    plan, lead = backward_plan(x.shape, x.dtype, g, **norms, gpu=L.gpu(x.device))
    area = g.kernel_size**2
    dx = empty_nhwc(x, channels, g.height, g.width)
    partial = L.empty((area + (0 if norm.mean is None else 2), plan.partials, channels), like=x)
    vec = L.vector_width(channels)
    eps = out.norm.eps if norm.mean is None else norm.eps
    if out.y is not None and out.norm.eps != eps:
        raise ValueError(
            f"both batch norms around a depthwise convolution must have one eps, got {eps}, {out.norm.eps}"
        )
    if out.y is not None and plan.config.separate:
        assert out.gate is not None
        assert out.q is not None
        dy = scale_backward(dy, out.y, out.gate, out.q, out.sums, out.norm, True, plan.site)
        out = NO_OUT_NORM
    L.launch(
        _depthwise_backward_kernel, (plan.blocks * plan.partials,), dy, *out[:4], *out.norm[:4], x, *norm[:4],
        pack_weight(weight), dx, partial, eps, 1.0 / (images * g.out_height * g.out_width),
        g.height, g.width, g.out_height, g.out_width, g.pad_top, g.pad_left, plan.strips, plan.bands, plan.band_rows,
        lead, plan.units, plan.groups, plan.partials, channels // vec,
        like=x, num_warps=NUM_WARPS, maxnreg=plan.config.maxnreg, site=plan.site, NORM=norm.mean is not None,
        OUT_NORM=out.y is not None, K=g.kernel_size, STRIDE=g.stride, **plan.constexprs(vec),
    )  # fmt: skip
    sums = sum_partials(partial, plan.site)
    dweight = sums[:area].t().reshape(channels, 1, g.kernel_size, g.kernel_size).contiguous()
    return dx, dweight, None if norm.mean is None else sums[area:]


IMAGES = ("dy_ptr", "y_ptr", "x_ptr", "dx_ptr")
NO_INPUT_VECTORS = {**dict.fromkeys(NORM_VECTORS), "NORM": False}
NO_OUT_VECTORS = {
    **dict.fromkeys(("y_ptr", "gate_ptr", "q_ptr", "sums_ptr", *(f"out_{name}" for name in NORM_VECTORS))),
    "OUT_NORM": False,
}


def aot_specs() -> Iterator[aot.KernelSpec]:
    """A block with expansion, a block without, and the convolution alone: every configuration that they select."""
    modes = (
        {"NORM": True, "OUT_NORM": True},
        {**NO_INPUT_VECTORS, "OUT_NORM": True},
        NO_INPUT_VECTORS | NO_OUT_VECTORS,
    )
    yield from strip_specs(_depthwise_backward_kernel, IMAGES, modes, BACKWARD, "OUT_NORM", NO_OUT_VECTORS)


def traffic(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    g: Geometry,
    *,
    norm: bool,
    out_norm: bool,
    again: bool = True,
    gpu: Gpu = REFERENCE,
) -> dict[str, int]:
    """Bytes read and written by each kernel of one `depthwise_backward`; without `again` no element of an image, tap or
    vector a second time by one program or its neighbours, which is what must come from beyond the caches."""
    images, channels = shape[:2]
    plan, lead = backward_plan(shape, dtype, g, norm=norm, out_norm=out_norm, gpu=gpu)
    first: dict[str, int] = {}
    if out_norm and plan.config.separate:
        of = (images, channels, g.out_height, g.out_width)
        first["_scale_backward_kernel"] = scale_backward_traffic(of, dtype, norm=True, training=True, again=again)
        out_norm = False
    first_row, first_column = g.pad_top // g.stride, g.pad_left // g.stride
    rows = columns = 0
    for band in range(plan.bands):
        row = first_row + band * plan.band_rows
        rows += inside(row - lead, row + plan.band_rows, g.out_height)
    for strip in range(plan.strips):
        column = first_column + strip * plan.config.columns
        columns += inside(column - (g.lines - 1), column + plan.config.columns, g.out_width)
    pixels = rows * columns if again else g.out_height * g.out_width
    image = images * channels * dtype.itemsize
    area = g.kernel_size**2
    walks = plan.groups * plan.band_rows if again else plan.partials
    vectors = (5 if norm else 0) + (6 if out_norm else 0)
    sums = area + (2 if norm else 0)
    return first | {
        "_depthwise_backward_kernel": image * (pixels * (2 if out_norm else 1) + 2 * g.height * g.width)
        + walks * plan.blocks * weight_bytes(area, plan.tile_units, again)
        + 4 * channels * ((vectors + sums) * plan.partials + (2 * plan.units * plan.bands if out_norm else 0)),
        "_sum_partials_kernel": sum_traffic(sums, plan.partials, channels),
    }
