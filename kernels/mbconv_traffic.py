"""Bytes that the launches of one `kernels.mbconv` move, step by step of its schedule."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import depthwise, depthwise_backward, drop_connect, excite
from kernels.batch_norm import sum_traffic
from kernels.pointwise_gemm import Epilogue, gemm_traffic, plan
from kernels.pointwise_operand import Prologue, coefficient_traffic
from kernels.pointwise_wgrad import wgrad_traffic
from kernels.squeeze_excite import image_plan
from kernels.squeeze_excite import traffic as squeeze_traffic
from kernels.strips import Padding, geometry

Bytes = dict[str, int]


class Block(NamedTuple):
    """One MBConv on a batch: x [images, in_channels, height, width], expanded to `channels`."""

    images: int
    in_channels: int
    channels: int
    out_channels: int
    squeezed: int
    height: int
    width: int
    kernel_size: int
    stride: int
    padding: Padding = "symmetric"
    expands: bool = True
    residual: bool = False
    scaled: bool = False


def _excite(images: int, chunks: int, channels: int, squeezed: int, from_memory: bool) -> Bytes:
    moved = excite.traffic(3, images, chunks, channels, squeezed)
    if from_memory:  # both matrices once a launch
        again = (images - 1) * 2 * 4 * channels * squeezed
        return {name: count - (0 if "parameters" in name else again) for name, count in moved.items()}
    return moved


def forward(block: Block, dtype: torch.dtype, *, from_memory: bool = False) -> dict[str, Bytes]:
    """F1 to F6 by launch. Every access counts, as under the interpreter; with `from_memory` an element that another
    program of the same launch reads too counts once, as where the caches serve the others."""
    b, c, out = block.images, block.channels, block.out_channels
    g = geometry(block.height, block.width, block.kernel_size, block.stride, block.padding)
    narrow, wide = (b, block.in_channels, block.height, block.width), (b, c, block.height, block.width)
    d, p = (b, c, g.out_height, g.out_width), (b, out, g.out_height, g.out_width)

    def product(shape: tuple[int, int, int, int], n: int, prologue: Prologue, epilogue: Epilogue) -> Bytes:
        parts = plan(shape, shape[1], n, prologue, epilogue, dtype).parts
        return {
            "_pointwise_kernel": gemm_traffic(shape, n, dtype, prologue, epilogue, from_memory=from_memory),
            "_merge_stats_kernel": 8 * parts * n + 8 * n,
        }

    squeeze = squeeze_traffic(d, dtype, block.squeezed, norm=True)
    chunks = image_plan(d)[3]
    join = drop_connect.bn_traffic(p, dtype, joined=block.residual)["_drop_connect_kernel"]
    steps = {"F1 expand": product(narrow, c, "none", "statistics")} if block.expands else {}
    return steps | {
        "F2 depthwise": depthwise.traffic(wide, dtype, g, norm=block.expands, stats=True, again=not from_memory),
        "F3 squeeze": {"_squeeze_kernel": squeeze["_squeeze_kernel"]},
        "F4 excite": {"_excite_kernel": _excite(b, chunks, c, block.squeezed, from_memory)["_excite_kernel"]},
        "F5 project": {"_coefficients_kernel": coefficient_traffic(c, False)}
        | product(d, out, "bn_silu_gate", "statistics"),
        "F6 join": {"_drop_connect_kernel": join},
    }


def backward(block: Block, dtype: torch.dtype, *, from_memory: bool = False) -> dict[str, Bytes]:
    """B1 to B7 by launch; arguments as in `forward`."""
    b, c, out = block.images, block.channels, block.out_channels
    g = geometry(block.height, block.width, block.kernel_size, block.stride, block.padding)
    wide, d, p = (
        (b, c, block.height, block.width),
        (b, c, g.out_height, g.out_width),
        (b, out, g.out_height, g.out_width),
    )
    join = drop_connect.bn_traffic(p, dtype, joined=block.scaled)
    chunks = plan(p, out, c, "bn_grad", "gate_sums", dtype).parts
    gates = _excite(b, chunks, c, block.squeezed, from_memory)
    steps: dict[str, Bytes] = {
        "B1 join backward": {n: join[n] for n in ("_bn_drop_connect_reduce_kernel", "_sum_partials_kernel")},
        "B2 project dgrad": {
            "_coefficients_kernel": coefficient_traffic(out, True),
            "_pointwise_kernel": gemm_traffic(
                p, c, dtype, "bn_grad", "gate_sums", scaled=block.scaled, from_memory=from_memory
            ),
        },
        "B2 project wgrad": wgrad_traffic(
            d, out, dtype, "bn_silu_gate", "bn_grad", scaled=block.scaled, from_memory=from_memory
        ),
        "B3 excite backward": {n: gates[n] for n in ("_excite_backward_kernel", "_excite_parameters_kernel")},
        "B4 combine": {"_sum_partials_kernel": sum_traffic(2, b, c)},
        "B5 depthwise backward": depthwise_backward.traffic(
            wide, dtype, g, norm=block.expands, out_norm=True, again=not from_memory
        ),
    }
    if block.expands:
        epilogue: Epilogue = "residual" if block.residual else "none"
        steps["B7 expand dgrad"] = {
            "_coefficients_kernel": coefficient_traffic(c, True),
            "_pointwise_kernel": gemm_traffic(
                wide, block.in_channels, dtype, "bn_silu_grad", epilogue, from_memory=from_memory
            ),
        }
        steps["B7 expand wgrad"] = wgrad_traffic(
            wide, block.in_channels, dtype, "bn_silu_grad", from_memory=from_memory
        )
    return steps
