"""The launches of a training-mode MBConv, grouped between one exchange of batch statistics and the next.

Each operation ends where a batch norm needs a number from the whole batch: its mean and variance forward, Σ dz and
Σ dz x̂ backward. `kernels.mbconv` strings them together and says what each computes; several processes exchange those
numbers between two operations and nowhere else. None is differentiable by itself.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from kernels import launch as L
from kernels.batch_norm import sum_partials
from kernels.block import pointwise as P
from kernels.block.depthwise import depthwise, merge_stats
from kernels.block.depthwise_backward import depthwise_backward
from kernels.block.strips import Geometry, Padding, empty_nhwc, geometry
from kernels.operation import once_differentiable, operation
from kernels.ops import excite as E
from kernels.ops.drop_connect import reduce_sums
from kernels.ops.squeeze_excite import fake_parameters, fake_vectors, squeeze
from kernels.vectors import Norm, OutNorm


def _geometry(x: Tensor, w: Tensor, stride: int, padding: Any) -> Geometry:
    assert padding in get_args(Padding)
    return geometry(x.shape[2], x.shape[3], w.shape[-1], stride, padding)


def _area(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _vector(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


@operation("mbconv_expand")
def expand(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, C_in, H, W], w [C, C_in] in the dtype of x → E [B, C, H, W], its mean and biased variance [C]."""
    return P.forward(L.nhwc(x), w)


