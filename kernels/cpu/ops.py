"""The operations of a training-mode MBConv on a CPU: `kernels.block.mbconv_ops` in C++, with the same signatures.

What is different: `depthwise_gradients` returns dA1 σ'(z1), which it has in cache, where the Triton form returns dA1
and `expand_backward` computes σ' again; without an expansion both return E's gradient. dgrad and wgrad of a convolution
(the halves of B2 and of B7) are one pass. B7 could go into B5 but for the exchange of BN1's sums between them: with
W1ᵀ diag W1 and xᵀ x the sums' part can be added later, which pays only where x has few channels.

Sums are cut by shape, so every result has the same bits for any number of threads. No two threads write the same
bytes: a task owns its rows, or its images and channels, of the output and a row of the partial sums; scratch is a
thread's own (`Call::per_thread`); what one loop of a parallel region writes the next reads behind its barrier, and
partial sums are added up in their order by whoever owns the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels import launch as L
from kernels.block import mbconv_ops
from kernels.block.strips import Geometry, empty_nhwc, geometry
from kernels.cpu.calls import as_flat, as_image, as_optional, as_vectors, declare
from kernels.cpu.library import library


def _geometry(e: Tensor, w: Tensor, stride: int, padding: Any) -> Geometry:
    k = w.shape[-1]
    if (k, stride) not in ((3, 1), (3, 2), (5, 1), (5, 2)) or padding not in ("symmetric", "same"):
        raise ValueError(f"k must be 3 or 5 and stride 1 or 2, got k {k}, stride {stride} and padding {padding!r}")
    return geometry(e.shape[2], e.shape[3], k, stride, padding)


def _map(e: Tensor, g: Geometry) -> tuple[int, ...]:
    sizes = g.height, g.width, g.out_height, g.out_width, g.pad_top, g.pad_left, g.kernel_size, g.stride
    return (*e.shape[:2], *sizes)


def _area(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def expand(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = as_image("x", x)
    channels, c_in = w.shape[0], x.shape[1]
    w = as_flat("w", w, channels, c_in, dtype=x.dtype)
    e = empty_nhwc(x, channels, *x.shape[2:])
    mean, var = L.empty((channels,), x), L.empty((channels,), x)
    library().call("expand", x.dtype, x.shape[0] * _area(x), c_in, channels, x, w, e, mean, var)
    return e, mean, var


def residual_expand(
    p: Tensor, residual: Tensor | None, drop_scale: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor,
    bias: Tensor, w: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = as_image("p", p)
    (images, c_in), channels = p.shape[:2], w.shape[0]
    residual = as_optional("residual", residual, *p.shape, dtype=p.dtype)
    vectors = as_vectors(images, drop_scale=drop_scale) + as_vectors(c_in, mean=mean, var=var, weight=weight, bias=bias)
    w = as_flat("w", w, channels, c_in, dtype=p.dtype)
    x, e = L.empty_image(p), empty_nhwc(p, channels, *p.shape[2:])
    e_mean, e_var = L.empty((channels,), p), L.empty((channels,), p)
    library().call(
        "residual_expand", p.dtype, images, _area(p), c_in, channels, p, residual, *vectors, eps, w, x, e, e_mean, e_var
    )
    return x, e, e_mean, e_var


def residual_add(
    p: Tensor, residual: Tensor | None, drop_scale: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor,
    bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """y = drop_scale[b] BN3(p) (+ residual): F6 alone, for a block whose output the next one does not make."""
    p = as_image("p", p)
    images, channels = p.shape[:2]
    residual = as_optional("residual", residual, *p.shape, dtype=p.dtype)
    vectors = as_vectors(images, drop_scale=drop_scale) + as_vectors(
        channels, mean=mean, var=var, weight=weight, bias=bias
    )
    y = L.empty_image(p)
    library().call("residual_add", p.dtype, images, _area(p), channels, p, residual, *vectors, eps, y)
    return y


def depthwise_forward(
    e: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, w: Tensor,
    eps: float, stride: int, padding: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    e = as_image("e", e)
    g, channels = _geometry(e, w, stride, padding), e.shape[1]
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    w = as_flat("w", w, channels, 1, g.kernel_size, g.kernel_size)
    d = empty_nhwc(e, channels, g.out_height, g.out_width)
    d_mean, d_var = L.empty((channels,), e), L.empty((channels,), e)
    library().call("depthwise", e.dtype, *_map(e, g), e, *vectors, w, eps, d, d_mean, d_var)
    return d, d_mean, d_var


def project(
    d: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, b_reduce: Tensor,
    w_expand: Tensor, b_expand: Tensor, w: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d = as_image("d", d)
    (images, channels), out, squeezed = d.shape[:2], w.shape[0], w_reduce.shape[0]
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    w_reduce, w_expand = (
        as_flat("w_reduce", w_reduce, squeezed, channels),
        as_flat("w_expand", w_expand, channels, squeezed),
    )
    b_reduce, b_expand = as_flat("b_reduce", b_reduce, squeezed), as_flat("b_expand", b_expand, channels)
    w = as_flat("w", w, out, channels, dtype=d.dtype)
    p = empty_nhwc(d, out, *d.shape[2:])
    shapes = (out,), (out,), (4, channels), (images, channels), (images, squeezed), (images, channels)
    found = [L.empty(shape, d) for shape in (*shapes, (2, images, channels))]
    library().call(
        "project", d.dtype, images, _area(d), channels, out, squeezed, d, *vectors, w_reduce, b_reduce, w_expand,
        b_expand, w, eps, p, *found,
    )  # fmt: skip
    p_mean, p_var, d_norm, pooled, hidden, gate, dsilu_sums = found
    return p, p_mean, p_var, d_norm, pooled, hidden, gate, dsilu_sums


def residual_add_backward(
    dy: Tensor, p: Tensor, drop_scale: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    p = as_image("p", p)
    dy = as_image("dy", dy, *p.shape, dtype=p.dtype)
    images, channels = p.shape[:2]
    vectors = as_vectors(images, drop_scale=drop_scale) + as_vectors(channels, mean=mean, var=var)
    sums = L.empty((2, channels), p)
    library().call("residual_add_backward", p.dtype, images, _area(p), channels, dy, p, *vectors, eps, sums)
    return sums


def project_backward(
    dy: Tensor, p: Tensor, drop_scale: Tensor | None, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor,
    bias: Tensor, d: Tensor, d_norm: Tensor, w: Tensor, w_reduce: Tensor, w_expand: Tensor, pooled: Tensor,
    hidden: Tensor, gate: Tensor, dsilu_sums: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d = as_image("d", d)
    (images, channels), out, squeezed = d.shape[:2], w.shape[0], w_reduce.shape[0]
    p = as_image("p", p, images, out, *d.shape[2:], dtype=d.dtype)
    dy = as_image("dy", dy, *p.shape, dtype=d.dtype)
    arguments = [
        *as_vectors(images, drop_scale=drop_scale), as_flat("sums", sums, 2, out),
        *as_vectors(out, mean=mean, var=var, weight=weight, bias=bias), d, as_flat("d_norm", d_norm, 4, channels),
        as_flat("w", w, out, channels, dtype=d.dtype), as_flat("w_reduce", w_reduce, squeezed, channels),
        as_flat("w_expand", w_expand, channels, squeezed), as_flat("pooled", pooled, images, channels),
        as_flat("hidden", hidden, images, squeezed), as_flat("gate", gate, images, channels),
        as_flat("dsilu_sums", dsilu_sums, 2, images, channels),
    ]  # fmt: skip
    da = L.empty_image(d)
    shapes = (images, channels), (2, channels), (out, channels), (squeezed, channels), (squeezed,)
    found = [L.empty(shape, d) for shape in (*shapes, (channels, squeezed), (channels,))]
    library().call(
        "project_backward", d.dtype, images, _area(d), channels, out, squeezed, dy, p, *arguments, eps, da, *found
    )
    q, d_sums, dw, dw_reduce, db_reduce, dw_expand, db_expand = found
    return da, q, d_sums, dw, dw_reduce, db_reduce, dw_expand, db_expand


def depthwise_gradients(
    da: Tensor, d: Tensor, gate: Tensor, q: Tensor, sums: Tensor, out_mean: Tensor, out_var: Tensor, out_weight: Tensor,
    out_bias: Tensor, e: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    w: Tensor, eps: float, stride: int, padding: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dA1 σ'(z1) [B, C, H, W] (without a norm E's gradient), dw fp32 and, with a norm, its Σ dz, Σ dz ê [2, C]."""
    e = as_image("e", e)
    g, (images, channels) = _geometry(e, w, stride, padding), e.shape[:2]
    d = as_image("d", d, images, channels, g.out_height, g.out_width, dtype=e.dtype)
    da = as_image("da", da, *d.shape, dtype=e.dtype)
    gate, q = as_flat("gate", gate, images, channels), as_flat("q", q, images, channels)
    sums = as_flat("sums", sums, 2, channels)
    out = as_vectors(channels, mean=out_mean, var=out_var, weight=out_weight, bias=out_bias)
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    w = as_flat("w", w, channels, 1, g.kernel_size, g.kernel_size)
    du, dw = L.empty_image(e), L.empty(tuple(w.shape), e)
    e_sums = None if mean is None else L.empty((2, channels), e)
    library().call(
        "depthwise_backward", e.dtype, *_map(e, g), da, d, gate, q, sums, *out, e, *vectors, w, eps, du, dw,
        e_sums,
    )  # fmt: skip
    return du, dw, e_sums


