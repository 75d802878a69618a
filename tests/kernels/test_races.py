"""Every kernel, as compiled, is free of races, overruns and reads of unwritten memory; each such fault is seen.

`make races` runs this file in an environment with ttsem (see tests/races.py). The cases are ragged, and small: each
has several programs all the same, and those that walk several tiles.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("ttsem", reason="ttsem is not here: `make races` runs this file in an environment that has it")

from ttsem.sanitize import KernelFault

from kernels import all_specs, batch_norm, configs, launch
from kernels.augment import OUTPUTS, augment
from kernels.block.strips import CONFIGURATIONS
from kernels.device import Gpu
from tests import parity, races
from tests.kernels import test_augment as test_augment_kernel
from tests.kernels.block import test_depthwise, test_mbconv, test_pointwise, test_pointwise_conv2d
from tests.kernels.conv2d import pointwise_conv2d
from tests.mutations import ROOT, Mutation
from tests.parity import ARGUMENTS, NAMES, SHAPES, WALK, kernel_device

__all__ = ["kernel_device"]

pytestmark = pytest.mark.skipif(not races.active(), reason="needs `-p tests.races`, as `make races` has it")


FP16, BF16 = torch.float16, torch.bfloat16
MODES: tuple[Literal["block", "expand 1", "alone"], ...] = ("block", "expand 1", "alone")


def operations() -> list[parity.Case]:
    """Each operation in each dtype and mode on shapes that select every tile and squeeze block, walking, and without
    optional arguments."""
    made = []
    for op in ARGUMENTS:
        modes: tuple[Any, ...] = ("train", "eval") if op.startswith("bn") else ("plain",)
        optional = [name for name in ("residual", "drop_scale") if name in ARGUMENTS[op] and op != "drop_connect_add"]
        for i, dtype in enumerate(NAMES):
            for mode in modes:
                # Two of the ragged ones, and those that select the tiles, dealt to the dtypes in turn.
                ragged, tiled = (SHAPES[i], SHAPES[i + 3]), (*SHAPES[1:2], *SHAPES[7:])
                chosen = (*ragged, *tiled) if mode != "eval" else (ragged[0], *tiled[i::2])
                made += [parity.Case(op, dtype, shape, squeeze, mode) for shape, squeeze in chosen]
            made.append(parity.Case(op, dtype, WALK, 4, modes[0], walk=True))
            made += [parity.Case(op, dtype, SHAPES[i][0], 4, modes[0], absent=(name,)) for name in optional]
        if op.endswith("squeeze_excite"):
            made += [parity.Case(op, FP16, (2, 8, 5, 5), squeeze, modes[0]) for squeeze in (16, 48, 100, 256)]
    return made


# Beside those of the parity tests: the aligned ones in bf16, which has most candidates, narrow products of many
# channels, and more images to a tile.
PRODUCTS = (
    *test_pointwise.QUICK,
    *test_pointwise.SLOW,
    *(test_pointwise.Case(BF16, *test_pointwise.SHAPES[i]) for i in (3, 7, 8)),
    test_pointwise.Case(BF16, 1, 80, 40, 136, 3, 5),
    test_pointwise.Case(BF16, 1, 136, 40, 24, 3, 5),
    test_pointwise.Case(BF16, 5, 8, 24, 40, 3, 5),
    test_pointwise.Case(FP16, 2, 8, 24, 40, 8, 8),
)
CONVOLUTIONS = (
    *test_depthwise.QUICK,
    *(case for case in test_depthwise.SLOW if case.programs or case.mode != "block"),
    *(
        test_depthwise.Case(k, stride, (2, 40, 5, 9), mode, dtype=BF16)
        for k, stride in CONFIGURATIONS
        for mode in MODES
    ),
)
BLOCKS = (
    *test_mbconv.QUICK,
    *test_mbconv.SLOW,
    # Whose expansion's backward has three blocks of channels, of few inputs and of more.
    *(test_mbconv.Block(c, c, ratio, 3, 1, (5, 4), BF16, images=2) for c, ratio in ((16, 10), (24, 6))),
)


def with_each_candidate(run: Callable[[], Mapping[str, Tensor]]) -> None:
    """Run with every launch's first candidate, then with the second where it has one, and so on."""
    n, more = 0, True

    def nth(site: configs.Site, card: Gpu) -> configs.Config:
        nonlocal more
        found = configs.candidates(site, card)
        more |= len(found) > n + 1
        return found[min(n, len(found) - 1)]

    while more:
        more = False
        with mock.patch.object(configs, "choose", nth):
            for name, value in run().items():
                assert not value.is_floating_point() or value.isfinite().all(), f"{name} was not written whole"
        n += 1


