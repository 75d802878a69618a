"""Triton's run-time path for cards that are not here (`tests.fake_driver`), in processes that do not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUSED = {
    "_pointwise_kernel", "_pointwise_wgrad_kernel", "_depthwise_kernel", "_depthwise_backward_kernel",
    "_excite_kernel", "_excite_backward_kernel", "_squeeze_kernel", "_norm_vectors_kernel",
}  # fmt: skip


def tried(*arguments: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_driver", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["86", "90"])
def test_every_launch_binds_and_was_compiled_ahead_as_it_is_launched(arch: str) -> None:
    result = tried("bind", arch)
    assert set(result["kernels"]) >= FUSED
    assert result["launched"] == result["recorded"] > 300
    assert result["compiled while recorded"] == []
    assert result["compiled once more"] == []  # `compile_all` foresaw every launch
    assert result["compiled again"] == []
    assert result["not in the compile report"] == []
    # A view that begins off 16 bytes is another specialisation, of the kernels that it meets, once.
    other = set(result["compiled for a misaligned view"])
    assert other >= {"_stats_kernel", "_bn_silu_fwd_kernel", "_bn_silu_dx_kernel"}
    assert other.isdisjoint({"_merge_stats_kernel", "_excite_kernel"})
    assert result["compiled for it again"] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["86", pytest.param("90", marks=pytest.mark.full)])  # 90 has twice as much
def test_wide_blocks_fit_the_shared_memory_of_a_block(arch: str) -> None:
    result = tried("load", arch)
    assert "error" not in result, result["error"]
    assert set(result["shared"]) >= FUSED
    assert max(result["shared"].values()) <= result["limit"]
    assert result["shared"]["_pointwise_kernel"] > 0


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_is_refused_in_one_sentence() -> None:
    result = tried("load", "86", "1024")
    assert result["error"].count("\n") == 0
    assert "_kernel needs" in result["error"]
    assert "of shared memory and NVIDIA GeForce RTX 3090 has 1,024" in result["error"]
