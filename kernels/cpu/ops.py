"""The operations of a training-mode MBConv on a CPU: `kernels.block.mbconv_ops` in C++, with the same signatures.

What is different: `depthwise_gradients` returns dA1 σ'(z1), which it has in cache, where the Triton form returns dA1
and `expand_backward` computes σ' again; without an expansion both return E's gradient. dgrad and wgrad of a convolution
(the halves of B2 and of B7) are one pass. B7 could go into B5 but for the exchange of BN1's sums between them: with
W1ᵀ diag W1 and xᵀ x the sums' part can be added later, which pays only where x has few channels.

Sums are cut by shape, so every result has the same bits for any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kernels import launch as L
from kernels.block import mbconv_ops
from kernels.block.strips import Geometry, empty_nhwc, geometry
from kernels.cpu.library import STORAGE_DTYPES, library
from kernels.operation import once_differentiable


def _image(name: str, x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """x as the library reads it, channels last; ValueError or TypeError where it can't."""
    if x.dim() != 4 or (shape and tuple(x.shape) != shape) or x.numel() == 0:
        raise ValueError(f"{name} must have shape {list(shape) or '[B, C, H, W]'}, got {tuple(x.shape)}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}: the CPU operations take tensors of the CPU")
    if x.dtype not in STORAGE_DTYPES or (dtype is not None and x.dtype != dtype):
        raise TypeError(f"{name} must be {dtype or 'float32 or bfloat16'}, got {x.dtype}")
    if x.numel() // x.shape[1] > L.MAX_ROWS:
        raise ValueError(f"{name} must have at most 2**30 pixels in a batch, got shape {tuple(x.shape)}")
    return L.nhwc(x)


def _flat(name: str, x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector or matrix as the library reads it, row-major."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(x.shape)}")
    if x.device.type != "cpu" or x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} on the CPU, got {x.dtype} on {x.device}")
    return x.contiguous()


def _vectors(channels: int, **vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else _flat(name, v, channels) for name, v in vectors.items()]


