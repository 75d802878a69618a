"""What follows backward on a CPU, each in one pass over all tensors of a model: an optimizer's step, the moving average
of weights, and the norm of gradients.

Eager PyTorch makes a pass for each operation of each tensor: for RMSprop with an average 12 reads and writes of the
weights' size more, and some thousand calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kernels.cpu.library import library

Row = TypeVar("Row", bound=tuple[Tensor, ...])


def takes(*row: Tensor) -> bool:
    """Whether these tensors can be a row: fp32 on the CPU, dense, of one size and in one order in memory."""
    first = row[0]
    shape, stride = first.shape, first.stride()
    for t in row:
        if t.dtype is not torch.float32 or not t.is_cpu or t.stride() != stride or t.shape != shape:
            return False
    return first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)


def rmsprop_(
    rows: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    lr: float,
    *,
    weight_decay: float,
    decay: float,
    momentum: float,
    eps: float,
    tensorflow: bool,
) -> list[int]:
    """One step in place of rows of parameter, gradient, mean square and momentum; returns the places of those that
    `takes` refuses, which are left as they are. tensorflow: eps within the root, and lr within the momentum."""
    table, left = _table(rows)
    library().call(
        "rmsprop_step", torch.float32, len(table), table, float(lr), float(weight_decay), int(tensorflow), float(decay),
        float(momentum), float(eps),
    )  # fmt: skip
    return left


def move_average_(pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> list[int]:
    """average <- average + weight (value - average) for each (average, value). Returns the places of pairs that `takes`
    refuses, which are left as they are."""
    table, left = _table(pairs)
    library().call("move_average", torch.float32, len(table), table, float(weight))
    return left


def norm(tensors: Sequence[Tensor]) -> Tensor | None:
    """√Σ x² over all tensors, float32 []; the same bits for any number of threads. None where `takes` refuses one."""
    table, left = _table([(t,) for t in tensors])
    if left:
        return None
    found = torch.empty(())
    library().call("norm_of", torch.float32, len(table), table, found)
    return found


def _table(rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
    """Addresses and sizes of the rows that are taken, int64, and the places of the others."""
    left = [i for i, row in enumerate(rows) if not takes(*row)]
    taken = [row for i, row in enumerate(rows) if i not in left] if left else rows
    table = [[*(t.data_ptr() for t in row), row[0].numel()] for row in taken]
    return torch.tensor(table, dtype=torch.int64), left
