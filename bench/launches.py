"""The steps of a fused block's schedule (F1 to B7 of `kernels.mbconv`), each by itself: our launches, the same job in
PyTorch, and the bare product or convolution inside it as cuBLAS or cuDNN runs it.

The same job takes the same tensors and gives the same results, so whichever is fastest could stand in for the others.
The library call is less than the job: no batch norm, SiLU, gate, sums or statistics go with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet.forms import block_name
from kernels.batch_norm import sum_partials
from kernels.block import pointwise
from kernels.block.depthwise import depthwise, merge_stats
from kernels.block.depthwise_backward import depthwise_backward
from kernels.block.pointwise_blocks import plan
from kernels.block.strips import geometry
from kernels.block.traffic import Block
from kernels.device import gpu
from kernels.ops.drop_connect import reduce_sums, residual_add
from kernels.ops.excite import excite, excite_backward
from kernels.ops.squeeze_excite import image_plan, squeeze
from kernels.vectors import Norm, OutNorm

EPS = 1e-3
Results = tuple[Tensor, ...]


class Launch(NamedTuple):
    """`ours()` and `job(*arguments)` give the same results, but that ours leaves sums [K, B, C] in parts [K, B, P, C]
    where the next launch adds them up; `library` is cuBLAS or cuDNN on the same matrices."""

    ours: Callable[[], tuple[Tensor | None, ...]]
    job: Callable[..., Results]
    arguments: tuple[Any, ...]
    library: Callable[[], object] | None = None


def describe(block: Block) -> str:
    key = block_name(
        block.in_channels, block.channels, block.out_channels, block.kernel_size, block.stride, block.height
    )
    return f"{key}, batch {block.images}"


class Vectors(NamedTuple):
    """A batch norm as its input's gradient needs it, [C] each; `sums` [2, C] are Σ dz and Σ dz x̂."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    sums: Tensor

    @property
    def norm(self) -> Norm:
        return Norm(*self[:4], EPS)

    def norm_vectors(self, rows: int = 0) -> Tensor:
        """As the 1×1 convolutions take them; for the gradients' prologues with the number of rows."""
        return pointwise.norm_vectors(*self[:4], EPS, self.sums if rows else None, rows)


