"""Every kernel, as compiled, is free of races, overruns and reads of unwritten memory; each such fault is seen.

`make races` runs this file in an environment with ttsem (see tests/races.py). The cases are ragged, and small: each
has several programs all the same, and those that walk several tiles.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("ttsem", reason="ttsem is not here: `make races` runs this file in an environment that has it")

from ttsem.sanitize import KernelFault

from kernels.augment import OUTPUTS, augment
from tests import parity, races, test_augment_kernel, test_depthwise, test_mbconv, test_pointwise
from tests.mutations import ROOT, Mutation
from tests.parity import ARGUMENTS, NAMES, SHAPES, WALK, kernel_device

__all__ = ["kernel_device"]

pytestmark = pytest.mark.skipif(not races.active(), reason="needs `-p tests.races`, as `make races` has it")


def operations() -> list[parity.Case]:
    """Each operation in each dtype and mode on three shapes of its own, walking, and without optional arguments."""
    made = []
    for i, op in enumerate(ARGUMENTS):
        modes: tuple[Any, ...] = ("train", "eval") if op.startswith("bn") else ("plain",)
        for j, dtype in enumerate(NAMES):
            for mode in modes:
                chosen = [SHAPES[(i + 3 * n + j) % len(SHAPES)] for n in range(3 if mode != "eval" else 1)]
                made += [parity.Case(op, dtype, shape, squeeze, mode) for shape, squeeze in chosen]
            case = parity.Case(op, dtype, WALK, 4, modes[0], walk=True)
            made.append(case)
            optional = [name for name in ("residual", "scale") if name in ARGUMENTS[op]]
            if op == "bn_drop_connect_add":
                made += [replace(case, shape=SHAPES[j][0], walk=False, absent=(name,)) for name in optional]
    return made


@pytest.mark.parametrize("case", operations(), ids=str)
def test_operations(case: parity.Case) -> None:
    for name, value in parity.run(case, "triton").items():
        assert torch.isfinite(value).all(), f"{name} was not written whole"


@pytest.mark.parametrize("case", [*test_pointwise.QUICK, *test_pointwise.SLOW], ids=str)
def test_pointwise_products(case: test_pointwise.Case) -> None:
    for name, value in test_pointwise.launched(case, test_pointwise.inputs(case)).items():
        assert torch.isfinite(value).all(), f"{name} was not written whole"


@pytest.mark.parametrize("case", [*test_depthwise.QUICK, *test_depthwise.SLOW], ids=str)
def test_depthwise_convolutions(case: test_depthwise.Case) -> None:
    sums = None if case.mode == "alone" else torch.zeros(2, case.shape[1])
    for name, value in test_depthwise.run(case, test_depthwise.inputs(case), sums).items():
        assert torch.isfinite(value).all(), f"{name} was not written whole"


@pytest.mark.parametrize("block", [*test_mbconv.QUICK, *test_mbconv.SLOW], ids=str)
def test_mbconv_trains(block: test_mbconv.Block) -> None:
    for name, value in test_mbconv.run(block, test_mbconv.inputs(block), "triton").items():
        assert torch.isfinite(value).all(), f"{name} was not written whole"


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_mbconv_infers(dtype: torch.dtype) -> None:
    for block in (test_mbconv.QUICK[0], test_mbconv.SLOW[5]):
        block = replace(block, dtype=dtype)
        with torch.no_grad(), parity.nan_allocations():
            y = test_mbconv.call(block, test_mbconv.inputs(block), "triton", training=False)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_mbconv_leaves_its_join(dtype: torch.dtype) -> None:
    block = functools.partial(test_mbconv.Block, expand_ratio=6, kernel_size=3, stride=1, map=(7, 5), dtype=dtype)
    blocks = (block(6, 8, expand_ratio=1, scaled=False), block(8, 8), block(8, 10, scaled=False))
    for name, value in test_mbconv.chained(blocks, join=False).items():
        assert torch.isfinite(value).all(), f"{name} was not written whole"


@pytest.mark.parametrize("dtype", OUTPUTS, ids=OUTPUTS.get)
def test_augment(dtype: torch.dtype) -> None:
    photos, table = test_augment_kernel.noise(*test_augment_kernel.SIZES), test_augment_kernel.full_table()
    images = augment(*photos, table, resolution=37, margin=2, dtype=dtype, impl="triton")
    assert dtype == torch.uint8 or torch.isfinite(images).all()


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
