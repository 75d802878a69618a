"""The training step (forward, loss, backward, optimizer) of B0@224 against timm's and torchvision's.

Each model in its better memory format, same batch, threads, precision, optimizer and loss, eager, interleaved in one
run: before each timed step of ours every peer takes one. Reported: images/s, and the median over rounds of
(fastest peer's seconds / ours); above 1 ours is the faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contenders import OURS, StepRunner, available_peers, best_format
from bench.measure import median_ratio, synchronise

VARIANT, RESOLUTION = "b0", 224
# Enough rounds that the ratio's own spread, on a quiet machine, is about a hundredth.
CPU_BATCH, CPU_ROUNDS = 8, 25
GPU_BATCH, GPU_ROUNDS = 256, 50


def test_training_step_b0(benchmark: Any, device: torch.device, tell: list[str]) -> None:
    on_gpu = device.type == "cuda"
    batch, rounds = (GPU_BATCH, GPU_ROUNDS) if on_gpu else (CPU_BATCH, CPU_ROUNDS)
    peers, missing = available_peers()
    if not peers:
        pytest.skip("no peer to compare with: install timm or torchvision")

    def prepared(name: str) -> StepRunner:
        def make(memory_format: str) -> StepRunner:
            return StepRunner(
                name, VARIANT, RESOLUTION, batch, device, amp="bf16" if on_gpu else "off", memory_format=memory_format
            )

        return best_format(make, device)

    runners = {name: prepared(name) for name in (OURS, *peers)}
    taken: dict[str, list[float]] = {name: [] for name in peers}

    def timed(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        synchronise(device)
        return time.perf_counter() - began

    def peers_first() -> None:
        for name in peers:
            taken[name].append(timed(runners[name]))

    def ours() -> None:
        runners[OURS]()
        synchronise(device)

    benchmark.group = f"training step {VARIANT}@{RESOLUTION} batch {batch}"
    benchmark.pedantic(ours, setup=peers_first, rounds=rounds)
    if benchmark.disabled:
        return
    own = list(benchmark.stats.stats.data)
    fastest = min(peers, key=lambda name: statistics.median(taken[name]))
    ratio = median_ratio(taken[fastest][-len(own) :], own)
    rates = {name: batch / statistics.median(times) for name, times in {OURS: own, **taken}.items()}
    benchmark.extra_info.update(
        ratio_to_fastest=ratio,
        fastest_peer=fastest,
        images_per_second=rates,
        memory_formats={name: runner.memory_format for name, runner in runners.items()},
        threads=torch.get_num_threads(),
        missing=missing,
    )
    for name, rate in rates.items():
        tell.append(
            f"step {VARIANT}@{RESOLUTION} batch {batch} {name}: {rate:.1f} img/s, {runners[name].memory_format}"
        )
    tell.append(f"step: {OURS} runs at {ratio:.3f} of the fastest peer ({fastest}); median of {len(own)} pairs")
    tell.extend(missing)
