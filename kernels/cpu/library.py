"""The compiled operations, loaded once a process, and how they are called."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import BuildError, build

STORAGE_DTYPES = (torch.float32, torch.bfloat16)


class Library:
    """The functions of one compiled library, by operation and by the images' storage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} does not load ({error}): delete it, or pass impl='torch'") from error
        self._functions: dict[tuple[str, torch.dtype], Callable[..., int]] = {}

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        """Run `name` for images of `dtype` on as many threads as torch has. Tensors must be contiguous in memory."""
        function = self._functions.get((name, dtype))
        if function is None:
            table = (ctypes.c_void_p * len(STORAGE_DTYPES)).in_dll(self._library, f"fastnet_{name}")
            function = ctypes.CFUNCTYPE(ctypes.c_int)(table[STORAGE_DTYPES.index(dtype)] or 0)
            self._functions[name, dtype] = function
        if function(ctypes.c_long(torch.get_num_threads()), *map(_argument, arguments)):
            raise MemoryError(f"can't allocate memory for the CPU operation {name}")


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_double:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_long(value)


_own: Library | None = None
_forced: Library | None = None
_failures: dict[tuple[str | None, ...], str] = {}


def library(log: Callable[[str], None] = lambda line: None) -> Library:
    """This CPU's library, compiled where it is not yet, of which `log` gets a line. Raises BuildError."""
    global _own
    if _forced is not None:
        return _forced
    if _own is None:
        _own = Library(build(log=log))
    return _own


def unavailable(log: Callable[[str], None] = lambda line: None) -> str | None:
    """Why this CPU's library can't be had; None where it can. What has failed is not tried again in this process, but
    where compiler or cache are others."""
    where = tuple(os.environ.get(name) for name in ("CXX", "PATH", "XDG_CACHE_HOME"))
    if where not in _failures:
        try:
            library(log)
        except BuildError as error:
            _failures[where] = str(error)
    return _failures.get(where)


@contextmanager
def using(other: Library) -> Iterator[None]:
    """Run the operations of another build, such as that of a smaller CPU."""
    global _forced
    before, _forced = _forced, other
    try:
        yield
    finally:
        _forced = before
