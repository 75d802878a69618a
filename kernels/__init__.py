"""Fused operations around the convolutions of MBConv, forward and backward, each with a plain-PyTorch twin.

Every function takes `impl`: "auto" runs Triton where `x` is on CUDA and PyTorch elsewhere, "triton" never falls
back, "torch" is `kernels.reference`. A Triton operation can be differentiated once.
"""

from __future__ import annotations

from kernels import augment, batch_norm, batch_norm_silu, depthwise, depthwise_backward, drop_connect, excite, pointwise
from kernels import squeeze_excite as _squeeze_excite_file
from kernels.batch_norm_silu import bn_silu
from kernels.batch_norm_silu_squeeze_excite import bn_silu_squeeze_excite
from kernels.conv2d import depthwise_conv2d, pointwise_conv2d
from kernels.drop_connect import bn_drop_connect_add, drop_connect_add
from kernels.launch import Impl, KernelSpec
from kernels.mbconv import ConvNorm, Excite, mbconv
from kernels.squeeze_excite import squeeze_excite

__all__ = [
    "ConvNorm",
    "Excite",
    "Impl",
    "KernelSpec",
    "all_specs",
    "bn_drop_connect_add",
    "bn_silu",
    "bn_silu_squeeze_excite",
    "depthwise_conv2d",
    "drop_connect_add",
    "mbconv",
    "pointwise_conv2d",
    "squeeze_excite",
]

_KERNEL_FILES = (
    batch_norm, batch_norm_silu, excite, _squeeze_excite_file, drop_connect, depthwise, depthwise_backward, pointwise,
    augment,
)  # fmt: skip


def all_specs() -> list[KernelSpec]:
    """Every kernel configuration that a launch can select, for ahead-of-time compilation."""
    return [spec for file in _KERNEL_FILES for spec in file.aot_specs()]
