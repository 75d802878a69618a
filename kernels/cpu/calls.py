"""What the CPU operations take, checked before a call, and how they are declared to torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kernels import launch as L
from kernels.cpu.library import STORAGE_DTYPES
from kernels.operation import once_differentiable, schema_of


def as_image(name: str, x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
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


def as_flat(name: str, x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector or matrix as the library reads it, row-major."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(x.shape)}")
    if x.device.type != "cpu" or x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} on the CPU, got {x.dtype} on {x.device}")
    return x.contiguous()


def as_vectors(channels: int, **vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else as_flat(name, v, channels) for name, v in vectors.items()]


def as_optional(name: str, x: Tensor | None, *shape: int, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else as_image(name, x, *shape, dtype=dtype)


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


def declare(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operation, declared to torch, and called without torch's dispatcher, which takes as long as the function,
    where that has no part in it."""
    op = torch.library.custom_op(
        f"fastnet::cpu_{name}", function, mutates_args=(), device_types="cpu", schema=schema_of(function)
    )
    op.register_fake(fake)
    once_differentiable(op, "mbconv")
    OPERATIONS[name] = op

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if _plain(arguments[0]) else op(*arguments)

    return call
