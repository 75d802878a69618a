"""Stem and head in C++: a convolution, its batch norm and SiLU, held to PyTorch in every build that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.block.strips import geometry
from kernels.cpu import layer as cpu_layer
from kernels.cpu.build import Level, cpu_level
from kernels.cpu.calls import OPERATIONS
from kernels.cpu.layer import conv_bn_silu
from kernels.cpu.library import using
from kernels.vectors import ConvNorm
from tests.kernels.cpu.test_ops import BF16, DRAWS, F32, LEVELS, check_operation, library
from tests.parity import Outcome, hold, nan_allocations

EPS, MOMENTUM = 1e-3, 0.1


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[Level]:
    with using(library(request.param)):
        yield request.param


class Case(NamedTuple):
    c_in: int
    channels: int
    k: int
    stride: int
    size: tuple[int, int]
    dtype: torch.dtype = F32
    padding: str = "symmetric"
    images: int = 3

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype == BF16 else "fp32"
        return f"{self.c_in}to{self.channels} k{self.k} s{self.stride} {self.size} {dtype} {self.padding}"


# The stem's and the head's, channels that fill no vector, odd maps, one row, more rows than a group has.
CASES = (
    Case(3, 32, 3, 2, (23, 20)), Case(3, 10, 3, 2, (8, 9), padding="same"), Case(1, 6, 3, 2, (1, 7)),
    Case(3, 32, 3, 2, (22, 24), BF16), Case(4, 40, 3, 2, (7, 6), BF16, "same"), Case(10, 40, 1, 1, (3, 5)),
    Case(22, 58, 1, 1, (7, 7), BF16), Case(5, 8, 3, 1, (6, 5)),
)  # fmt: skip


def run(case: Case, impl: str, dtype: torch.dtype | None, seed: int) -> dict[str, Tensor]:
    """Results by PyTorch in its own precision, or with `dtype` in that one; or in C++."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stored, vectors = (case.dtype, F32) if dtype is None else (dtype, dtype)
    height, width = (-(-n // case.stride) for n in case.size)
    x = drawn(case.images, case.c_in, *case.size).to(case.dtype).to(stored)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(case.k == 1)
    w = (drawn(case.channels, case.c_in, case.k, case.k) / (case.k * case.c_in**0.5)).to(case.dtype)
    w = w.to(vectors).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, mean = ((drawn(case.channels) * 0.5 + shift).to(vectors) for shift in (1, 0, 0))
    weight.requires_grad_()
    bias.requires_grad_()
    layer = ConvNorm(w, weight, bias, mean, torch.ones(case.channels, dtype=vectors))
    dy = drawn(case.images, case.channels, height, width).to(case.dtype).to(stored)
    options: Any = {"momentum": MOMENTUM, "eps": EPS}
    if impl == "native":
        with nan_allocations():
            y = conv_bn_silu(x, layer, stride=case.stride, padding=case.padding, **options)
            leaves = [leaf for leaf in (x, w, weight, bias) if leaf.requires_grad]
            gradients = torch.autograd.grad(y, leaves, dy)
    else:
        g = geometry(*case.size, case.k, case.stride, case.padding)  # type: ignore[arg-type]
        below = (g.out_height - 1) * case.stride + case.k - g.height - g.pad_top
        right = (g.out_width - 1) * case.stride + case.k - g.width - g.pad_left
        pads = g.pad_left, max(right, 0), g.pad_top, max(below, 0)
        s = F.conv2d(F.pad(x, pads), w.to(stored), stride=case.stride)
        y = reference.bn_silu(s, weight, bias, *layer[3:], training=True, **options)
        leaves = [leaf for leaf in (x, w, weight, bias) if leaf.requires_grad]
        gradients = torch.autograd.grad(y, leaves, dy)
    names = ["dx", "dw", "dweight", "dbias"][4 - len(leaves) :]
    found = dict(zip(names, gradients, strict=True)) | {"y": y.detach(), "mean": layer[3], "var": layer[4]}
    assert impl == "torch" or found["dw"].stride() == w.stride()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case) -> None:
    def outcome(seed: int = 0) -> Outcome:
        exact = run(case, "torch", torch.float64, seed)
        return Outcome(run(case, "native", None, seed), run(case, "torch", None, seed), exact, [])

    for name, value in outcome().kernel.items():
        assert torch.isfinite(value).all(), f"{name} has NaN or inf: something was not written"
    hold(outcome, draws=DRAWS)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_the_bits_are_those_of_any_number_of_threads(case: Case) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(case, "native", None, 0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [name for name, value in found[0].items() if not torch.equal(value, other[name])] == []


def test_schema_fakes_and_refusals(level: Level) -> None:
    if level != cpu_level():
        pytest.skip("the same Python in every build")
    x, w = torch.randn(2, 3, 7, 6).contiguous(memory_format=torch.channels_last), torch.randn(10, 27)
    s, mean, var = cpu_layer.convolve(x, w, 3, 2, "same")
    norm = mean, var, torch.ones(10), torch.zeros(10)
    du, sums = cpu_layer.activate_backward(s, s, *norm, EPS)
    arguments: dict[str, tuple[Any, ...]] = {
        "convolve": (x, w, 3, 2, "same"), "activate": (s, *norm, EPS), "activate_backward": (s, s, *norm, EPS),
        "convolve_backward": (du, s, sums, *norm, x, 3, 2, "same", EPS),
    }  # fmt: skip
    assert arguments.keys() == {
        name for name in OPERATIONS if hasattr(cpu_layer, name) and name not in vars(cpu_layer.ops)
    }
    for name, given in arguments.items():
        check_operation(name, given)
    layer = ConvNorm(torch.randn(10, 3, 3, 3), *(torch.ones(10) for _ in range(4)))
    options: Any = {"padding": "same", "momentum": MOMENTUM, "eps": EPS}
    with pytest.raises(ValueError, match="no gradient of its input here"):
        conv_bn_silu(x.clone().requires_grad_(), layer, stride=2, **options)
    with pytest.raises(ValueError, match="has stride 1 here"):
        conv_bn_silu(x, layer._replace(weight=torch.randn(10, 3, 1, 1)), stride=2, **options)
    with pytest.raises(ValueError, match="w must have shape"):
        conv_bn_silu(x, layer._replace(weight=torch.randn(10, 4, 3, 3)), stride=2, **options)
