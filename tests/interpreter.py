"""Makes Triton's interpreter err as a GPU does: fp32 is rounded to bf16 to nearest and even on a tie, instead of
truncated, and, where a test asks for it, the two approximations in a sigmoid are off by what the PTX ISA allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import numpy as np
from numpy.typing import NDArray


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `values` as bf16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding must not carry a NaN into infinity
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)


def correct() -> None:
    """Replace the interpreter's conversions between fp32 and bf16 in this process."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def corrected(values: NDArray[Any], source: Any, target: Any, rounding_mode: Any) -> NDArray[Any]:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(values.view(np.float32))
        if source == tl.bfloat16 and target == tl.float32:
            return from_bfloat16(values)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = corrected


SigmoidError = Literal["", "high", "low", "changing"]
_injected: list[SigmoidError] = [""]


def injected() -> SigmoidError:
    """The error that `approximate_sigmoid` gives at the moment; "" for none."""
    return _injected[-1]


@contextlib.contextmanager
def approximate_sigmoid(error: SigmoidError) -> Iterator[None]:
    """Let `ex2` of the kernels' sigmoid be off by 2 units in the last place and `rcp` by 1, the most that is stated.

    "high" and "low" err so that each sigmoid comes out too large or too small, "changing" by the bits of the argument:
    of ex2 by -2 to 2 units, of rcp by -1 to 1.
    """
    from kernels import batch_norm
    from kernels.launch import tl

    def off(value: Any, argument: Any, ulps: int, sign: int) -> Any:
        bits = value.to(tl.int32, bitcast=True)
        if error == "changing":
            # The four highest bits of a product with 2^32 / φ are -8 to 7.
            high = (argument.to(tl.int32, bitcast=True) * -1640531527) >> 28
            units = (high + 8) % (2 * ulps + 1) - ulps
        else:
            units = sign * ulps * (1 if error == "high" else -1)
        moved = (bits + units).to(tl.float32, bitcast=True)
        # Zero, infinity and NaN are exact, and no step may lead to them.
        return tl.where((value > 1e-37) & (value < 1e38), moved, value)

    exact_ex2, exact_rcp = batch_norm.ex2, batch_norm.rcp
    patched = mock.patch.multiple(
        batch_norm,
        ex2=lambda x: off(exact_ex2(x), x, 2, -1),
        rcp=lambda x: off(exact_rcp(x), x, 1, 1),
    )
    with patched:
        _injected.append(error)
        try:
            yield
        finally:
            _injected.pop()
