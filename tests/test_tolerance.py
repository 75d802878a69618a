"""The tolerance rule itself: what it allows for, and that a GPU's sigmoid passes it where a broken kernel does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels.tolerance import UNIT, Errors, approximated, measure, most_wrong, worst
from tests.parity import Case, kernel_device  # noqa: F401

HALF_UNIT = torch.finfo(torch.float32).eps / 2
ONES = torch.ones(4, dtype=torch.float64)


def full(value: float) -> Tensor:
    return torch.full((4,), value)


def test_errors_are_shares_of_what_the_rule_allows() -> None:
    found = measure(full(1.5), full(1.125), ONES, [ONES * 1.25, ONES * 0.5])
    assert found == Errors(0.5, 0.125, HALF_UNIT, 0.5, 1.0)
    assert found.share == 0.5 / (2 * 0.125 + HALF_UNIT + 0.5)
    assert found.right
    lucky = measure(full(1.25), full(1.0), ONES)
    assert lucky.share > 1000
    assert not lucky.right
    assert worst([lucky, found]) == found, "the largest errors of both draws"
    assert most_wrong([found, lucky, found]) == lucky
    assert measure(full(1.0), full(1.0), ONES).share == 0
    nothing = torch.zeros(4, dtype=torch.float64)
    assert measure(full(1e-30), full(0.0), nothing).share == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_gross_and_allows_nothing(bad: float) -> None:
    value = full(1.0)
    value[2] = bad
    assert measure(value, full(1.0), ONES).gross
    assert str(measure(value, full(1.0), ONES)) == "gross: NaN or inf"
    assert measure(full(1.0 + 1e-6), value, ONES).allowed == HALF_UNIT


def test_gross_is_what_no_rounding_explains() -> None:
    tf32 = measure(full(1.0 + 2**-11), full(1.0), ONES)
    assert tf32.share > 1000
    assert not tf32.gross
    assert measure(full(1.2), full(1.0), ONES).gross
    assert not measure(full(1.2), full(0.8), ONES).gross, "PyTorch is as far off: the formula cancels"


@given(st.floats(-80, 80), st.sampled_from(["silu", "sigmoid"]))
def test_sigmoid_and_silu_move_by_the_bound_and_their_gradients_with_them(z: float, name: str) -> None:
    def run() -> tuple[Tensor, Tensor]:
        x = torch.tensor([z], dtype=torch.float64, device="cpu", requires_grad=True)
        y: Tensor = getattr(F, name)(x)
        return y.detach(), torch.autograd.grad(y, x)[0]

    (y, slope), s = run(), 1 / (1 + math.exp(-z))
    bound = ((2 + abs(z)) * (1 - s) + 1) * UNIT
    moved = approximated(run)
    for value, _ in moved:
        assert abs(float(value / y) - 1) == pytest.approx(bound, rel=1e-5) if z else True
    derivative = abs(1 + z * (1 - 2 * s)) if name == "silu" else abs(1 - 2 * s)
    for _, value in moved:
        assert abs(float(value - slope)) == pytest.approx(bound * s * derivative, rel=1e-3, abs=1e-13)


def test_in_place_and_lower_precision() -> None:
    z = torch.randn(50, dtype=torch.float64)
    plain, in_place = (approximated(lambda i=i: F.silu(z.clone(), inplace=i)) for i in (False, True))  # type: ignore[misc]
    assert all(map(torch.equal, plain, in_place))
    assert torch.equal(approximated(lambda: torch.sigmoid(z.float()))[1], torch.sigmoid(z.float()))


def test_each_pattern_of_signs_moves_its_kind_of_sum_the_farthest() -> None:
    z = torch.randn(10_000, dtype=torch.float64)
    s = torch.sigmoid(z)
    unit = 1 / (s * ((2 + z.abs()) * (1 - s) + 1))  # every term moves by as much
    both = unit * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(5_000)

    def moved(weights: Tensor) -> list[float]:
        found = approximated(lambda: (torch.sigmoid(z) * weights).sum())
        return [abs(float(value - (s * weights).sum())) / UNIT for value in found]

    one, changing = moved(unit)
    assert one == pytest.approx(10_000, rel=1e-3)
    assert changing < 500, "the root of their number, within five deviations"
    one, changing = moved(both)
    assert one < 1
    assert 5 < changing < 500
