"""Makes Triton's interpreter round fp32 to bf16 as every GPU does, to nearest and even on a tie; it truncates."""

from __future__ import annotations

from typing import Any

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


def mend() -> None:
    """Replace the interpreter's conversions between fp32 and bf16 in this process."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def mended(values: NDArray[Any], source: Any, target: Any, rounding_mode: Any) -> NDArray[Any]:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(values.view(np.float32))
        if source == tl.bfloat16 and target == tl.float32:
            return from_bfloat16(values)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = mended
