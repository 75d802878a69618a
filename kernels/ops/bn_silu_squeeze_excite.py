"""`y = a * gate(mean_HW(a))` with `a = silu(batch_norm(x))`: the depthwise convolution's output up to the
projection's input.

No kernel writes a. Forward passes over x: batch statistics; per-image sums of a (the squeeze), σ' and σ' x̂; after
one launch for the gates, y = a gate. With q what each pixel receives through the mean (see
`kernels.ops.squeeze_excite`), z = weight x̂ + bias and σ' = silu'(z):

    da = dy gate + q       dz = da σ'       dx = weight / sqrt(var + eps) (dz - (Σ dz + x̂ Σ dz x̂) / N)

(the terms over N only where the statistics are those of x). gate and q are constant within an image and channel, so
the batch norm's sums need no pass of their own:

    Σ dz   = Σ_b (gate Σ_hw dy σ'   + q Σ_hw σ'  )      = dbias
    Σ dz x̂ = Σ_b (gate Σ_hw dy σ' x̂ + q Σ_hw σ' x̂)      = dweight

Σ_hw dy a (the gate's gradient), Σ_hw dy σ' and Σ_hw dy σ' x̂ come from one pass over dy and x, the sums without dy
from forward. Saved for backward: x, five [B, C] or [B, S] vectors and the [C] ones. In passes over the image:
forward 3 reads and 1 write (2 + 1 in evaluation mode), backward 4 reads and 1 write. Unfused PyTorch: forward 5 +
3, backward 11 + 5 or more, and it saves x, z and a.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import launch as L
from kernels import reference
from kernels.batch_norm import check_batch_norm, statistics, sum_partials, sum_traffic
from kernels.batch_norm import traffic as statistics_traffic
from kernels.device import REFERENCE, Gpu
from kernels.operation import once_differentiable, operation
from kernels.ops import excite as E
from kernels.ops import squeeze_excite as SE
from kernels.sync import all_reduce_sums
from kernels.vectors import Norm


@operation("bn_silu_squeeze_excite")
def bn_silu_squeeze_excite_op(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    eps: float,
    training: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, pooled [B, C], hidden [B, S], gate [B, C], sums of dsilu_sums [2, B, C]; only y is differentiable."""
    x = L.nhwc(x)
    norm = Norm(mean, var, weight, bias, eps)
    partial = SE.squeeze(x, None, norm)
    pooled, hidden, gate, dsilu_sums = E.excite(
        partial, x.shape[2] * x.shape[3], w_reduce, b_reduce, w_expand, b_expand
    )
    assert dsilu_sums is not None
    return SE.scale(x, gate, norm), pooled, hidden, gate, dsilu_sums


@operation("bn_silu_squeeze_excite_backward")
def bn_silu_squeeze_excite_backward_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w_reduce: Tensor,
    w_expand: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    dsilu_sums: Tensor,
    eps: float,
    training: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, [dbias, dweight] as [2, C], dWr, dbr, dWe, dbe."""
    dy, x = L.nhwc(dy), L.nhwc(x)
    norm = Norm(mean, var, weight, bias, eps)
    partial = SE.squeeze(x, dy, norm)
    q, shares, *parameters = E.excite_backward(
        partial, x.shape[2] * x.shape[3], w_reduce, w_expand, pooled, hidden, gate, dsilu_sums
    )
    assert shares is not None
    sums = sum_partials(shares)
    dw_reduce, db_reduce, dw_expand, db_expand = parameters
    dx = SE.scale_backward(dy, x, gate, q, all_reduce_sums(sums, x.numel() // x.shape[1], group), norm, training)
    return dx, sums, dw_reduce, db_reduce, dw_expand, db_expand


@bn_silu_squeeze_excite_op.register_fake
def _(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    dsilu_sums = x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)
    return L.empty_image(x), *SE.fake_vectors(x, w_reduce), dsilu_sums


@bn_silu_squeeze_excite_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, w_reduce: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    return L.empty_image(x), sums, *SE.fake_parameters(w_reduce)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mean, var, weight, bias, w_reduce, _, w_expand, _, *ctx.options = inputs
    ctx.save_for_backward(x, mean, var, weight, bias, w_reduce, w_expand, *output[1:])


def _backward(ctx: Any, dy: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    dx, sums, *parameters = bn_silu_squeeze_excite_backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, sums[1], sums[0], *parameters, None, None, None


bn_silu_squeeze_excite_op.register_autograd(_backward, setup_context=_setup_context)
once_differentiable(bn_silu_squeeze_excite_backward_op, "bn_silu_squeeze_excite")


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
    impl: L.Impl = "auto",
) -> Tensor:
    """`squeeze_excite(bn_silu(x))` for `x` [B, C, H, W], in the dtype of `x`. Arguments and errors as in those two."""
    vectors = SE.squeeze_vectors(x, w_reduce, b_reduce, w_expand, b_expand)
    check_batch_norm(x, weight, bias, running_mean, running_var, training, **vectors)
    if E.resolve(impl, x, w_reduce.shape[0]) == "torch":
        return reference.bn_silu_squeeze_excite(
            x, weight, bias, running_mean, running_var, w_reduce, b_reduce, w_expand, b_expand,
            training=training, momentum=momentum, eps=eps, group=group,
        )  # fmt: skip
    mean, var = statistics(x, running_mean, running_var, training, momentum, group)
    return bn_silu_squeeze_excite_op(
        x, mean, var, weight, bias, w_reduce, b_reduce, w_expand, b_expand, eps, training, group
    )[0]


def traffic(
    shape: tuple[int, int, int, int], dtype: torch.dtype, squeeze: int, training: bool = True, gpu: Gpu = REFERENCE
) -> dict[str, int]:
    """Bytes read and written by each kernel of one call; the kernels are those of `squeeze_excite` and `excite`."""
    return {
        **(statistics_traffic(shape, dtype, gpu) if training else {}),
        **SE.traffic(shape, dtype, squeeze, norm=True, training=training, gpu=gpu),
        "_sum_partials_kernel": sum_traffic(2, shape[0], shape[1]),
    }
