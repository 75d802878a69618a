"""Time to the first compiled training step of ours against `torch.compile` of timm's model, cold and warm.

Each measurement is a fresh process. Cold: its Inductor and Triton caches are empty folders of its own; warm: a second
process on the same folders. Images are small and few: what is compiled, and how long that takes, depends on the number
of distinct programs, and hardly on the sizes in them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.contenders import OURS, TIMM, available_peers
from bench.first_step import in_subprocess

VARIANT, RESOLUTION, BATCH = "b0", 64, 4


def test_first_compiled_step(benchmark: Any, tmp_path: Path, tell: list[str]) -> None:
    if TIMM not in available_peers()[0]:
        pytest.skip("timm is not installed")

    def first_step(name: str) -> float:
        caches = tmp_path / name.replace(" ", "-")
        result = in_subprocess(name, caches, variant=VARIANT, resolution=RESOLUTION, batch=BATCH)
        return float(result["first_step"])

    cold, warm = {}, {}
    # The one timed by the plug-in is ours, cold, with the start of its process; the figures below leave that out.
    cold[OURS] = benchmark.pedantic(first_step, args=(OURS,), rounds=1)
    cold[TIMM] = first_step(TIMM)
    for name in (OURS, TIMM):
        warm[name] = first_step(name)
    benchmark.extra_info.update(
        cold_seconds=cold,
        warm_seconds=warm,
        cold_ratio=cold[OURS] / cold[TIMM],
        warm_ratio=warm[OURS] / warm[TIMM],
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    for what, seconds in (("cold", cold), ("warm", warm)):
        tell.append(
            f"first compiled step {VARIANT}@{RESOLUTION} batch {BATCH}, {what}: {OURS} {seconds[OURS]:.1f} s, "
            f"{TIMM} {seconds[TIMM]:.1f} s, ratio {seconds[OURS] / seconds[TIMM]:.2f}"
        )
