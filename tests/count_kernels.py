"""Bytes that Triton kernels move, counted under the interpreter: every unmasked lane of every load, store and atomic.

What a formula states about a kernel is held to this. Each access counts: what a cache would serve twice counts twice.
`distinct` counts an element once that a launch reads, and once that it writes: what must come from memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np


@dataclass
class Bytes:
    """What one kernel moved, over `launches` launches; `by_size`: element size -> bytes."""

    launches: int = 0
    distinct: int = 0
    by_size: Counter[int] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.by_size.total()


@dataclass
class Traffic:
    """Per kernel function name."""

    kernels: dict[str, Bytes] = field(default_factory=lambda: defaultdict(Bytes))

    @property
    def total(self) -> int:
        return sum(moved.total for moved in self.kernels.values())

    def of_size(self, size: int) -> int:
        """Bytes of elements of that many bytes."""
        return sum(moved.by_size[size] for moved in self.kernels.values())


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what the kernels run inside the block move. RuntimeError where Triton is not interpreting."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("bytes are counted under the interpreter: set TRITON_INTERPRET=1 before importing triton")
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    traffic = Traffic()
    running = ""

    touched: dict[tuple[bool, int], list[Any]] = defaultdict(list)  # addresses by (written, element size), a launch

    def count(pointers: Any, mask: Any, *, written: bool) -> None:
        lanes = int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape)))
        size = pointers.get_element_ty().primitive_bitwidth // 8
        traffic.kernels[running].by_size[size] += lanes * size
        present = np.broadcast_to(mask.data, pointers.data.shape)
        touched[written, size].append(np.unique(pointers.data[present]))

    def reading(original: Any) -> Any:
        def load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            count(pointers, mask, written=False)
            return original(pointers, mask, *rest, **options)

        return load

    def writing(original: Any) -> Any:
        def store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            count(pointers, mask, written=True)
            return original(pointers, value, mask, *rest, **options)

        return store

    def updating(original: Any) -> Any:
        def update(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            count(pointers, mask, written=False)
            count(pointers, mask, written=True)
            return original(operation, pointers, value, mask, *rest, **options)

        return update

    original_call = interpreter.GridExecutor.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal running
        running = self.fn.__name__
        traffic.kernels[running].launches += 1
        touched.clear()
        result = original_call(self, *arguments, **options)
        for (_, size), addresses in touched.items():
            traffic.kernels[running].distinct += size * np.unique(np.concatenate(addresses)).size
        return result

    # Unmasked loads and stores reach these with a mask of ones.
    with (
        patch.object(builder, "create_masked_load", reading(builder.create_masked_load)),
        patch.object(builder, "create_masked_store", writing(builder.create_masked_store)),
        patch.object(builder, "create_atomic_rmw", updating(builder.create_atomic_rmw)),
        patch.object(interpreter.GridExecutor, "__call__", call),
    ):
        yield traffic
