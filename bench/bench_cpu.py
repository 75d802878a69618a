"""The training step of B0 on a CPU: blocks in C++ against PyTorch's, ours and the peers', eager and compiled.

    pytest bench -k cpu --benchmark-only

Every contender takes a step in each round, all with the allocator that our commands run with (`fastnet.allocator`), so
that what is compared is arithmetic; as installed, peers are slower still. Reported: images/s by the median step, and
the median over rounds of (fastest peer's seconds / ours) in fp32 and in bf16, in whatever form that peer is fastest.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from bench.contenders import OURS, StepRunner, compared_peers
from bench.measure import median_ratio
from kernels.cpu.build import cpu_level

VARIANT, RESOLUTION = "b0", 224
ROUNDS = 15


@pytest.mark.parametrize("batch", [8, 16])
def test_cpu_training_step(benchmark: Any, device: torch.device, tell: list[str], batch: int) -> None:
    if device.type != "cpu":
        pytest.skip("measures a CPU")

    def runner(name: str, amp: Any = "off", **options: Any) -> StepRunner:
        return StepRunner(name, VARIANT, RESOLUTION, batch, device, amp=amp, **options)

    peers = {f"{OURS} torch": runner(OURS, kernels="torch")}
    for name in compared_peers():
        peers[f"{name} eager"] = runner(name)
        peers[f"{name} compiled"] = runner(name, compile_options={})
        if cpu_level() == "avx512-bf16":  # elsewhere PyTorch's bf16 convolutions take many times as long
            peers[f"{name} eager bf16"] = runner(name, "bf16")
    bf16 = runner(OURS, "bf16", kernels="native")
    fp32 = runner(OURS, kernels="native")
    others = {**peers, f"{OURS} native bf16": bf16}
    taken: dict[str, list[float]] = {name: [] for name in others}
    for run in (*others.values(), fp32):
        for _ in range(2):
            run()

    def others_first() -> None:
        for name, run in others.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)

    benchmark.group = f"CPU training step {VARIANT}@{RESOLUTION} batch {batch}"
    benchmark.pedantic(fp32, setup=others_first, rounds=ROUNDS)
    if benchmark.disabled:
        return
    own = list(benchmark.stats.stats.data)
    taken = {name: times[-len(own) :] for name, times in taken.items()} | {f"{OURS} native fp32": own}
    fastest = min(peers, key=lambda name: statistics.median(taken[name]))
    rates = {name: batch / statistics.median(times) for name, times in taken.items()}
    ratios = {kind: median_ratio(taken[fastest], taken[f"{OURS} native {kind}"]) for kind in ("fp32", "bf16")}
    benchmark.extra_info.update(
        images_per_second=rates, fastest_peer=fastest, ratios=ratios, threads=torch.get_num_threads()
    )
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        tell.append(f"CPU step {VARIANT}@{RESOLUTION} batch {batch} {name}: {rate:.1f} img/s")
    tell.append(
        f"CPU step batch {batch}: native fp32 at {ratios['fp32']:.2f}, bf16 at {ratios['bf16']:.2f} of {fastest}; "
        f"median of {len(own)} rounds, {torch.get_num_threads()} threads"
    )
