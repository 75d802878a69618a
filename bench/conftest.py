"""What the benchmarks share: the device, and one readable line a benchmark at the end of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch

from bench.machine import photos_folder
from fastnet.allocator import keep_memory
from fastnet.device import pick_device

_LINES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """`--benchmark-disable-gc`, here because without pytest-benchmark pytest would refuse it in its configuration."""
    if hasattr(config.option, "benchmark_disable_gc"):
        config.option.benchmark_disable_gc = True


@pytest.fixture(scope="session")
def device() -> torch.device:
    return pick_device("auto")


@pytest.fixture(scope="session", autouse=True)
def _memory(device: torch.device) -> None:
    """Ours and the peers' timings alike are taken as our commands run."""
    keep_memory(device)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real photos in Food-101's layout, or skip."""
    folder = photos_folder()
    if folder is None:
        pytest.skip("no real photos: set FASTNET_PHOTOS to a folder in Food-101's layout")
    return folder


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines appended here are printed after the table of timings."""
    lines: list[str] = []
    yield lines
    request.config.stash.setdefault(_LINES, []).extend(lines)


@pytest.fixture(scope="module")
def at_the_end(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows appended here are printed together behind what the module's benchmarks told."""
    rows: list[str] = []
    yield rows
    if rows:
        request.config.stash.setdefault(_LINES, []).extend(["", *rows])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_LINES, [])
    if lines:
        terminalreporter.section("comparisons")
        for line in lines:
            terminalreporter.write_line(line)
