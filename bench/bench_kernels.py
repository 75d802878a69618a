"""Every fused MBConv of B0, and each fused operation on the five largest B0 shapes, forward and backward, bf16, cold
L2: the proof's cases.

`extra_info` holds GB/s, the share of measured copy bandwidth, and the same for eager PyTorch and torch.compile. What
breaks the tolerance rule is not timed: it fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import DIRECTIONS, BlockCase, OpCase, timed_shapes
from bench.launches import describe
from bench.measure import ColdCache, copy_bandwidth, synchronise
from bench.proof.blocks import FUSED, time_block, timed_blocks
from bench.proof.kernels import DTYPE, time_case
from bench.shapes import OpShape
from bench.stages import Context
from kernels.block.traffic import Block

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on a CUDA device: there is none")


@pytest.fixture(scope="module")
def bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device)[0]


@pytest.fixture(scope="module")
def cold(device: torch.device) -> ColdCache:
    return ColdCache(device)


@pytest.mark.parametrize("shape", timed_shapes() if torch.cuda.is_available() else timed_shapes(tiny=True), ids=str)
def test_operation(
    benchmark: Any, shape: OpShape, device: torch.device, bandwidth: float, cold: ColdCache, tell: list[str]
) -> None:
    found = time_case(OpCase(shape, DTYPE, device), ("triton", "eager", "compiled"), cold, bandwidth, seconds=0.15)
    for direction in DIRECTIONS:
        for name, result in found[direction].items():
            tell.append(
                f"{shape.op} {shape} {direction}, {name}: {1e6 * result['timing']['median']:.1f} us, "
                f"{result['gb_per_second']:.0f} GB/s, {result['of_copy_bandwidth']:.0%} of copy bandwidth"
            )
    benchmark.extra_info.update(found, copy_bandwidth=bandwidth)
    benchmark.group = shape.op
    case = OpCase(shape, DTYPE, device)

    def both() -> None:
        """What the plug-in's own clock sees: forward and backward with the host's launch costs, warm caches."""
        case.backward(case.forward(case.public(), impl="triton"))
        synchronise(device)

    benchmark(both)


@pytest.mark.parametrize("block", timed_blocks(tiny=not torch.cuda.is_available()), ids=describe)
def test_block(benchmark: Any, block: Block, device: torch.device, bandwidth: float, tell: list[str]) -> None:
    rate = {"cases": {"large copy": {"bytes_per_second": bandwidth}}}
    context = Context(device, float("inf"), {"copy bandwidth": rate})
    found = time_block(block, (FUSED, "triton-ops", "torch", "compiled"), context)
    predicted = sum(found["predicted"].values())
    for name in (FUSED, "triton-ops", "torch", "compiled"):
        one = found[name]
        tell.append(
            f"block {describe(block)}, {name}: {1e3 * one['seconds']:.3f} ms, bytes alone {1e3 * predicted:.3f} ms, "
            f"peak {one['peak_bytes'] / 1e6:.0f} MB"
        )
    benchmark.extra_info.update(found, copy_bandwidth=bandwidth)
    benchmark.group = "mbconv"
    case = BlockCase(block, FUSED, DTYPE, device)

    def both() -> None:
        case.backward(case.forward())
        synchronise(device)

    benchmark(both)
