"""The depthwise kernels against the fp64 oracle: k × stride × padding × surroundings × dtype × shape."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs, device, reference
from kernels.block import depthwise, depthwise_backward, strips
from kernels.block.depthwise import merge_stats
from kernels.block.strips import CONFIGURATIONS, Geometry, Padding, Strips, geometry
from kernels.tolerance import approximated
from kernels.vectors import NO_NORM, NO_OUT_NORM, Norm, OutNorm
from tests import parity
from tests.count_kernels import count_traffic
from tests.kernels.conv2d import depthwise_conv2d
from tests.parity import DEVICE, kernel_device

__all__ = ["kernel_device"]

EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """mode "block": behind an expansion and before its own norm; "expand 1": without an expansion; "alone": neither."""

    k: int
    stride: int
    shape: tuple[int, int, int, int]
    mode: Literal["block", "expand 1", "alone"] = "block"
    padding: Padding = "symmetric"
    dtype: torch.dtype = torch.float32
    programs: int | None = None  # else what the kernels choose
    candidate: int = 0

    def __str__(self) -> str:
        parts = [
            f"k{self.k}",
            f"s{self.stride}",
            "x".join(map(str, self.shape)),
            self.mode.replace(" ", ""),
            self.padding,
        ]
        extra = [f"p{self.programs}"] * bool(self.programs) + [f"candidate{self.candidate}"] * bool(self.candidate)
        return "-".join([*parts, parity.NAMES[self.dtype], *extra])

    @property
    def geometry(self) -> Geometry:
        return geometry(self.shape[2], self.shape[3], self.k, self.stride, self.padding)


QUICK = [
    Case(3, 1, (1, 10, 7, 7)),
    Case(3, 1, (3, 6, 7, 4), "expand 1", dtype=torch.bfloat16),
    Case(3, 2, (3, 4, 8, 7), padding="same", dtype=torch.float16),
    Case(3, 2, (1, 22, 7, 8), "alone"),
    Case(5, 1, (1, 6, 7, 8), dtype=torch.bfloat16),
    Case(5, 1, (3, 4, 8, 7), programs=1),
    Case(5, 2, (1, 10, 8, 8), padding="same"),
    Case(5, 2, (3, 6, 7, 8)),
    Case(5, 1, (1, 8, 7, 7), dtype=torch.bfloat16),  # the first candidate: dy by a pass of its own
]
SLOW = [
    # Programs that walk several tiles, of two blocks of channels; bands of rows, the last one shorter.
    Case(3, 1, (9, 40, 7, 15), programs=4),
    Case(3, 1, (1, 8, 35, 5), programs=8),
    Case(3, 2, (1, 8, 37, 5), programs=8),
    Case(3, 2, (1, 8, 36, 5), padding="same", programs=8),
    Case(5, 2, (1, 8, 70, 5), programs=8),
    *(Case(k, s, (1, 144, 7, 7), dtype=torch.float16) for k, s in CONFIGURATIONS),
    *(Case(k, s, (3, 8, 8, 7), dtype=torch.bfloat16, candidate=i) for k, s in CONFIGURATIONS for i in (0, 1)),
    *(Case(k, s, (3, 10, 15, 8), padding="same") for k, s in CONFIGURATIONS),
    *(Case(3, s, (3, 10, 15, 8), mode, padding="same") for s in (1, 2) for mode in ("expand 1", "alone")),
]
SHAPES = ((3, 4, 7, 15), (1, 6, 15, 15), (3, 10, 8, 7), (1, 22, 15, 8), (3, 58, 7, 7), (1, 144, 8, 15))
FULL = [
    Case(k, s, shape, mode, padding, dtype)
    for dtype in parity.NAMES
    for k, s in CONFIGURATIONS
    for padding in ("symmetric", "same")
    if s == 2 or padding == "symmetric"
    for mode in ("block", "expand 1", "alone")
    for shape in SHAPES
]
CASES = [pytest.param(case, id=str(case), marks=pytest.mark.wide if i % 3 else ()) for i, case in enumerate(QUICK)]
CASES += [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in SLOW]
CASES += [pytest.param(case, id=f"full-{case}", marks=pytest.mark.full) for case in FULL]


def inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """x and y of the case's dtype, channels_last; y a plausible output and dy the gradient that arrives."""
    generator = torch.Generator("cpu").manual_seed(seed)
    b, c, _, _ = case.shape
    out = (b, c, case.geometry.out_height, case.geometry.out_width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(DEVICE)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu").to(DEVICE)

    def image(value: Tensor) -> Tensor:
        return value.to(case.dtype).contiguous(memory_format=torch.channels_last)

    mean = normal(c)
    return {
        "x": image(normal(*case.shape) + mean[:, None, None]),
        "y": image(normal(*out) + normal(c)[:, None, None]),
        "dy": image(normal(*out) + 0.3),
        "w": normal(c, 1, case.k, case.k) / case.k,
        "mean": mean,
        "var": 0.5 + uniform(c),
        **{n: 1 + 0.3 * normal(c) for n in ("weight", "out_weight")},
        **{n: 0.3 * normal(c) for n in ("bias", "out_bias")},
        "gate": uniform(b, c),
        "q": 0.1 * normal(b, c),
    }


def compose(case: Case, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the kernels compute, out of PyTorch's operations and autograd, in the dtype of the values."""
    parameters = {n: v[n].clone().requires_grad_() for n in ("w", "weight", "bias", "out_weight", "out_bias")}
    a = v["x"]
    if case.mode == "block":
        z = F.batch_norm(a, v["mean"], v["var"], parameters["weight"], parameters["bias"], False, 0.0, EPS)
        a = F.silu(z)
    else:
        a = a.clone().requires_grad_()
    y = reference.depthwise_conv2d(a, parameters["w"], stride=case.stride, padding=case.padding)
    result = {"y": y.detach()}
    dy = v["dy"]
    if case.mode != "alone":
        raw = v["y"].clone().requires_grad_()
        norm = F.batch_norm(raw, None, None, parameters["out_weight"], parameters["out_bias"], True, 0.0, EPS)
        d = dy * v["gate"].to(dy.dtype)[:, :, None, None] + v["q"].to(dy.dtype)[:, :, None, None]
        dy, dbias, dweight = torch.autograd.grad(
            F.silu(norm), (raw, parameters["out_bias"], parameters["out_weight"]), d
        )
        result |= {"out_sums": torch.stack([dbias, dweight])}
    result["dx"], result["dw"] = torch.autograd.grad(y, (a, parameters["w"]), dy)
    return result


def one_by_one(rows: Tensor) -> Tensor:
    """The mean of the rows in their own precision: torch.mean and var_mean of float32 add in float64 on a CPU."""
    return functools.reduce(torch.add, rows.unbind()) / len(rows)


def reductions(case: Case, v: dict[str, Tensor], y: Tensor, dx: Tensor) -> dict[str, Tensor]:
    """Statistics of the stored y, and Σ dz, Σ dz x̂ of the norm before the convolution from the stored dx."""
    if case.mode == "alone":
        return {}
    rows = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
    mean = one_by_one(rows)
    result = {"mean": mean, "var": one_by_one((rows - mean) ** 2)}
    if case.mode == "block":
        vectors = [v[n].clone().requires_grad_() for n in ("bias", "weight")]
        z = F.batch_norm(v["x"], v["mean"], v["var"], vectors[1], vectors[0], False, 0.0, EPS)
        result["sums"] = torch.stack(torch.autograd.grad(F.silu(z), vectors, dx))
    return result


def run(case: Case, v: dict[str, Tensor], out_sums: Tensor | None) -> dict[str, Tensor]:
    """The kernels, every buffer NaN before they write it; `out_sums` Σ dz and Σ dz ŷ of the norm behind."""
    norm = Norm(v["mean"], v["var"], v["weight"], v["bias"], EPS) if case.mode == "block" else NO_NORM
    out = NO_OUT_NORM
    if out_sums is not None:
        var, mean = torch.var_mean(v["y"].double(), (0, 2, 3), correction=0)
        moments = Norm(mean.float(), var.float(), v["out_weight"], v["out_bias"], EPS)
        out = OutNorm(v["y"], v["gate"], v["q"], out_sums.float(), moments)
    with parity.nan_allocations(), parity.candidate(case.candidate), parity.few_programs(case.programs):
        y, partial, counts = depthwise.depthwise(v["x"], v["w"], case.geometry, norm, stats=case.mode != "alone")
        result = {"y": y}
        if partial is not None and counts is not None:
            result["mean"], result["var"] = merge_stats(partial, counts)
            assert counts.sum().item() == y.numel() // y.shape[1]
        result["dx"], result["dw"], sums = depthwise_backward.depthwise_backward(
            v["dy"], v["x"], v["w"], case.geometry, norm, out
        )
    assert (sums is None) == (case.mode != "block")
    return result if sums is None else {**result, "sums": sums}


@parity.remembered
def outcome(case: Case, seed: int) -> parity.Outcome:
    v = inputs(case, seed)
    wide = {n: t.double() for n, t in v.items()}
    pytorch = compose(case, v)
    kernel = run(case, v, compose(case, wide).get("out_sums"))
    pytorch |= reductions(case, v, kernel["y"].float(), kernel["dx"])

    def exact() -> dict[str, Tensor]:
        return compose(case, wide) | reductions(case, wide, kernel["y"].double(), kernel["dx"].double())

    return parity.Outcome(kernel, pytorch, exact(), approximated(exact))


@pytest.mark.parametrize("case", CASES)
def test_forward_statistics_gradients_and_sums(case: Case) -> None:
    kernel, pytorch, oracle, _ = outcome(case, 0)
    assert kernel.keys() | {"out_sums"} >= oracle.keys()
    for name, value in kernel.items():
        assert (value.shape, value.dtype) == (oracle[name].shape, pytorch[name].dtype), name
        assert torch.isfinite(value).all(), f"{name} has NaN or inf: something was not written"
        if value.dim() == 4 and name != "dw":
            assert value.is_contiguous(memory_format=torch.channels_last), name
    parity.hold(functools.partial(outcome, case))


def test_cases_walk_several_tiles_and_cut_bands() -> None:
    def plans(case: Case) -> list[Any]:
        with parity.few_programs(case.programs):
            card = device.gpu(torch.device("cpu"))
            shape, g = (case.shape, case.dtype), case.geometry
            return [
                strips.forward_plan(*shape, g, norm=True, stats=True, gpu=card)[0],
                strips.backward_plan(*shape, g, norm=True, out_norm=True, gpu=card)[0],
            ]

    assert all(p.partials < p.groups and p.partials > 1 for p in plans(SLOW[0]))
    for case in SLOW[1:5]:
        assert any(p.bands > 1 for p in plans(case)), str(case)


def test_statistics_survive_a_large_mean_and_tiles_that_differ() -> None:
    x = (torch.randn(3, 4, 7, 7) * 0.1 + 1e3).contiguous(memory_format=torch.channels_last)
    w = torch.zeros(4, 1, 3, 3)
    w[:, :, 1, 1] = 1.0  # the identity
    with mock.patch.object(configs, "choose", return_value=Strips(2, 1)), parity.few_programs(1):
        y, partial, counts = depthwise.depthwise(x, w, geometry(7, 7, 3, 1), stats=True)
    assert torch.equal(y, x)
    assert partial is not None
    assert counts is not None
    mean, var = merge_stats(partial, counts)
    var64, mean64 = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    unit = torch.finfo(torch.float32).eps * 1e3
    assert (mean - mean64).abs().max() < unit
    assert (var - var64).abs().max() < 0.1 * unit


def test_merge_walks_more_partials_than_a_tile_holds() -> None:
    count = torch.randint(0, 5, (700,)).float()
    mean, m2 = torch.randn(700, 10) + 50, torch.rand(700, 10)
    merged, var = merge_stats(torch.stack([mean, m2]), count)
    n, m = count.double()[:, None], mean.double()
    expected = (n * m).sum(0) / n.sum()
    torch.testing.assert_close(merged, expected.float())
    torch.testing.assert_close(var, ((m2.double().sum(0) + (n * (m - expected) ** 2).sum(0)) / n.sum()).float())


@pytest.mark.parametrize("case", [QUICK[0], pytest.param(QUICK[7], marks=pytest.mark.slow)], ids=str)
def test_repeats_bit_for_bit_and_images_do_not_mix(case: Case) -> None:
    case = replace(case, shape=(2, *case.shape[1:]))
    v = inputs(case)
    sums = torch.randn(2, case.shape[1])
    first, second = run(case, v, sums), run(case, v, sums)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with_nan = {**v, "x": v["x"].clone(), "dy": v["dy"].clone()}
    with_nan["x"][1], with_nan["dy"][1] = float("nan"), float("nan")
    other = run(case, with_nan, sums)
    assert torch.equal(other["y"][0], first["y"][0])
    assert torch.equal(other["dx"][0], first["dx"][0])
    assert other["y"][1].isnan().any()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(QUICK[5], programs=None), marks=pytest.mark.wide),
        QUICK[6],
        QUICK[8],
        pytest.param(SLOW[2], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_traffic_is_what_the_interpreter_counts(case: Case) -> None:
    v = inputs(case)
    with count_traffic() as counted:
        run(case, v, torch.zeros(2, case.shape[1]))
    with parity.few_programs(case.programs):
        of: Any = {"shape": case.shape, "dtype": case.dtype, "g": case.geometry, "norm": True}
        of["gpu"] = device.gpu(torch.device("cpu"))
        stated = depthwise.traffic(**of, stats=True) | depthwise_backward.traffic(**of, out_norm=True)
        once = depthwise.traffic(**of, stats=True, again=False)
    assert {name: moved.total for name, moved in counted.kernels.items()} == stated
    assert once["_depthwise_kernel"] < stated["_depthwise_kernel"]


# The convolution alone, as an operation of PyTorch's


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(("k", "stride"), CONFIGURATIONS)
def test_reference_is_the_models_convolution(k: int, stride: int, padding: Padding) -> None:
    from fastnet.layers import Conv2d

    module = Conv2d(6, 6, k, stride, 6, padding)
    x = torch.randn(2, 6, 8, 15)
    y = depthwise_conv2d(x, module.weight, stride=stride, padding=padding)
    torch.testing.assert_close(y, module(x))
    g = geometry(8, 15, k, stride, padding)
    assert y.shape[2:] == (g.out_height, g.out_width)


def test_depthwise_conv2d_is_the_reference_in_any_layout_forward_and_backward() -> None:
    x, w = torch.randn(2, 8, 5, 6), torch.randn(8, 1, 3, 3)
    dy = torch.randn(2, 8, 3, 3)
    results = []
    for impl in ("torch", "triton"):
        for layout in (torch.contiguous_format, torch.channels_last):
            leaves = [x.contiguous(memory_format=layout).requires_grad_(), w.clone().requires_grad_()]
            y = depthwise_conv2d(*leaves, stride=2, padding="same", impl=impl)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, expected)
    assert results[2][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.wide
def test_opcheck() -> None:
    x = torch.randn(2, 4, 3, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(4, 1, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.fastnet.depthwise_conv2d, (x, w, 2, "same"))
    plain = (torch.randn(2, 4, 2, 1), x.detach(), w.detach(), 2, "same")
    torch.library.opcheck(torch.ops.fastnet.depthwise_conv2d_backward, plain)


def test_compiles_into_one_graph_and_refuses_a_second_derivative() -> None:
    x, w = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 1, 3, 3)
    step = torch.compile(depthwise_conv2d, fullgraph=True, dynamic=False, backend="aot_eager")
    eager, graph = depthwise_conv2d(x, w, impl="triton"), step(x, w, impl="triton")
    assert torch.equal(eager, graph)
    assert eager.stride() == graph.stride()
    (dx,) = torch.autograd.grad(eager.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^depthwise_conv2d has no second derivative in Triton: pass impl='torch'"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("expected", "match", "x", "w", "options"),
    [
        (ValueError, r"x must be \[B, C, H, W\]", (4, 5, 5), (4, 1, 3, 3), {}),
        (ValueError, r"weight must have shape \(4, 1, 3, 3\).*got \(4, 3, 3\)", (1, 4, 5, 5), (4, 3, 3), {}),
        (ValueError, r"weight must have shape .*got \(5, 1, 3, 3\)", (1, 4, 5, 5), (5, 1, 3, 3), {}),
        (ValueError, "k 3 or 5 and stride 1 or 2, got k 7 and stride 1", (1, 4, 5, 5), (4, 1, 7, 7), {}),
        (ValueError, "k 3 or 5 and stride 1 or 2, got k 3 and stride 3", (1, 4, 5, 5), (4, 1, 3, 3), {"stride": 3}),
        (ValueError, "'symmetric' or 'same', got 'valid'", (1, 4, 5, 5), (4, 1, 3, 3), {"padding": "valid"}),
        (ValueError, "impl must be 'auto', 'triton' or 'torch'", (1, 4, 5, 5), (4, 1, 3, 3), {"impl": "cuda"}),
    ],
)
def test_bad_input_gets_one_sentence(
    expected: type[Exception], match: str, x: tuple[int, ...], w: tuple[int, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(expected, match=match) as caught:
        depthwise_conv2d(torch.randn(x), torch.randn(w), **options)
    assert "\n" not in str(caught.value)
