"""What `--kernels auto` computes a training block by where measurements say that the fused kernels lose.

`choices.json` beside this file holds the exceptions alone, GPU by GPU and block by block, and is written from
`bench/results` by `python -m bench.choices --write`. A GPU or block that was not measured runs fused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastnet.model import BlockShape

# The whole block in our kernels; cuDNN's and cuBLAS's convolutions with our operations between them; PyTorch alone,
# which under torch.compile is Inductor.
Form = Literal["triton", "triton-ops", "torch"]
# GPU → block → mode ("eager" or "compiled") → form
Exceptions = dict[str, dict[str, dict[str, Form]]]

FILE = Path(__file__).with_name("choices.json")
EXCEPTIONS: Exceptions = json.loads(FILE.read_text(encoding="utf-8"))


def block_key(in_channels: int, expanded: int, out_channels: int, kernel_size: int, stride: int, height: int) -> str:
    """What tells blocks apart in measurements; `height` is that of the block's input."""
    return f"{in_channels}→{expanded}→{out_channels} k{kernel_size} s{stride} at {height}"


@torch.compiler.assume_constant_result
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def chosen(shape: BlockShape, x: Tensor, height: int) -> Form:
    """How to train a block on an input of that height, on the device and of the dtype of x; what was measured holds for
    16-bit images."""
    if not EXCEPTIONS or x.dtype not in (torch.float16, torch.bfloat16):
        return "triton"
    expanded = shape.in_channels * shape.expand_ratio
    key = block_key(shape.in_channels, expanded, shape.out_channels, shape.kernel_size, shape.stride, height)
    mode = "compiled" if torch.compiler.is_compiling() else "eager"
    return EXCEPTIONS.get(_device_name(x.device), {}).get(key, {}).get(mode, "triton")
