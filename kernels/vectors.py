"""The tensors that go through a block's operations together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvNorm(NamedTuple):
    """A convolution and the batch norm behind it: weight [C_out, C_in / groups, k, k] and four vectors [C_out]."""

    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor
    running_var: Tensor


class Excite(NamedTuple):
    """Squeeze-and-excite's two linear maps: [S, C], [S], [C, S], [C]."""

    w_reduce: Tensor
    b_reduce: Tensor
    w_expand: Tensor
    b_expand: Tensor


class PendingResidual(NamedTuple):
    """A block's output that the next block's expansion makes as it loads: projection [B, C, H, W], residual or None,
    drop-connect scale [B] or None, and the projection's batch norm [C].

    For autograd `p` is the output: what arrives as its gradient is the output's. The rest takes no part in it.
    """

    p: Tensor
    residual: Tensor | None
    drop_scale: Tensor | None
    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """The batch norm in front of the activation; `None` in every field stands for no norm and no activation."""

    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


NO_NORM = Norm()


class OutNorm(NamedTuple):
    """What turns the gradient of the gated activation into that of the convolution's output `y` [B, C, Ho, Wo], raw.

    `gate` and `q` are [B, C] (kernels.ops.excite), `sums` [2, C] are Σ dz and Σ dz ŷ of the batch norm `norm` of y.
    """

    y: Tensor | None = None
    gate: Tensor | None = None
    q: Tensor | None = None
    sums: Tensor | None = None
    norm: Norm = NO_NORM


NO_OUT_NORM = OutNorm()
