"""Fused operations around the convolutions of MBConv, forward and backward, each with a plain-PyTorch twin.

Every function takes `impl`: "auto" runs Triton where `x` is on CUDA and PyTorch elsewhere, "triton" never falls
back, "torch" is `kernels.reference`. A Triton operation can be differentiated once.
"""

from __future__ import annotations

from kernels import augment, batch_norm
from kernels.aot import KernelSpec
from kernels.block import depthwise, depthwise_backward, pointwise
from kernels.launch import Impl
from kernels.mbconv import ConvNorm, Excite, mbconv
from kernels.ops import bn_silu as batch_norm_silu
from kernels.ops import drop_connect, excite
from kernels.ops import squeeze_excite as _squeeze_excite_file
from kernels.ops.bn_silu import bn_silu
from kernels.ops.bn_silu_squeeze_excite import bn_silu_squeeze_excite
from kernels.ops.drop_connect import bn_drop_connect_add, drop_connect_add
from kernels.ops.squeeze_excite import squeeze_excite

__all__ = [
    "ConvNorm",
    "Excite",
    "Impl",
    "KernelSpec",
    "all_specs",
    "bn_drop_connect_add",
    "bn_silu",
    "bn_silu_squeeze_excite",
    "drop_connect_add",
    "mbconv",
    "squeeze_excite",
]

_KERNEL_FILES = (
    batch_norm, batch_norm_silu, excite, _squeeze_excite_file, drop_connect, depthwise, depthwise_backward, pointwise,
    augment,
)  # fmt: skip


def all_specs() -> list[KernelSpec]:
    """Every kernel configuration that a launch can select, for ahead-of-time compilation."""
    return [spec for file in _KERNEL_FILES for spec in file.aot_specs()]
