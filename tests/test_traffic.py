"""Bytes: what each kernel file states about itself, and what the benchmarks divide by, against bytes counted."""

from __future__ import annotations

import functools
import importlib
from collections import Counter

import numpy as np
import pytest
import torch

from bench.cases import DIRECTIONS, OpCase, image_bytes
from bench.shapes import OpShape, activations, largest, model_shapes
from bench.traffic import Traffic, count_traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted under the interpreter, on a CPU")

# Ragged on purpose, and large enough that a reduction walks several tiles and leaves several partial sums.
SHAPES = [
    OpShape("squeeze_excite", 2, 24, 15, 15, squeezed=6),
    OpShape("bn_silu", 3, 10, 15, 15),
    OpShape("bn_silu_squeeze_excite", 2, 24, 15, 15, squeezed=4),
    OpShape("drop_connect_add", 3, 22, 7, 7, residual=True, scaled=True),
    OpShape("bn_drop_connect_add", 3, 144, 7, 7, residual=True, scaled=True),
    OpShape("bn_drop_connect_add", 2, 16, 15, 15),
]

FILES = {
    "bn_silu": "batch_norm_silu",
    "bn_silu_squeeze_excite": "batch_norm_silu_squeeze_excite",
    "drop_connect_add": "drop_connect",
    "bn_drop_connect_add": "drop_connect",
}


@functools.cache
def counted(shape: OpShape, dtype: torch.dtype) -> dict[str, Traffic]:
    case = OpCase(shape, dtype, torch.device("cpu"))
    with count_traffic() as forward:
        output = case.forward(case.public(), impl="triton")
    with count_traffic() as backward:
        case.backward(output)
    return {"forward": forward, "backward": backward}


def stated(shape: OpShape, dtype: torch.dtype) -> Counter[str]:
    """Bytes by kernel, as the operation's file says."""
    module = importlib.import_module(f"kernels.{FILES.get(shape.op, shape.op)}")
    size = (shape.batch, shape.channels, shape.height, shape.width)
    if shape.op == "bn_drop_connect_add":
        assert shape.residual == shape.scaled, "the formula is that of the form with both or none"
        by_launch = module.bn_traffic(size, dtype, joined=shape.residual)
    elif shape.squeezed:
        by_launch = module.traffic(size, dtype, shape.squeezed)
    else:
        by_launch = module.traffic(size, dtype)
    by_kernel: Counter[str] = Counter()
    for name, count in by_launch.items():
        by_kernel[name.partition(":")[0]] += count
    return by_kernel


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.op}-{s}")
def test_kernels_move_the_bytes_that_their_file_states(shape: OpShape) -> None:
    dtype = torch.bfloat16
    found: Counter[str] = Counter()
    for traffic in counted(shape, dtype).values():
        for name, moved in traffic.kernels.items():
            found[name] += moved.total
    expected = stated(shape, dtype)
    assert set(found) == set(expected)
    for name, count in found.items():
        assert count == pytest.approx(expected[name], rel=0.02), name


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.op}-{s}")
def test_bandwidth_is_computed_from_the_image_bytes_that_move(shape: OpShape) -> None:
    # Images are bf16, vectors fp32: two-byte elements are image elements.
    found = counted(shape, torch.bfloat16)
    for direction in DIRECTIONS:
        assert found[direction].of_size(2) == image_bytes(shape, torch.bfloat16, direction)


def test_counter_counts_unmasked_lanes_only() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)
        tl.store(y_ptr + n, tl.load(x_ptr))

    x, y = torch.arange(20, dtype=torch.int16), torch.zeros(21, dtype=torch.int16)
    with count_traffic() as traffic:
        copy_kernel[(3,)](x, y, 20, BLOCK=8)
    assert traffic.kernels["copy_kernel"].launches == 1
    # 20 masked elements and one unmasked one for each of three programs, read and written, two bytes each.
    assert traffic.total == 2 * 2 * (20 + 3)
    np.testing.assert_array_equal(y[:20], x)
    before = traffic.total
    copy_kernel[(3,)](x, y, 20, BLOCK=8)
    assert traffic.total == before, "counting ends with the block"


def test_shapes_come_from_the_model() -> None:
    calls = model_shapes("b0", 224, 128)
    assert sum(calls.values()) == 1 + 15 + 16 + 16 + 1  # stem, expansions, depthwise, projections, head
    stem = OpShape("bn_silu", 128, 32, 112, 112)
    assert calls[stem] == 1
    first = OpShape("bn_silu_squeeze_excite", 128, 32, 112, 112, squeezed=8)
    assert calls[first] == 1
    widths = {s.channels for s in calls if s.op == "bn_silu_squeeze_excite"}
    assert widths == {32, 96, 144, 240, 480, 672, 1152}
    biggest = largest("bn_silu", 5)
    assert [s.elements for s in biggest] == sorted((s.elements for s in biggest), reverse=True)
    assert (biggest[0].channels, biggest[0].height) == (96, 112)
    assert all(s.residual and s.scaled for s in largest("drop_connect_add", 5))
    with pytest.raises(ValueError, match="unknown operation"):
        largest("convolution")


def test_one_pass_is_the_published_number_of_activations() -> None:
    # timm's registry lists 6.75 M for B0 at 224 and 10.88 M for B1 at 240.
    assert activations("b0", 224) == pytest.approx(6.75e6, rel=0.005)
    assert activations("b1", 240) == pytest.approx(10.88e6, rel=0.005)