def _optional(name: str, x: Tensor | None, *shape: int, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else _image(name, x, *shape, dtype=dtype)


def _geometry(e: Tensor, taps: Tensor, stride: int, padding: Any) -> Geometry:
    k = taps.shape[-1]
    if (k, stride) not in ((3, 1), (3, 2), (5, 1), (5, 2)) or padding not in ("symmetric", "same"):
        raise ValueError(f"k must be 3 or 5 and stride 1 or 2, got k {k}, stride {stride} and padding {padding!r}")
    return geometry(e.shape[2], e.shape[3], k, stride, padding)


def _map(e: Tensor, g: Geometry) -> tuple[int, ...]:
    sizes = g.height, g.width, g.out_height, g.out_width, g.pad_top, g.pad_left, g.kernel_size, g.stride
    return (*e.shape[:2], *sizes)


def _area(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def expand(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = _image("x", x)
    channels, c_in = w.shape[0], x.shape[1]
    w = _flat("w", w, channels, c_in, dtype=x.dtype)
    e = empty_nhwc(x, channels, *x.shape[2:])
    mean, var = L.empty((channels,), x), L.empty((channels,), x)
    library().call("expand", x.dtype, x.shape[0] * _area(x), c_in, channels, x, w, e, mean, var)
    return e, mean, var


def residual_expand(
    p: Tensor, residual: Tensor | None, scale: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    w: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = _image("p", p)
    (images, c_in), channels = p.shape[:2], w.shape[0]
    residual = _optional("residual", residual, *p.shape, dtype=p.dtype)
    vectors = _vectors(images, scale=scale) + _vectors(c_in, mean=mean, var=var, weight=weight, bias=bias)
    w = _flat("w", w, channels, c_in, dtype=p.dtype)
    x, e = L.empty_image(p), empty_nhwc(p, channels, *p.shape[2:])
    e_mean, e_var = L.empty((channels,), p), L.empty((channels,), p)
    library().call(
        "residual_expand", p.dtype, images, _area(p), c_in, channels, p, residual, *vectors, eps, w, x, e, e_mean, e_var
    )
    return x, e, e_mean, e_var


def join(
    p: Tensor, residual: Tensor | None, scale: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """y = scale[b] BN3(p) (+ residual): F6 alone, for a block whose output the next one does not make."""
    p = _image("p", p)
    images, channels = p.shape[:2]
    residual = _optional("residual", residual, *p.shape, dtype=p.dtype)
    vectors = _vectors(images, scale=scale) + _vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    y = L.empty_image(p)
    library().call("join", p.dtype, images, _area(p), channels, p, residual, *vectors, eps, y)
    return y


def depthwise_forward(
    e: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, taps: Tensor,
    eps: float, stride: int, padding: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    e = _image("e", e)
    g, channels = _geometry(e, taps, stride, padding), e.shape[1]
    vectors = _vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    taps = _flat("taps", taps, channels, 1, g.kernel_size, g.kernel_size)
    d = empty_nhwc(e, channels, g.out_height, g.out_width)
    d_mean, d_var = L.empty((channels,), e), L.empty((channels,), e)
    library().call("depthwise", e.dtype, *_map(e, g), e, *vectors, taps, eps, d, d_mean, d_var)
    return d, d_mean, d_var


def project(
    d: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, b_reduce: Tensor,
    w_expand: Tensor, b_expand: Tensor, w: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d = _image("d", d)
    (images, channels), out, squeezed = d.shape[:2], w.shape[0], w_reduce.shape[0]
    vectors = _vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    w_reduce, w_expand = (
        _flat("w_reduce", w_reduce, squeezed, channels),
        _flat("w_expand", w_expand, channels, squeezed),
    )
    b_reduce, b_expand = _flat("b_reduce", b_reduce, squeezed), _flat("b_expand", b_expand, channels)
    w = _flat("w", w, out, channels, dtype=d.dtype)
    p = empty_nhwc(d, out, *d.shape[2:])
    shapes = (out,), (out,), (4, channels), (images, channels), (images, squeezed), (images, channels)
    found = [L.empty(shape, d) for shape in (*shapes, (2, images, channels))]
    library().call(
        "project", d.dtype, images, _area(d), channels, out, squeezed, d, *vectors, w_reduce, b_reduce, w_expand,
        b_expand, w, eps, p, *found,
    )  # fmt: skip
    p_mean, p_var, d_norm, pooled, hidden, gate, slopes = found
    return p, p_mean, p_var, d_norm, pooled, hidden, gate, slopes


def join_backward(dy: Tensor, p: Tensor, scale: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    p = _image("p", p)
    dy = _image("dy", dy, *p.shape, dtype=p.dtype)
    images, channels = p.shape[:2]
    vectors = _vectors(images, scale=scale) + _vectors(channels, mean=mean, var=var)
    sums = L.empty((2, channels), p)
    library().call("join_backward", p.dtype, images, _area(p), channels, dy, p, *vectors, eps, sums)
    return sums


def project_backward(
    dy: Tensor, p: Tensor, scale: Tensor | None, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
    d: Tensor, d_norm: Tensor, w: Tensor, w_reduce: Tensor, w_expand: Tensor, pooled: Tensor, hidden: Tensor,
    gate: Tensor, slopes: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d = _image("d", d)
    (images, channels), out, squeezed = d.shape[:2], w.shape[0], w_reduce.shape[0]
    p = _image("p", p, images, out, *d.shape[2:], dtype=d.dtype)
    dy = _image("dy", dy, *p.shape, dtype=d.dtype)
    arguments = [
        *_vectors(images, scale=scale), _flat("sums", sums, 2, out),
        *_vectors(out, mean=mean, var=var, weight=weight, bias=bias), d, _flat("d_norm", d_norm, 4, channels),
        _flat("w", w, out, channels, dtype=d.dtype), _flat("w_reduce", w_reduce, squeezed, channels),
        _flat("w_expand", w_expand, channels, squeezed), _flat("pooled", pooled, images, channels),
        _flat("hidden", hidden, images, squeezed), _flat("gate", gate, images, channels),
        _flat("slopes", slopes, 2, images, channels),
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
    taps: Tensor, eps: float, stride: int, padding: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dA1 σ'(z1) [B, C, H, W] (without a norm E's gradient), dtaps fp32 and, with a norm, its Σ dz, Σ dz ê [2, C]."""
    e = _image("e", e)
    g, (images, channels) = _geometry(e, taps, stride, padding), e.shape[:2]
    d = _image("d", d, images, channels, g.out_height, g.out_width, dtype=e.dtype)
    da = _image("da", da, *d.shape, dtype=e.dtype)
    gate, q = _flat("gate", gate, images, channels), _flat("q", q, images, channels)
    sums = _flat("sums", sums, 2, channels)
    out = _vectors(channels, mean=out_mean, var=out_var, weight=out_weight, bias=out_bias)
    vectors = _vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    taps = _flat("taps", taps, channels, 1, g.kernel_size, g.kernel_size)
    du, dtaps = L.empty_image(e), L.empty(tuple(taps.shape), e)
    e_sums = None if mean is None else L.empty((2, channels), e)
    library().call(
        "depthwise_backward", e.dtype, *_map(e, g), da, d, gate, q, sums, *out, e, *vectors, taps, eps, du, dtaps,
        e_sums,
    )  # fmt: skip
    return du, dtaps, e_sums


def expand_backward(
    da: Tensor, e: Tensor, sums: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, x: Tensor, w: Tensor,
    residual_gradient: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [B, C_in, H, W] and dW [C, C_in] fp32; `da` is the first of `depthwise_gradients`, dA1 σ'(z1)."""
    x = _image("x", x)
    c_in, channels = x.shape[1], w.shape[0]
    e = _image("e", e, x.shape[0], channels, *x.shape[2:], dtype=x.dtype)
    da = _image("da", da, *e.shape, dtype=x.dtype)
    residual_gradient = _optional("residual_gradient", residual_gradient, *x.shape, dtype=x.dtype)
    vectors = _vectors(channels, mean=mean, var=var, weight=weight, bias=bias)
    dx, dw = L.empty_image(x), L.empty((channels, c_in), x)
    library().call(
        "expand_backward", x.dtype, x.shape[0] * _area(x), c_in, channels, da, e, _flat("sums", sums, 2, channels),
        *vectors, eps, x, _flat("w", w, channels, c_in, dtype=x.dtype), residual_gradient, dx, dw,
    )  # fmt: skip
    return dx, dw


def inference(
    x: Tensor, expand: list[Tensor], depthwise_layer: list[Tensor], excite: list[Tensor], project: list[Tensor],
    stride: int, padding: str, residual: bool, eps: float,
) -> Tensor:  # fmt: skip
    """The block with the running statistics: y. Every norm is folded into its convolution."""
    x = _image("x", x)
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
        layers += [_flat(f"{name}.weight", layer[0], *weight), *(_flat(name, v, weight[0]) for v in layer[1:])]
        if name == "depthwise":
            shapes = (squeezed, channels), (squeezed,), (channels, squeezed), (channels,)
            layers += [_flat("excite", v, *shape) for v, shape in zip(excite, shapes, strict=True)]
    y = empty_nhwc(x, out, g.out_height, g.out_width)
    sizes = x.shape[0], channels, *_map(x, g)[2:], c_in, out, squeezed, int(residual)
    library().call("inference", x.dtype, *sizes, x, *layers, eps, y)
    return y


OPERATIONS: dict[str, Any] = {}
"""The operations as torch knows them, by name."""


def _plain(x: Tensor) -> bool:
    """Whether nothing but the result is wanted of an operation on x: no gradient, no trace, no fake tensor."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


def _declare(name: str, function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Any:
    """The operation, declared to torch, and called without torch's dispatcher, which takes as long as the function,
    where that has no part in it."""
    op = torch.library.custom_op(f"fastnet::cpu_{name}", function, mutates_args=(), device_types="cpu", schema=schema)
    op.register_fake(fake)
    once_differentiable(op, "mbconv")
    OPERATIONS[name] = op

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if _plain(arguments[0]) else op(*arguments)

    return call


def _twin(function: Callable[..., Any]) -> Any:
    """The operation with the schema of its Triton form, and on fake tensors the same outputs."""
    name = function.__name__
    triton_form = getattr(mbconv_ops, name)
    schema = str(triton_form._opoverload._schema)
    return _declare(name, function, schema[schema.index("(") :], lambda *arguments: triton_form(*arguments))


expand = _twin(expand)
residual_expand = _twin(residual_expand)
join = _declare(
    "join", join,
    "(Tensor p, Tensor? residual, Tensor? scale, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps)"
    " -> Tensor",
    lambda p, *others: L.empty_image(p),
)  # fmt: skip
depthwise_forward = _twin(depthwise_forward)
project = _twin(project)
join_backward = _twin(join_backward)
project_backward = _twin(project_backward)
depthwise_gradients = _twin(depthwise_gradients)
expand_backward = _twin(expand_backward)
inference = _twin(inference)
