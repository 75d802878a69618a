"""The training step on a CPU: blocks in C++ against timm and torchvision, eager and compiled, fp32 and bf16.

    pytest bench -k cpu --benchmark-only
    pytest bench/bench_cpu.py --benchmark-only -k 'eager and 224 and 16'       # one row of it, in a minute

Every contender takes a step in each round, the update included, all with the allocator that our commands run with
(`fastnet.allocator`), so that what is compared is arithmetic. Then the peers run once more as they are installed, in a
process of their own. Reported: images/s by the median step, and ours in fp32 and in bf16 against whatever form of a
peer is fastest: over the rounds of one process, and against the best as installed.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from bench import cpu_peers
from bench.contenders import OURS, StepRunner, Workload
from bench.measure import median_ratio
from kernels.cpu.build import cpu_level, cpu_name

WORKLOADS = (
    Workload("b0", 224, 8), Workload("b0", 224, 16), Workload("b0", 224, 64), Workload("b1", 232, 4),
    Workload("b4", 380, 4), Workload("b0", 128, 64),
)  # fmt: skip


@pytest.mark.parametrize("work", WORKLOADS, ids=str)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_cpu_training_step(
    benchmark: Any, device: torch.device, tell: list[str], work: Workload, mode: cpu_peers.Mode
) -> None:
    if device.type != "cpu":
        pytest.skip("measures a CPU")
    rounds = 15 if work.batch * work.resolution**2 <= 16 * 224**2 else 7
    peers = cpu_peers.runners(work, mode)
    torch_alone = StepRunner(OURS, *work, device, kernels="torch")
    bf16 = StepRunner(OURS, *work, device, amp="bf16", kernels="native")
    fp32 = StepRunner(OURS, *work, device, kernels="native")
    others = {**peers, f"{OURS} torch": torch_alone, f"{OURS} native bf16": bf16}
    taken: dict[str, list[float]] = {name: [] for name in others}
    for run in (*others.values(), fp32):
        for _ in range(2):
            run()

    def others_first() -> None:
        for name, run in others.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)

    benchmark.group = f"CPU training step {work}, peers {mode}"
    benchmark.pedantic(fp32, setup=others_first, rounds=rounds)
    if benchmark.disabled:
        return
    own = list(benchmark.stats.stats.data)
    taken = {name: times[-len(own) :] for name, times in taken.items()} | {f"{OURS} native fp32": own}
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    installed = cpu_peers.as_installed(work, mode)
    fastest, fastest_installed = min(peers, key=seconds.__getitem__), min(installed, key=installed.__getitem__)
    ratios = {kind: median_ratio(taken[fastest], taken[f"{OURS} native {kind}"]) for kind in ("fp32", "bf16")}
    stated = {kind: installed[fastest_installed] / seconds[f"{OURS} native {kind}"] for kind in ratios}
    threads = torch.get_num_threads()
    benchmark.extra_info.update(
        seconds=seconds, seconds_installed=installed, fastest_peer=fastest, ratios=ratios, ratios_installed=stated,
        threads=threads, cpu=cpu_name(), level=cpu_level(),
    )  # fmt: skip
    for name, median in sorted(seconds.items(), key=lambda item: -item[1]):
        as_it_comes = f"; as installed {work.batch / installed[name]:.1f}" if name in installed else ""
        tell.append(f"CPU step {work} {name}: {work.batch / median:.1f} img/s{as_it_comes}")
    tell.append(
        f"CPU step {work}: native fp32 {ratios['fp32']:.2f} x, bf16 {ratios['bf16']:.2f} x {fastest}; as installed "
        f"{stated['fp32']:.2f} x, {stated['bf16']:.2f} x {fastest_installed}; medians of {rounds} rounds, {threads} "
        f"threads, {cpu_level()}"
    )
