"""The 1×1 convolutions against plain PyTorch in fp64, launcher by launcher: dtype × shape × what is fused in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import aot, device
from kernels.block import pointwise, pointwise_blocks, pointwise_gemm, pointwise_operand, pointwise_wgrad
from kernels.tolerance import approximated
from tests import parity
from tests.count_kernels import count_traffic
from tests.parity import DEVICE, NAMES, Outcome, kernel_device  # noqa: F401

EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """A block whose expansion and projection have the same map; `walk` makes programs walk several tiles."""

    dtype: torch.dtype
    batch: int
    entry: int
    expanded: int
    out: int
    height: int
    width: int
    scaled: bool = True
    walk: bool = False
    candidate: int = 0

    def __str__(self) -> str:
        channels = f"{self.entry}-{self.expanded}-{self.out}"
        extra = (
            "-walk" * self.walk + "-unscaled" * (not self.scaled) + f"-candidate{self.candidate}" * bool(self.candidate)
        )
        return f"{NAMES[self.dtype]}-{self.batch}x{self.height}x{self.width}-{channels}{extra}"

    @property
    def maps(self) -> tuple[int, int]:
        return self.height, self.width


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Ragged channels; aligned ones that between them select every block; images that a tile holds one, two or many of.
SHAPES = (
    (3, 4, 22, 6, 7, 7),
    (1, 10, 58, 22, 15, 7),
    (3, 24, 72, 40, 7, 7),
    (1, 16, 96, 24, 15, 15),
    (3, 6, 144, 10, 7, 15),
    (3, 32, 8, 16, 3, 5),
    (1, 80, 136, 136, 7, 15),
    (1, 136, 144, 80, 7, 7),
    (3, 40, 24, 72, 15, 15),
)
QUICK = [
    Case(FP32, *SHAPES[0], walk=True),
    Case(FP16, *SHAPES[1], scaled=False),
    Case(FP16, *SHAPES[2], walk=True),
    Case(FP16, *SHAPES[5]),
    Case(BF16, *SHAPES[5], walk=True),
    Case(BF16, *SHAPES[5], candidate=1),
    Case(BF16, 1, 40, 24, 72, 3, 5, candidate=1),
]
SLOW = [
    Case(FP32, *SHAPES[2]),
    Case(FP16, *SHAPES[3], walk=True),
    Case(FP16, *SHAPES[6]),
    Case(FP16, *SHAPES[7], walk=True),
    Case(BF16, *SHAPES[2]),
    # Between them and those above every candidate.
    Case(BF16, 1, 8, 40, 24, 3, 5, candidate=1),
    *(Case(BF16, *SHAPES[shape], walk=shape == 6, candidate=i) for shape in (2, 6) for i in (1, 2)),
]
FULL = [
    Case(dtype, *shape, scaled=scaled, walk=walk)
    for dtype in (FP32, FP16, BF16)
    for shape in SHAPES
    for scaled, walk in ((True, False), (False, True))
]
CASES = [
    *QUICK,
    *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW),
    *(pytest.param(case, marks=pytest.mark.full) for case in FULL if case not in (*QUICK, *SLOW)),
]


def inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu").to(DEVICE)

    def image(channels: int) -> Tensor:
        x = normal(case.batch, channels, *case.maps) + normal(channels)[:, None, None]
        return x.to(case.dtype).contiguous(memory_format=torch.channels_last)

    entry, expanded, out = case.entry, case.expanded, case.out
    values = {"x": image(entry), "e": image(expanded), "d": image(expanded), "p": image(out)}
    values |= {"dy": image(out), "da1": image(expanded), "dres": image(entry)}
    values |= {"w1": normal(expanded, entry) / entry**0.5, "w3": normal(out, expanded) / expanded**0.5}
    for name, channels in (("e", expanded), ("d", expanded), ("p", out)):
        values |= {f"weight_{name}": 1 + 0.3 * normal(channels), f"bias_{name}": 0.3 * normal(channels)}
    values["gate"] = torch.sigmoid(normal(case.batch, expanded))
    values["scale"] = torch.tensor([1.25, 0.0, 2.0])[torch.arange(case.batch) % 3].to(DEVICE)
    if not case.scaled:
        values["scale"].fill_(1.0)
    return values


def composed(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every result by unfused PyTorch with images and weights in `dtype`; sums in fp32, or fp64 with it."""
    v = {name: value.to(dtype) if value.dim() == 4 else value for name, value in values.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype == torch.float64:
        v = {name: value.double() for name, value in v.items()}
    w1, w3 = (v[name].to(dtype)[:, :, None, None] for name in ("w1", "w3"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, v[f"weight_{name}"], v[f"bias_{name}"], training=True, eps=EPS)

    def dsilu(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.silu(z).sum(), z)[0]

    with torch.enable_grad():
        leaf_p, leaf_e = v["p"].clone().requires_grad_(), v["e"].clone().requires_grad_()
        scaled = v["dy"] * v["scale"].to(dtype)[:, None, None, None]
        (dp,) = torch.autograd.grad(norm("p", leaf_p), leaf_p, scaled)
        (de,) = torch.autograd.grad(F.silu(norm("e", leaf_e)), leaf_e, v["da1"])
        z = norm("d", v["d"])
        sigma = dsilu(z)
        activated = F.silu(z)
    gated = activated * v["gate"].to(dtype)[:, :, None, None]
    alone = norm("p", v["p"])
    residual_sum = alone * v["scale"].to(dtype)[:, None, None, None] + v["dy"]
    found = {"e_out": F.conv2d(v["x"], w1), "p_plain": F.conv2d(activated, w3), "p_out": F.conv2d(gated, w3)}
    found["j_out"] = F.conv2d(residual_sum, w3.transpose(0, 1))
    for name in tuple(found):
        found[f"{name}_var"], found[f"{name}_mean"] = torch.var_mean(found[name].to(wide), (0, 2, 3), correction=0)
    found |= {"residual_sum": residual_sum, "alone": alone}
    da = F.conv_transpose2d(dp, w3)
    centred = v["d"].to(wide) - v["d"].to(wide).mean((0, 2, 3), keepdim=True)
    xhat = centred / (centred.square().mean((0, 2, 3), keepdim=True) + EPS).sqrt()
    terms = (da * activated, da * sigma, (da * sigma).to(wide) * xhat)
    found |= {"da": da, "gate_sums": torch.stack([term.to(wide).sum((2, 3)) for term in terms])}
    found["dw3"] = torch.ops.aten.convolution_backward(
        dp, gated, w3, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1][:, :, 0, 0].to(wide)  # fmt: skip
    found["dx"] = F.conv_transpose2d(de, w1)
    found["dx_residual"] = found["dx"] + v["dres"]
    found["dw1"] = torch.ops.aten.convolution_backward(
        de, v["x"], w1, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1][:, :, 0, 0].to(wide)  # fmt: skip
    return found


def batch_norm_of(name: str, values: dict[str, Tensor], dz: Tensor | None = None) -> Tensor:
    """The norm_vectors of a batch norm of `values[name]`, with finished sums of dz and dz x̂."""
    x = values[name].double()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    sums = None
    if dz is not None:
        xhat = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
        sums = torch.stack([dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))]).float()
    rows = x.numel() // x.shape[1]
    vectors = values[f"weight_{name}"], values[f"bias_{name}"]
    return pointwise.norm_vectors(mean.float(), var.float(), *vectors, EPS, sums, rows)


