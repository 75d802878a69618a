"""What surrounds a launch: observers, dry runs, and the sentences that Triton's errors become."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import kernels
from kernels import configs, device, launch
from kernels.configs import Site
from tests import parity
from tests.parity import Case

RTX_3090 = device.Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 101_376)


def raising(error: Exception) -> Any:
    """A kernel whose launch raises."""

    def run(*args: Any, **options: Any) -> None:
        raise error

    class Kernel:
        fn = SimpleNamespace(__name__="_some_kernel")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return run

    return Kernel()


def launched(error: Exception) -> None:
    with device.pretend(RTX_3090):
        launch.launch(raising(error), (1,), like=torch.ones(1), num_warps=4)


@pytest.mark.skipif(not launch.INTERPRETED, reason="launches on CPU tensors")
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            triton.OutOfResources(115_200, 101_376, "shared memory"),
            r"some_kernel needs 115,200 of shared memory and NVIDIA GeForce RTX 3090 has 101,376: pass impl='torch'",
        ),
        (
            triton.CompilationError("def f():\n  x", None, "boom"),
            r"some_kernel could not be compiled for NVIDIA GeForce RTX 3090 \(CompilationError: boom\)",
        ),
        (
            triton.runtime.errors.PTXASError("no such\ninstruction"),
            r"could not be compiled .*PTXASError: instruction\)",
        ),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "needs a C compiler and Python's headers"),
        (subprocess.CalledProcessError(1, ["gcc"]), "install gcc and python3-dev, name a compiler in CC"),
        (FileNotFoundError("no-such-compiler"), "needs a C compiler"),
        (PermissionError("cannot write /cache"), r"could not keep what it compiled .*TRITON_CACHE_DIR"),
        (RuntimeError("PassManager::run failed"), "could not be compiled for NVIDIA GeForce RTX 3090"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "could not be compiled"),
        (
            RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
            "could not be compiled .*image is invalid",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_triton_raises_becomes_one_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(launch.KernelError, match=sentence) as caught:
        launched(error)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.skipif(not launch.INTERPRETED, reason="launches on CPU tensors")
def test_no_memory_stays_what_it_is_and_a_fault_of_a_running_kernel_is_not_explained_away() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="64 GiB"):
        launched(torch.OutOfMemoryError("tried to allocate 64 GiB"))
    with pytest.raises(torch.OutOfMemoryError, match="some_kernel was loaded"):
        launched(RuntimeError("Triton Error [CUDA]: out of memory"))
    for error in (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), ValueError("mine")):
        with pytest.raises(type(error)) as caught:
            launched(error)
        assert caught.value is error


def expansion(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.ones(40, 24, dtype=x.dtype)
    found: tuple[torch.Tensor, ...] = torch.ops.fastnet.mbconv_expand(x, weight)
    return found


IMAGES = torch.ones(2, 24, 7, 7).contiguous(memory_format=torch.channels_last)
SITE = Site("pointwise", (2, 7, 7, 24, 40, "none", "statistics", "float32"))


@pytest.mark.skipif(not launch.INTERPRETED, reason="launches on CPU tensors")
def test_an_observer_sees_each_launch_with_its_site_and_runs_it() -> None:
    seen: list[Site | None] = []

    def observer(site: Site | None, run: Callable[[], None]) -> None:
        seen.append(site)
        run()

    with launch.observing(observer):
        y, mean, _ = expansion(IMAGES)
        kernels.drop_connect_add(IMAGES, IMAGES, None, impl="triton")
    assert seen == [SITE, SITE, None]  # the product, the merge of its statistics, and what has no choice
    assert (y == 24).all()
    assert (mean == 24).all()
    expansion(IMAGES)
    assert len(seen) == 3, "observing ends with the block"


def test_a_dry_run_lists_launches_and_runs_none() -> None:
    with parity.nan_allocations(), launch.dry() as listed:
        y, mean, _ = expansion(IMAGES)
    assert y.isnan().all()
    assert mean.isnan().all()
    assert [job.site for job in listed] == [SITE, SITE]
    assert not any(isinstance(argument, torch.Tensor) for job in listed for argument in job.args)
    first = listed[0].args[0]
    assert (first.dtype, first.data_ptr()) == (torch.float32, IMAGES.data_ptr() % 16)
    assert configs.candidates(SITE, device.REFERENCE)


def test_a_dry_run_needs_no_device_and_no_memory() -> None:
    with launch.dry() as listed:
        kernels.block.pointwise.forward(
            torch.empty(64, 24, 500, 500, device="meta"), torch.empty(40, 24, device="meta")
        )
    assert len(listed) == 2
    assert listed[0].args[0].data_ptr() == 0


@pytest.mark.skipif(not launch.INTERPRETED, reason="compiles nothing")
def test_the_interpreter_has_nothing_to_compile() -> None:
    with launch.dry() as listed:
        parity.call(
            "drop_connect_add", parity.inputs(Case("drop_connect_add", torch.float32, (2, 8, 5, 5))), "triton", {}
        )
    assert len(listed) == 1
    assert launch.compile_all(listed, progress=lambda done, total: pytest.fail("compiled")) == 0
