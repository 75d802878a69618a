"""Each fused operation on the five largest B0 shapes, forward and backward, bf16, cold L2: the proof's cases.

`extra_info` holds GB/s, the share of measured copy bandwidth, and the same for eager PyTorch and torch.compile. What
breaks the tolerance rule is not timed: it fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import DIRECTIONS, OpCase, timed_shapes
from bench.measure import ColdCache, copy_bandwidth, synchronise
from bench.proof_kernels import DTYPE, time_case
from bench.shapes import OpShape

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
