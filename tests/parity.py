"""How tests hold a kernel to the rule of `kernels.tolerance`; the operations under test and their ragged cases.

The oracle is `kernels.reference` in fp64 on the very values the kernel was given, pytorch is `kernels.reference` in
the kernel's own storage type. A gradient of a handful of values can meet a draw on which PyTorch is right by luck;
where one draw breaks the rule, the rule is put to the largest errors, the kernel's too, over DRAWS draws.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor

import kernels
from kernels import configs, device, launch, tolerance
from tests import interpreter

NORM = ("weight", "bias", "running_mean", "running_var")
EXCITE = ("w_reduce", "b_reduce", "w_expand", "b_expand")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "squeeze_excite": ("x", *EXCITE),
    "bn_silu": ("x", *NORM),
    "bn_silu_squeeze_excite": ("x", *NORM, *EXCITE),
    "drop_connect_add": ("x", "residual", "drop_scale"),
    "bn_drop_connect_add": ("x", "residual", "drop_scale", *NORM),
}
CONSTANT = ("drop_scale", "running_mean", "running_var")
DRAWS = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernels run in Triton's interpreter
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(autouse=True)
def kernel_device() -> Iterator[None]:
    """Tensors of a test that imports this are made where the kernels can run."""
    with torch.device(DEVICE):
        yield


class Outcome(NamedTuple):
    """Results by name: the kernels', PyTorch's, the oracle's, and the oracle's with approximate sigmoids."""

    kernel: dict[str, Tensor]
    pytorch: dict[str, Tensor]
    oracle: dict[str, Tensor]
    approximated: list[dict[str, Tensor]]

    def errors(self, name: str) -> tolerance.Errors:
        moved = [results[name] for results in self.approximated]
        return tolerance.measure(self.kernel[name], self.pytorch[name], self.oracle[name], moved)


def hold(outcome: Callable[[int], Outcome], names: Iterable[str] | None = None, draws: int = DRAWS) -> None:
    """Hold the results of `outcome` (of a seed) to the tolerance rule, all of them or `names`."""
    for name in list(outcome(0).kernel) if names is None else names:
        first = outcome(0).errors(name)
        if not first.right:
            assert not first.gross, f"{name}: {first}"  # luck of PyTorch's does not explain this
            errors = tolerance.worst(outcome(seed).errors(name) for seed in range(draws))
            assert errors.right, f"{name}: {errors} over {draws} draws"


def hold_one(kernel: Tensor, pytorch: Tensor, oracle: Tensor, name: str = "y") -> None:
    """As `hold`, for one result on one draw by a formula without a sigmoid."""
    errors = tolerance.measure(kernel, pytorch, oracle)
    assert errors.right, f"{name}: {errors}"


Made = TypeVar("Made")


def remembered(make: Callable[..., Made]) -> Callable[..., Made]:
    """`functools.cache`, apart for each error that the interpreter's sigmoid is given."""
    cached = functools.cache(lambda _injected, *args: make(*args))
    return lambda *args: cached(interpreter.injected(), *args)


@dataclass(frozen=True)
class Case:
    op: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    squeeze: int = 4
    mode: Literal["train", "eval", "plain"] = "plain"
    absent: tuple[str, ...] = ()  # optional arguments passed as None
    walk: bool = False  # make each program of a reduction walk several tiles
    device: str = DEVICE

    def __str__(self) -> str:
        parts = [self.op, NAMES[self.dtype], "x".join(map(str, self.shape)), f"s{self.squeeze}", self.mode]
        parts += [f"no_{name}" for name in self.absent] + ["walk"] * self.walk
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        if self.mode == "plain":
            return {}
        return {"training": self.mode == "train", "momentum": 0.1, "eps": 1e-3}


# B, C, H, W and squeeze width. C = 24, 8, 48 and 112 select the four aligned tiles; the others are ragged.
SHAPES = (
    ((3, 10, 7, 7), 4),
    ((1, 24, 15, 15), 58),
    ((3, 6, 15, 7), 6),
    ((1, 144, 7, 7), 10),
    ((3, 58, 7, 15), 22),
    ((1, 22, 15, 7), 10),
    ((3, 4, 7, 15), 4),
    ((3, 8, 7, 7), 6),
    ((1, 48, 7, 15), 4),
    ((1, 112, 7, 7), 22),
)
WALK = (3, 24, 15, 15)  # six tiles: two programs of three
QUICK = {torch.float32: SHAPES[:4], torch.float16: SHAPES[:2], torch.bfloat16: SHAPES[:2]}


def cases(op: str) -> list[Any]:
    """Parameters for pytest: one quick case of each dtype, more of them marked wide, the rest of the product slow; what
    is absent is left out at two shapes, at the others in full."""
    modes: tuple[Any, ...] = ("train", "eval") if op.startswith("bn") else ("plain",)
    optional = [name for name in ("residual", "drop_scale") if name in ARGUMENTS[op]]
    if op == "drop_connect_add":
        optional.remove("residual")
    made = []
    full = set()
    for dtype, quick in QUICK.items():
        for mode in modes:
            for i, (shape, squeeze) in enumerate(SHAPES):
                case = Case(op, dtype, shape, squeeze, mode)
                fast = i < (1 if mode == "eval" else len(quick))
                made.append((case, fast))
                if i == 0:
                    made.append(
                        (replace(case, shape=WALK, walk=True), fast and mode != "eval" and dtype == torch.float32)
                    )
                made += [(replace(case, absent=(name,)), fast and i == 0 and mode != "eval") for name in optional]
                full |= {replace(case, absent=(name,)) for name in optional if i > 1}
    found: Counter[torch.dtype] = Counter()
    parameters = []
    for case, fast in made:
        found[case.dtype] += fast
        slow = pytest.mark.full if case in full else pytest.mark.slow
        marks = slow if not fast else pytest.mark.wide if found[case.dtype] > 1 else ()
        parameters.append(pytest.param(case, id=str(case), marks=marks))
    return parameters


