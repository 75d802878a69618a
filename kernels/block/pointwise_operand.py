"""What an operand of the 1×1 convolutions' products goes through between its load and the product.

f works on a tile in fp32 and is rounded to the storage dtype once:

    "none"          a
    "bn_silu"       silu(z), z = bn_scale (a - mean) + bias, bn_scale = weight / sqrt(var + eps)
    "bn_silu_gate"  silu(z) gate[b]
    "residual_add"  s[b] z + x                                              drop-connect's residual add; x may be None
    "bn_grad"       bn_scale s[b] a - grad_offset - grad_slope (x - mean)   the gradient through a batch norm of x
    "bn_silu_grad"  bn_scale a silu'(z(x)) - grad_offset - grad_slope (x - mean)    and through SiLU before it

where grad_offset = bn_scale Σdz / M and grad_slope = bn_scale Σdz x̂ / (M sqrt(var + eps)) restate the derivation in
`kernels.ops.bn_silu`. `norm_vectors` makes those vectors once; a tile of 32 channels would otherwise spend up to
half as many special-function operations on roots and reciprocals as on its own SiLUs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.batch_norm import channel_vector, inverse_std, sigmoid, silu_and_dsilu, store_channels, tile_at
from kernels.launch import tl

Prologue = Literal["none", "bn_silu", "bn_silu_gate", "residual_add", "bn_grad", "bn_silu_grad"]
SILU = ("bn_silu", "bn_silu_gate", "bn_silu_grad")
GRADIENTS = ("bn_grad", "bn_silu_grad")
NORM_BLOCK = 128

if L.INTERPRETED:

    def bound(n):
        """A loop bound as a Python integer: the interpreter of Triton 3.6 cannot make one of it with NumPy 2.4."""
        return int(n.handle.data.item()) if hasattr(n, "handle") else int(n)

else:

    @L.helper
    def bound(n):
        return n


@L.jit
def _norm_vectors_kernel(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,  # [2, C]: Σ dz, Σ dz x̂; None in forward
    norm_ptr,  # [4 (6), C]: mean, 1 / sqrt(var + eps), bn_scale, bias (, grad_offset, grad_slope)
    eps,
    inverse_rows,
    channels,
    BLOCK_C: tl.constexpr,
):
    c0 = tl.program_id(0) * BLOCK_C
    cols = c0 + tl.arange(0, BLOCK_C)
    mask = cols < channels
    rstd = inverse_std(tl.load(var_ptr + cols, mask=mask, other=1.0), eps)
    bn_scale = rstd * tl.load(weight_ptr + cols, mask=mask, other=0.0)
    store_channels(norm_ptr, tl.load(mean_ptr + cols, mask=mask, other=0.0), c0, channels, BLOCK_C)
    store_channels(norm_ptr + channels, rstd, c0, channels, BLOCK_C)
    store_channels(norm_ptr + 2 * channels, bn_scale, c0, channels, BLOCK_C)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0)
    store_channels(norm_ptr + 3 * channels, bias, c0, channels, BLOCK_C)
    if sums_ptr is not None:
        grad_offset = bn_scale * (tl.load(sums_ptr + cols, mask=mask, other=0.0) * inverse_rows)
        grad_slope = bn_scale * rstd * (tl.load(sums_ptr + channels + cols, mask=mask, other=0.0) * inverse_rows)
        store_channels(norm_ptr + 4 * channels, grad_offset, c0, channels, BLOCK_C)
        store_channels(norm_ptr + 5 * channels, grad_slope, c0, channels, BLOCK_C)


@L.helper
def operand_vectors(norm_ptr, c0, channels, PROLOGUE: tl.constexpr, BLOCK_C: tl.constexpr):
    """mean, bn_scale, bias, grad_offset, grad_slope of a channel block; zero where the prologue has no use for them."""
    mean = tl.zeros([1, BLOCK_C], tl.float32)
    bn_scale, bias, grad_offset, grad_slope = mean, mean, mean, mean
    if PROLOGUE != "none":
        mean = channel_vector(norm_ptr, c0, channels, BLOCK_C)
        bn_scale = channel_vector(norm_ptr + 2 * channels, c0, channels, BLOCK_C)
    if PROLOGUE != "none" and PROLOGUE != "bn_grad":
        bias = channel_vector(norm_ptr + 3 * channels, c0, channels, BLOCK_C)
    if PROLOGUE == "bn_grad" or PROLOGUE == "bn_silu_grad":
        grad_offset = channel_vector(norm_ptr + 4 * channels, c0, channels, BLOCK_C)
        grad_slope = channel_vector(norm_ptr + 5 * channels, c0, channels, BLOCK_C)
    return mean, bn_scale, bias, grad_offset, grad_slope


@L.helper
def gate_tile(
    gate_ptr, row, row_count, area, c0, channels, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The gates of the images that rows row... belong to. A tile that reaches into at most SPAN images selects among
    as many vectors; SPAN 0 loads a gate an element."""
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    cols = c0 + tl.arange(0, BLOCK_C)[None, :]
    if SPAN == 0:
        mask = (rows < row_count) & (cols < channels)
        return tl.load(gate_ptr + (rows // area) * channels + cols, mask=mask, other=0.0)
    else:
        first = row // area
        last = (row_count - 1) // area
        gate = channel_vector(gate_ptr + first * channels, c0, channels, BLOCK_C)
        for i in tl.static_range(1, SPAN):
            image = tl.minimum(first + i, last)
            following = channel_vector(gate_ptr + image * channels, c0, channels, BLOCK_C)
            gate = tl.where(rows >= (first + i) * area, following, gate)
        return gate


@L.helper
def operand(
    a_ptr, x_ptr, gate_ptr, drop_scale_ptr, vectors, row, end, row_count, area, c0, channels,
    PROLOGUE: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tile f(A) in the storage dtype; a product must not see its rows past `end`."""
    offsets, mask = tile_at(row, end, c0, channels, BLOCK_M, BLOCK_C)
    raw = tl.load(a_ptr + offsets, mask=mask, other=0.0)
    if PROLOGUE == "none":
        return raw
    else:
        mean, bn_scale, bias, grad_offset, grad_slope = vectors
        a = raw.to(tl.float32)
        if PROLOGUE == "bn_grad" or PROLOGUE == "bn_silu_grad":
            centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean
            if drop_scale_ptr is not None:
                rows = row + tl.arange(0, BLOCK_M)
                a = a * tl.load(drop_scale_ptr + rows // area, mask=rows < end, other=0.0)[:, None]
            if PROLOGUE == "bn_silu_grad":
                _, dsilu = silu_and_dsilu(centred * bn_scale + bias)
                a = a * dsilu
            a = a * bn_scale - grad_offset - centred * grad_slope
        elif PROLOGUE == "residual_add":
            a = (a - mean) * bn_scale + bias
            if drop_scale_ptr is not None:
                rows = row + tl.arange(0, BLOCK_M)
                a = a * tl.load(drop_scale_ptr + rows // area, mask=rows < end, other=0.0)[:, None]
            if x_ptr is not None:
                a += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            z = (a - mean) * bn_scale + bias
            a = z * sigmoid(z)
            if PROLOGUE == "bn_silu_gate":
                a = a * gate_tile(gate_ptr, row, row_count, area, c0, channels, SPAN, BLOCK_M, BLOCK_C)
        return a.to(a_ptr.dtype.element_ty)


@L.helper
def product(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def vector_width(*channels: int) -> int:
    """VEC of all of them together."""
    return min(L.vector_width(c) for c in channels)


def span_for(block_m: int, area: int, vec: int, dtype: torch.dtype) -> int:
    """SPAN of a gate: 2 where a tile is no longer than an image, 3 for 64 rows of 7×7, else a load an element."""
    span = (block_m - 1) // area + 2
    most = 3 if block_m > 32 else 2
    return span if span <= most and vec > 1 and dtype != torch.float32 else 0


def area_of(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def widened(dtype: torch.dtype) -> bool:
    """Whether products are of fp32 copies: the interpreter multiplies bf16 wrongly."""
    return L.INTERPRETED and dtype == torch.bfloat16


def norm_vectors(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, sums: Tensor | None = None, rows: int = 0
) -> Tensor:
    """[4, C] for the forward prologues and "gate_sums"; with `sums` [2, C], Σ dz and Σ dz x̂ over `rows` rows, [6, C]
    for the gradients' prologues too."""
    channels = mean.shape[0]
    vectors = L.empty((4 if sums is None else 6, channels), like=mean)
    L.launch(
        _norm_vectors_kernel, (L.cdiv(channels, NORM_BLOCK),), mean, var, weight, bias, sums, vectors, eps,
        1.0 / max(rows, 1), channels, like=mean, num_warps=4, BLOCK_C=NORM_BLOCK,
    )  # fmt: skip
    return vectors


VECTORS = {"none": 0, "bn_silu": 3, "bn_silu_gate": 3, "residual_add": 3, "bn_grad": 4, "bn_silu_grad": 5}


def norm_vectors_traffic(channels: int, sums: bool) -> int:
    """Bytes that `_norm_vectors_kernel` moves."""
    return 4 * channels * (12 if sums else 8)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    block = {"BLOCK_C": NORM_BLOCK}
    yield aot.spec(_norm_vectors_kernel, "small", "fp32", block)
    yield aot.spec(_norm_vectors_kernel, "small", "fp32", {"sums_ptr": None, **block})
