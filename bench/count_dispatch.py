"""Bytes that a step moves through PyTorch's own operations, counted where they are dispatched; nothing is computed.

An operation moves its tensor arguments and its results once each, and a view moves nothing. Batch norm alone must read
its images twice, for a sum over the batch before it can apply it: x forward, x and dy backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.contenders import NUM_CLASSES

_READ_TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}  # so many of the first arguments
_FREE = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if function.namespace == "aten" and name not in _FREE and not function.is_view:
            tensors = tree_leaves((args, kwargs, results, args[: _READ_TWICE.get(name, 0)]))
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return results


def step_bytes(
    build: Callable[[], nn.Module], batch: int, resolution: int, *, amp: torch.dtype = torch.bfloat16
) -> Counter[str]:
    """Bytes by operation of forward, loss and backward of one training step under autocast.

    This project's Triton operations are left out: their files state what they move.
    """
    with FakeTensorMode():
        model = build()
        images = torch.empty(batch, 3, resolution, resolution).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long)
        with _Counter() as counter:
            with torch.autocast("cpu", dtype=amp):
                logits = model(images)
            torch.nn.functional.cross_entropy(logits.float(), labels % NUM_CLASSES).backward()
    return counter.bytes
