"""The two products of squeeze-and-excite on vectors, one launch for the whole batch each way.

With pooled p [B, C], hidden v = p Wrᵀ + br [B, S], h = silu(v) and gate g = sigmoid(h Weᵀ + be) [B, C]; G =
∂loss/∂g:

    du = G g (1 - g)        dWe = duᵀ h        dbe = Σ_b du        dh = du We
    dv = dh silu'(v)        dWr = dvᵀ p        dbr = Σ_b dv        dp = dv Wr

Each image is a program; the parameters' gradients are one more launch over blocks of channels that walks the batch
in order, so they repeat bit for bit. What reaches memory is [B, C] and [B, S] vectors and the two matrices, which
every image reads again from L2. S may be anything up to 256: rows past it are masked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.batch_norm import sigmoid, silu_and_dsilu
from kernels.launch import tl

MAX_CHUNKS = 16  # partial sums of one image and channel
MAX_SQUEEZE = 256


def resolve(impl: L.Impl, x: Tensor, squeeze: int) -> Literal["triton", "torch"]:
    """`launch.resolve` for an operation that squeezes to `squeeze` channels: "auto" is PyTorch where they are more than
    the kernels take."""
    found = L.resolve(impl, x)
    if found == "triton" and squeeze > MAX_SQUEEZE:
        if impl == "auto":
            return "torch"
        raise ValueError(
            f"the Triton kernels squeeze to at most {MAX_SQUEEZE} channels, got {squeeze}: pass impl='auto' or 'torch'"
        )
    return found


def excite_blocks(squeeze: int) -> dict[str, Any]:
    """Up to 8192 matrix elements a step, 32 a thread: few steps, each about as long as L2's latency (predicted)."""
    block_s = max(L.power_of_two(squeeze), 16)
    return {"MAX_CHUNKS": MAX_CHUNKS, "BLOCK_S": block_s, "BLOCK_C": min(8192 // block_s, 128)}


def parameter_blocks(squeeze: int) -> dict[str, Any]:
    """A block of each matrix's gradient stays in registers while the batch goes by, as many images a step as there are
    registers for: each step waits for memory once (predicted)."""
    block_s = max(L.power_of_two(squeeze), 16)
    return {"BLOCK_B": min(max(4096 // block_s, 16), 128), "BLOCK_S": block_s, "BLOCK_C": 16}


EXCITE_WARPS = 8
PARAMETER_WARPS = 4
SQUEEZE_SIZES = (16, 32, 64, 128, 256)


@L.helper
def sum_chunks(partial_ptr, vector, chunks, channels, c, MAX_CHUNKS: tl.constexpr):
    """Σ over the chunks of [.., chunks, channels] for one image and channels c."""
    p = tl.arange(0, MAX_CHUNKS)[:, None]
    mask = (p < chunks) & (c[None, :] < channels)
    return tl.sum(tl.load(partial_ptr + (vector * chunks + p) * channels + c[None, :], mask=mask, other=0.0), axis=0)


@L.jit
def _excite_kernel(
    partial_ptr,  # [1 or 3, B, P, C]: sums of a, σ', σ' x̂
    w_reduce_ptr,
    b_reduce_ptr,
    w_expand_ptr,
    b_expand_ptr,
    pooled_ptr,
    hidden_ptr,
    gate_ptr,
    dsilu_sums_ptr,  # [2, B, C]: sums of σ', σ' x̂
    inverse_area,
    images,
    chunks,
    channels,
    squeeze,
    NORM: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    products = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    c0 = 0
    while c0 < channels:
        c = c0 + tl.arange(0, BLOCK_C)
        pooled = sum_chunks(partial_ptr, image, chunks, channels, c, MAX_CHUNKS) * inverse_area
        tl.store(pooled_ptr + image * channels + c, pooled, mask=c < channels)
        if NORM:
            for k in tl.static_range(2):
                total = sum_chunks(partial_ptr, (k + 1) * images + image, chunks, channels, c, MAX_CHUNKS)
                tl.store(dsilu_sums_ptr + (k * images + image) * channels + c, total, mask=c < channels)
        mask = (s[:, None] < squeeze) & (c[None, :] < channels)
        w = tl.load(w_reduce_ptr + s[:, None] * channels + c[None, :], mask=mask, other=0.0)
        products += w * pooled[None, :]
        c0 += BLOCK_C
    hidden = tl.sum(products, axis=1) + tl.load(b_reduce_ptr + s, mask=s < squeeze, other=0.0)
    tl.store(hidden_ptr + image * squeeze + s, hidden, mask=s < squeeze)
    h = hidden * sigmoid(hidden)
    c0 = 0
    while c0 < channels:
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < channels) & (s[None, :] < squeeze)
        w = tl.load(w_expand_ptr + c[:, None] * squeeze + s[None, :], mask=mask, other=0.0)
        u = tl.sum(w * h[None, :], axis=1) + tl.load(b_expand_ptr + c, mask=c < channels, other=0.0)
        tl.store(gate_ptr + image * channels + c, sigmoid(u), mask=c < channels)
        c0 += BLOCK_C


@L.jit
def _excite_backward_kernel(
    partial_ptr,  # [1 or 3, B, P, C]: sums of dout a, dout σ', dout σ' x̂
    w_reduce_ptr,
    w_expand_ptr,
    hidden_ptr,
    gate_ptr,
    dsilu_sums_ptr,
    du_ptr,
    dv_ptr,
    q_ptr,  # [B, C]: dp / (H W), what every pixel receives
    bn_ptr,  # [2, B, C]: each image's share of Σ dz and Σ dz x̂
    inverse_area,
    images,
    chunks,
    channels,
    squeeze,
    NORM: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    products = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    c0 = 0
    while c0 < channels:
        c = c0 + tl.arange(0, BLOCK_C)
        gate = tl.load(gate_ptr + image * channels + c, mask=c < channels, other=0.0)
        du = sum_chunks(partial_ptr, image, chunks, channels, c, MAX_CHUNKS) * gate * (1.0 - gate)
        tl.store(du_ptr + image * channels + c, du, mask=c < channels)
        mask = (s[:, None] < squeeze) & (c[None, :] < channels)
        w = tl.load(w_expand_ptr + c[None, :] * squeeze + s[:, None], mask=mask, other=0.0)
        products += w * du[None, :]
        c0 += BLOCK_C
    hidden = tl.load(hidden_ptr + image * squeeze + s, mask=s < squeeze, other=0.0)
    _, dsilu = silu_and_dsilu(hidden)
    dv = tl.sum(products, axis=1) * dsilu
    tl.store(dv_ptr + image * squeeze + s, dv, mask=s < squeeze)
    c0 = 0
    while c0 < channels:
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (s[:, None] < squeeze) & (c[None, :] < channels)
        w = tl.load(w_reduce_ptr + s[:, None] * channels + c[None, :], mask=mask, other=0.0)
        q = tl.sum(w * dv[:, None], axis=0) * inverse_area
        tl.store(q_ptr + image * channels + c, q, mask=c < channels)
        if NORM:
            gate = tl.load(gate_ptr + image * channels + c, mask=c < channels, other=0.0)
            for k in tl.static_range(2):
                total = sum_chunks(partial_ptr, (k + 1) * images + image, chunks, channels, c, MAX_CHUNKS)
                at = (k * images + image) * channels + c
                dsilu_sums = tl.load(dsilu_sums_ptr + at, mask=c < channels, other=0.0)
                tl.store(bn_ptr + at, gate * total + q * dsilu_sums, mask=c < channels)
        c0 += BLOCK_C


@L.jit
def _excite_parameters_kernel(
    pooled_ptr,
    hidden_ptr,
    du_ptr,
    dv_ptr,
    dw_reduce_ptr,
    db_reduce_ptr,
    dw_expand_ptr,
    db_expand_ptr,
    images,
    channels,
    squeeze,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    dw_expand = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    dw_reduce = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    db_expand = tl.zeros([BLOCK_C], tl.float32)
    db_reduce = tl.zeros([BLOCK_S], tl.float32)
    start = 0
    while start < images:
        b = start + tl.arange(0, BLOCK_B)
        narrow = b[:, None] * squeeze + s[None, :]
        narrow_mask = (b[:, None] < images) & (s[None, :] < squeeze)
        wide = b[None, :] * channels + c[:, None]
        wide_mask = (b[None, :] < images) & (c[:, None] < channels)
        hidden = tl.load(hidden_ptr + narrow, mask=narrow_mask, other=0.0)
        dv = tl.load(dv_ptr + narrow, mask=narrow_mask, other=0.0)
        du = tl.load(du_ptr + wide, mask=wide_mask, other=0.0)
        pooled = tl.load(pooled_ptr + wide, mask=wide_mask, other=0.0)
        dw_expand += tl.dot(du, hidden * sigmoid(hidden), input_precision="ieee")
        dw_reduce += tl.dot(pooled, dv, input_precision="ieee")
        db_expand += tl.sum(du, axis=1)
        db_reduce += tl.sum(dv, axis=0)
        start += BLOCK_B
    mask = (c[:, None] < channels) & (s[None, :] < squeeze)
    tl.store(dw_expand_ptr + c[:, None] * squeeze + s[None, :], dw_expand, mask=mask)
    tl.store(dw_reduce_ptr + s[None, :] * channels + c[:, None], dw_reduce, mask=mask)
    tl.store(db_expand_ptr + c, db_expand, mask=c < channels)
    tl.store(db_reduce_ptr + s, db_reduce, mask=s < tl.where(tl.program_id(0) == 0, squeeze, 0))


def excite(
    partial: Tensor, area: int, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pooled [B, C], hidden [B, S], gate [B, C] and, from three partial sums, the sums of dsilu_sums [2, B, C]."""
    k, images, chunks, channels = partial.shape
    squeeze = w_reduce.shape[0]
    pooled, gate = L.empty((images, channels), like=partial), L.empty((images, channels), like=partial)
    hidden = L.empty((images, squeeze), like=partial)
    dsilu_sums = L.empty((2, images, channels), like=partial) if k == 3 else None
    L.launch(
        _excite_kernel, (images,), partial, w_reduce.contiguous(), b_reduce.contiguous(), w_expand.contiguous(),
        b_expand.contiguous(), pooled, hidden, gate, dsilu_sums, 1.0 / area, images, chunks, channels, squeeze,
        like=partial, num_warps=EXCITE_WARPS, NORM=k == 3, **excite_blocks(squeeze),
    )  # fmt: skip
    return pooled, hidden, gate, dsilu_sums


def excite_backward(
    partial: Tensor,
    area: int,
    w_reduce: Tensor,
    w_expand: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    dsilu_sums: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """q [B, C], the images' shares of the batch norm's sums [2, B, C], and dWr, dbr, dWe, dbe."""
    k, images, chunks, channels = partial.shape
    squeeze = w_reduce.shape[0]
    du, q = L.empty((images, channels), like=partial), L.empty((images, channels), like=partial)
    dv = L.empty((images, squeeze), like=partial)
    shares = L.empty((2, images, channels), like=partial) if k == 3 else None
    L.launch(
        _excite_backward_kernel, (images,), partial, w_reduce.contiguous(), w_expand.contiguous(), hidden, gate,
        dsilu_sums, du, dv, q, shares, 1.0 / area, images, chunks, channels, squeeze,
        like=partial, num_warps=EXCITE_WARPS, NORM=k == 3, **excite_blocks(squeeze),
    )  # fmt: skip
    dw_reduce, db_reduce = L.empty((squeeze, channels), like=partial), L.empty((squeeze,), like=partial)
    dw_expand, db_expand = L.empty((channels, squeeze), like=partial), L.empty((channels,), like=partial)
    blocks = parameter_blocks(squeeze)
    L.launch(
        _excite_parameters_kernel, (L.cdiv(channels, blocks["BLOCK_C"]),), pooled, hidden, du, dv,
        dw_reduce, db_reduce, dw_expand, db_expand, images, channels, squeeze,
        like=partial, num_warps=PARAMETER_WARPS, **blocks,
    )  # fmt: skip
    return q, shares, dw_reduce, db_reduce, dw_expand, db_expand


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    for size in SQUEEZE_SIZES:
        for fn, vectors in (
            (_excite_kernel, ("dsilu_sums_ptr",)),
            (_excite_backward_kernel, ("dsilu_sums_ptr", "bn_ptr")),
        ):
            for norm in (True, False):
                absent = {} if norm else dict.fromkeys(vectors)
                constexprs = {**absent, "NORM": norm, **excite_blocks(size)}
                yield aot.spec(fn, "small", "fp32", constexprs, num_warps=EXCITE_WARPS)
        yield aot.spec(
            _excite_parameters_kernel, "small", "fp32", dict(parameter_blocks(size)), num_warps=PARAMETER_WARPS
        )


def traffic(k: int, images: int, chunks: int, channels: int, squeeze: int) -> dict[str, int]:
    """Bytes read and written by each kernel; `k` partial sums an image, channel and chunk (1, or 3 with batch norm)."""
    wide, narrow, matrix = 4 * images * channels, 4 * images * squeeze, 4 * channels * squeeze
    matrices = images * 2 * matrix
    slices = L.cdiv(channels, parameter_blocks(squeeze)["BLOCK_C"])
    return {
        "_excite_kernel": k * chunks * wide + matrices + (k + 2) * wide + 2 * narrow,
        "_excite_backward_kernel": k * chunks * wide + matrices + 3 * wide + 2 * narrow + (5 * wide if k == 3 else 0),
        "_excite_parameters_kernel": 2 * wide + 2 * slices * narrow + 2 * matrix + 4 * (channels + squeeze),
    }
