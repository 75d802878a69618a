"""A whole MBConv, in training: what each batch norm needs is reduced where its input is made, and applied where it is
read, so nothing normalised or activated ever reaches memory.

    E = x W1ᵀ                D = depthwise(silu(BN1(E)))        g = gate(mean_HW silu(BN2(D)))   (kernels.ops.excite)
    P = (silu(BN2(D)) g) W3ᵀ                                    y = s[b] BN3(P) (+ x where the block has a residual)

s [B] is drop-connect's scale. A block without expansion has x for silu(BN1(E)). Saved for backward: x, E, D, P, [C] and
[B, C] vectors, weights.

Schedule, with passes over x, E, D, P (y and its gradient are of P's size), a hat for a normalised value, σ' for SiLU's
derivative, dA and dA1 for the gradients of silu(BN2(D)) g and silu(BN1(E)):

    F1  expand             x → E, statistics of E in its epilogue
    F2  depthwise          E → D, BN1 and SiLU as it loads, statistics of D
    F3  squeeze            D → per image Σ a, Σ σ', Σ σ' d̂
    F4  excite             pooled vectors → gate; one launch
    F5  project            D → P, BN2, SiLU and gate as it loads, statistics of P
    F6  residual add       P (, x) → y
    B1  add backward       dy, P → Σ dz, Σ dz p̂ of BN3, dz = s[b] dy
    B2  project backward   dy, P, D → dA, per image Σ dA a, Σ dA σ', Σ dA σ' d̂; and dy, P, D → dW3
    B3  excite backward    vectors → dWr, dbr, dWe, dbe and q, what a pixel receives through the mean
    B4  combine            Σ dz = Σ_b (g Σ dA σ' + q Σ σ'), Σ dz d̂ alike: BN2's sums without a pass over memory
    B5  depthwise backward dA, D, E → dA1, dw2, and in its epilogue (B6) Σ dz, Σ dz ê of BN1
    B7  expand backward    dA1, E (, dy) → dx; and dA1, E, x → dW1

Statistics after F1, F2 and F5 and sums after B1, B4 and B5 are where several processes exchange (`kernels.sync`).

    forward    x + 2 E + 3 D + 3 P (+ x)                        backward    x + 6 E + 6 D + 6 P + x (+ dy)

in elements, vectors and partials aside; `bench.traffic` counts every byte. Unfused PyTorch moves 6 E + 9 D + 6 P or
more forward and twice that backward. The two halves of B2 read dy, P and D twice; those of B7 dA1 and E, but where
C_exp × C_in is small, in the blocks with the largest images, one kernel does both (`kernels.block.expand_backward`).
With k 5, B5 has a pass of its own that makes dy, 2 D more (`kernels.block.depthwise_backward`).

In a model F6 is left to the next block where that has an expansion (`PendingResidual`): its F1 makes y of P and x as it
loads, and stores it once, for y is that block's residual and its weight gradient's operand. That saves a read of y; the
price is that the programs of other output columns make y again, from P and x in L2.

The same schedule in C++, for a CPU, is `kernels.cpu.ops`: one autograd function and one set of exchange points serve
both.

Inference is the forward half without statistics: running means and variances take the batch's place, and BN3 and
the residual add are part of F5, whose output is y.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels import launch as L
from kernels import reference
from kernels.block import mbconv_ops
from kernels.block.strips import CONFIGURATIONS, Padding
from kernels.cpu import ops as cpu_ops
from kernels.cpu.library import STORAGE_DTYPES
from kernels.ops.drop_connect import bn_drop_connect_add_op
from kernels.ops.excite import resolve as resolve_squeeze
from kernels.sync import all_gather_stats, all_reduce_sums
from kernels.vectors import ConvNorm, Excite, PendingResidual

BlockImpl = Literal["auto", "triton", "native", "torch"]


def resolve(impl: BlockImpl, x: Tensor, squeeze: int = 1) -> Literal["triton", "native", "torch"]:
    """`excite.resolve`, and "native": the same schedule in C++, for fp32 and bf16 on a CPU, which never falls back."""
    if impl != "native":
        if impl not in get_args(BlockImpl):
            raise ValueError(f"impl must be 'auto', 'triton', 'native' or 'torch', got {impl!r}")
        return resolve_squeeze(impl, x, squeeze)
    if x.device.type != "cpu":
        raise RuntimeError(f"impl='native' cannot run on {x.device.type} tensors: move them to the CPU or pass 'auto'")
    if x.dtype not in STORAGE_DTYPES:
        raise TypeError(f"impl='native' stores float32 or bfloat16, got {x.dtype}: pass impl='torch'")
    return "native"


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _operations(native: bool) -> Any:
    """The schedule's operations in C++ for a CPU, or in Triton."""
    return cpu_ops if native else mbconv_ops


