"""The forms that a block of the model can be computed in, and which one `--kernels auto` takes, for the process.

`fastnet.training.tuning` finds out what is right and fastest on a GPU or a CPU and sets it here, before anything is
traced or recorded. What was not looked at runs fused on a GPU, and by PyTorch on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastnet.arch import ModelConfig
from kernels.cpu.library import unavailable

# The whole block in our kernels; cuDNN's and cuBLAS's convolutions with our operations between them; PyTorch alone,
# which under torch.compile is Inductor. In order of the memory that they keep for backward. "native" is the whole block
# in C++, on a CPU.
Form = Literal["triton", "native", "triton-ops", "torch"]


class Place(NamedTuple):
    """Where a form holds: a kind of block or layer, the height and width that it is given, the images' dtype and the
    device's type, batch statistics (training) or kept ones, compiled or not."""

    kind: tuple[int | str, ...]
    height: int
    width: int
    dtype: torch.dtype
    device: str
    training: bool
    compiled: bool


_chosen: dict[Place, Form] = {}


def use(forms: Mapping[Place, Form]) -> None:
    """Compute so from now on; other places stay as they are."""
    _chosen.update(forms)


def forget() -> None:
    """Back to the fused form everywhere."""
    _chosen.clear()


def chosen(
    kind: tuple[int | str, ...], x: Tensor, height: int, width: int, training: bool, dtype: torch.dtype | None = None
) -> Form:
    """What a block or layer computes by, on inputs of that size, on the device and of the dtype (or `dtype`) of x."""
    return _look_up(kind, height, width, dtype or x.dtype, x.device.type, training, torch.compiler.is_compiling())


@torch.compiler.assume_constant_result
def _look_up(*place: object) -> Form:
    return _chosen.get(Place(*place), "triton")  # type: ignore[arg-type]


def computes_natively(model: nn.Module) -> bool:
    """Whether what is around the model's blocks runs in C++ too: on a CPU where the library is there, for a model of
    ours whose kernels are native or auto."""
    config, parameter = getattr(model, "config", None), next(model.parameters(), None)
    if not isinstance(config, ModelConfig) or parameter is None or parameter.device.type != "cpu":
        return False
    return config.kernels in ("auto", "native") and config.network.family.has_kernels and unavailable() is None


def block_name(in_channels: int, expanded: int, out_channels: int, kernel_size: int, stride: int, height: int) -> str:
    """What tells blocks apart for a reader; `height` is that of the block's input."""
    return f"{in_channels}→{expanded}→{out_channels} k{kernel_size} s{stride} at {height}"
