"""Runs every kernel launch of a pytest run as compiled, without a GPU, and fails on faults that values do not show.

A plugin, `pytest -p tests.races`, for `ttsem`: each launch is compiled to Triton's TTIR for sm_90, the very code that a
GPU's machine code is made from, and executed program by program on a CPU. It raises at the kernel's line when

- two programs touch the same element and one of them writes it, so that their order matters (a race);
- a load or a store is outside the tensor that the pointer belongs to, by one element already;
- a load reads an element that no program has written: fresh memory is NaN, and no case has another;
- a launch could not be judged: an operation that ttsem does not know, or more accesses than it can keep.

Beyond ttsem's own `python -m ttsem.sanitize pytest` it knows one more instruction of the kernels' assembly, notices
unwritten memory at the load instead of in the values, and compiles no further than TTIR, each configuration once.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ttsem import harness, memory, mlir, ops, sanitize, values

CAPABILITY = 90
_session = contextlib.ExitStack()
_load = memory.Memory.load


def active() -> bool:
    """Whether launches of this process are executed by ttsem."""
    return bool(torch.cuda.is_available() and type(harness._driver.active).__module__.startswith("ttsem"))


def reciprocal(x: Any) -> list[NDArray[np.float32]]:
    """`rcp.approx.ftz.f32`, as exact as fp32 allows; that it may be a unit off is the parity tests' concern."""
    with np.errstate(divide="ignore", under="ignore"):
        quotient = np.reciprocal(np.asarray(x, np.float32))
    return [np.where(np.abs(quotient) < np.finfo(np.float32).tiny, np.float32(0), quotient)]


def load(self: Any, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
    """ttsem's load, which stops where a lane that is not masked off finds NaN."""
    loaded = _load(self, addresses, mask, other, dtype)
    if loaded.dtype == np.uint16:  # how ttsem holds bf16
        unwritten = (loaded & 0x7FFF) > 0x7F80
    else:
        unwritten = np.isnan(loaded) if loaded.dtype.kind == "f" else np.zeros(())
    if unwritten.any():
        raise values.Poison(f"{int(unwritten.sum())} of the elements read were never written")
    return loaded


class _Texts(dict[tuple[Any, ...], str]):
    """TTIR by kernel and specialisation."""

    def of(self, record: Any, stage: str, target: Any) -> str:
        options, *specialised = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (record.fn, str(options), *map(str, specialised))
        if key not in self:
            mlir.enable_generic_printing()
            self[key] = mlir.to_generic(harness._stage_text(record, stage, target))
        return self[key]


def unchecked() -> NoReturn:
    raise sanitize.Unjudged("unsupported", "too many accesses to look for races: make the case smaller", [])


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before tests.conftest asks for a GPU, so that the kernels compile instead of being interpreted."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory with NaN
    ops.PTX_FRAGMENTS["rcp.approx.ftz.f32 $0, $1;"] = (reciprocal, "div")
    memory.Memory.load = load
    harness.ir_for_launch = _Texts().of
    harness.mlir.parse = functools.cache(mlir.parse)
    _session.enter_context(sanitize.session(CAPABILITY, "pytest", on_unchecked=unchecked))
    from kernels import device

    _session.enter_context(device.pretend(device.REFERENCE))


def pytest_unconfigure() -> None:
    _session.close()
