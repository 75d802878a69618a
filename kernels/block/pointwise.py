"""The 1×1 convolutions of MBConv with the batch norms, SiLU, gate and drop-connect around them fused into them.

With M = B H W rows, x [M, C_in], expansion E = x W1ᵀ, depthwise output D, gate g[b], and projection P:

    E = x W1ᵀ                                       and the statistics of E
    P = (silu(BN(D)) g[b]) W3ᵀ                      and the statistics of P

`BN(t) = weight (t - mean) / sqrt(var + eps) + bias`. Nothing normalised or activated reaches memory; what is saved
for backward is x, E, D, P and vectors. With dy the gradient of the block's output, s[b] its drop-connect scale, dA
that of silu(BN(D)) g, dA1 that of silu(BN(E)), a hat for a normalised value and r = 1 / sqrt(var + eps):

    dz = s dy                  dP  = weight r (dz - (Σ dz + p̂ Σ dz p̂) / M)         projection's BN, Σ from outside
    dA = dP W3                 and per image Σ dA a, Σ dA σ', Σ dA σ' d̂            a = silu(BN(D)), σ' its derivative
    dW3 = dPᵀ (silu(BN(D)) g)
    dz = dA1 silu'(BN(E))      dE  = weight r (dz - (Σ dz + ê Σ dz ê) / M)         expansion's BN
    dx = dE W1 (+ dy where the block has a residual)
    dW1 = dEᵀ x

dP and dE are made as they load, in each of the two products that want them, and rounded to the storage dtype there.

Bytes, in elements of the storage dtype (vectors, weights and partials aside), against unfused PyTorch, whose BN
takes 2 reads and 1 write forward and 4 + 1 backward, SiLU 1 + 1 and 2 + 1, gate and drop_scale 1 + 1 and 2 + 2 or more:

    expansion forward   x + E                       unfused x + E, and E again for the statistics
    projection forward  D + P                       unfused 7 D + 2 P
    projection backward 2 dy + 2 P + 2 D + dA       unfused 11 D + 8 P
    expansion backward  2 (dA1 + E) + 2 x (+ dy)    unfused 10 E + 3 x

Where C_exp × C_in is small `kernels.block.expand_backward` makes dx and dW1 at once, from one read of dA1 and E. One
kernel for dA and dW3 would read D, dy and P once: predicted to save D + dy + P of 3 D + 2 dy + 2 P, a third of the
projection's backward; its price is a [64, C_out] accumulator beside the tile and partials a program.

Predicted limits on an H200, to be held against measurements: memory for every product without SiLU, arithmetic being
a tenth of the tensor cores' at most; with SiLU the special-function units, at two operations an element (exponential,
reciprocal) 1.85e12 elements/s, nine tenths of what 4.3 TB/s delivers in 16 bits; for "gate_sums" and the weight
gradients, which make SiLU and its derivative again, likewise. In fp32 the multiplications of `pointwise_gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import aot
from kernels import launch as L
from kernels.batch_norm import MERGE, MERGE_CHANNELS, MERGE_WARPS, _merge_stats_kernel
from kernels.block import expand_backward, pointwise_gemm, pointwise_operand, pointwise_wgrad
from kernels.block.pointwise_blocks import Epilogue, Plan, plan
from kernels.block.pointwise_gemm import gemm, gemm_traffic
from kernels.block.pointwise_operand import norm_vectors, norm_vectors_traffic
from kernels.block.pointwise_wgrad import wgrad, wgrad_traffic
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu

__all__ = [
    "aot_specs",
    "expansion_dgrad",
    "expansion_wgrad",
    "forward",
    "norm_vectors",
    "projection_dgrad",
    "projection_wgrad",
    "residual_add_forward",
    "traffic",
]


def forward(
    x: Tensor, weight: Tensor, norm: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = f(x) weightᵀ and its mean and biased variance, fp32 [C_out].

    x is [B, C_in, H, W] in channels_last, weight [C_out, C_in]; f is silu(BN(x)) with `norm` [4 or 6, C_in] from
    `norm_vectors`, times `gate` fp32 [B, C_in] where there is one.
    """
    prologue: pointwise_operand.Prologue = "none" if norm is None else "bn_silu" if gate is None else "bn_silu_gate"
    return _merged(*gemm(x, weight, prologue=prologue, epilogue="statistics", vectors=norm, gate=gate))


