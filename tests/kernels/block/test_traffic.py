"""Bytes: what each kernel file states about itself, and what the benchmarks divide by, against bytes counted."""

from __future__ import annotations

import functools
import importlib
from collections import Counter

import numpy as np
import pytest
import torch

from bench.cases import DIRECTIONS, OpCase, image_bytes
from bench.shapes import OpShape, activations, largest, model_blocks, model_shapes
from bench.traffic import Work, eager, fused, in_blocks, operations
from fastnet.summary import summarise
from kernels import ConvNorm, Excite, mbconv
from kernels.block import traffic as mbconv_traffic
from kernels.block.traffic import Block
from kernels.mbconv import mbconv_training
from tests.count_kernels import Traffic, count_traffic

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
    "bn_silu": "bn_silu",
    "bn_silu_squeeze_excite": "bn_silu_squeeze_excite",
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
    module = importlib.import_module(f"kernels.ops.{FILES.get(shape.op, shape.op)}")
    size = (shape.batch, shape.channels, shape.height, shape.width)
    if shape.op == "bn_drop_connect_add":
        assert shape.residual == shape.scaled, "the formula is that of the form with both or none"
        by_launch = module.bn_traffic(size, dtype, with_residual=shape.residual)
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


BLOCKS = (
    Block(3, 8, 48, 8, 2, 7, 9, 3, 1, residual=True, scaled=True),
    pytest.param(Block(3, 16, 96, 24, 4, 15, 8, 5, 2, "same"), marks=pytest.mark.slow),
    Block(2, 32, 32, 16, 8, 9, 9, 3, 1, expands=False),
)


def random_layers(block: Block) -> tuple[ConvNorm | None, ConvNorm, Excite, ConvNorm]:
    def norm(*shape: int) -> ConvNorm:
        out = shape[0]
        return ConvNorm(torch.randn(shape), torch.ones(out), torch.zeros(out), torch.zeros(out), torch.ones(out))

    c, s, k = block.channels, block.squeezed, block.kernel_size
    expand = norm(c, block.in_channels, 1, 1) if block.expands else None
    excite = Excite(torch.randn(s, c), torch.zeros(s), torch.randn(c, s), torch.zeros(c))
    return expand, norm(c, 1, k, k), excite, norm(block.out_channels, c, 1, 1)


@pytest.mark.wide
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(map(str, block)))
def test_a_fused_block_moves_the_bytes_that_its_schedule_states(block: Block) -> None:
    dtype = torch.bfloat16
    x = torch.randn(block.images, block.in_channels, block.height, block.width).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with count_traffic() as counted_forward:
        y = mbconv(
            x, *random_layers(block), torch.ones(block.images) if block.scaled else None,
            stride=block.stride, padding=block.padding, residual=block.residual, training=True, momentum=0.1, eps=1e-3,
            impl="triton",
        )  # fmt: skip
    with count_traffic() as counted_backward:
        y.sum().backward()
    for found, state in (
        (counted_forward, mbconv_traffic.forward),
        (counted_backward, mbconv_traffic.backward),
    ):
        for from_memory in (False, True):
            expected: Counter[str] = Counter()
            for launches in state(block, dtype, from_memory=from_memory).values():
                expected.update(launches)
            counts = {n: moved.distinct if from_memory else moved.total for n, moved in found.kernels.items()}
            assert counts == pytest.approx(dict(expected), rel=0.02)


@pytest.mark.wide
def test_a_join_that_is_left_to_the_next_block_moves_the_bytes_that_are_stated() -> None:
    """Two blocks with a residual: the second makes the first one's output, its own residual, and adds it."""
    block = Block(3, 8, 144, 8, 2, 7, 9, 3, 1, residual=True, scaled=True)
    options = {"stride": 1, "padding": "symmetric", "residual": True, "momentum": 0.1, "eps": 1e-3, "group": ""}
    x = torch.randn(3, 8, 7, 9).to(torch.bfloat16, memory_format=torch.channels_last)
    layers = random_layers(block)
    with count_traffic() as counted:
        left = mbconv_training(x, *layers, torch.ones(3), **options, defer_residual=True)  # type: ignore[arg-type]
        mbconv_training(left, *layers, torch.ones(3), **options, defer_residual=False)  # type: ignore[arg-type]
    for from_memory in (False, True):
        expected: Counter[str] = Counter()
        for steps in mbconv_traffic.model([block, block], torch.bfloat16, from_memory=from_memory):
            for step, launches in steps.items():
                if step.startswith("F"):
                    expected.update(launches)
        counts = {n: moved.distinct if from_memory else moved.total for n, moved in counted.kernels.items()}
        assert counts == pytest.approx(dict(expected), rel=0.02)


def test_blocks_are_those_of_the_model() -> None:
    def excited(b: Block) -> OpShape:
        height, width = (-(-n // b.stride) for n in (b.height, b.width))
        return OpShape("bn_silu_squeeze_excite", b.images, b.channels, height, width, b.squeezed)

    found = Counter(excited(block) for block in model_blocks("b1", 240, 2))
    calls = model_shapes("b1", 240, 2)
    assert found == Counter({s: n for s, n in calls.items() if s.op == "bn_silu_squeeze_excite"})


@pytest.mark.slow
def test_a_step_of_b0_moves_less_than_half_of_what_eager_pytorch_does() -> None:
    work = Work("b0", 224, 128)
    parts = fused(work, from_memory=True)
    assert sum(parts.values()) <= 10.5 * work.byte_pass
    assert in_blocks(parts) < operations(work) < eager(work)
    assert eager(work) == pytest.approx(25 * work.byte_pass, rel=0.05)
    told = summarise("b0", resolution=224)
    assert sum(stage.byte_passes or 0 for stage in told.stages[1:-1]) * work.byte_pass == pytest.approx(
        in_blocks(parts), rel=0.002
    )
    assert told.totals[101].byte_passes is not None
    # The summary leaves out the loss, the classifier and casts of weights.
    assert told.totals[101].byte_passes * work.byte_pass == pytest.approx(sum(parts.values()), rel=0.02)


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
