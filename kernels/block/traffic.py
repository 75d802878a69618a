"""Bytes that the launches of one `kernels.mbconv` move, step by step of its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kernels.batch_norm import partial_plan, sum_traffic
from kernels.block import depthwise, depthwise_backward, strips
from kernels.block.pointwise import expansion_backward_traffic
from kernels.block.pointwise_blocks import plan
from kernels.block.pointwise_gemm import gemm_traffic
from kernels.block.pointwise_operand import Prologue, norm_vectors_traffic
from kernels.block.pointwise_wgrad import wgrad_traffic
from kernels.block.strips import BLOCK_C, Geometry, Padding, geometry
from kernels.device import REFERENCE, Gpu
from kernels.launch import cdiv, tile_for
from kernels.ops import drop_connect, excite
from kernels.ops.squeeze_excite import image_plan
from kernels.ops.squeeze_excite import traffic as squeeze_traffic

Bytes = dict[str, int]
Shape = tuple[int, int, int, int]


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
    if from_memory:  # matrices and biases once a launch; the gate, which backward reads twice, once
        matrices = (images - 1) * 2 * 4 * channels * squeezed
        moved["_excite_kernel"] -= matrices + (images - 1) * 4 * (channels + squeezed)
        moved["_excite_backward_kernel"] -= matrices + 4 * images * channels
        slices = cdiv(channels, excite.parameter_blocks(squeezed)["BLOCK_C"])
        moved["_excite_parameters_kernel"] -= (slices - 1) * 2 * 4 * images * squeezed
    return moved


def _image(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _squeeze(d: Shape, dtype: torch.dtype, squeezed: int, from_memory: bool, gpu: Gpu) -> Bytes:
    if not from_memory:
        return {"_squeeze_kernel": squeeze_traffic(d, dtype, squeezed, norm=True, gpu=gpu)["_squeeze_kernel"]}
    b, c, _, _ = d
    return {"_squeeze_kernel": _image(d, dtype) + 4 * 4 * c + 3 * 4 * b * c * image_plan(d, gpu)[3]}


def _residual_add(p: Shape, dtype: torch.dtype, *, residual: bool, scaled: bool, from_memory: bool, gpu: Gpu) -> Bytes:
    """Forward and backward; a block has a scale only where it has a residual, and the first may have that alone."""
    b, c, height, width = p
    moved = drop_connect.bn_traffic(p, dtype, with_residual=residual, gpu=gpu)
    tiles, blocks = cdiv(height * width, tile_for(c).height), cdiv(c, tile_for(c).block_c)
    if residual and not scaled:
        moved["_drop_connect_kernel"] -= 4 * b * tiles * blocks
        moved["_bn_drop_connect_reduce_kernel"] -= 4 * b * height * width * blocks
    if from_memory:
        partials = partial_plan(b * height * width, c, gpu, halved=True)[3]
        moved["_drop_connect_kernel"] = (3 if residual else 2) * _image(p, dtype) + 4 * 4 * c + 4 * b * scaled
        moved["_bn_drop_connect_reduce_kernel"] = 2 * _image(p, dtype) + 4 * b * scaled + 8 * c * (1 + partials)
    return moved


def _depthwise(shape: Shape, dtype: torch.dtype, g: Geometry, norm: bool, from_memory: bool, gpu: Gpu) -> Bytes:
    moved = depthwise.traffic(shape, dtype, g, norm=norm, stats=True, again=not from_memory, gpu=gpu)
    if from_memory:  # vectors and weights once a launch; means and counts, which the merge reads twice, once
        c = shape[1]
        plan = strips.forward_plan(shape, dtype, g, norm=norm, stats=True, gpu=gpu)[0]
        vectors = 4 * plan.blocks * g.kernel_size**2 * BLOCK_C + (16 * c if norm else 0)
        moved["_depthwise_kernel"] -= (plan.partials - 1) * vectors
        moved["_merge_counted_stats_kernel"] = 4 * plan.partials * (2 * c + 1) + 4 * 2 * c
    return moved


def _depthwise_backward(
    shape: Shape, dtype: torch.dtype, g: Geometry, norm: bool, from_memory: bool, gpu: Gpu
) -> Bytes:
    moved = depthwise_backward.traffic(shape, dtype, g, norm=norm, out_norm=True, again=not from_memory, gpu=gpu)
    if from_memory:  # vectors and weights once a launch
        b, c, _, _ = shape
        plan = strips.backward_plan(shape, dtype, g, norm=norm, out_norm=True, gpu=gpu)[0]
        area, separate = g.kernel_size**2, plan.config.separate
        images = 2 * _image(shape, dtype) + (1 if separate else 2) * _image((b, c, g.out_height, g.out_width), dtype)
        vectors = c * (4 * norm + (0 if separate else 6 + 2 * b)) + plan.blocks * area * BLOCK_C
        moved["_depthwise_backward_kernel"] = images + 4 * (vectors + c * (area + 2 * norm) * plan.partials)
    return moved


def forward(
    block: Block,
    dtype: torch.dtype,
    *,
    prev: Block | None = None,
    defer_residual: bool = False,
    from_memory: bool = False,
    gpu: Gpu = REFERENCE,
) -> dict[str, Bytes]:
    """F1 to F6 by launch. Every access counts, as under the interpreter; with `from_memory` an element that another
    program of the same launch reads too counts once, as where the caches serve the others. `gpu`: the card that the
    launches are cut up for.

    prev: a block that leaves its residual add to this one's F1; with `defer_residual` this one leaves its
    own to the next.
    """
    b, c, out = block.images, block.channels, block.out_channels
    g = geometry(block.height, block.width, block.kernel_size, block.stride, block.padding)
    narrow, wide = (b, block.in_channels, block.height, block.width), (b, c, block.height, block.width)
    d, p = (b, c, g.out_height, g.out_width), (b, out, g.out_height, g.out_width)

    def product(shape: Shape, n: int, prologue: Prologue, scaled: bool = False, with_residual: bool = False) -> Bytes:
        parts = plan(shape, shape[1], n, prologue, "statistics", dtype, gpu).parts
        moved = gemm_traffic(
            shape,
            n,
            dtype,
            prologue,
            "statistics",
            scaled=scaled,
            with_residual=with_residual,
            from_memory=from_memory,
            gpu=gpu,
        )
        return {"_pointwise_kernel": moved, "_merge_stats_kernel": 8 * parts * n + 8 * n}

    gate = _excite(b, image_plan(d, gpu)[3], c, block.squeezed, from_memory)
    added = _residual_add(p, dtype, residual=block.residual, scaled=block.scaled, from_memory=from_memory, gpu=gpu)
    steps: dict[str, Bytes] = {}
    if prev is not None:
        steps["F1 expand"] = {"_norm_vectors_kernel": norm_vectors_traffic(block.in_channels, False)}
        steps["F1 expand"] |= product(narrow, c, "residual_add", prev.scaled, prev.residual)
    elif block.expands:
        steps["F1 expand"] = product(narrow, c, "none")
    steps |= {
        "F2 depthwise": _depthwise(wide, dtype, g, block.expands, from_memory, gpu),
        "F3 squeeze": _squeeze(d, dtype, block.squeezed, from_memory, gpu),
        "F4 excite": {"_excite_kernel": gate["_excite_kernel"]},
        "F5 project": {"_norm_vectors_kernel": norm_vectors_traffic(c, False)} | product(d, out, "bn_silu_gate"),
    }
    return (
        steps | {"F6 residual add": {"_drop_connect_kernel": added["_drop_connect_kernel"]}}
        if not defer_residual
        else steps
    )


def backward(block: Block, dtype: torch.dtype, *, from_memory: bool = False, gpu: Gpu = REFERENCE) -> dict[str, Bytes]:
    """B1 to B7 by launch; arguments as in `forward`."""
    b, c, out = block.images, block.channels, block.out_channels
    g = geometry(block.height, block.width, block.kernel_size, block.stride, block.padding)
    wide, d, p = (
        (b, c, block.height, block.width),
        (b, c, g.out_height, g.out_width),
        (b, out, g.out_height, g.out_width),
    )
    added = _residual_add(p, dtype, residual=block.residual, scaled=block.scaled, from_memory=from_memory, gpu=gpu)
    chunks = plan(p, out, c, "bn_grad", "gate_sums", dtype, gpu).parts
    common: Any = {"from_memory": from_memory, "gpu": gpu}
    gates = _excite(b, chunks, c, block.squeezed, from_memory)
    steps: dict[str, Bytes] = {
        "B1 residual add backward": {n: added[n] for n in ("_bn_drop_connect_reduce_kernel", "_sum_partials_kernel")},
        "B2 project dgrad": {
            "_norm_vectors_kernel": norm_vectors_traffic(out, True),
            "_pointwise_kernel": gemm_traffic(p, c, dtype, "bn_grad", "gate_sums", scaled=block.scaled, **common),
        },
        "B2 project wgrad": wgrad_traffic(d, out, dtype, "bn_silu_gate", "bn_grad", scaled=block.scaled, **common),
        "B3 excite backward": {n: gates[n] for n in ("_excite_backward_kernel", "_excite_parameters_kernel")},
        "B4 combine": {"_sum_partials_kernel": sum_traffic(2, b, c)},
        "B5 depthwise backward": _depthwise_backward(wide, dtype, g, block.expands, from_memory, gpu),
    }
    if block.expands:
        steps["B7 expand backward"] = {"_norm_vectors_kernel": norm_vectors_traffic(c, True)}
        steps["B7 expand backward"] |= expansion_backward_traffic(
            wide, block.in_channels, dtype, residual=block.residual, **common
        )  # fmt: skip
    return steps


def model(
    blocks: Sequence[Block], dtype: torch.dtype, *, from_memory: bool = False, gpu: Gpu = REFERENCE
) -> list[dict[str, Bytes]]:
    """F1 to B7 of each of the blocks of a model, which leave their residual adds to the expansion behind them."""
    found = []
    for prev, block, following in zip([None, *blocks], blocks, [*blocks[1:], None], strict=False):
        steps = forward(
            block, dtype, prev=prev if block.expands else None,
            defer_residual=following is not None and following.expands, from_memory=from_memory, gpu=gpu,
        )  # fmt: skip
        found.append(steps | backward(block, dtype, from_memory=from_memory, gpu=gpu))
    return found
