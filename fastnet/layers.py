"""The layers of EfficientNet in plain torch: convolution, batch norm, squeeze-and-excitation, MBConv.

Modules hold parameters and shapes only; ``kernels`` computes what lies between the convolutions or, with Triton in
training and in inference, a whole MBConv.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet.arch import Activation, BlockShape, Kernels, ModelConfig, Padding
from fastnet.forms import Form, chosen
from kernels import ConvNorm, Excite, bn_drop_connect_add, bn_silu, bn_silu_squeeze_excite, mbconv, reference
from kernels.cpu.layer import conv_bn_silu
from kernels.cpu.library import STORAGE_DTYPES
from kernels.launch import Impl, resolve
from kernels.mbconv import BlockImpl, mbconv_training
from kernels.ops.excite import MAX_SQUEEZE
from kernels.vectors import PendingResidual

UNFUSED = (
    "kernels={!r} can't fuse a block whose batch norms are frozen while gradients flow through it: such blocks run "
    "convolution by convolution, as with 'triton-ops'"
)


def operation_impl(kernels: Kernels) -> Impl:
    """What an operation alone runs under a model's choice of kernels."""
    if kernels == "native":
        return "torch"
    return "triton" if kernels == "triton-ops" else kernels


class Conv2d(nn.Conv2d):
    """Bias-free convolution with symmetric or TF "SAME" padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        groups: int,
        padding: Padding,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        # At stride 1 SAME is symmetric for odd kernels.
        self.same = padding == "same" and stride > 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.same:
            return super().forward(x)
        rows, columns = (
            same_padding(size, k, s) for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        )
        if rows % 2 == 0 and columns % 2 == 0:
            return F.conv2d(x, self.weight, None, self.stride, (rows // 2, columns // 2), 1, self.groups)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


def same_padding(size: int, kernel_size: int, stride: int) -> int:
    """Pixels that TF's "SAME" adds to one axis in all, so that ceil(size / stride) outputs come.

    Half of them (rounded down) go left or above, the rest right or below.
    """
    return max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)


class BatchNorm(nn.Module):
    """Parameters and running statistics of a batch norm; the kernels compute it with what follows it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.eps = config.bn_eps
        self.momentum = config.bn_momentum
        self.impl = operation_impl(config.kernels)
        self.group = ""  # name of the process group whose ranks' batches are normalised as one

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.running_mean, self.running_var

    @property
    def is_16_bit(self) -> bool:
        """After `model.half()` or `model.bfloat16()`: PyTorch computes it as any model, unless kernels were insisted
        on."""
        return self.weight.dtype in (torch.float16, torch.bfloat16) and self.impl in ("auto", "torch")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
            "group": self.group,
            "impl": self.impl,
        }


