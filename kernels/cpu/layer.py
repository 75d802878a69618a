"""silu(batch_norm(convolution(x))) on a CPU in training: stem and head, as the blocks' operations do it.

    forward     s = conv(x) and its statistics, one pass; y = silu(norm(s))
    backward    dy, s → du = dy σ'(z), Σ du, Σ du ŝ;  du, s, x → dw (and dx for a 1 x 1 convolution)

s is kept, and neither the normalised tensor nor what the windows hold is ever in memory. A 1 x 1 convolution is
`ops.expand`. Statistics and sums are where several processes exchange (`kernels.sync`). A larger convolution has no
gradient of its input, which is an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import launch as L
from kernels.block.strips import empty_nhwc, geometry
from kernels.cpu import ops
from kernels.cpu.calls import as_flat, as_image, as_vectors, declare
from kernels.cpu.library import library
from kernels.sync import all_gather_stats, all_reduce_sums
from kernels.vectors import ConvNorm


def convolve(x: Tensor, w: Tensor, k: int, stride: int, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """s [B, C, H, W] of w [C, k k C_in], whose columns are windows as they lie in memory, and its mean and variance."""
    x = as_image("x", x)
    channels, c_in = w.shape[0], x.shape[1]
    w = as_flat("w", w, channels, k * k * c_in, dtype=x.dtype)
    sizes, out = _windows(x, k, stride, padding)
    s = empty_nhwc(x, channels, *out)
    mean, var = L.empty((channels,), x), L.empty((channels,), x)
    library().call("convolve", x.dtype, *sizes, channels, x, w, s, mean, var)
    return s, mean, var


def activate(s: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(norm(s))."""
    s, channels = as_image("s", s), s.shape[1]
    y = L.empty_image(s)
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    library().call("activate", s.dtype, s.numel() // channels, channels, s, *vectors, eps, y)
    return y


def activate_backward(
    dy: Tensor, s: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dy σ'(z) in the shape of s, and its Σ and Σ · ŝ, [2, C]."""
    s, channels = as_image("s", s), s.shape[1]
    dy = as_image("dy", dy, *s.shape, dtype=s.dtype)
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    du, sums = L.empty_image(s), L.empty((2, channels), s)
    library().call("activate_backward", s.dtype, s.numel() // channels, channels, dy, s, *vectors, eps, du, sums)
    return du, sums


def convolve_backward(
    du: Tensor, s: Tensor, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, x: Tensor, k: int,
    stride: int, padding: str, eps: float,
) -> Tensor:  # fmt: skip
    """dw [C, k k C_in] fp32."""
    x, s = as_image("x", x), as_image("s", s)
    channels, c_in = s.shape[1], x.shape[1]
    sizes, out = _windows(x, k, stride, padding)
    s = as_image("s", s, x.shape[0], channels, *out, dtype=x.dtype)
    du = as_image("du", du, *s.shape, dtype=x.dtype)
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    dw = L.empty((channels, k * k * c_in), x)
    sums = as_flat("sums", sums, 2, channels)
    library().call("convolve_backward", x.dtype, *sizes, channels, x, du, s, sums, *vectors, eps, dw)
    return dw


def _windows(x: Tensor, k: int, stride: int, padding: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    g = geometry(x.shape[2], x.shape[3], k, stride, padding)
    sizes = (*x.shape[:2], g.height, g.width, g.out_height, g.out_width, g.pad_top, g.pad_left, k, stride)
    return sizes, (g.out_height, g.out_width)


def _fake_convolve(x: Tensor, w: Tensor, k: int, stride: int, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    _, out = _windows(x, k, stride, padding)
    return empty_nhwc(x, w.shape[0], *out), L.empty((w.shape[0],), x), L.empty((w.shape[0],), x)


convolve = declare("convolve", convolve, _fake_convolve)
activate = declare("activate", activate, lambda s, *others: L.empty_image(s))
activate_backward = declare(
    "activate_backward", activate_backward, lambda dy, s, *others: (L.empty_image(s), L.empty((2, s.shape[1]), s))
)
convolve_backward = declare(
    "convolve_backward", convolve_backward,
    lambda du, s, sums, mean, var, weight, bias, x, k, *others: L.empty((s.shape[1], k * k * x.shape[1]), s),
)  # fmt: skip


class _ConvBnSilu(torch.autograd.Function):
    """y, and the statistics (mean, var), with a `group` also the rows of all ranks; they are not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: str, eps: float, group: str
    ) -> tuple[Tensor, ...]:
        k = w.shape[-1]
        stored = w.to(x.dtype).permute(0, 2, 3, 1).flatten(1)
        s, mean, var = ops.expand(x, stored) if k == 1 else convolve(x, stored, k, stride, padding)
        mean, var, rows = all_gather_stats(mean, var, _rows(s), group)
        y = activate(s, mean, var, weight, bias, eps)
        ctx.save_for_backward(x, s, mean, var, weight, bias, stored if k == 1 else None)
        ctx.options = k, stride, padding, eps, group, w.shape, w.stride()
        others = [mean, var] if isinstance(rows, int) else [mean, var, rows]
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return y, *others

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, s, mean, var, weight, bias, stored = ctx.saved_tensors
        k, stride, padding, eps, group, shape, strides = ctx.options
        norm = mean, var, weight, bias
        du, sums = activate_backward(dy, s, *norm, eps)
        joint = all_reduce_sums(sums, _rows(s), group)
        dx = None
        if k == 1:
            dx, dw = ops.expand_backward(du, s, joint, *norm, x, stored, None, eps)
        else:
            dw = convolve_backward(du, s, joint, *norm, x, k, stride, padding, eps)
        dw = dw.view(shape[0], k, k, shape[1]).permute(0, 3, 1, 2)
        return dx, L.with_strides(dw, strides), sums[1], sums[0], None, None, None, None


def conv_bn_silu(
    x: Tensor, layer: ConvNorm, *, stride: int, padding: str, momentum: float, eps: float, group: str = ""
) -> Tensor:
    """silu(batch_norm(conv(x))) in training: x [B, C_in, H, W] → [B, C, ⌈H / stride⌉, ⌈W / stride⌉] in the dtype of x,
    or autocast's; moves the running statistics. x gets a gradient where the convolution is 1 x 1 with stride 1.

    Raises ValueError or TypeError for shapes and dtypes that don't fit, and for a gradient that isn't there.
    """
    k = layer.weight.shape[-1]
    if k == 1 and stride != 1:
        raise ValueError(f"a 1 x 1 convolution has stride 1 here, got {stride}")
    if k > 1 and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"a {k} x {k} convolution has no gradient of its input here: pass impl='torch'")
    if x.shape[0] * L.cdiv(x.shape[2], stride) * L.cdiv(x.shape[3], stride) == 1:
        raise ValueError(f"batch statistics need more than one value per channel, got x of shape {tuple(x.shape)}")
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype("cpu"))
    options = stride, padding, eps, group
    y, mean, var, *joint = _ConvBnSilu.apply(x, layer.weight, layer.norm_weight, layer.norm_bias, *options)
    rows = joint[0] if joint else _rows(y)
    with torch.no_grad():
        running = [layer.running_mean, layer.running_var]
        torch._foreach_lerp_(running, [mean, var * (rows / (rows - 1))], momentum)
    return y


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]