def operate(case: parity.Case) -> dict[str, Tensor]:
    return parity.run(case, "triton")


def multiply(case: test_pointwise.Case) -> dict[str, Tensor]:
    return test_pointwise.launched(case, test_pointwise.inputs(case))


def multiply_alone(case: test_pointwise.Case) -> dict[str, Tensor]:
    """The convolution as an operation: from `entry` channels to `out`."""
    x, weight = test_pointwise_conv2d.arguments(case.dtype, (case.batch, case.entry, *case.maps), case.out)
    with parity.nan_allocations(), parity.few_programs(4 if case.walk else None):
        y = pointwise_conv2d(x, weight, impl="triton")
        dx, dweight = torch.autograd.grad(y, [x, weight], torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def convolve(case: test_depthwise.Case) -> dict[str, Tensor]:
    sums = None if case.mode == "alone" else torch.zeros(2, case.shape[1])
    return test_depthwise.run(case, test_depthwise.inputs(case), sums)


def train(block: test_mbconv.Block) -> dict[str, Tensor]:
    return test_mbconv.run(block, test_mbconv.inputs(block), "triton")


def infer(block: test_mbconv.Block) -> dict[str, Tensor]:
    with torch.no_grad(), parity.nan_allocations():
        return {"y": test_mbconv.call(block, test_mbconv.inputs(block), "triton", training=False)}


def leave_residual_adds(dtype: torch.dtype) -> dict[str, Tensor]:
    """A block without a residual, one with its own and one with the one that was left to it, in a row."""
    block = functools.partial(test_mbconv.Block, expand_ratio=6, kernel_size=3, stride=1, map=(7, 5), dtype=dtype)
    blocks = (block(6, 8, expand_ratio=1, scaled=False), block(8, 8), block(8, 10, scaled=False))
    return test_mbconv.chained(blocks, defer_residual=True)


def add_up(partials: int) -> dict[str, Tensor]:
    return {"sums": batch_norm.sum_partials(torch.randn(2, partials, 12))}


def augmented(dtype: torch.dtype) -> dict[str, Tensor]:
    photos, table = test_augment_kernel.noise(*test_augment_kernel.SIZES), test_augment_kernel.full_table()
    return {"images": augment(*photos, table, resolution=37, margin=2, dtype=dtype, impl="triton")}


INFERRED = tuple(
    test_mbconv.Block(c_in, c_out, 6, 3, 1, size, dtype, padding="same")
    for dtype in NAMES
    for c_in, c_out, size in ((2, 3, (4, 5)), (8, 8, (7, 7)), (8, 16, (9, 9)), (8, 72, (8, 8)), (8, 72, (7, 7)))
) + tuple(test_mbconv.Block(8, n, 1, 5, 2, (5, 5), FP16, images=1) for n in (8, 72))
ALONE = tuple(
    test_pointwise.Case(dtype, 2, entry, 8, out, 5, 7, walk=out == 40)
    for dtype in NAMES
    for entry, out in (
        (10, 6),
        (16, 24),
        (24, 16),
        (24, 40),
        (40, 72),
        (72, 40),
        (136, 136),
        (24, 136),
        (136, 24),
        (72, 72),
    )
)
RUNS: dict[str, tuple[Callable[[Any], dict[str, Tensor]], Sequence[Any]]] = {
    "operation": (operate, operations()),
    "product": (multiply, PRODUCTS),
    "product alone": (multiply_alone, ALONE),
    "depthwise": (convolve, CONVOLUTIONS),
    "block": (train, BLOCKS),
    "inference": (infer, INFERRED),
    "residual_adds": (leave_residual_adds, tuple(NAMES)),
    "sums": (add_up, (3, 33, 300)),
    "augment": (augmented, tuple(OUTPUTS)),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [pytest.param(kind, case, id=f"{kind}-{case}") for kind, (_, cases) in RUNS.items() for case in cases],
)
def test_no_race_no_overrun_and_nothing_unwritten_is_read(kind: str, case: Any) -> None:
    with_each_candidate(functools.partial(RUNS[kind][0], case))


def form(kernel: Any, constexprs: Mapping[str, Any]) -> tuple[str, frozenset[tuple[str, str]]]:
    """A kernel and its compile-time arguments, without those that are absent pointers or concern only the schedule."""
    known = {name: str(value) for name, value in constexprs.items() if name in kernel.arg_names}
    return kernel.fn.__name__, frozenset((n, v) for n, v in known.items() if not n.endswith("_ptr") and n != "STAGES")


def test_cases_cover_every_form_of_every_kernel() -> None:
    """Of whatever the compile report builds, up to the dtype; the depthwise cases are a product that does."""
    with launch.dry() as launches, mock.patch.object(Tensor, "isfinite", return_value=torch.ones(())):
        for kind, (run, cases) in RUNS.items():
            for case in cases if kind != "depthwise" else ():
                with_each_candidate(functools.partial(run, case))
    covered = {form(job.kernel, job.options) for job in launches}
    specified = {form(spec.fn, spec.constexprs) for spec in all_specs() if spec.kind != "strips"}
    missing = sorted(f"{name} {sorted(constexprs)}" for name, constexprs in specified - covered)
    assert not missing, "\n".join(missing)


STORE = "store_channels(partial_ptr + part * channels, mean_of_means + shift, c0, channels, BLOCK_C)"
PLANTED = (
    # Executed one after another, the next program puts right what the one before spilled: values do not show it.
    Mutation(
        "each program writes one channel of the next one's means",
        "kernels/batch_norm.py",
        STORE,
        STORE.replace("channels, BLOCK_C", "channels + (part + 1 < partials).to(tl.int32), BLOCK_C"),
        ("both touch element 24 of `partial_ptr`",),
    ),
    Mutation(
        "one channel too many is stored",
        "kernels/batch_norm.py",
        "tl.store(ptr + cols, value, mask=cols < channels)",
        "tl.store(ptr + cols, value, mask=cols <= channels)",
        (r"writes 1 element\(s\) past the end of the tensor passed as `partial_ptr`",),
    ),
    Mutation(
        "one row too many is read",
        "kernels/batch_norm.py",
        "(rows < end) & (cols < channels)",
        "(rows <= end) & (cols < channels)",
        (r"reads 24 element\(s\) past the end of the tensor passed as `x_ptr`",),
    ),
    Mutation(
        "the first program does not write its squares",
        "kernels/batch_norm.py",
        "tl.sum(m2, axis=0), c0, channels, BLOCK_C)",
        "tl.sum(m2, axis=0), c0, tl.where(part > 0, channels, 0), BLOCK_C)",
        ("`_merge_stats_kernel`.*8 of the elements read were never written",),
    ),
)


def statistics(module: ModuleType) -> tuple[Tensor, Tensor]:
    """`batch_stats` of a copy of kernels/batch_norm.py by two programs that walk three tiles each."""
    x = torch.randn(parity.WALK).contiguous(memory_format=torch.channels_last)
    with parity.few_programs(2):
        return module.batch_stats(x)


def copied(source: str, file: Path) -> ModuleType:
    """Kernels, imported from `file` beside those of the project."""
    file.write_text(source.replace('"fastnet::', f'"{file.stem}::'))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unbroken_copy_has_no_fault(tmp_path: Path) -> None:
    mean, var = statistics(copied((ROOT / "kernels/batch_norm.py").read_text(), tmp_path / "unbroken.py"))
    assert mean.isfinite().all()
    assert var.isfinite().all()


@pytest.mark.parametrize("mutation", PLANTED, ids=lambda m: m.name.replace(" ", "-"))
def test_planted_fault_is_seen(mutation: Mutation, tmp_path: Path) -> None:
    source = mutation.apply((ROOT / mutation.file).read_text())
    with pytest.raises(KernelFault, match=mutation.tests[0]):
        statistics(copied(source, tmp_path / f"planted{PLANTED.index(mutation)}.py"))
