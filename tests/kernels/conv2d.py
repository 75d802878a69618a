"""The depthwise and the 1×1 convolution alone, as operations of PyTorch with gradients.

    depthwise    y[o, p] = Σ_{ky, kx} w[ky, kx] x[o s + ky - top, p s + kx - left]        w [C, 1, k, k]
    pointwise    y = x wᵀ over [B H W, C_in]                                              w [C_out, C_in, 1, 1]

They run the kernels of `kernels.block.depthwise`, `kernels.block.depthwise_backward` and `kernels.block.pointwise` with
nothing fused in; a block with its batch norms is `kernels.mbconv`. Saved for backward: x and w. Bytes as unfused
PyTorch moves them.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch as L
from kernels import reference
from kernels.block.depthwise import depthwise
from kernels.block.depthwise_backward import depthwise_backward
from kernels.block.pointwise_gemm import gemm
from kernels.block.pointwise_wgrad import wgrad
from kernels.block.strips import CONFIGURATIONS, Geometry, Padding, empty_nhwc, geometry
from kernels.operation import once_differentiable, operation


@operation("depthwise_conv2d")
def depthwise_conv2d_op(x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
    x = L.nhwc(x)
    return depthwise(x, weight, _geometry(x, weight, stride, padding))[0]


@operation("depthwise_conv2d_backward")
def depthwise_conv2d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: str
) -> tuple[Tensor, Tensor]:
    """dx and dweight."""
    dy, x = L.nhwc(dy), L.nhwc(x)
    return depthwise_backward(dy, x, weight, _geometry(x, weight, stride, padding))[:2]


def _geometry(x: Tensor, weight: Tensor, stride: int, padding: Any) -> Geometry:
    return geometry(x.shape[2], x.shape[3], weight.shape[2], stride, padding)


@depthwise_conv2d_op.register_fake
def _(x: Tensor, weight: Tensor, stride: int, padding: str) -> Tensor:
    g = _geometry(x, weight, stride, padding)
    return empty_nhwc(x, x.shape[1], g.out_height, g.out_width)


@depthwise_conv2d_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: str) -> tuple[Tensor, Tensor]:
    return empty_nhwc(x, *x.shape[1:]), weight.new_empty(weight.shape)


def _setup_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _backward_depthwise(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = depthwise_conv2d_backward_op(dy, x, weight, ctx.stride, ctx.padding)
    return dx, L.with_strides(dweight, weight.stride()), None, None


depthwise_conv2d_op.register_autograd(_backward_depthwise, setup_context=_setup_depthwise)
once_differentiable(depthwise_conv2d_backward_op, "depthwise_conv2d")


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: Padding = "symmetric", impl: L.Impl = "auto"
) -> Tensor:
    """Depthwise convolution of `x` [B, C, H, W] by `weight` [C, 1, k, k] fp32: [B, C, ⌈H / stride⌉, ⌈W / stride⌉] in
    the dtype of `x`.

    padding: "symmetric" is k // 2 on every side, "same" TF's, which puts an odd pixel right and below. On the Triton
    path sums are fp32, k is 3 or 5 and stride 1 or 2, and an `x` that is not channels_last is copied first. Raises
    ValueError or TypeError for a wrong shape, dtype, device or option, RuntimeError where `impl="triton"` cannot run.
    """
    k = weight.shape[-1] if weight.dim() else 0
    L.check(x, weight=(weight, (x.shape[1], 1, k, k) if x.dim() == 4 else ()))
    if (k, stride) not in CONFIGURATIONS:
        raise ValueError(f"a depthwise convolution has k 3 or 5 and stride 1 or 2, got k {k} and stride {stride!r}")
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be 'symmetric' or 'same', got {padding!r}")
    if L.resolve(impl, x) == "torch":
        return reference.depthwise_conv2d(x, weight, stride=stride, padding=padding)
    return depthwise_conv2d_op(x, weight, stride, padding)


@operation("pointwise_conv2d")
def pointwise_conv2d_op(x: Tensor, weight: Tensor) -> Tensor:
    return gemm(x, weight.flatten(1))[0]


@operation("pointwise_conv2d_backward")
def pointwise_conv2d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = gemm(dy, weight.flatten(1), dgrad=True)[0] if need_dx else None
    return dx, wgrad(dy, x).view(weight.shape) if need_dweight else None


@pointwise_conv2d_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return empty_nhwc(x, weight.shape[0], *x.shape[2:])


@pointwise_conv2d_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool) -> tuple[Tensor | None, Tensor | None]:
    return L.empty_image(x) if need_dx else None, x.new_empty(
        weight.shape, dtype=torch.float32
    ) if need_dweight else None


def _setup_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_pointwise(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = pointwise_conv2d_backward_op(dy, x, weight, *ctx.needs_input_grad)
    return dx, None if dweight is None else L.with_strides(dweight, weight.stride())


pointwise_conv2d_op.register_autograd(_backward_pointwise, setup_context=_setup_pointwise)
once_differentiable(pointwise_conv2d_backward_op, "pointwise_conv2d")


def pointwise_conv2d(x: Tensor, weight: Tensor, *, impl: L.Impl = "auto") -> Tensor:
    """`conv2d(x, weight)` for x [B, C_in, H, W] and an fp32 weight [C_out, C_in, 1, 1], in the dtype of x.

    On the Triton path an `x` that is not channels_last is copied first. Raises ValueError or TypeError for a wrong
    shape, dtype or device, RuntimeError where `impl="triton"` cannot run.
    """
    if weight.dim() != 4 or weight.shape[2:] != (1, 1) or weight.shape[0] == 0:
        raise ValueError(f"weight must be [C_out, C_in, 1, 1], got shape {tuple(weight.shape)}")
    L.check(x, weight=(weight, (weight.shape[0], x.shape[1] if x.dim() == 4 else 0, 1, 1)))
    if L.resolve(impl, x) == "torch":
        return F.conv2d(x, weight.to(x.dtype)).to(x.dtype)
    return pointwise_conv2d_op(x, weight)