def residual_add_forward(
    p: Tensor, residual: Tensor | None, drop_scale: Tensor | None, norm: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = s[b] BN(p) (+ residual) [B, C_in, H, W]; x weightᵀ, and its mean and biased variance, as in `forward`."""
    x = L.empty_image(p)
    found = gemm(
        p, weight, prologue="residual_add", epilogue="statistics", x=residual, residual_sum=x, vectors=norm,
        drop_scale=drop_scale,
    )  # fmt: skip
    return x, *_merged(*found)


def _merged(y: Tensor, partial: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance that its partials make."""
    assert partial is not None
    channels = y.shape[1]
    mean, var = L.empty((channels,), like=y), L.empty((channels,), like=y)
    L.launch(
        _merge_stats_kernel, (L.cdiv(channels, MERGE_CHANNELS),), partial, mean, var, y.numel() // channels, plan.step,
        plan.parts, channels, like=y, num_warps=MERGE_WARPS, site=plan.site, **MERGE,
    )  # fmt: skip
    return y, mean, var


def projection_dgrad(
    dy: Tensor, p: Tensor, weight: Tensor, norm: Tensor, drop_scale: Tensor | None, d: Tensor, d_norm: Tensor
) -> tuple[Tensor, Tensor]:
    """dA, and Σ dA a, Σ dA σ', Σ dA σ' d̂ of pieces of images as [3, B, chunks, C_exp] for `excite.excite_backward`.

    dy and p are [B, C_out, H, W], d is [B, C_exp, H, W], weight [C_out, C_exp], drop_scale [B] or None; `norm`
    [6, C_out] is the projection's batch norm with its finished sums, `d_norm` [4 or 6, C_exp] that of d.
    """
    da, partial, _ = gemm(
        dy, weight, prologue="bn_grad", epilogue="gate_sums", dgrad=True, x=p, vectors=norm, drop_scale=drop_scale,
        other=d, other_vectors=d_norm,
    )  # fmt: skip
    assert partial is not None
    return da, partial


def projection_wgrad(
    dy: Tensor, p: Tensor, norm: Tensor, drop_scale: Tensor | None, d: Tensor, d_norm: Tensor, gate: Tensor
) -> Tensor:
    """dW3 [C_out, C_exp] in fp32; arguments as in `projection_dgrad`, gate [B, C_exp]."""
    return wgrad(
        d, dy, wide_prologue="bn_silu_gate", narrow_prologue="bn_grad", wide_is_input=True, narrow_x=p,
        wide_vectors=d_norm, narrow_vectors=norm, gate=gate, drop_scale=drop_scale,
    )  # fmt: skip


def expansion_backward(
    da: Tensor, e: Tensor, weight: Tensor, norm: Tensor, x: Tensor, residual_gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx [B, C_in, H, W] and dW1 [C_exp, C_in] in fp32; arguments as in `expansion_dgrad`, x [B, C_in, H, W]."""
    p = expand_backward.plan(
        da.shape, x.shape[1], da.dtype, residual=residual_gradient is not None, gpu=L.gpu(da.device)
    )  # fmt: skip
    if p.form.together:
        return expand_backward.together(da, e, weight, norm, x, residual_gradient, p)
    dx = expansion_dgrad(da, e, weight, norm, residual_gradient, p.site)
    return dx, expansion_wgrad(da, e, norm, x, p.site)


def expansion_dgrad(
    da: Tensor,
    e: Tensor,
    weight: Tensor,
    norm: Tensor,
    residual_gradient: Tensor | None = None,
    site: Site | None = None,
) -> Tensor:
    """dx [B, C_in, H, W] from da, the gradient of silu(BN(e)), both [B, C_exp, H, W]; weight [C_exp, C_in].

    `norm` [6, C_exp] is the expansion's batch norm with its finished sums; `residual_gradient` is added to dx; `site`:
    where time is counted, if not at the product's own.
    """
    return gemm(
        da, weight, prologue="bn_silu_grad", epilogue="none" if residual_gradient is None else "residual", dgrad=True,
        x=e, vectors=norm, other=residual_gradient, site=site,
    )[0]  # fmt: skip


def expansion_wgrad(da: Tensor, e: Tensor, norm: Tensor, x: Tensor, site: Site | None = None) -> Tensor:
    """dW1 [C_exp, C_in] in fp32; arguments as in `expansion_dgrad`, x [B, C_in, H, W]."""
    return wgrad(da, x, wide_prologue="bn_silu_grad", wide_x=e, wide_vectors=norm, site=site)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch of the 1×1 convolutions can select."""
    for file in (pointwise_operand, pointwise_gemm, pointwise_wgrad, expand_backward):
        yield from file.aot_specs()


def expansion_backward_traffic(
    shape: tuple[int, int, int, int],
    entry: int,
    dtype: torch.dtype,
    *,
    residual: bool,
    from_memory: bool = False,
    gpu: Gpu = REFERENCE,
) -> dict[str, int]:
    """Bytes that each kernel of `expansion_backward` moves for da of `shape` and `entry` channels of x."""
    p = expand_backward.plan(shape, entry, dtype, residual=residual, gpu=gpu)
    if p.form.together:
        return expand_backward.together_traffic(shape, entry, dtype, p, residual=residual, from_memory=from_memory)
    common: dict[str, Any] = {"from_memory": from_memory, "gpu": gpu}
    epilogue: Epilogue = "residual" if residual else "none"
    dgrad = {"_pointwise_kernel": gemm_traffic(shape, entry, dtype, "bn_silu_grad", epilogue, **common)}
    return dgrad | wgrad_traffic(shape, entry, dtype, "bn_silu_grad", **common)


def traffic(
    shape: tuple[int, int, int, int],
    channels: tuple[int, int],
    dtype: torch.dtype,
    *,
    residual: bool,
    scaled: bool,
    from_memory: bool = False,
    gpu: Gpu = REFERENCE,
) -> dict[str, dict[str, int]]:
    """Bytes that each kernel moves, launcher by launcher, in a block whose projection sees [B, C_exp, H, W] = `shape`
    and whose expansion has the same map (stride 1); `channels` are (C_in, C_out).

    Every access counts, as under the interpreter; with `from_memory` images count once a launch, as where L2 serves
    the other columns' programs.
    """
    b, expanded, h, w = shape
    entry, out = channels
    common: dict[str, Any] = {"from_memory": from_memory, "gpu": gpu}
    narrow_in, narrow_out = (b, entry, h, w), (b, out, h, w)

    def merge(k: int, n: int, prologue: pointwise_operand.Prologue) -> dict[str, int]:
        partials = plan((b, k, h, w), k, n, prologue, "statistics", dtype, gpu).parts
        return {"_merge_stats_kernel": 8 * partials * n + 8 * n}

    def product(size: tuple[int, int, int, int], n: int, *form: Any, **options: Any) -> dict[str, int]:
        options |= common
        return {"_pointwise_kernel": gemm_traffic(size, n, dtype, *form, **options)}

    return {
        "norm_vectors": {"_norm_vectors_kernel": norm_vectors_traffic(expanded, False)},
        "expansion_forward": product(narrow_in, expanded, "none", "statistics") | merge(entry, expanded, "none"),
        "projection_forward": product(shape, out, "bn_silu_gate", "statistics") | merge(expanded, out, "bn_silu_gate"),
        "projection_dgrad": product(narrow_out, expanded, "bn_grad", "gate_sums", scaled=scaled),
        "projection_wgrad": wgrad_traffic(shape, out, dtype, "bn_silu_gate", "bn_grad", scaled=scaled, **common),
        "expansion_backward": expansion_backward_traffic(shape, entry, dtype, residual=residual, **common),
    }