class _Options(NamedTuple):
    stride: int
    padding: str
    residual: bool
    eps: float
    group: str
    native: bool
    defer_residual: bool


class _MBConv(torch.autograd.Function):
    """y, or with `defer_residual` what stands for it (see `PendingResidual`), and the batch statistics (mean1, var1,)
    mean2, var2, mean3, var3; with a `group` then the images of all ranks; and last x, where it is made here from
    `prev`. None but y is differentiable. Tensors come one by one, as autograd sees them: x, the other six of `prev`
    (None without), drop_scale, and the weights of expansion (None without), depthwise convolution, squeeze-and-excite
    and projection."""

    @staticmethod
    def forward(ctx: Any, options: _Options, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        stride, padding, residual, eps, group, native = options[:6]
        x0, drop_scale0, mean0, var0, g0, b0, drop_scale, w1, g1, b1, w2, g2, b2, wr, br, we, be, w3, g3, b3 = tensors
        ops = _operations(native)
        w3_stored = w3.to(x.dtype).flatten(1)
        if w1 is None:
            w1_stored = mean1 = var1 = None
            e = x
        else:
            w1_stored = w1.to(x.dtype).flatten(1)
            if mean0 is None:
                e, mean1, var1 = ops.expand(x, w1_stored)
            else:
                x, e, mean1, var1 = ops.residual_expand(x, x0, drop_scale0, mean0, var0, g0, b0, w1_stored, eps)
            mean1, var1, _ = all_gather_stats(mean1, var1, _rows(e), group)
        d, mean2, var2 = ops.depthwise_forward(e, mean1, var1, g1, b1, w2, eps, stride, padding)
        mean2, var2, _ = all_gather_stats(mean2, var2, _rows(d), group)
        p, mean3, var3, d_norm, *vectors = ops.project(d, mean2, var2, g2, b2, wr, br, we, be, w3_stored, eps)
        mean3, var3, rows = all_gather_stats(mean3, var3, _rows(p), group)
        y = p
        if not options.defer_residual:
            shortcut = x if residual else None
            if native:
                y = cpu_ops.residual_add(p, shortcut, drop_scale, mean3, var3, g3, b3, eps)
            else:
                y = bn_drop_connect_add_op(p, shortcut, drop_scale, mean3, var3, g3, b3, eps, True, group)
        ctx.save_for_backward(
            x, drop_scale, None if w1 is None else e, d, p, d_norm, *vectors, mean1, var1, g1, b1, mean2, var2, g2, b2,
            mean3, var3, g3, b3, w1_stored, w2, wr, we, w3_stored,
        )  # fmt: skip
        ctx.options = options
        ctx.weight_strides = w1 if w1 is None else w1.stride(), w2.stride(), w3.stride()
        others = [mean2, var2, mean3, var3]
        if mean1 is not None and var1 is not None:
            others = [mean1, var1, *others]
        if group:
            assert isinstance(rows, Tensor)
            others.append(rows * (p.shape[0] / _rows(p)))
        if mean0 is not None:
            others.append(x)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # or backward would begin with zeros for each of them
        return y, *others

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        stride, padding, residual, eps, group, native = ctx.options[:6]
        strides1, strides2, strides3 = ctx.weight_strides
        ops = _operations(native)
        (
            x, drop_scale, e, d, p, d_norm, pooled, hidden, gate, dsilu_sums, mean1, var1, g1, b1, mean2, var2, g2, b2,
            mean3, var3, g3, b3, w1, w2, wr, we, w3,
        ) = ctx.saved_tensors  # fmt: skip
        sums3 = ops.residual_add_backward(dy, p, drop_scale, mean3, var3, eps)
        joint = all_reduce_sums(sums3, _rows(p), group)
        da, q, sums2, dw3, dwr, dbr, dwe, dbe = ops.project_backward(
            dy, p, drop_scale, joint, mean3, var3, g3, b3, d, d_norm, w3, wr, we, pooled, hidden, gate, dsilu_sums, eps
        )
        joint = all_reduce_sums(sums2, _rows(d), group)
        da1, dw2, sums1 = ops.depthwise_gradients(
            da, d, gate, q, joint, mean2, var2, g2, b2, x if e is None else e, mean1, var1, g1, b1, w2, eps, stride,
            padding,
        )  # fmt: skip
        del da
        if e is None:
            dx, dw1, dg1, db1 = da1 + dy if residual else da1, None, None, None
        else:
            joint = all_reduce_sums(sums1, _rows(e), group)
            dx, dw1 = ops.expand_backward(da1, e, joint, mean1, var1, g1, b1, x, w1, dy if residual else None, eps)
            dw1, dg1, db1 = L.with_strides(dw1[:, :, None, None], strides1), sums1[1], sums1[0]
        return (
            None, dx, *(None,) * 7, dw1, dg1, db1, L.with_strides(dw2, strides2), sums2[1], sums2[0],
            dwr, dbr, dwe, dbe, L.with_strides(dw3[:, :, None, None], strides3), sums3[1], sums3[0],
        )  # fmt: skip


def _check(
    x: Tensor, expand: ConvNorm | None, depthwise: ConvNorm, excite: Excite, project: ConvNorm,
    drop_scale: Tensor | None, stride: int, padding: str, residual: bool,
) -> None:  # fmt: skip
    c_in = x.shape[1] if x.dim() == 4 else 0
    channels, k = depthwise.weight.shape[0], depthwise.weight.shape[-1]
    out, squeezed = project.weight.shape[0], excite.w_reduce.shape[0]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"drop_scale": (drop_scale, x.shape[:1])}
    layers = {"depthwise": (depthwise, (channels, 1, k, k)), "project": (project, (out, channels, 1, 1))}
    if expand is not None:
        layers = {"expand": (expand, (channels, c_in, 1, 1))} | layers
    elif channels != c_in:
        raise ValueError(f"without an expansion the depthwise convolution has the {c_in} channels of x, got {channels}")
    for name, (layer, shape) in layers.items():
        shapes[f"{name}.weight"] = layer.weight, shape
        shapes |= {f"{name}.{v}": (t, shape[:1]) for v, t in zip(ConvNorm._fields[1:], layer[1:], strict=True)}
    excite_shapes = ((squeezed, channels), (squeezed,), (channels, squeezed), (channels,))
    shapes |= {f"excite.{v}": (t, s) for v, t, s in zip(Excite._fields, excite, excite_shapes, strict=True)}
    L.check(x, **shapes)
    if (k, stride) not in CONFIGURATIONS:
        raise ValueError(f"MBConv has k 3 or 5 and stride 1 or 2, got k {k} and stride {stride!r}")
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be 'symmetric' or 'same', got {padding!r}")
    if residual and (stride != 1 or out != c_in):
        raise ValueError(
            f"a residual needs stride 1 and equal channels, got stride {stride}, {c_in} and {out} channels"
        )


