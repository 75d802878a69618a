"""The update in C++: RMSprop, the moving average and the gradients' norm, in every build that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fastnet.training.optim import RMSprop, RMSpropTF
from kernels.cpu import update
from kernels.cpu.build import Level
from kernels.cpu.library import using
from tests.kernels.cpu.test_ops import LEVELS, library

# Shorter than a vector, no multiple of one, longer than a piece; a convolution that is channels last.
SIZES = ((1,), (5,), (33,), (40000,), (6, 3, 3, 3), (3, 7), (2, 8192 + 5))


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[Level]:
    with using(library(request.param)):
        yield request.param


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    found = [torch.randn(size, dtype=dtype) for size in SIZES]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in found]


@pytest.mark.parametrize("kind", [RMSprop, RMSpropTF])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_rmsprop_is_pytorchs(kind: type[RMSprop], weight_decay: float) -> None:
    """Within twice PyTorch's own error, as every kernel; and one that is skipped changes no bit."""
    starts: list[Tensor] = tensors()
    options: dict[str, Any] = {"decay": 0.9, "momentum": 0.8, "eps": 1e-3, "weight_decay": weight_decay}
    gradients = [tensors() for _ in range(3)]

    def run(native: bool, dtype: torch.dtype) -> list[Tensor]:
        """All parameters, mean squares and momenta: of a single number PyTorch's is right by luck."""
        params = [nn.Parameter(t.to(dtype, copy=True)) for t in starts]
        optimizer = kind(params, 0.05, **options, native=native)
        for i, step in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.7**i
            for p, gradient in zip(params, step, strict=True):
                p.grad = gradient.to(dtype)
            optimizer.step()
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        kept = zip(*((p.detach(), *optimizer.state[p].values()) for p in params), strict=True)
        return [torch.cat([t.flatten() for t in some]) for some in kept]

    with mock.patch.object(update, "rmsprop_", wraps=update.rmsprop_) as called:
        ours = run(True, torch.float32)
    assert called.call_count == len(gradients)
    for own, torchs, exact in zip(ours, run(False, torch.float32), run(False, torch.float64), strict=True):
        allowed = 2 * (torchs - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
        assert (own - exact).abs().max() <= allowed


def test_what_a_row_cannot_be_is_left_to_pytorch() -> None:
    double, whole = torch.ones(4, dtype=torch.float64), torch.ones(4, 6)
    assert update.takes(whole, whole)
    for row in ([whole, whole.t().contiguous().t()], [whole, whole[:, :3]], [double], [torch.ones(4, 12)[:, ::2]]):
        assert not update.takes(*row)
    assert update.norm([whole, double]) is None
    averages = double.clone(), whole.clone()
    assert update.move_average_([(averages[0], double + 1), (averages[1], whole + 1)], 0.5) == [0]
    assert torch.equal(averages[0], double)
    assert torch.equal(averages[1], whole + 0.5)
    p = nn.Parameter(double)
    p.grad = torch.ones_like(p)
    RMSpropTF([p], 1.0, native=True).step()
    assert (p < 1).all()


def test_the_average_and_the_norm_are_pytorchs_for_any_number_of_threads() -> None:
    averages, values, before = tensors(), tensors(), torch.get_num_threads()
    moved, norms = [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            mine = [t.clone() for t in averages]
            update.move_average_(list(zip(mine, values, strict=True)), 0.3)
            moved.append(mine)
            norm = update.norm(values)
            assert norm is not None
            norms.append(norm)
    finally:
        torch.set_num_threads(before)
    for others in moved[1:]:
        assert all(torch.equal(a, b) for a, b in zip(moved[0], others, strict=True))
    assert len({float(norm) for norm in norms}) == 1
    exact = torch.linalg.vector_norm(torch.cat([t.double().flatten() for t in values]))
    assert norms[0] == exact.float()
    for own, average, value in zip(moved[0], averages, values, strict=True):
        torch.testing.assert_close(own, average.lerp(value, 0.3), rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    for bad in (float("nan"), float("inf")):
        values = tensors()
        values[3][17] = bad
        norm = update.norm(values)
        assert norm is not None
        assert not norm.isfinite()
