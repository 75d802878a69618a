"""Scaling: the published table, the rounding rules under random input, the pure compound rule."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnet.arch import round_filters, round_repeats
from fastnet.scaling import SCALED, CompoundScaler, architecture, markdown_table, round_resolution

widths = st.floats(0.1, 4.0)
phis = st.floats(0.0, 8.0)


@given(st.integers(1, 4096), widths, st.sampled_from([1, 2, 4, 8, 16]))
def test_round_filters_is_the_nearest_multiple_but_never_far_below(filters: int, width: float, divisor: int) -> None:
    rounded = round_filters(filters, width, divisor)
    scaled = filters * width
    assert rounded % divisor == 0
    assert rounded >= divisor
    assert rounded >= 0.9 * scaled
    if rounded - divisor >= max(divisor, 0.9 * scaled):  # a smaller multiple was allowed, so it must be further away
        assert abs(rounded - divisor - scaled) >= abs(rounded - scaled)
    assert abs(rounded - scaled) <= divisor


@given(st.integers(1, 4096), widths, widths)
def test_round_filters_grows_with_width(filters: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    # Raising a value that fell below 90 % may lift it above the neighbour's, by one divisor at most.
    assert round_filters(filters, small) <= round_filters(filters, large) + 8


@pytest.mark.parametrize(
    ("filters", "width", "expected"),
    [(32, 1.0, 32), (32, 1.1, 32), (40, 1.1, 48), (16, 1.2, 24), (32, 1.4, 48), (1280, 1.1, 1408), (112, 1.4, 160)],
)
def test_round_filters_of_the_published_models(filters: int, width: float, expected: int) -> None:
    assert round_filters(filters, width) == expected


@given(st.integers(1, 20), st.floats(0.01, 6.0))
def test_round_repeats_rounds_up(repeats: int, depth: float) -> None:
    rounded = round_repeats(repeats, depth)
    assert rounded >= repeats * depth > rounded - 1


@given(st.floats(0.5, 4096.0), st.sampled_from([1, 8, 16, 32]))
def test_round_resolution_is_the_nearest_multiple(resolution: float, multiple: int) -> None:
    rounded = round_resolution(resolution, multiple)
    assert rounded % multiple == 0
    assert rounded >= multiple
    assert abs(rounded - resolution) <= multiple / 2 or rounded == multiple


def test_round_resolution_halves_up() -> None:
    assert [round_resolution(r) for r in (203.9, 204, 211.9, 212, 1)] == [200, 208, 208, 216, 8]


@given(phis)
def test_compound_scaler_powers(phi: float) -> None:
    scaler = CompoundScaler(phi)
    assert math.isclose(scaler.depth, 1.2**phi)
    assert math.isclose(scaler.width, 1.1**phi)
    assert abs(scaler.resolution() - 200 * 1.15**phi) <= 4 + 1e-9
    arch = scaler.architecture()
    assert (arch.width, arch.depth, arch.resolution) == (scaler.width, scaler.depth, scaler.resolution())
    assert 0.2 <= arch.dropout == arch.drop_connect_rate <= 0.5


@given(phis, phis)
def test_compound_scaler_grows_with_phi(a: float, b: float) -> None:
    small, large = (CompoundScaler(phi) for phi in sorted((a, b)))
    assert small.depth <= large.depth
    assert small.width <= large.width
    assert small.resolution() <= large.resolution()


@given(st.floats(1.0, 2.0), st.floats(1.0, 1.5), st.floats(1.0, 1.5))
def test_compound_scaler_checks_its_constraint(alpha: float, beta: float, gamma: float) -> None:
    if abs(alpha * beta**2 * gamma**2 - 2) <= 0.1:
        assert CompoundScaler(1, alpha, beta, gamma).depth == alpha
    else:
        with pytest.raises(ValueError, match="must be about 2"):
            CompoundScaler(1, alpha, beta, gamma)


@pytest.mark.parametrize("phi", [-0.1, float("nan"), float("inf")])
def test_compound_scaler_refuses_phi(phi: float) -> None:
    with pytest.raises(ValueError, match="phi must be"):
        CompoundScaler(phi)


def test_compound_scaler_refuses_shrinking() -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        CompoundScaler(1, alpha=0.9, beta=1.2, gamma=1.25)


def test_published_architectures() -> None:
    archs = [architecture(variant) for variant in SCALED]
    assert [a.width for a in archs] == [1.0, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0]
    assert [a.depth for a in archs] == [1.0, 1.1, 1.2, 1.4, 1.8, 2.2, 2.6, 3.1]
    assert [a.official_resolution for a in archs] == [224, 240, 260, 300, 380, 456, 528, 600]
    assert [a.resolution for a in archs] == [200, 232, 264, 304, 352, 400, 464, 536]
    assert [a.dropout for a in archs] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert [a.drop_connect_rate for a in archs] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]


def test_compound_architectures_are_the_pure_powers() -> None:
    for phi, variant in enumerate(SCALED):
        arch, scaler = architecture(variant, "compound"), CompoundScaler(phi)
        assert (arch.width, arch.depth, arch.resolution) == (scaler.width, scaler.depth, scaler.resolution())
        assert (arch.name, arch.scaling) == (variant, "compound")


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="'b8': choose one of b0, b1"):
        architecture("b8")
    with pytest.raises(ValueError, match="'wide': choose one of published, compound"):
        architecture("b0", "wide")  # type: ignore[arg-type]


def test_scaling_needs_no_torch() -> None:
    code = "import sys, fastnet.scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_markdown_table() -> None:
    lines = markdown_table().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| B0 | 1.00 / 1.00 | 5.29 M | 1.00 / 1.00 | 5.29 M | – | – |"
    # Quoted B1 (1.1 / 1.1) is published B2's size, and quoted B7 (2.0 / 1.4) is published B4's.
    assert lines[3] == "| B1 | 1.10 / 1.00 | 7.79 M | 1.20 / 1.10 | 9.11 M | 1.10 / 1.10 | 9.11 M |"
    assert lines[9] == "| B7 | 3.10 / 2.00 | 66.35 M | 3.58 / 1.95 | 68.74 M | 2.00 / 1.40 | 19.34 M |"