def mbconv(
    x: Tensor,
    expand: ConvNorm | None,
    depthwise: ConvNorm,
    excite: Excite,
    project: ConvNorm,
    drop_scale: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = "symmetric",
    residual: bool = False,
    training: bool,
    momentum: float,
    eps: float,
    group: str = "",
    impl: BlockImpl = "auto",
) -> Tensor:
    """MBConv: x [B, C_in, H, W] → [B, C_out, ⌈H / stride⌉, ⌈W / stride⌉] in the dtype of x.

    In training it moves the running statistics as `nn.BatchNorm2d` does, over the batches of all ranks of the process
    group named `group` if there is one; else it normalises by them, and on the fused paths has no gradient. drop_scale
    [B] fp32 is drop-connect's (None is one), for training, and gets no gradient. Parameters are fp32; in autocast an
    fp32 x is rounded to the autocast dtype on the fused paths. An `x` that is not channels_last is copied there first.
    Raises ValueError or TypeError for a wrong shape, dtype, device or option, RuntimeError where `impl="triton"`, or
    "native", the same schedule in C++ for a CPU, cannot run.
    """
    _check(x, expand, depthwise, excite, project, drop_scale, stride, padding, residual)
    if drop_scale is not None and not training:
        raise ValueError("drop_scale is for training: pass drop_scale=None")
    if training:
        _check_rows(x, stride)
    form = resolve(impl, x, excite.w_reduce.shape[0])
    if form == "torch":
        return reference.mbconv(
            x, expand, depthwise, excite, project, drop_scale, stride=stride, padding=padding, residual=residual,
            training=training, momentum=momentum, eps=eps, group=group,
        )  # fmt: skip
    if training:
        y = mbconv_training(
            x, expand, depthwise, excite, project, drop_scale, stride=stride, padding=padding, residual=residual,
            momentum=momentum, eps=eps, group=group, defer_residual=False, native=form == "native",
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y
    layers = ([] if expand is None else list(expand), list(depthwise), list(excite), list(project))
    return _operations(form == "native").inference(_in_autocast(x), *layers, stride, padding, residual, eps)


def mbconv_training(
    x: Tensor | PendingResidual,
    expand: ConvNorm | None,
    depthwise: ConvNorm,
    excite: Excite,
    project: ConvNorm,
    drop_scale: Tensor | None,
    *,
    stride: int,
    padding: Padding,
    residual: bool,
    momentum: float,
    eps: float,
    group: str,
    defer_residual: bool,
    native: bool = False,
) -> Tensor | PendingResidual:
    """The fused path of `mbconv` in training, for arguments whose shapes fit, also with a
    residual add left to the next block: x may be PendingResidual where there is an expansion, and with `defer_residual`
    the output is."""
    prev: PendingResidual | None = None
    if isinstance(x, PendingResidual):
        prev, x = x, x.p
    if not native:
        resolve_squeeze("triton", x, excite.w_reduce.shape[0])
    _check_rows(x, stride)
    x = _in_autocast(x)
    y, *others = _MBConv.apply(
        _Options(stride, padding, residual, eps, group, native, defer_residual), x,
        *((None,) * 6 if prev is None else prev[1:]), drop_scale, *((None,) * 3 if expand is None else expand[:3]),
        *depthwise[:3], *excite, *project[:3],
    )  # fmt: skip
    shortcut: Tensor = x.detach() if prev is None else others.pop()
    images = others.pop() if group else y.shape[0]
    outer, inner = (t.shape[2] * t.shape[3] for t in (x, y))
    counted = [] if expand is None else [(expand, images * outer)]
    _move_running_statistics([*counted, (depthwise, images * inner), (project, images * inner)], others, momentum)
    if not defer_residual:
        return y
    mean, var = others[-2:]
    norm = project.norm_weight.detach(), project.norm_bias.detach()
    return PendingResidual(y, shortcut if residual else None, drop_scale, mean, var, *norm)


def _check_rows(x: Tensor, stride: int) -> None:
    if x.shape[0] * L.cdiv(x.shape[2], stride) * L.cdiv(x.shape[3], stride) == 1:
        raise ValueError(f"batch statistics need more than one value per channel, got x of shape {tuple(x.shape)}")


def _in_autocast(x: Tensor) -> Tensor:
    """x as the kernels take it: in autocast an fp32 image is rounded."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _move_running_statistics(
    layers: list[tuple[ConvNorm, Tensor | int]], statistics: list[Tensor], momentum: float
) -> None:
    """running += momentum (batch - running), the batch's variance unbiased; few launches for all layers. layers: with
    the rows of all ranks, which are a tensor where ranks are several."""
    with torch.no_grad():
        factors: list[Any] = [rows / (rows - 1) for _, rows in layers]
        variances = torch._foreach_mul(statistics[1::2], factors)
        running = [layer.running_mean for layer, _ in layers] + [layer.running_var for layer, _ in layers]
        torch._foreach_lerp_(running, [*statistics[::2], *variances], momentum)
