"""The tolerance rule itself: what it allows for, and that a GPU's sigmoid passes it where a broken kernel does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import batch_norm, launch, tolerance
from kernels.launch import INTERPRETED, tl
from kernels.tolerance import UNIT, Errors, approximated, measure, most_wrong, worst
from tests import interpreter, parity
from tests.kernels.block import test_depthwise, test_mbconv, test_pointwise
from tests.parity import Case, Outcome, kernel_device  # noqa: F401

interpreted = pytest.mark.skipif(not INTERPRETED, reason="a GPU's sigmoid has its own error")
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


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
@pytest.mark.parametrize("z", [-80.0, -17.3, -3.0, -1.0, -1e-3, 0.3, 1.7, 9.0, 80.0])
def test_sigmoid_and_silu_move_by_the_bound_and_their_gradients_with_them(name: str, z: float) -> None:
    def run() -> tuple[Tensor, Tensor]:
        x = torch.tensor([z], dtype=torch.float64, device="cpu", requires_grad=True)
        y: Tensor = getattr(F, name)(x)
        return y.detach(), torch.autograd.grad(y, x)[0]

    (y, slope), s = run(), 1 / (1 + math.exp(-z))
    bound = ((2 + abs(z)) * (1 - s) + 1) * UNIT
    moved = approximated(run)
    for value, _ in moved:
        assert abs(float(value / y) - 1) == pytest.approx(bound, rel=1e-5)
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


# What a GPU's sigmoid may be off by, given to the interpreter's.

EVALUATION = [Case(op, torch.float32, (3, 10, 7, 7), mode="eval") for op in ("bn_silu", "bn_silu_squeeze_excite")]
GATE = Case("squeeze_excite", torch.float32, (3, 10, 7, 7))
OUTCOMES: dict[str, Callable[[int], Outcome]] = {
    **{str(case): functools.partial(parity.outcome, case) for case in (GATE, *EVALUATION)},
    "training": functools.partial(parity.outcome, replace(EVALUATION[1], mode="train")),
    "pointwise": functools.partial(test_pointwise.outcome, test_pointwise.QUICK[0]),
    "depthwise": functools.partial(test_depthwise.outcome, test_depthwise.QUICK[0]),
    "fp16": functools.partial(test_depthwise.outcome, test_depthwise.QUICK[2]),
    "mbconv": functools.partial(test_mbconv.outcome, test_mbconv.QUICK[0]),
}
ERRORS: dict[str, tuple[interpreter.SigmoidError, ...]] = {
    str(GATE): ("low", "high", "changing"), str(EVALUATION[0]): ("high",), str(EVALUATION[1]): ("low", "changing"),
    "training": ("changing",), "pointwise": ("low",), "depthwise": ("high",), "fp16": ("changing",),
    "mbconv": ("low", "changing"),
}  # fmt: skip
INJECTED = [
    pytest.param(name, error, marks=() if (name, error) == (str(GATE), "low") else pytest.mark.slow)
    for name, errors in ERRORS.items()
    for error in errors
]


@interpreted
@pytest.mark.parametrize(("name", "error"), INJECTED)
def test_parity_with_the_error_that_a_gpus_sigmoid_may_have(name: str, error: interpreter.SigmoidError) -> None:
    exact = OUTCOMES[name](0)
    with interpreter.approximate_sigmoid(error):
        parity.hold(OUTCOMES[name])
        found = OUTCOMES[name](0)
    assert any(not torch.equal(found.kernel[tensor], value) for tensor, value in exact.kernel.items())


@interpreted
@pytest.mark.slow
def test_the_term_is_what_approximations_do_to_a_result() -> None:
    """More than a rounding, which the rule has already, and no more than the term; on any CPU, as PyTorch's own error
    is no part of it."""
    plain = [OUTCOMES[str(GATE)](seed) for seed in range(parity.DRAWS)]
    with interpreter.approximate_sigmoid("low"):
        moved = [OUTCOMES[str(GATE)](seed) for seed in range(parity.DRAWS)]
    errors = tolerance.worst(outcome.errors("y") for outcome in moved)
    assert errors.right
    shift = max(float((a.kernel["y"] - b.kernel["y"]).abs().max()) for a, b in zip(plain, moved, strict=True))
    assert errors.rounding < shift <= errors.approximation + errors.rounding


@interpreted
def test_injected_errors_are_those_that_are_documented() -> None:
    x = torch.linspace(-30, 30, 4001)
    for name, exact, ulps in (("ex2", torch.exp2(x.double()), 2), ("rcp", 1 / (1 + x.double().abs()), 1)):
        argument = x if name == "ex2" else 1 + x.abs()
        plain = evaluated(name, argument)
        assert ((plain.double() - exact).abs() <= exact * UNIT).all()
        for error in ("high", "low", "changing"):
            with interpreter.approximate_sigmoid(error):
                units = evaluated(name, argument).view(torch.int32) - plain.view(torch.int32)
            assert units.abs().max() == ulps, (name, error)
            assert set(units.tolist()) == (set(range(-ulps, ulps + 1)) if error == "changing" else {int(units[0])})


def evaluated(name: str, x: Tensor) -> Tensor:
    """One of the two approximations in `kernels.batch_norm`, by the interpreter."""
    y = torch.empty_like(x)
    (_ex2_kernel if name == "ex2" else _rcp_kernel)[(1,)](x, y, x.numel(), BLOCK=launch.power_of_two(x.numel()))
    return y


@launch.jit
def _ex2_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, batch_norm.ex2(tl.load(x_ptr + at, mask=at < count, other=1.0)), mask=at < count)


@launch.jit
def _rcp_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, batch_norm.rcp(tl.load(x_ptr + at, mask=at < count, other=1.0)), mask=at < count)
