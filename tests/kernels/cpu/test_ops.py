"""The block's operations in C++: parity with PyTorch in every build that this CPU runs, bits, threads, refusals."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import kernels
from kernels.block import mbconv_ops
from kernels.cpu import ops as cpu_ops
from kernels.cpu.build import Level, build, cpu_level, cpu_levels
from kernels.cpu.calls import OPERATIONS
from kernels.cpu.library import Library, using
from kernels.mbconv import BlockImpl, PendingResidual, mbconv_training
from tests.kernels.block.test_mbconv import Block, Values, call, inputs, run
from tests.parity import DEVICE, Outcome, hold, nan_allocations

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the tests' tensors are on a GPU here")

F32, BF16 = torch.float32, torch.bfloat16
DRAWS = 32  # which cost little here; the largest of errors amplified by a small variance needs many
POISON = ("-DFASTNET_POISON",)  # scratch starts as NaN
TESTED: tuple[Level, ...] = ("amx", "avx512-bf16", "avx2", "plain")


def build_parameter(level: Level) -> Any:
    """This CPU's own build is in the daily check; one that it can't run is skipped with the reason."""
    marks = [pytest.mark.skipif(level not in cpu_levels(), reason=f"this CPU has no {level}")]
    return pytest.param(level, marks=marks if level == cpu_level() else [*marks, pytest.mark.slow])


LEVELS = [build_parameter(level) for level in dict.fromkeys([*TESTED, cpu_level()])]


@functools.cache
def library(level: Level) -> Library:
    return Library(build(level, POISON))


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[Level]:
    with using(library(request.param)):
        yield request.param


# Every kind of block: expansion, residual, kernel size, stride, padding, odd maps; channels that fill no vector, a
# product deeper and wider than a tile, one image, one pixel, more images than groups of rows.
BLOCKS = (
    Block(2, 2, 6, 3, 1, (4, 5), squeeze=1),
    Block(8, 8, 1, 3, 1, (7, 5), BF16),
    Block(4, 6, 6, 5, 2, (7, 15), squeeze=1),
    Block(16, 24, 6, 3, 2, (15, 8), padding="same", squeeze=4),
    Block(10, 10, 6, 5, 1, (5, 7), BF16),
    Block(22, 22, 1, 3, 1, (6, 7), images=1, scaled=False, squeeze=5),
    Block(24, 40, 6, 5, 1, (7, 7), BF16, images=2, scaled=False, squeeze=6),
    Block(6, 10, 6, 5, 2, (9, 6), BF16, padding="same"),
    # Of one pixel: enough images that no variance is near zero, which would make an error a matter of luck.
    Block(6, 4, 6, 5, 2, (1, 1), images=40, scaled=False, squeeze=1),
    # No bf16 where a tap sees padding alone: PyTorch (oneDNN with AVX512_BF16) leaves its gradient unwritten.
    Block(4, 4, 1, 3, 2, (2, 1), images=40, scaled=False, squeeze=1),
    Block(4, 4, 1, 3, 2, (3, 2), BF16, squeeze=1),
    Block(16, 16, 1, 5, 2, (12, 9)),
    Block(40, 40, 6, 3, 1, (23, 21), squeeze=10),
    Block(24, 40, 6, 5, 2, (23, 21), BF16, squeeze=10),
    Block(12, 12, 6, 5, 1, (2, 3), images=40, scaled=False),
    Block(16, 32, 6, 3, 1, (7, 9), BF16, squeeze=4),
)


@functools.cache
def outcome(block: Block, level: Level, seed: int = 0) -> Outcome:
    values = inputs(block, seed)
    with using(library(level)):
        kernel, pytorch = run(block, values.to(None), "native"), run(block, values.to(None), "torch")
    return Outcome(kernel, pytorch, run(block, values.to(torch.float64), "torch"), [])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_parity(block: Block, level: Level) -> None:
    kernel, pytorch, oracle, _ = outcome(block, level)
    for name, value in kernel.items():
        assert value.shape == oracle[name].shape, name
        assert value.dtype == pytorch[name].dtype, name
        assert torch.isfinite(value).all(), f"{name} has NaN or inf: something was not written"
    assert kernel["y"].is_contiguous(memory_format=torch.channels_last)
    assert kernel["dx"].is_contiguous(memory_format=torch.channels_last)
    hold(functools.partial(outcome, block, level), draws=DRAWS)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_inference(block: Block, level: Level) -> None:
    def infer(seed: int) -> Outcome:
        values = inputs(block, seed)

        def run(impl: BlockImpl, values: Values = values) -> dict[str, Tensor]:
            return {"y": call(block, values, impl, training=False)}

        return Outcome(run("native"), run("torch"), run("torch", values.to(torch.float64)), [])

    with torch.no_grad(), nan_allocations():
        hold(infer)


@pytest.mark.parametrize("block", [BLOCKS[12], BLOCKS[13], BLOCKS[14]], ids=str)
def test_the_bits_are_those_of_any_number_of_threads(block: Block) -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            found.append(run(block, inputs(block), "native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name, value in found[0].items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_residual_add_that_the_next_block_does_changes_no_bit(dtype: torch.dtype) -> None:
    blocks = (
        Block(6, 8, 1, 3, 1, (7, 5), dtype, scaled=False), Block(8, 8, 6, 3, 1, (7, 5), dtype),
        Block(8, 8, 6, 5, 1, (7, 5), dtype), Block(8, 10, 2, 3, 2, (7, 5), dtype, scaled=False),
    )  # fmt: skip

    def chained(defer: bool) -> list[Tensor]:
        values = [inputs(block, seed) for seed, block in enumerate(blocks)]
        leaves = [values[0].x, *(leaf for v in values for name, leaf in v.leaves().items() if name != "x")]
        for leaf in leaves:
            leaf.requires_grad_()
        h: Tensor | PendingResidual = values[0].x
        with nan_allocations():
            for block, v in zip(blocks, values, strict=True):
                layers: Any = v.layers
                padding: Any = block.padding
                h = mbconv_training(
                    h, **layers, drop_scale=v.drop_scale, stride=block.stride, padding=padding, residual=block.residual,
                    momentum=0.1, eps=1e-3, group="", defer_residual=defer and block is not blocks[-1], native=True,
                )  # fmt: skip
            assert isinstance(h, Tensor)
            return [h.detach(), *torch.autograd.grad(h, leaves, values[-1].dy)]

    assert all(torch.equal(one, other) for one, other in zip(chained(True), chained(False), strict=True))


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    """Sums of squares alone would leave none of them: (10⁴)² has units of 8."""
    x = (torch.randn(2, 8, 9, 9) + 1e4).contiguous(memory_format=torch.channels_last)
    identity, w = torch.eye(8), torch.zeros(8, 1, 3, 3)
    w[:, :, 1, 1] = 1
    expected = x.double().var((0, 2, 3), correction=0)
    for var in (
        cpu_ops.expand(x, identity)[2],
        cpu_ops.depthwise_forward(x, None, None, None, None, w, 1e-3, 1, "symmetric")[2],
    ):
        torch.testing.assert_close(var.double(), expected, rtol=1e-6, atol=0)


def test_whatever_lies_in_memory_as_rows_gives_the_same_bits() -> None:
    block = BLOCKS[4]
    values, other = inputs(block), inputs(block)
    other.x = other.x.contiguous()  # channels first
    other.dy = other.dy.contiguous()
    first, second = run(block, values, "native"), run(block, other, "native")
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("block", [BLOCKS[0], BLOCKS[7]], ids=str)
def test_schema_and_fake_tensors_of_every_operation(block: Block, level: Level) -> None:
    """`opcheck`, on what a block calls it with."""
    if level != cpu_level():
        pytest.skip("the same Python in every build")
    called: dict[str, tuple[Any, ...]] = {}
    declared = {name for name in OPERATIONS if hasattr(cpu_ops, name)}

    def recording(name: str, op: Any) -> Any:
        def run(*arguments: Any) -> Any:
            called[name] = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
            return op(*arguments)

        return run

    with contextlib.ExitStack() as stack:
        for name in declared:
            stack.enter_context(mock.patch.object(cpu_ops, name, recording(name, getattr(cpu_ops, name))))
        run(block, inputs(block), "native")
        with torch.no_grad():
            call(block, inputs(block), "native", training=False)
    assert called.keys() == declared - {"residual_expand"}  # of a block behind another
    p, w = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last), torch.randn(12, 4)
    vectors = [torch.ones(4) for _ in range(4)]
    called["residual_expand"] = (p, p.clone(), torch.ones(2), *vectors, w, 1e-3)
    for name, arguments in called.items():
        check_operation(name, arguments)


def check_operation(name: str, arguments: tuple[Any, ...]) -> None:
    """`opcheck`, and fake tensors with the strides and storage offsets of real ones, which it does not compare."""
    op = OPERATIONS[name]._opoverload
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode() as mode:
        fake = op(*tree_map_only(Tensor, mode.from_tensor, arguments))
    places = [
        [(t.stride(), t.storage_offset()) for t in tree_leaves(found) if t is not None]
        for found in (op(*arguments), fake)
    ]
    assert places[0] == places[1], name


def test_arguments_that_do_not_fit_are_refused_before_the_call() -> None:
    x, w, ones = torch.ones(2, 8, 3, 3), torch.ones(12, 8), torch.ones(8)
    with pytest.raises(ValueError, match="w must have shape"):
        cpu_ops.expand(x, torch.ones(12, 7))
    with pytest.raises(TypeError, match="w must be"):
        cpu_ops.expand(x, w.bfloat16())
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        cpu_ops.expand(x.half(), w.half())
    with pytest.raises(ValueError, match="residual must have shape"):
        cpu_ops.residual_add(x, x[:1], None, ones, ones, ones, ones, 1e-3)
    with pytest.raises(ValueError, match="k must be 3 or 5"):
        cpu_ops.depthwise_forward(x, None, None, None, None, torch.ones(8, 1, 7, 7), 1e-3, 1, "symmetric")
    block = BLOCKS[0]
    with pytest.raises(TypeError, match="pass impl='torch'"):
        call(block, inputs(block).to(torch.float64), "native")
    values = inputs(block)
    layers: Any = {n: None if v is None else type(v)(*(t.to("meta") for t in v)) for n, v in values.layers.items()}
    x, options = values.x.to("meta"), {"training": True, "momentum": 0.1, "eps": 1e-3, "residual": True}
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        kernels.mbconv(x, **layers, **options, impl="native")  # type: ignore[arg-type]


def test_both_forms_of_an_operation_take_the_same_arguments() -> None:
    forms = {name: op for name, op in OPERATIONS.items() if hasattr(mbconv_ops, name)}
    assert len(forms) == len(mbconv_ops.OPERATIONS)
    for name, op in forms.items():
        mine, theirs = (str(one._opoverload._schema).partition("(")[2] for one in (op, getattr(mbconv_ops, name)))
        assert mine == theirs, name
