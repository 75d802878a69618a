"""The same operations in plain PyTorch: the oracle in fp64, and what runs wherever Triton does not.

Nothing here is shared with the Triton kernels. Parameters are fp32 (fp64 for the oracle), `x` may be of lower
precision; every function returns `x.dtype`. In autocast the two SE products run in the autocast dtype, as
`F.linear` does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import sync
from kernels.vectors import ConvNorm, Excite


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float,
    group: str,
) -> Tensor:  # fmt: skip
    if training and group:
        return sync.batch_norm(x, mean, var, weight, bias, momentum, eps, group)
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def squeeze_excite(x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor) -> Tensor:
    """`x * sigmoid(w_expand @ silu(w_reduce @ mean(x) + b_reduce) + b_expand)`; Hu et al. 2018, eq. 2–4."""
    pooled = x.mean((2, 3), dtype=w_reduce.dtype)
    hidden = F.silu(F.linear(pooled, w_reduce, b_reduce))
    gate = torch.sigmoid(F.linear(hidden, w_expand, b_expand))
    return x * gate.to(x.dtype)[:, :, None, None]


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
) -> Tensor:
    """`silu(batch_norm(x))`; in training the running statistics are updated in place as `nn.BatchNorm2d` does."""
    z = _batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, group)
    return F.silu(z, inplace=not z.requires_grad)  # in place costs autograd a clone; without autograd it saves a tensor


def bn_silu_squeeze_excite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    group: str = "",
) -> Tensor:
    """`squeeze_excite(bn_silu(x))`."""
    a = bn_silu(x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, group=group)
    return squeeze_excite(a, w_reduce, b_reduce, w_expand, b_expand)


def drop_connect_add(x: Tensor, residual: Tensor, drop_scale: Tensor | None) -> Tensor:
    """`residual + drop_scale[b] * x`; Huang et al. 2016, mask and 1/survival factor both in `drop_scale`."""
    if drop_scale is None:
        return x + residual
    return x * drop_scale.to(x.dtype)[:, None, None, None] + residual


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
) -> Tensor:
    """`residual + drop_scale[b] * batch_norm(x)`; a missing residual is zero and a missing drop_scale is one."""
    z = _batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, group)
    if residual is not None:
        return drop_connect_add(z, residual, drop_scale)
    return z if drop_scale is None else z * drop_scale.to(z.dtype)[:, None, None, None]


def depthwise_conv2d(x: Tensor, weight: Tensor, *, stride: int, padding: str) -> Tensor:
    """Depthwise convolution by `weight` [C, 1, k, k], padded symmetrically or as TF's "SAME"."""
    k = weight.shape[-1]
    pads = k // 2
    if padding == "same":
        rows, columns = (max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        pads = 0
    return F.conv2d(x, weight.to(x.dtype), None, stride, pads, 1, x.shape[1])


def mbconv(
    x: Tensor,
    expand: ConvNorm | None,
    depthwise: ConvNorm,
    excite: Excite,
    project: ConvNorm,
    drop_scale: Tensor | None,
    *,
    stride: int,
    padding: str,
    residual: bool,
    training: bool,
    momentum: float,
    eps: float,
    group: str = "",
) -> Tensor:
    """Tan & Le 2019, section 4 (MBConv of Sandler et al. 2018 with squeeze-and-excitation), convolution by
    convolution."""
    norm: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "group": group}
    a = x
    if expand is not None:
        a = bn_silu(F.conv2d(x, expand.weight.to(x.dtype)), *expand[1:], **norm)
    d = depthwise_conv2d(a, depthwise.weight, stride=stride, padding=padding)
    a = bn_silu_squeeze_excite(d, *depthwise[1:], *excite, **norm)
    p = F.conv2d(a, project.weight.to(a.dtype))
    return bn_drop_connect_add(p, x if residual else None, drop_scale, *project[1:], **norm)