@expand.register_fake
def _(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return empty_nhwc(x, w.shape[0], *x.shape[2:]), _vector(x, w.shape[0]), _vector(x, w.shape[0])


@operation("mbconv_residual_expand")
def residual_expand(
    p: Tensor,
    residual: Tensor | None,
    drop_scale: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The previous block's projection p [B, C_in, H, W], the batch norm on it, drop_scale [B] and residual → x, that
    block's output; and `expand` of x."""
    norm = P.norm_vectors(mean, var, weight, bias, eps)
    return P.residual_add_forward(L.nhwc(p), None if residual is None else L.nhwc(residual), drop_scale, norm, w)


@residual_expand.register_fake
def _(p: Tensor, residual: Tensor | None, drop_scale: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    channels = others[4].shape[0]
    return (
        L.empty_image(p), empty_nhwc(p, channels, *p.shape[2:]), _vector(p, channels), _vector(p, channels),
    )  # fmt: skip


@operation("mbconv_depthwise")
def depthwise_forward(
    e: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor,
    eps: float,
    stride: int,
    padding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """E [B, C, H, W], the batch norm on it (None: neither norm nor SiLU), w [C, 1, k, k] fp32 → D, its mean and
    biased variance."""
    d, partial, counts = depthwise(
        L.nhwc(e), w, _geometry(e, w, stride, padding), Norm(mean, var, weight, bias, eps), stats=True
    )
    assert partial is not None
    assert counts is not None
    return d, *merge_stats(partial, counts)


@depthwise_forward.register_fake
def _(
    e: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor,
    eps: float,
    stride: int,
    padding: str,
) -> tuple[Tensor, ...]:
    g = _geometry(e, w, stride, padding)
    channels = e.shape[1]
    return empty_nhwc(e, channels, g.out_height, g.out_width), _vector(e, channels), _vector(e, channels)


@operation("mbconv_project")
def project(
    d: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    w: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """D [B, C, H, W] and the batch norm on it, squeeze-and-excite, w [C_out, C] in the dtype of D → P [B, C_out, H, W],
    its mean and biased variance; for backward the norm's norm_vectors [4, C], pooled [B, C], hidden [B, S], gate
    [B, C] and each image's sums of σ' and σ' d̂ [2, B, C]."""
    d = L.nhwc(d)
    partial = squeeze(d, None, Norm(mean, var, weight, bias, eps))
    pooled, hidden, gate, dsilu_sums = E.excite(partial, _area(d), w_reduce, b_reduce, w_expand, b_expand)
    assert dsilu_sums is not None
    norm = P.norm_vectors(mean, var, weight, bias, eps)
    return *P.forward(d, w, norm, gate), norm, pooled, hidden, gate, dsilu_sums


@project.register_fake
def _(
    d: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, b_reduce: Tensor,
    w_expand: Tensor, b_expand: Tensor, w: Tensor, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    (images, channels), out = d.shape[:2], w.shape[0]
    return (
        empty_nhwc(d, out, *d.shape[2:]), _vector(d, out), _vector(d, out), _vector(d, 4, channels),
        *fake_vectors(d, w_reduce), _vector(d, 2, images, channels),
    )  # fmt: skip


@operation("mbconv_residual_add_backward")
def residual_add_backward(
    dy: Tensor, p: Tensor, drop_scale: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Σ dz and Σ dz p̂ of the projection's batch norm, dz = drop_scale[b] dy: [2, C_out]."""
    return reduce_sums(L.nhwc(dy), L.nhwc(p), drop_scale, mean, var, eps)


@residual_add_backward.register_fake
def _(dy: Tensor, p: Tensor, *others: Any) -> Tensor:
    return _vector(p, 2, p.shape[1])


@operation("mbconv_project_backward")
def project_backward(
    dy: Tensor,
    p: Tensor,
    drop_scale: Tensor | None,
    sums: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    d: Tensor,
    d_norm: Tensor,
    w: Tensor,
    w_reduce: Tensor,
    w_expand: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    dsilu_sums: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dA [B, C, H, W], q [B, C], Σ dz and Σ dz d̂ of the depthwise convolution's batch norm [2, C], dW [C_out, C] and
    dWr, dbr, dWe, dbe, all fp32 but dA. `sums` are those of `residual_add_backward`."""
    dy, p, d = L.nhwc(dy), L.nhwc(p), L.nhwc(d)
    norm = P.norm_vectors(mean, var, weight, bias, eps, sums, p.numel() // p.shape[1])
    da, partial = P.projection_dgrad(dy, p, w, norm, drop_scale, d, d_norm)
    dw = P.projection_wgrad(dy, p, norm, drop_scale, d, d_norm, gate)
    q, shares, *excite = E.excite_backward(partial, _area(d), w_reduce, w_expand, pooled, hidden, gate, dsilu_sums)
    assert shares is not None
    dw_reduce, db_reduce, dw_expand, db_expand = excite
    return da, q, sum_partials(shares), dw, dw_reduce, db_reduce, dw_expand, db_expand


@project_backward.register_fake
def _(
    dy: Tensor, p: Tensor, drop_scale: Tensor | None, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor,
    bias: Tensor, d: Tensor, d_norm: Tensor, w: Tensor, w_reduce: Tensor, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    images, channels = d.shape[:2]
    return (
        L.empty_image(d), _vector(d, images, channels), _vector(d, 2, channels), _vector(d, *w.shape),
        *fake_parameters(w_reduce),
    )  # fmt: skip


@operation("mbconv_depthwise_backward")
def depthwise_gradients(
    da: Tensor,
    d: Tensor,
    gate: Tensor,
    q: Tensor,
    sums: Tensor,
    out_mean: Tensor,
    out_var: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    e: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor,
    eps: float,
    stride: int,
    padding: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dA1 [B, C, H, W], the gradient of the expansion's activation (of E itself without a norm), dw fp32 and, with a
    norm, its Σ dz and Σ dz ê [2, C]."""
    out = OutNorm(L.nhwc(d), gate, q, sums, Norm(out_mean, out_var, out_weight, out_bias, eps))
    e = L.nhwc(e)
    g = _geometry(e, w, stride, padding)
    return depthwise_backward(L.nhwc(da), e, w, g, Norm(mean, var, weight, bias, eps), out)


@depthwise_gradients.register_fake
def _(
    da: Tensor, d: Tensor, gate: Tensor, q: Tensor, sums: Tensor, out_mean: Tensor, out_var: Tensor, out_weight: Tensor,
    out_bias: Tensor, e: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    w: Tensor, *others: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    k2 = w.shape[-1] ** 2
    sums_of_e = None if mean is None else _vector(e, k2 + 2, e.shape[1])[k2:]
    return L.empty_image(e), _vector(e, *w.shape), sums_of_e


@operation("mbconv_expand_backward")
def expand_backward(
    da: Tensor,
    e: Tensor,
    sums: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    w: Tensor,
    residual_gradient: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dx [B, C_in, H, W] and dW [C, C_in] fp32; da is dA1 and `sums` of `depthwise_gradients`."""
    da, e, x = L.nhwc(da), L.nhwc(e), L.nhwc(x)
    norm = P.norm_vectors(mean, var, weight, bias, eps, sums, e.numel() // e.shape[1])
    residual_gradient = None if residual_gradient is None else L.nhwc(residual_gradient)
    return P.expansion_backward(da, e, w, norm, x, residual_gradient)


@expand_backward.register_fake
def _(
    da: Tensor, e: Tensor, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, x: Tensor, w: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return L.empty_image(x), _vector(x, *w.shape)


@operation("mbconv_inference")
def inference(
    x: Tensor,
    expand: list[Tensor],
    depthwise_layer: list[Tensor],
    excite: list[Tensor],
    project: list[Tensor],
    stride: int,
    padding: str,
    residual: bool,
    eps: float,
) -> Tensor:
    """The block with the running statistics, the last norm folded into its convolution: y. A layer is (weight, norm
    weight, norm bias, mean, variance), `expand` empty for a block without; `excite` is (w_reduce, b_reduce, w_expand,
    b_expand)."""
    x = L.nhwc(x)
    e, norm1 = x, Norm()
    if expand:
        w1, g1, b1, mean1, var1 = expand
        e = P.gemm(x, w1.flatten(1))[0]
        norm1 = Norm(mean1, var1, g1, b1, eps)
    w, g2, b2, mean2, var2 = depthwise_layer
    d = depthwise(e, w, _geometry(e, w, stride, padding), norm1)[0]
    partial = squeeze(d, None, Norm(mean2, var2, g2, b2, eps))
    gate = E.excite(partial, _area(d), *excite)[2]
    w3, g3, b3, mean3, var3 = project
    norm2 = P.norm_vectors(mean2, var2, g2, b2, eps)
    bn_scale = g3 * torch.rsqrt(var3 + eps)
    return P.gemm(
        d, w3.flatten(1) * bn_scale[:, None], prologue="bn_silu_gate", epilogue="bias", vectors=norm2, gate=gate,
        other=x if residual else None, other_vectors=b3 - mean3 * bn_scale,
    )[0]  # fmt: skip


@inference.register_fake
def _(
    x: Tensor, expand: list[Tensor], depthwise_layer: list[Tensor], excite: list[Tensor], project: list[Tensor],
    stride: int, *others: Any,
) -> Tensor:  # fmt: skip
    return empty_nhwc(x, project[0].shape[0], L.cdiv(x.shape[2], stride), L.cdiv(x.shape[3], stride))


OPERATIONS = (
    expand, residual_expand, depthwise_forward, project, residual_add_backward, project_backward, depthwise_gradients,
    expand_backward, inference,
)  # fmt: skip
for _op in OPERATIONS:
    once_differentiable(_op, "mbconv")
