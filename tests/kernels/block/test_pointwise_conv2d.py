"""The 1×1 convolution alone, as an operation of PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import parity
from tests.kernels.conv2d import pointwise_conv2d
from tests.parity import DEVICE, NAMES, Outcome, kernel_device  # noqa: F401


def arguments(dtype: torch.dtype, shape: tuple[int, ...] = (2, 10, 5, 7), out: int = 6) -> list[Tensor]:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    return [x.requires_grad_(), (torch.randn(out, shape[1], 1, 1) / shape[1] ** 0.5).requires_grad_()]


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("shape", "out"), [((2, 10, 5, 7), 6), ((1, 24, 7, 7), 40)])
def test_pointwise_conv2d(dtype: torch.dtype, shape: tuple[int, ...], out: int) -> None:
    x, weight = arguments(dtype, shape, out)
    dy = torch.randn(shape[0], out, *shape[2:]).to(dtype)
    results = []
    for impl, wide in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        leaves = [
            x.detach().to(wide).requires_grad_(),
            weight.detach().to(wide if wide == torch.float64 else torch.float32).requires_grad_(),
        ]
        with parity.nan_allocations():
            y = pointwise_conv2d(*leaves, impl=impl)  # type: ignore[arg-type]
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))])
    for name, kernel, pytorch, oracle in zip(("y", "dx", "dweight"), *results, strict=True):
        assert kernel.dtype == pytorch.dtype
        assert kernel.stride() == pytorch.contiguous(memory_format=torch.channels_last).stride() or name == "dweight"
        parity.hold_one(kernel, pytorch, oracle, name)


@pytest.mark.slow
def test_pointwise_conv2d_keeps_pytorchs_contract() -> None:
    x, weight = arguments(torch.float32)
    ops = torch.ops.fastnet
    torch.library.opcheck(ops.pointwise_conv2d, (x, weight))
    dy = torch.randn(2, 6, 5, 7)
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(ops.pointwise_conv2d_backward, (dy, x.detach(), weight.detach(), *wanted))
    y = pointwise_conv2d(x, weight, impl="triton")
    assert y.is_contiguous(memory_format=torch.channels_last)
    nchw = pointwise_conv2d(x.contiguous(), weight, impl="triton")
    assert torch.equal(y, nchw)
    assert nchw.stride() == y.stride()
    spread, full = torch.ones(()).expand(y.shape), torch.ones(y.shape)
    pairs = zip(*(torch.autograd.grad(y, (x, weight), g, retain_graph=True) for g in (spread, full)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.autograd.grad(y, weight, dy, retain_graph=True)[0].shape == weight.shape
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"^pointwise_conv2d has no second derivative in Triton"):
        torch.autograd.grad(dx.sum(), weight)


@pytest.mark.slow
def test_pointwise_conv2d_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    x, weight = arguments(torch.float32)
    step = torch.compile(pointwise_conv2d, fullgraph=True, dynamic=False, backend="aot_eager")
    eager, graph = (f(x, weight, impl="triton") for f in (pointwise_conv2d, step))
    assert torch.equal(eager, graph)
    assert eager.stride() == graph.stride()
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, weight)) for y in (eager, graph)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("expected", "match", "change"),
    [
        (ValueError, r"weight must be \[C_out, C_in, 1, 1\], got shape \(6, 10\)", lambda x, w: (x, w[:, :, 0, 0])),
        (ValueError, r"weight must be .*got shape \(6, 10, 3, 3\)", lambda x, w: (x, w.expand(6, 10, 3, 3))),
        (ValueError, r"weight must have shape \(6, 10, 1, 1\).*got \(6, 9, 1, 1\)", lambda x, w: (x, w[:, :9])),
        (TypeError, r"weight must be float32 .*got torch.float16", lambda x, w: (x, w.half())),
        (ValueError, r"x must be \[B, C, H, W\], got shape \(10, 5, 7\)", lambda x, w: (x[0], w)),
        (TypeError, r"stores float32, float16 or bfloat16, got torch.float64", lambda x, w: (x.double(), w.double())),
    ],
)
def test_pointwise_conv2d_refuses_bad_input_in_one_sentence(
    expected: type[Exception], match: str, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    with pytest.raises(expected, match=match) as caught:
        pointwise_conv2d(*change(*arguments(torch.float32)), impl="triton")
    assert "\n" not in str(caught.value)