def expand_backward(
    da: Tensor, e: Tensor, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, x: Tensor, w: Tensor,
    residual_gradient: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [B, C_in, H, W] and dW [C, C_in] fp32; `da` is the first of `depthwise_gradients`, dA1 σ'(z1)."""
    x = as_image("x", x)
    c_in, channels = x.shape[1], w.shape[0]
    e = as_image("e", e, x.shape[0], channels, *x.shape[2:], dtype=x.dtype)
    da = as_image("da", da, *e.shape, dtype=x.dtype)
    residual_gradient = as_optional("residual_gradient", residual_gradient, *x.shape, dtype=x.dtype)
    vectors = as_vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    dx, dw = L.empty_image(x), L.empty((channels, c_in), x)
    library().call(
        "expand_backward", x.dtype, x.shape[0] * _area(x), c_in, channels, da, e, as_flat("sums", sums, 2, channels),
        *vectors, eps, x, as_flat("w", w, channels, c_in, dtype=x.dtype), residual_gradient, dx, dw,
    )  # fmt: skip
    return dx, dw


def inference(
    x: Tensor, expand: list[Tensor], depthwise_layer: list[Tensor], excite: list[Tensor], project: list[Tensor],
    stride: int, padding: str, residual: bool, eps: float,
) -> Tensor:  # fmt: skip
    """The block with the running statistics: y. Every norm is folded into its convolution."""
    x = as_image("x", x)
    c_in = x.shape[1]
    w_reduce, _, _, b_expand = excite
    channels, out, squeezed = b_expand.shape[0], project[0].shape[0], w_reduce.shape[0]
    g = _geometry(x, depthwise_layer[0], stride, padding)
    k = g.kernel_size
    layers: list[Tensor | None] = []
    for name, layer, weight in (
        ("expand", expand, (channels, c_in, 1, 1)), ("depthwise", depthwise_layer, (channels, 1, k, k)),
        ("project", project, (out, channels, 1, 1)),
    ):  # fmt: skip
        if not layer:
            layers += [None] * 5
            continue
        layers += [as_flat(f"{name}.weight", layer[0], *weight), *(as_flat(name, v, weight[0]) for v in layer[1:])]
        if name == "depthwise":
            shapes = (squeezed, channels), (squeezed,), (channels, squeezed), (channels,)
            layers += [as_flat("excite", v, *shape) for v, shape in zip(excite, shapes, strict=True)]
    y = empty_nhwc(x, out, g.out_height, g.out_width)
    sizes = x.shape[0], channels, *_map(x, g)[2:], c_in, out, squeezed, int(residual)
    library().call("inference", x.dtype, *sizes, x, *layers, eps, y)
    return y


def _twin(function: Callable[..., Any]) -> Any:
    """The operation, which on fake tensors has the outputs of its Triton form."""
    name = function.__name__
    triton_form = getattr(mbconv_ops, name)

    def fake(*arguments: Any) -> Any:
        found = triton_form(*arguments)
        if isinstance(found, Tensor):
            return _on_its_own(found)
        return tuple(None if output is None else _on_its_own(output) for output in found)

    return declare(name, function, fake)


def _on_its_own(output: Tensor) -> Tensor:
    """The same shape and strides in memory of its own: in Triton an output may be part of a larger tensor."""
    return output.new_empty_strided(output.shape, output.stride())


expand = _twin(expand)
residual_expand = _twin(residual_expand)
residual_add = declare(
    "residual_add", residual_add,
    lambda p, *others: L.empty_image(p),
)  # fmt: skip
depthwise_forward = _twin(depthwise_forward)
project = _twin(project)
residual_add_backward = _twin(residual_add_backward)
project_backward = _twin(project_backward)
depthwise_gradients = _twin(depthwise_gradients)
expand_backward = _twin(expand_backward)
inference = _twin(inference)