class SqueezeExcite(nn.Module):
    """Weights of x · σ(expand(silu(reduce(mean(x))))); Hu et al. 2018."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, squeezed)
        self.expand = nn.Linear(squeezed, channels)

    @property
    def tensors(self) -> Excite:
        return Excite(self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)


class ConvBNAct(nn.Module):
    """Convolution, batch norm, activation, and squeeze-and-excitation where one is given (with SiLU)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        config: ModelConfig,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Activation = "silu",
        alone: bool = False,
    ) -> None:
        """alone: not a part of a block, so that what is measured of it counts (`forms`)."""
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, groups, config.padding)
        self.bn = BatchNorm(out_channels, config)
        self.activation = activation
        self.alone = alone
        self.kernels = config.kernels

    @property
    def layer(self) -> ConvNorm:
        return ConvNorm(self.conv.weight, *self.bn.tensors)

    @property
    def kind(self) -> tuple[int | str, ...]:
        """What tells this layer from others (`forms.Place`), whose size is that of the convolution's output."""
        return ("layer", self.conv.in_channels, self.conv.out_channels, self.conv.kernel_size[0], self.conv.stride[0])

    def forward(self, x: Tensor, se: SqueezeExcite | None = None, *, form: Form | None = None) -> Tensor:
        """[B, C_in, H, W] → [B, C_out, H/stride, W/stride]. form: instead of what was chosen."""
        if se is None and self._is_native(x, form):
            padding = "same" if self.conv.same else "symmetric"
            options = {name: getattr(self.bn, name) for name in ("momentum", "eps", "group")}
            return conv_bn_silu(x, self.layer, stride=self.conv.stride[0], padding=padding, **options)
        x = self.conv(x)
        options = self.bn.options
        if form is None and self.alone and self.bn.impl == "auto":
            form = chosen(self.kind, x, x.shape[2], x.shape[3], self.bn.training)
        if form == "torch":
            options["impl"] = "torch"
        if self.activation == "relu6":
            return F.relu6(_bn_add(self.bn, x))
        if self.bn.is_16_bit:
            del options["impl"]
            if se is None:
                return reference.bn_silu(x, *self.bn.tensors, **options)
            return reference.bn_silu_squeeze_excite(x, *self.bn.tensors, *se.tensors, **options)
        if se is None:
            return bn_silu(x, *self.bn.tensors, **options)
        return bn_silu_squeeze_excite(x, *self.bn.tensors, *se.tensors, **options)

    def _is_native(self, x: Tensor, form: Form | None) -> bool:
        """Whether a stem or head is computed in C++: in training, on a CPU, where `form`, the model's choice of kernels
        or what was measured says so, and an image wants no gradient."""
        if not self.alone or not self.bn.training or self.activation != "silu" or x.device.type != "cpu":
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype not in STORAGE_DTYPES or self.bn.weight.dtype != torch.float32 or x.dtype not in STORAGE_DTYPES:
            return False
        if self.conv.kernel_size[0] > 1 and x.requires_grad and torch.is_grad_enabled():
            return False
        if form is not None or self.kernels != "auto":
            return (self.kernels if form is None else form) == "native"
        height, width = (-(-side // self.conv.stride[0]) for side in x.shape[2:])
        return chosen(self.kind, x, height, width, True, dtype) == "native"


def _bn_add(bn: BatchNorm, x: Tensor, residual: Tensor | None = None, drop_scale: Tensor | None = None) -> Tensor:
    """Batch norm, times drop_scale [B], plus the residual."""
    options = bn.options
    if bn.is_16_bit:
        del options["impl"]
        return reference.bn_drop_connect_add(x, residual, drop_scale, *bn.tensors, **options)
    return bn_drop_connect_add(x, residual, drop_scale, *bn.tensors, **options)


class Project(nn.Module):
    """MBConv's linear bottleneck, 1×1 convolution and batch norm; drop_scale[b] times that plus the residual."""

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 1, 1, 1, config.padding)
        self.bn = BatchNorm(out_channels, config)

    @property
    def layer(self) -> ConvNorm:
        return ConvNorm(self.conv.weight, *self.bn.tensors)

    def forward(self, x: Tensor, residual: Tensor | None, drop_scale: Tensor | None) -> Tensor:
        return _bn_add(self.bn, self.conv(x), residual, drop_scale)


class MBConv(nn.Module):
    """Expand 1×1 → depthwise k×k → squeeze-and-excite → project 1×1, + input where the shape allows.

    Paper, section 4.
    """

    def __init__(self, shape: BlockShape, config: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        expanded = shape.expanded
        act = shape.activation
        self.expand = (
            ConvBNAct(shape.in_channels, expanded, 1, config, activation=act) if shape.expand_ratio != 1 else None
        )
        self.depthwise = ConvBNAct(
            expanded, expanded, shape.kernel_size, config, stride=shape.stride, groups=expanded, activation=act
        )
        self.se = SqueezeExcite(expanded, shape.squeezed) if shape.squeezed else None
        self.project = Project(expanded, shape.out_channels, config)
        self.has_residual = shape.has_residual
        self.padding = config.padding
        self.kernels = config.kernels
        self.defers_residual = True  # where the next block can make this one's output; False: never

    def forward(
        self,
        x: Tensor | PendingResidual,
        drop_scale: Tensor | None = None,
        *,
        defer_residual: bool = False,
        form: Form | None = None,
    ) -> Tensor | PendingResidual:
        """x [B, C_in, H, W], drop_scale [B] (None: 1) → [B, C_out, H/stride, W/stride].

        x may be PendingResidual, and with `defer_residual` the output is, where `EfficientNet.forward` says so. form:
        instead of the one that `self.form` names.
        """
        bn = self.project.bn
        if not bn.training:
            drop_scale = None  # nothing is dropped from a frozen block
        if isinstance(x, PendingResidual) or defer_residual:
            native = self._is_native(x, form)
            return mbconv_training(
                x, *self._layers, drop_scale, **self._options, defer_residual=defer_residual, native=native
            )
        form = self.form(x, x.shape[2], x.shape[3]) if form is None else form
        if form != "triton-ops":
            impl: BlockImpl = bn.impl if form == "triton" else form
            return mbconv(x, *self._layers, drop_scale, **self._options, training=bn.training, impl=impl)
        h = x if self.expand is None else self.expand(x)
        h = self.depthwise(h, self.se)
        return self.project(h, x if self.has_residual else None, drop_scale)

    @property
    def _layers(self) -> tuple[ConvNorm | None, ConvNorm, Excite, ConvNorm]:
        assert self.se is not None
        expand = None if self.expand is None else self.expand.layer
        return expand, self.depthwise.layer, self.se.tensors, self.project.layer

    @property
    def _options(self) -> dict[str, Any]:
        bn = self.project.bn
        options = {"stride": self.shape.stride, "padding": self.padding, "residual": self.has_residual}
        return options | {"momentum": bn.momentum, "eps": bn.eps, "group": bn.group}

    @property
    def kind(self) -> tuple[int | str, ...]:
        """What tells this kind of block from others (`forms.Place`)."""
        return ("block", *self.shape[:5], self.padding)

    def form(self, x: Tensor, height: int, width: int) -> Form:
        """How the block is computed on inputs of that size, on the device and of the dtype of x: as one ("triton",
        "native", or "torch" where that was measured to be faster) or convolution by convolution.

        As one only in our kernels, and with every norm in training, or none of them and nothing to differentiate.
        """
        norms = [part.bn.training for part in (self.expand, self.depthwise, self.project) if part is not None]
        training = all(norms)
        fused = self._fused(x, height, width, training)
        if fused is None:
            return "triton-ops"
        if not training and (any(norms) or self._takes_gradients(x)):
            if self.kernels in ("triton", "native") and not torch.compiler.is_compiling():
                warnings.warn(UNFUSED.format(self.kernels), stacklevel=2)
            return "triton-ops"
        if fused == "native" or self.kernels == "triton":
            return fused
        # The operations have a remedy of their own for what the fused kernels can't hold.
        if self.shape.squeezed > MAX_SQUEEZE:
            return "triton-ops"
        return fused

    def _fused(self, x: Tensor, height: int, width: int, training: bool) -> Form | None:
        """What the model's choice of kernels, and what was measured, would compute the whole block by; None where only
        convolution by convolution."""
        if self.kernels == "native":
            return "native"
        if self.kernels in ("torch", "triton-ops") or self.project.bn.is_16_bit:
            return None
        if resolve(self.project.bn.impl, x) != "torch":
            return "triton" if self.kernels == "triton" else chosen(self.kind, x, height, width, training)
        # On a CPU PyTorch computes what was not measured.
        return "native" if chosen(self.kind, x, height, width, training) == "native" else None

    def _is_native(self, x: Tensor | PendingResidual, form: Form | None) -> bool:
        """Whether a block is computed in C++ that shares a residual add with its neighbour: `form`, or else as both."""
        if form is not None:
            return form == "native"
        image = x.p if isinstance(x, PendingResidual) else x
        return self.kernels == "native" or (self.kernels == "auto" and resolve(self.project.bn.impl, image) == "torch")

    def _takes_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def can_defer_residual(self, following: MBConv, x: Tensor | PendingResidual) -> bool:
        """Whether the next block's expansion can make this one's output as it loads: both train fused."""
        x = x.p if isinstance(x, PendingResidual) else x
        height, width = (math.ceil(side / self.shape.stride) for side in x.shape[2:])
        return (
            following.expand is not None
            and self.project.bn.training
            and following.project.bn.training
            and self.form(x, x.shape[2], x.shape[3]) == following.form(x, height, width) in ("triton", "native")
            and self.defers_residual
            and not (self._forward_hooks or following._forward_pre_hooks)  # which want to see it
        )