def launched(case: Case, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every result by the kernels, on memory that starts as NaN."""
    v = values
    e = v["e"].double()
    weight_e, bias_e = v["weight_e"].double(), v["bias_e"].double()
    z = F.batch_norm(e, None, None, weight_e, bias_e, training=True, eps=EPS)
    s = torch.sigmoid(z)
    programs = parity.few_programs(4 if case.walk else None)
    with parity.nan_allocations(), parity.candidate(case.candidate), programs:
        norm_d = batch_norm_of("d", v)
        norm_p = batch_norm_of("p", v, v["dy"].double() * v["scale"].double()[:, None, None, None])
        norm_e = batch_norm_of("e", v, v["da1"].double() * (s + z * s * (1 - s)))
        scale = v["scale"] if case.scaled else None
        found: dict[str, Tensor] = {}
        for name, arguments in (
            ("e_out", (v["x"], v["w1"])),
            ("p_plain", (v["d"], v["w3"], norm_d)),
            ("p_out", (v["d"], v["w3"], norm_d, v["gate"])),
        ):
            found[name], found[f"{name}_mean"], found[f"{name}_var"] = pointwise.forward(*arguments)
        entry = pointwise.residual_add_forward(
            v["p"], v["dy"], scale, norm_p[:4].contiguous(), v["w3"].t().contiguous()
        )
        found |= dict(zip(("residual_sum", "j_out", "j_out_mean", "j_out_var"), entry, strict=True))
        found["alone"] = pointwise.residual_add_forward(
            v["p"], None, None, norm_p[:4].contiguous(), v["w3"].t().contiguous()
        )[0]
        found["da"], partial = pointwise.projection_dgrad(v["dy"], v["p"], v["w3"], norm_p, scale, v["d"], norm_d)
        found["gate_sums"] = partial.sum(2)
        found["dw3"] = pointwise.projection_wgrad(v["dy"], v["p"], norm_p, scale, v["d"], norm_d, v["gate"])
        backward = v["da1"], v["e"], v["w1"], norm_e, v["x"]
        found["dx"], _ = pointwise.expansion_backward(*backward)
        found["dx_residual"], found["dw1"] = pointwise.expansion_backward(*backward, v["dres"])
    return found


@parity.remembered
def outcome(case: Case, seed: int) -> Outcome:
    values = inputs(case, seed)
    exact = functools.partial(composed, values, torch.float64)
    return Outcome(launched(case, values), composed(values, case.dtype), exact(), approximated(exact))


RESULTS = {
    "expansion_forward": ("e_out", "e_out_mean", "e_out_var"),
    "activated_forward": ("p_plain", "p_plain_mean", "p_plain_var"),
    "projection_forward": ("p_out", "p_out_mean", "p_out_var"),
    "residual_add_forward": ("residual_sum", "alone", "j_out", "j_out_mean", "j_out_var"),
    "projection_dgrad": ("da", "gate_sums"),
    "projection_wgrad": ("dw3",),
    "expansion_backward": ("dx", "dx_residual", "dw1"),
}


@pytest.mark.parametrize("launcher", RESULTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pointwise(case: Case, launcher: str) -> None:
    kernel, pytorch, oracle, _ = outcome(case, 0)
    held = []
    for name in RESULTS[launcher]:
        assert kernel[name].shape == oracle[name].shape, name
        assert kernel[name].dtype == pytorch[name].dtype, name
        assert torch.isfinite(kernel[name]).all(), f"{name} has NaN or inf: something was not written"
        if kernel[name].dim() == 4:
            assert kernel[name].is_contiguous(memory_format=torch.channels_last), name
        elif "dw" not in name and case.dtype == BF16 and DEVICE == "cpu":
            continue  # sums of what was stored, and the interpreter truncates what it stores
        held.append(name)
    parity.hold(functools.partial(outcome, case), held)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pointwise_statistics_are_those_of_the_stored_values(case: Case) -> None:
    kernel = outcome(case, 0).kernel
    for name in ("e_out", "p_plain", "p_out", "j_out"):
        y = kernel[name].double()
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        unit = torch.finfo(torch.float32).eps
        assert (kernel[f"{name}_mean"] - mean).abs().max() <= 4 * unit * y.abs().max()
        assert ((kernel[f"{name}_var"] - var).abs() <= 8 * unit * var).all()


def test_pointwise_repeats_bit_for_bit_and_leaves_its_inputs_alone() -> None:
    case = QUICK[0]
    values = inputs(case)
    before = {name: value.clone() for name, value in values.items()}
    first = outcome(case, 0).kernel
    for name, again in launched(case, values).items():
        assert torch.equal(again, first[name]), name
    assert all(torch.equal(values[name], value) for name, value in before.items())


def test_pointwise_statistics_survive_a_large_mean_and_tiles_that_differ() -> None:
    # E[y²] - E[y]² would be off by 1e6 * 2**-24 = 0.06 where the variance is of the size of 0.01.
    x = torch.cat([torch.full((1, 8, 15, 15), 1e3), 1e3 + 0.1 * torch.randn(1, 8, 15, 15)])
    with parity.nan_allocations(), parity.few_programs(2):
        y, mean, var = pointwise.forward(x.contiguous(memory_format=torch.channels_last), torch.eye(8))
    assert torch.equal(y, x)
    var64, mean64 = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    unit = torch.finfo(torch.float32).eps * 1e3
    assert (mean - mean64).abs().max() < unit
    assert (var - var64).abs().max() < 0.1 * unit


def test_pointwise_gate_sums_come_in_at_most_sixteen_pieces_of_an_image() -> None:
    # 25 row tiles an image; the sums of dA a with a = silu(BN(d)) over pieces must be those of the image.
    maps = (1, 8, 40, 40)
    dy, p, d = (torch.randn(maps).contiguous(memory_format=torch.channels_last) for _ in range(3))
    vectors = torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8), EPS
    norm_p = pointwise.norm_vectors(*vectors, torch.zeros(2, 8), 1600)
    with parity.nan_allocations(), parity.few_programs(10**6):
        da, partial = pointwise.projection_dgrad(
            dy, p, torch.eye(8), norm_p, None, d, pointwise.norm_vectors(*vectors)
        )  # fmt: skip
    assert partial.shape == (3, 1, 13, 8)
    torch.testing.assert_close(da, dy / (1 + EPS) ** 0.5)
    expected = (da.double() * F.silu(d.double() / (1 + EPS) ** 0.5)).sum((2, 3))
    torch.testing.assert_close(partial[0].sum(1).double(), expected, rtol=1e-5, atol=1e-5)


# The convolution alone


# Bytes and configurations


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted under the interpreter, on a CPU")
@pytest.mark.parametrize("case", [QUICK[2], QUICK[3], QUICK[1], QUICK[4]], ids=str)
def test_pointwise_kernels_move_the_bytes_that_their_file_states(case: Case) -> None:
    v = inputs(case)
    norm_d, norm_p, norm_e = batch_norm_of("d", v), batch_norm_of("p", v, v["dy"]), batch_norm_of("e", v, v["da1"])
    scale = v["scale"] if case.scaled else None
    mean = torch.zeros(case.expanded)
    calls: dict[str, Callable[[], Any]] = {
        "norm_vectors": lambda: pointwise.norm_vectors(mean, mean, mean, mean, EPS),
        "expansion_forward": lambda: pointwise.forward(v["x"], v["w1"]),
        "projection_forward": lambda: pointwise.forward(v["d"], v["w3"], norm_d, v["gate"]),
        "projection_dgrad": lambda: pointwise.projection_dgrad(
            v["dy"], v["p"], v["w3"], norm_p, scale, v["d"], norm_d
        ),
        "projection_wgrad": lambda: pointwise.projection_wgrad(
            v["dy"], v["p"], norm_p, scale, v["d"], norm_d, v["gate"]
        ),
        "expansion_backward": lambda: pointwise.expansion_backward(
            v["da1"], v["e"], v["w1"], norm_e, v["x"], v["dres"]
        ),
    }  # fmt: skip
    shape = (case.batch, case.expanded, *case.maps)
    with parity.few_programs(4 if case.walk else None):
        options: dict[str, Any] = {"residual": True, "scaled": case.scaled, "gpu": device.gpu(torch.device("cpu"))}
        stated = pointwise.traffic(shape, (case.entry, case.out), case.dtype, **options)
        once = pointwise.traffic(shape, (case.entry, case.out), case.dtype, from_memory=True, **options)
        assert stated.keys() == calls.keys()
        for name, call in calls.items():
            with count_traffic() as counted:
                call()
            assert {kernel: moved.total for kernel, moved in counted.kernels.items()} == stated[name], name
            assert all(once[name][kernel] <= total for kernel, total in stated[name].items())


def test_every_width_selects_specified_configurations() -> None:
    specs = list(pointwise.aot_specs())
    assert len({spec.name for spec in specs}) == len(specs)

    def known(kernel: Any, dtype: torch.dtype) -> set[frozenset[tuple[str, Any]]]:
        names = ("PROLOGUE", "EPILOGUE", "DGRAD", "WIDE", "NARROW", "SPAN", "VEC", *BLOCK_NAMES)
        return {
            frozenset(
                [(name, s.constexprs[name]) for name in names if name in s.constexprs]
                + [("warps", s.num_warps), ("maxnreg", s.maxnreg)]
            )
            for s in specs
            if s.fn is kernel and f"[{NAMES[dtype]}," in s.name
        }

    bounds = (1, 8, 16, 24, 32, 48, 64, 72, 96, 128, 144, 240, 672, 1152, 3840)
    widths = sorted({max(bound + more, 1) for bound in bounds for more in (-1, 0, 1, 8)})
    areas = (1, 16, 49, 64, 3136)
    for dtype in NAMES:
        made = known(pointwise_gemm._pointwise_kernel, dtype)
        for prologue, epilogue, dgrad in pointwise_gemm.FORMS:
            form: dict[str, Any] = {"PROLOGUE": prologue, "EPILOGUE": epilogue, "DGRAD": dgrad}
            for k, n in ((k, n) for k in widths for n in (6, 16, 24, 64, 72, 640)):
                vec = pointwise_operand.vector_width(k, n)
                for blocks in selectable(k, n, prologue, epilogue, dtype):
                    wanted: dict[str, Any] = {**form, **blocks.constexprs(), "VEC": vec, "warps": blocks.num_warps}
                    wanted["maxnreg"] = blocks.maxnreg
                    spans = {pointwise_operand.span_for(blocks.m, area, vec, dtype) for area in areas}
                    for span in spans if prologue == "bn_silu_gate" else (0,):
                        assert frozenset({**wanted, "SPAN": span}.items()) in made, (k, n, prologue, epilogue)
        made = known(pointwise_wgrad._pointwise_wgrad_kernel, dtype)
        for wide_prologue, narrow_prologue, _ in pointwise_wgrad.FORMS:
            for wide, narrow in ((wide, narrow) for wide in (9, 16, 24, 240, 1152) for narrow in widths):
                vec = pointwise_operand.vector_width(wide, narrow)
                for split in selectable_splits(wide, narrow, wide_prologue, dtype):
                    wanted = {"WIDE": wide_prologue, "NARROW": narrow_prologue, "VEC": vec}
                    wanted |= split.constexprs()
                    wanted |= {"warps": split.num_warps, "maxnreg": split.maxnreg}
                    spans = {pointwise_operand.span_for(split.m, area, vec, dtype) for area in areas}
                    for span in spans if wide_prologue == "bn_silu_gate" else (0,):
                        assert frozenset({**wanted, "SPAN": span}.items()) in made, (wide, narrow)


def selectable(*product: Any) -> set[pointwise_blocks.Blocks]:
    """On any card."""
    return {b for capability in aot.CAPABILITIES for b in pointwise_blocks.selectable(*(*product, capability))}


def selectable_splits(*gradient: Any) -> set[pointwise_wgrad.Blocks]:
    """On any card."""
    return {b for capability in aot.CAPABILITIES for b in pointwise_wgrad.selectable(*(*gradient, capability))}


BLOCK_NAMES = ("SINGLE", "STAGES", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_W")
