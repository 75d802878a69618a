"""Stand-ins for CUDA's recording, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnet.training.cuda_graph import Outputs


class RefuseHostReads(TorchDispatchMode):
    """Fails on what waits for the device: reading a number, and shapes that depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} needs the host")
        return func(*args, **(kwargs or {}))


class _Writer(RefuseHostReads):
    """Writes down what is dispatched, and each memory as it was when first seen."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.memory: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # it waits, and asks again with the tensor itself
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.memory:
                    self.memory[storage._cdata] = storage, storage.clone()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            out[-1].wait()
        self.operations.append((func, args, kwargs, out))
        return out


class OperationTape:
    """Writes down every operation that a function dispatches, gradients and collectives included, in order, and replays
    the list on the tensors that it met: as in a CUDA graph, no Python of the function's runs again, and nothing that
    was recorded has been computed. Whatever needs the host is refused."""

    def __init__(self) -> None:
        self.ran = self.recorded = self.replayed = 0
        self.names: list[str] = []

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        self.ran += 1
        return function()

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.recorded += 1
        random = torch.get_rng_state()
        with _Writer() as writer:
            outputs = function()
        torch.set_rng_state(random)
        for storage, before in writer.memory.values():
            storage.copy_(before)
        self.names = [str(func) for func, *_ in writer.operations]
        effective = [operation for operation in writer.operations if not _is_view(operation[0])]

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, out in effective:
                    _again(func, args, kwargs, out)

        return replay, outputs


def _is_view(func: Any) -> bool:
    written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    returned = [r.alias_info is not None for r in func._schema.returns]
    return not written and bool(returned) and all(returned)


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    result = func(*args, **kwargs)
    if func.namespace == "c10d":  # in place
        result[-1].wait()
        return
    for schema, mine, recorded in zip(func._schema.returns, _several(result), _several(out), strict=False):
        if schema.alias_info is not None:
            continue
        for new, old in zip(tree_leaves(mine), tree_leaves(recorded), strict=True):
            if isinstance(new, Tensor):
                if func.namespace == "_c10d_functional":
                    torch.ops._c10d_functional.wait_tensor(new)
                old.copy_(new)


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