def inputs(case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    """Arguments of the operation by name, and "dy"; images are channels_last, parameters fp32."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    b, c, _, _ = case.shape
    s = case.squeeze
    values = {
        "x": normal(*case.shape) + normal(c)[:, None, None],
        "residual": normal(*case.shape),
        "dy": normal(*case.shape) + 0.3,  # a common part, so that a lost mean shows
        "drop_scale": torch.tensor([1.25, 0.0, 1.25, 1.25] * b, device="cpu")[:b],
        "weight": 1 + 0.3 * normal(c),
        "bias": 0.3 * normal(c),
        "running_mean": 0.5 * normal(c),
        "running_var": 1 + torch.rand(c, generator=generator, device="cpu"),
        "w_reduce": normal(s, c) / c**0.5,
        "b_reduce": 0.3 * normal(s),
        "w_expand": normal(c, s) / s**0.5,
        "b_expand": 0.3 * normal(c),
    }
    result: dict[str, Tensor | None] = {}
    for name, value in values.items():
        if value.dim() == 4:
            value = value.to(case.dtype).contiguous(memory_format=torch.channels_last)
        result[name] = None if name in case.absent else value.to(case.device)
    return result


def as_double(values: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double() for name, value in values.items()}


@contextlib.contextmanager
def nan_allocations() -> Iterator[None]:
    """Every buffer the kernels allocate starts as NaN, so what they forget to write shows."""
    empty, empty_image = launch.empty, launch.empty_image

    def filled(make: Any) -> Any:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    with (
        mock.patch.object(launch, "empty", filled(empty)),
        mock.patch.object(launch, "empty_image", filled(empty_image)),
    ):
        yield


def call(
    op: str, values: dict[str, Tensor | None], impl: launch.Impl, options: dict[str, Any], wrap: Any = None
) -> Tensor:
    function = getattr(kernels, op)
    if wrap is not None:
        function = wrap(function)
    return function(*(values[name] for name in ARGUMENTS[op]), impl=impl, **options)


@contextlib.contextmanager
def candidate(index: int) -> Iterator[None]:
    """Every launch runs with its candidate of that number, or the last."""
    choose = configs.choose

    def nth(site: configs.Site, card: device.Gpu) -> Any:
        found = configs.candidates(site, card)
        return found[min(index, len(found) - 1)]

    with mock.patch.object(configs, "choose", nth if index else choose):
        yield


@contextlib.contextmanager
def few_programs(count: int | None) -> Iterator[None]:
    """Every launch whose work can be shared out has `count` programs; None: as many as it chooses."""
    if count is None:
        yield
        return
    choose = configs.choose

    def few(site: configs.Site, card: device.Gpu) -> Any:
        return replace(choose(site, card), programs=1)

    card = replace(device.gpu(torch.device(DEVICE)), multiprocessors=count)
    with (
        device.pretend(card), mock.patch.object(configs, "choose", few), mock.patch.object(launch, "PROGRAMS", 1)
    ):  # fmt: skip
        yield


def run(
    case: Case, impl: launch.Impl, values: dict[str, Tensor | None] | None = None, wrap: Any = None
) -> dict[str, Tensor]:
    """Output "y", moved statistics, and gradients as "d<name>"; in fp64 when `values` are."""
    values = inputs(case) if values is None else values
    fresh = {n: None if v is None else v.detach().clone(memory_format=torch.preserve_format) for n, v in values.items()}
    leaves = {n: v for n, v in fresh.items() if v is not None and n in ARGUMENTS[case.op] and n not in CONSTANT}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with nan_allocations(), few_programs(2 if case.walk else None):
        y = call(case.op, fresh, impl, case.options, wrap)
        gradients = torch.autograd.grad(y, list(leaves.values()), fresh["dy"])
    result = {"y": y.detach()}
    result |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    result |= {n: v for n in CONSTANT[1:] if n in ARGUMENTS[case.op] and (v := fresh[n]) is not None}
    return result


@remembered
def outcome(case: Case, seed: int = 0) -> Outcome:
    values = inputs(case, seed)

    def exact() -> dict[str, Tensor]:
        return run(case, "torch", as_double(values))

    return Outcome(
        run(case, "triton", values), run(case, "torch", values), exact(), tolerance.approximated(exact)
    )  # fmt: skip


def check(case: Case, direction: str) -> None:
    """Hold the case's forward results (output, moved statistics) or its gradients to the rule, and their strides."""
    kernel, pytorch, oracle, _ = outcome(case)
    names = [n for n in kernel if n.startswith("d") == (direction == "backward")]
    assert names
    for name in names:
        assert kernel[name].shape == oracle[name].shape, name
        assert kernel[name].dtype == pytorch[name].dtype, name
        assert torch.isfinite(kernel[name]).all(), f"{name} has NaN or inf: something was not written"
        if kernel[name].dim() == 4:
            assert kernel[name].is_contiguous(memory_format=torch.channels_last), f"{name} is not channels_last"
    hold(functools.partial(outcome, case), names)
