"""The fused MBConv: parity with PyTorch block by block, what it saves, that it repeats, compiles and refuses."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kernels
from kernels import ConvNorm, Excite, launch
from kernels.block import mbconv_ops
from kernels.mbconv import BlockImpl, PendingResidual, mbconv_training
from kernels.tolerance import approximated
from tests.parity import DEVICE, NAMES, Outcome, few_programs, hold, kernel_device, nan_allocations, remembered

__all__ = ["kernel_device"]

RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Block:
    """One kind of block; `expand_ratio` 1 has no expansion."""

    in_channels: int
    out_channels: int
    expand_ratio: int
    kernel_size: int
    stride: int
    map: tuple[int, int]
    dtype: torch.dtype = torch.float32
    images: int = 3
    squeeze: int = 2
    padding: str = "symmetric"
    scaled: bool = True

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    def __str__(self) -> str:
        size = "x".join(map(str, (self.images, self.in_channels, *self.map)))
        kind = f"e{self.expand_ratio}-k{self.kernel_size}-s{self.stride}-{self.padding}"
        unscaled = "-no_drop_scale" * (not self.scaled)
        return f"{size}-to{self.out_channels}-{kind}-{NAMES[self.dtype]}{unscaled}"


# Every kind in B0-B7: with and without expansion and residual, kernel sizes, strides, odd maps; and ragged channels.
QUICK = (
    Block(2, 2, 6, 3, 1, (4, 5), squeeze=1),
    Block(8, 8, 1, 3, 1, (7, 5), torch.float16),
)
SLOW = (
    Block(8, 8, 6, 3, 1, (5, 7)),
    Block(4, 6, 6, 5, 2, (7, 15), squeeze=1),
    Block(6, 10, 6, 5, 2, (9, 6), torch.float16, padding="same"),
    Block(16, 24, 6, 3, 2, (15, 8), padding="same", squeeze=4),
    Block(10, 10, 6, 5, 1, (5, 7), torch.bfloat16),
    Block(8, 16, 1, 3, 1, (9, 7), torch.bfloat16),
    Block(22, 22, 1, 3, 1, (6, 7), images=1, scaled=False, squeeze=5),
    Block(24, 40, 6, 5, 1, (7, 7), torch.float16, images=2, scaled=False, squeeze=6),
)
FULL = tuple(
    Block(c_in, c_out, ratio, k, stride, size, dtype, padding=padding)
    for dtype in NAMES
    for c_in, c_out in ((8, 8), (6, 6), (8, 24))
    for ratio in (1, 6)
    for k, stride, padding in ((3, 1, "symmetric"), (5, 1, "same"), (3, 2, "same"), (5, 2, "symmetric"))
    for size in ((8, 7), (15, 15))
)
CASES = [
    *(
        pytest.param(block, id=str(block), marks=pytest.mark.wide if block.dtype == torch.float32 else ())
        for block in QUICK
    ),
    *(pytest.param(block, id=str(block), marks=pytest.mark.slow) for block in SLOW),
    *(pytest.param(block, id=str(block), marks=pytest.mark.full) for block in FULL),
]


@dataclass
class Values:
    x: Tensor
    dy: Tensor
    drop_scale: Tensor | None
    layers: dict[str, ConvNorm | Excite | None]

    def to(self, dtype: torch.dtype | None) -> Values:
        """A copy; all of it in `dtype` if one is given."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().clone(memory_format=torch.preserve_format) if dtype is None else t.detach().to(dtype)

        layers = {n: None if v is None else type(v)(*map(copy, v)) for n, v in self.layers.items()}
        return Values(copy(self.x), copy(self.dy), None if self.drop_scale is None else copy(self.drop_scale), layers)

    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated, by name."""
        parameters = {
            f"{name}.{field}": value
            for name, layer in self.layers.items()
            if layer is not None
            for field, value in layer._asdict().items()
            if field not in RUNNING
        }
        return {"x": self.x} | parameters

    def running(self) -> dict[str, Tensor]:
        norms = {name: layer for name, layer in self.layers.items() if isinstance(layer, ConvNorm)}
        return {f"{name}.{field}": getattr(layer, field) for name, layer in norms.items() for field in RUNNING}


def inputs(block: Block, seed: int = 0) -> Values:
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    def image(channels: int, *size: int) -> Tensor:
        value = normal(block.images, channels, *size) + 0.5 * normal(channels)[:, None, None] + 0.3
        return value.to(DEVICE, block.dtype, memory_format=torch.channels_last)

    def layer(*shape: int) -> ConvNorm:
        out = shape[0]
        values = (
            normal(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5, 1 + 0.3 * normal(out), 0.3 * normal(out),
            0.5 * normal(out), 1 + torch.rand(out, generator=generator, device="cpu"),
        )  # fmt: skip
        return ConvNorm(*(value.to(DEVICE) for value in values))

    c, s, k = block.in_channels * block.expand_ratio, block.squeeze, block.kernel_size
    excite = (normal(s, c) / c**0.5, 0.3 * normal(s), normal(c, s) / s**0.5, 0.3 * normal(c))
    size = tuple(launch.cdiv(n, block.stride) for n in block.map)
    layers = {
        "expand": None if block.expand_ratio == 1 else layer(c, block.in_channels, 1, 1),
        "depthwise": layer(c, 1, k, k),
        "excite": Excite(*(value.to(DEVICE) for value in excite)),
        "project": layer(block.out_channels, c, 1, 1),
    }
    scale = torch.tensor([1.25, 0.0, 1.25], device=DEVICE)[: block.images] if block.scaled else None
    return Values(image(block.in_channels, *block.map), image(block.out_channels, *size), scale, layers)


def call(block: Block, values: Values, impl: BlockImpl, *, training: bool = True) -> Tensor:
    layers: Any = values.layers
    padding: Any = block.padding
    return kernels.mbconv(
        values.x, **layers, drop_scale=values.drop_scale if training else None, stride=block.stride,
        padding=padding, residual=block.residual, training=training, momentum=0.1, eps=1e-3, impl=impl,
    )  # fmt: skip


def run(block: Block, values: Values, impl: BlockImpl) -> dict[str, Tensor]:
    """Output "y", moved statistics by name and gradients as "d<name>"."""
    leaves = values.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_()
    with nan_allocations(), few_programs(4):  # programs walk several tiles
        y = call(block, values, impl)
        gradients = torch.autograd.grad(y, list(leaves.values()), values.dy)
    results = {"y": y.detach()} | values.running()
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@remembered
def outcome(block: Block, seed: int = 0) -> Outcome:
    values = inputs(block, seed)

    def exact() -> dict[str, Tensor]:
        return run(block, values.to(torch.float64), "torch")

    return Outcome(
        run(block, values.to(None), "triton"), run(block, values.to(None), "torch"), exact(), approximated(exact)
    )  # fmt: skip


@pytest.mark.parametrize("block", CASES)
def test_parity(block: Block) -> None:
    kernel, pytorch, oracle, _ = outcome(block)
    for name, value in kernel.items():
        assert value.shape == oracle[name].shape, name
        assert value.dtype == pytorch[name].dtype, name
        assert torch.isfinite(value).all(), f"{name} has NaN or inf: something was not written"
    assert kernel["y"].is_contiguous(memory_format=torch.channels_last)
    assert kernel["dx"].is_contiguous(memory_format=torch.channels_last)
    hold(functools.partial(outcome, block))


@pytest.mark.parametrize("block", [QUICK[0], pytest.param(SLOW[4], marks=pytest.mark.slow)], ids=str)
def test_inference(block: Block) -> None:
    def infer(seed: int) -> Outcome:
        values = inputs(block, seed)

        def run(impl: launch.Impl, values: Values = values) -> dict[str, Tensor]:
            return {"y": call(block, values, impl, training=False)}

        exact = functools.partial(run, "torch", values.to(torch.float64))
        return Outcome(run("triton"), run("torch"), exact(), approximated(exact))

    with torch.no_grad(), nan_allocations():
        hold(infer)


@pytest.mark.parametrize("block", [QUICK[0], QUICK[1]], ids=str)
def test_it_saves_the_raw_images_and_nothing_activated(block: Block) -> None:
    values = inputs(block)
    for leaf in values.leaves().values():
        leaf.requires_grad_()
    saved: dict[int, tuple[int, ...]] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.dtype == block.dtype and tensor.shape[0] == block.images:
            saved[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(block, values, "triton")
    c, images = block.in_channels * block.expand_ratio, block.images
    x_d_p = [(images, channels, *block.map) for channels in (block.in_channels, c, block.out_channels)]
    e = [(images, c, *block.map)] * (block.expand_ratio > 1)
    assert sorted(saved.values()) == sorted(x_d_p + e)


@pytest.mark.slow
def test_it_repeats_bit_for_bit() -> None:
    first, second = (run(QUICK[1], inputs(QUICK[1]), "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_no_drop_scale_is_one() -> None:
    block = QUICK[1]
    values = inputs(block)
    values.drop_scale = torch.ones_like(values.drop_scale) if values.drop_scale is not None else None
    ones = run(block, values, "triton")
    none = run(replace(block, scaled=False), inputs(replace(block, scaled=False)), "triton")
    for name, value in ones.items():
        assert torch.equal(value, none[name]), name


def chained(blocks: tuple[Block, ...], *, defer_residual: bool) -> dict[str, Tensor]:
    """As `run`, through blocks one after another that leave their residual adds to the next or do them themselves."""
    values = [inputs(block, seed) for seed, block in enumerate(blocks)]
    x = values[0].x.requires_grad_()
    leaves = {f"{i}.{name}": leaf for i, v in enumerate(values) for name, leaf in v.leaves().items() if name != "x"}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with nan_allocations():
        h: Tensor | PendingResidual = x
        for left, block, v in zip(reversed(range(len(blocks))), blocks, values, strict=True):
            defer = defer_residual and left > 0
            layers: Any = v.layers
            padding: Any = block.padding
            h = mbconv_training(
                h, **layers, drop_scale=v.drop_scale, stride=block.stride, padding=padding, residual=block.residual,
                momentum=0.1, eps=1e-3, group="", defer_residual=defer,
            )  # fmt: skip
            assert isinstance(h, PendingResidual) == defer
        assert isinstance(h, Tensor)
        gradients = torch.autograd.grad(h, [x, *leaves.values()], values[-1].dy)
    results = {"y": h.detach()} | {f"{i}.{name}": t for i, v in enumerate(values) for name, t in v.running().items()}
    return results | {f"d{name}": gradient for name, gradient in zip(["x", *leaves], gradients, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=NAMES.get
)
def test_a_residual_add_that_the_next_block_does_changes_no_bit(dtype: torch.dtype) -> None:
    """Left without a residual, with one that its own block made, and with one that the block before left."""
    blocks = (
        Block(6, 8, 1, 3, 1, (7, 5), dtype, scaled=False), Block(8, 8, 6, 3, 1, (7, 5), dtype),
        Block(8, 8, 6, 5, 1, (7, 5), dtype), Block(8, 10, 2, 3, 2, (7, 5), dtype, scaled=False),
    )  # fmt: skip
    left, done = chained(blocks, defer_residual=True), chained(blocks, defer_residual=False)
    assert [name for name, value in done.items() if not torch.equal(value, left[name])] == []


@pytest.mark.slow
def test_operations_pass_opcheck() -> None:
    calls: dict[str, tuple[Any, ...]] = {}
    operations = {name: op for name, op in vars(mbconv_ops).items() if op in mbconv_ops.OPERATIONS and name != "_op"}

    def record(name: str, op: Any) -> Any:
        def run_and_note(*args: Any) -> Any:
            calls[name] = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            return op(*args)

        return run_and_note

    block = QUICK[0]
    with mock.patch.multiple(mbconv_ops, **{name: record(name, op) for name, op in operations.items()}):
        run(block, inputs(block), "triton")
        chained((block, block), defer_residual=True)
        with torch.no_grad():
            call(block, inputs(block), "triton", training=False)
    assert set(calls) == set(operations)
    for name, arguments in calls.items():
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(operations[name], arguments, test_utils=tests)


@pytest.mark.slow
def test_it_compiles_whole_and_under_autocast() -> None:
    block = QUICK[0]
    values = inputs(block)
    for leaf in values.leaves().values():
        leaf.requires_grad_()
    dtype = torch.float16

    def step(values: Values) -> Tensor:
        with torch.autocast(DEVICE, dtype=dtype):
            return call(block, values, "triton")

    eager = inputs(block)
    for leaf in eager.leaves().values():
        leaf.requires_grad_()
    found, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(values), step(eager)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    dy = values.dy.to(dtype)
    theirs = torch.autograd.grad(found, list(values.leaves().values()), dy)
    ours = torch.autograd.grad(expected, list(eager.leaves().values()), dy)
    for name, one, other in zip(values.leaves(), theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    for name, moved in eager.running().items():
        torch.testing.assert_close(values.running()[name], moved, rtol=1e-6, atol=1e-6)


def refused(**changes: Any) -> dict[str, Any]:
    block = QUICK[0]
    values = inputs(block)
    options: dict[str, Any] = dict(training=True, momentum=0.1, eps=1e-3, residual=True, drop_scale=values.drop_scale)
    return {"x": values.x, **values.layers, **options, "impl": "torch", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 2}, "residual needs stride 1"),
        ({"stride": 3, "residual": False}, "k 3 or 5 and stride 1 or 2"),
        ({"padding": "valid"}, "'symmetric' or 'same'"),
        ({"expand": None}, "without an expansion"),
        ({"drop_scale": torch.ones(2)}, "drop_scale must have shape"),
        ({"training": False}, "scale is for training"),
        ({"x": torch.ones(3, 4, 7, 7)}, "expand.weight must have shape"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_bad_arguments_get_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.mbconv(**refused(**changes))


def test_inference_has_no_gradient_and_says_so() -> None:
    block = QUICK[1]
    values = inputs(block)
    values.x.requires_grad_()
    y = call(block, values, "triton", training=False)
    with pytest.raises(RuntimeError, match="mbconv"):
        y.sum().backward()