def matrix(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as [B H W, C]; no copy."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def image(m: Tensor, like: Tensor) -> Tensor:
    return m.view(like.shape[0], *like.shape[2:], m.shape[1]).permute(0, 3, 1, 2)


def pixels(v: Tensor) -> Tensor:
    """[C] or [B, C] for every pixel."""
    return v[..., None, None]


def statistics(y: Tensor) -> Results:
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return mean, var


def normalised(x: Tensor, v: Vectors) -> Tensor:
    return F.batch_norm(x, v.mean, v.var, v.weight, v.bias, False, 0.0, EPS)


def hat(x: Tensor, v: Vectors) -> Tensor:
    return (x - pixels(v.mean)) * pixels((v.var + EPS).rsqrt())


def dsilu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def through_norm(dz: Tensor, x: Tensor, v: Vectors) -> Tensor:
    """Gradient of the batch norm's input, in the dtype of x."""
    rows = x.numel() // x.shape[1]
    inner = dz - (pixels(v.sums[0]) + hat(x, v) * pixels(v.sums[1])) / rows
    return (inner * pixels(v.weight * (v.var + EPS).rsqrt())).to(x.dtype)


def scaled(dy: Tensor, drop_scale: Tensor | None) -> Tensor:
    return dy if drop_scale is None else dy * drop_scale[:, None, None, None]


def convolve(e: Tensor, w2: Tensor, stride: int) -> Tensor:
    return F.conv2d(e, w2.to(e.dtype), None, stride, w2.shape[-1] // 2, 1, e.shape[1])


def convolve_backward(dd: Tensor, e: Tensor, w2: Tensor, stride: int) -> Results:
    pad = w2.shape[-1] // 2
    found = torch.ops.aten.convolution_backward(
        dd, e, w2.to(e.dtype), None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], e.shape[1], [True, True, False]
    )
    return found[0], found[1]


# The jobs. Each returns what our launches return, in the same order.
def expand_job(x: Tensor, w: Tensor) -> Results:
    y = image(matrix(x) @ w.t(), x)
    return y, *statistics(y)


def depthwise_job(e: Tensor, v: Vectors | None, w2: Tensor, stride: int) -> Results:
    d = convolve(e if v is None else F.silu(normalised(e, v)), w2, stride)
    return d, *statistics(d)


def squeeze_job(d: Tensor, v: Vectors) -> Results:
    z = normalised(d, v)
    slopes = dsilu(z)
    return (torch.stack((F.silu(z).sum((2, 3)), slopes.sum((2, 3)), (slopes * hat(d, v)).sum((2, 3)))),)


def excite_job(partial: Tensor, area: int, wr: Tensor, br: Tensor, we: Tensor, be: Tensor) -> Results:
    sums = partial.sum(2)
    pooled = sums[0] / area
    hidden = F.linear(pooled, wr, br)
    return pooled, hidden, torch.sigmoid(F.linear(F.silu(hidden), we, be)), sums[1:]


def project_job(d: Tensor, v: Vectors, gate: Tensor, w: Tensor) -> Results:
    a = F.silu(normalised(d, v)) * pixels(gate).to(d.dtype)
    y = image(matrix(a) @ w.t(), a)
    return y, *statistics(y)


def residual_add_job(p: Tensor, v: Vectors, x: Tensor | None, drop_scale: Tensor | None) -> Results:
    y = scaled(normalised(p, v), drop_scale)
    return ((y if x is None else y + x).to(p.dtype),)


def residual_add_backward_job(dy: Tensor, p: Tensor, v: Vectors, drop_scale: Tensor | None) -> Results:
    dz = scaled(dy, drop_scale)
    return (torch.stack((dz.sum((0, 2, 3)), (dz * hat(p, v)).sum((0, 2, 3)))),)


def project_dgrad_job(
    dy: Tensor, p: Tensor, v: Vectors, drop_scale: Tensor | None, w: Tensor, d: Tensor, dv: Vectors
) -> Results:
    da = image(matrix(through_norm(scaled(dy, drop_scale), p, v)) @ w, d)
    z = normalised(d, dv)
    along = da * dsilu(z)
    return da, torch.stack(((da * F.silu(z)).sum((2, 3)), along.sum((2, 3)), (along * hat(d, dv)).sum((2, 3))))


def project_wgrad_job(
    dy: Tensor, p: Tensor, v: Vectors, drop_scale: Tensor | None, d: Tensor, dv: Vectors, gate: Tensor
) -> Results:
    a = F.silu(normalised(d, dv)) * pixels(gate).to(d.dtype)
    return (matrix(through_norm(scaled(dy, drop_scale), p, v)).t() @ matrix(a),)


def excite_backward_job(
    partial: Tensor, area: int, wr: Tensor, we: Tensor, pooled: Tensor, hidden: Tensor, gate: Tensor, dsilu_sums: Tensor
) -> Results:
    sums = partial.sum(2)
    du = sums[0] * gate * (1 - gate)
    dv = (du @ we) * dsilu(hidden)
    q = dv @ wr / area
    shares = gate * sums[1:] + q * dsilu_sums
    return q, shares, dv.t() @ pooled, dv.sum(0), du.t() @ F.silu(hidden), du.sum(0)


def combine_job(shares: Tensor) -> Results:
    return (shares.sum(1),)


def depthwise_backward_job(
    da: Tensor, d: Tensor, dv: Vectors, gate: Tensor, q: Tensor, e: Tensor, v: Vectors | None, w2: Tensor, stride: int
) -> Results:
    dz = (pixels(gate) * da + pixels(q)) * dsilu(normalised(d, dv))
    dd = through_norm(dz, d, dv)
    if v is None:
        return convolve_backward(dd, e, w2, stride)
    z = normalised(e, v)
    da1, dw2 = convolve_backward(dd, F.silu(z), w2, stride)
    dz1 = da1 * dsilu(z)
    return da1, dw2, torch.stack((dz1.sum((0, 2, 3)), (dz1 * hat(e, v)).sum((0, 2, 3))))


def expand_backward_job(da1: Tensor, e: Tensor, v: Vectors, w: Tensor, x: Tensor, dy: Tensor | None) -> Results:
    de = matrix(through_norm(da1 * dsilu(normalised(e, v)), e, v))
    dx = image(de @ w, e)
    return dx if dy is None else dx + dy, de.t() @ matrix(x)


def schedule(block: Block, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[tuple[str, Launch]]:
    """Every step of the block on random tensors, named and ordered as in `kernels.block.traffic`.

    A step's inputs are what the steps before give, by PyTorch; only symmetric padding.
    """
    assert block.padding == "symmetric"
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*size: int, spread: float = 1.0, centre: float = 0.0) -> Tensor:
        return centre + spread * torch.randn(size, generator=generator, device=device)

    def pixel_map(channels: int, height: int, width: int) -> Tensor:
        return normal(block.images, channels, height, width).to(dtype, memory_format=torch.channels_last)

    def vectors(mean: Tensor, var: Tensor) -> Vectors:
        c = mean.shape[0]
        weight, bias = normal(c, spread=0.1, centre=1.0), normal(c, spread=0.1)
        return Vectors(mean.float(), var.float(), weight, bias, normal(2, c))

    c, c_in, out, s, k = block.channels, block.in_channels, block.out_channels, block.squeezed, block.kernel_size
    g = geometry(block.height, block.width, k, block.stride)
    x = pixel_map(c_in, block.height, block.width)
    w1, w3 = normal(c, c_in, spread=c_in**-0.5).to(dtype), normal(out, c, spread=c**-0.5).to(dtype)
    w2 = normal(c, 1, k, k, spread=1 / k)
    wr, br, we, be = normal(s, c, spread=c**-0.5), normal(s), normal(c, s, spread=s**-0.5), normal(c)
    drop_scale = (normal(block.images) > -0.8).float() / 0.8 if block.scaled else None
    area, out_rows = g.out_height * g.out_width, block.images * g.out_height * g.out_width

    def parts(sums: Tensor, count: int) -> Tensor:
        """[K, B, C] as `count` parts [K, B, count, C]."""
        return sums.float()[:, :, None].expand(-1, -1, count, -1).div(count).contiguous()

    e, v1 = x, None
    if block.expands:
        yield "F1 expand", Launch(lambda: pointwise.forward(x, w1), expand_job, (x, w1), lambda: matrix(x) @ w1.t())
        e, *found = expand_job(x, w1)
        v1 = vectors(*found)
    norm1 = Norm() if v1 is None else v1.norm

    def depthwise_launch() -> Results:
        y, partial, counts = depthwise(e, w2, g, norm1, stats=True)
        assert partial is not None
        assert counts is not None
        return y, *merge_stats(partial, counts)

    forward: tuple[Any, ...] = (e, v1, w2, block.stride)
    stored_w2 = w2.to(dtype)
    yield (
        "F2 depthwise",
        Launch(depthwise_launch, depthwise_job, forward, lambda: convolve(e, stored_w2, block.stride)),
    )
    d, *found = depthwise_job(*forward)
    v2 = vectors(*found)
    yield "F3 squeeze", Launch(lambda: (squeeze(d, None, v2.norm),), squeeze_job, (d, v2))
    pooling = (parts(squeeze_job(d, v2)[0], image_plan(d.shape, gpu(device))[3]), area, wr, br, we, be)
    yield "F4 excite", Launch(lambda: excite(*pooling), excite_job, pooling)
    pooled, hidden, gate, dsilu_sums = excite_job(*pooling)
    yield "F5 project", Launch(
        lambda: pointwise.forward(d, w3, v2.norm_vectors(), gate),
        project_job, (d, v2, gate, w3), lambda: matrix(d) @ w3.t(),
    )  # fmt: skip
    p, *found = project_job(d, v2, gate, w3)
    v3 = vectors(*found)
    residual = x if block.residual else None
    yield (
        "F6 residual add",
        Launch(
            lambda: (residual_add(p, residual, drop_scale, v3[:4], EPS),),
            residual_add_job,
            (p, v3, residual, drop_scale),
        ),
    )
    dy = pixel_map(out, g.out_height, g.out_width)
    yield (
        "B1 residual add backward",
        Launch(
            lambda: (reduce_sums(dy, p, drop_scale, v3.mean, v3.var, EPS),),
            residual_add_backward_job,
            (dy, p, v3, drop_scale),
        ),
    )
    # Vectors that an earlier launch of the block has made.
    saved2, saved3 = functools.cache(v2.norm_vectors), functools.cache(lambda: v3.norm_vectors(out_rows))
    dgrad = (dy, p, v3, drop_scale, w3, d, v2)
    yield "B2 project dgrad", Launch(
        lambda: pointwise.projection_dgrad(dy, p, w3, v3.norm_vectors(out_rows), drop_scale, d, saved2()),
        project_dgrad_job, dgrad, lambda: matrix(dy) @ w3,
    )  # fmt: skip
    da, gate_sums = project_dgrad_job(*dgrad)
    yield "B2 project wgrad", Launch(
        lambda: (pointwise.projection_wgrad(dy, p, saved3(), drop_scale, d, saved2(), gate),),
        project_wgrad_job, (dy, p, v3, drop_scale, d, v2, gate), lambda: matrix(dy).t() @ matrix(d),
    )  # fmt: skip
    chunks = plan(p.shape, out, c, "bn_grad", "gate_sums", dtype, gpu(device)).parts
    exciting = (parts(gate_sums, chunks), area, wr, we, pooled, hidden, gate, dsilu_sums.contiguous())
    yield "B3 excite backward", Launch(lambda: excite_backward(*exciting), excite_backward_job, exciting)
    q, shares = excite_backward_job(*exciting)[:2]
    yield "B4 combine", Launch(lambda: (sum_partials(shares),), combine_job, (shares,))

    def depthwise_backward_launch() -> Results:
        da1, dw2, sums1 = depthwise_backward(da, e, w2, g, norm1, OutNorm(d, gate, q, v2.sums, v2.norm))
        return (da1, dw2) if sums1 is None else (da1, dw2, sums1)

    backward: tuple[Any, ...] = (da, d, v2, gate, q, e, v1, w2, block.stride)
    yield "B5 depthwise backward", Launch(
        depthwise_backward_launch, depthwise_backward_job, backward,
        lambda: convolve_backward(da, e, stored_w2, block.stride),
    )  # fmt: skip
    if v1 is None:
        return
    v, da1 = v1, depthwise_backward_job(*backward)[0]
    rows = block.images * block.height * block.width
    out_gradient = dy if block.residual else None
    yield "B7 expand backward", Launch(
        lambda: pointwise.expansion_backward(da1, e, w1, v.norm_vectors(rows), x, out_gradient),
        expand_backward_job, (da1, e, v, w1, x, out_gradient), lambda: (matrix(da1) @ w1, matrix(da1).t() @ matrix(x)),
    )  # fmt: skip
