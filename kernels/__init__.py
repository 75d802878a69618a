"""Fused operations around the convolutions of MBConv, forward and backward, each with a plain-PyTorch twin.

Every function takes `impl`: "auto" runs Triton where `x` is on CUDA and PyTorch elsewhere, "triton" never falls
back, "torch" is `kernels.reference`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kernels import reference

Impl = Literal["auto", "triton", "torch"]

__all__ = [
    "bn_drop_connect_add",
    "bn_silu",
    "bn_silu_squeeze_excite",
    "drop_connect_add",
    "squeeze_excite",
]


def squeeze_excite(
    x: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    return reference.squeeze_excite(x, w_reduce, b_reduce, w_expand, b_expand)


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
    impl: Impl = "auto",
) -> Tensor:
    return reference.bn_silu(
        x, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps
    )


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
    impl: Impl = "auto",
) -> Tensor:
    return reference.bn_silu_squeeze_excite(
        x, weight, bias, running_mean, running_var, w_reduce, b_reduce, w_expand, b_expand,
        training=training, momentum=momentum, eps=eps,
    )  # fmt: skip


def drop_connect_add(x: Tensor, residual: Tensor, scale: Tensor | None, *, impl: Impl = "auto") -> Tensor:
    return reference.drop_connect_add(x, residual, scale)


def bn_drop_connect_add(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    impl: Impl = "auto",
) -> Tensor:
    return reference.bn_drop_connect_add(
        x, residual, scale, weight, bias, running_mean, running_var,
        training=training, momentum=momentum, eps=eps,
    )  # fmt: skip
