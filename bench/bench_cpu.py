"""The training step on a CPU: ours in C++ against timm and torchvision, and the table of what was aimed at.

    pytest bench -k cpu --benchmark-only                                     # all of it, in about a quarter of an hour
    pytest bench/bench_cpu.py --benchmark-only -k 'step and 224 and 16'     # one row of it, in a minute

Every contender takes a step in each round, the update included, all with the allocator that our commands run with
(`fastnet.allocator`), so that what is compared is arithmetic. Then the peers run once more as they are installed, in a
process of their own. Reported: images/s by the median step, and ours in fp32 and in bf16 against whatever peer is
fastest: over the rounds of one process, and against the best as installed. Peers run eager in fp32, and at batch 16 in
bf16 and compiled too: a compilation takes a minute or two, and what each gains there is reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench import cpu_peers
from bench.contenders import OURS, TORCHVISION, StepRunner, Workload
from bench.measure import median_ratio
from kernels.cpu.build import build, cpu_level, cpu_levels, cpu_name
from kernels.cpu.library import Library, using


class Aim(NamedTuple):
    """Times as fast as the best peer with a tuned allocator; None: stated only."""

    fp32: float | None
    bf16: float | None


WORKLOADS = {
    Workload("b0", 224, 8): Aim(2.5, 3.6),
    Workload("b0", 224, 16): Aim(2.5, 3.6),
    Workload("b0", 224, 64): Aim(2.5, 3.6),
    Workload("b1", 232, 4): Aim(2.3, None),
    Workload("b4", 380, 4): Aim(2.3, None),
    Workload("b0", 128, 64): Aim(2.3, None),
}
ROW = Workload("b0", 224, 16)
AVX2_AIM, START_AIM, MEMORY_AIM = 1.5, 15.0, 0.5
HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _a_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("measures a CPU")


@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def test_cpu_training_step(benchmark: Any, tell: list[str], at_the_end: list[str], work: Workload) -> None:
    pixels = work.batch * work.resolution**2
    short = work.variant == "b0" and pixels <= 16 * 224**2
    peers: dict[str, Callable[[], object]] = dict(cpu_peers.runners(work, "eager", bf16=work == ROW))
    ours = own_runners(work)
    taken = _interleaved(benchmark, peers | ours, rounds=7 if short else 4)
    if taken is not None:
        installed = cpu_peers.as_installed(work, "eager", bf16=False)
        _report(benchmark, tell, at_the_end, f"{work}", work, taken, list(peers), installed, WORKLOADS[work])


def test_cpu_training_step_against_compiled_peers(benchmark: Any, tell: list[str], at_the_end: list[str]) -> None:
    peers: dict[str, Callable[[], object]] = dict(cpu_peers.runners(ROW, "compiled", bf16=False))
    taken = _interleaved(benchmark, peers | own_runners(ROW), rounds=7)
    if taken is not None:
        installed = cpu_peers.as_installed(ROW, "compiled", bf16=False)
        _report(benchmark, tell, at_the_end, f"{ROW}, compiled", ROW, taken, list(peers), installed, WORKLOADS[ROW])


def test_cpu_training_step_of_an_avx2_build(benchmark: Any, tell: list[str], at_the_end: list[str]) -> None:
    if "avx2" not in cpu_levels():
        pytest.skip("this CPU has no AVX2")
    library = Library(build("avx2"))
    step = StepRunner(OURS, *ROW, cpu_peers.CPU, kernels="native")

    def avx2() -> object:
        with using(library):
            return step()

    peers: dict[str, Callable[[], object]] = dict(cpu_peers.runners(ROW, "eager", bf16=False))
    taken = _interleaved(benchmark, peers | {f"{OURS} fp32": avx2}, rounds=5)
    if taken is not None:
        _report(benchmark, tell, at_the_end, f"{ROW}, AVX2 build", ROW, taken, list(peers), {}, Aim(AVX2_AIM, None))


def test_cpu_start_of_training(benchmark: Any, tell: list[str], at_the_end: list[str], tmp_path: Path) -> None:
    """From nothing: the library compiled, every block checked and measured, and the first step."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "bench.cpu_peers", "start", *map(str, ROW)]

    def start() -> dict[str, float]:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=HERE, env=environment)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(start, rounds=1)
    seconds = sum(found.values())
    benchmark.extra_info.update(found)
    parts = ", ".join(f"{name} {spent:.1f} s" for name, spent in found.items())
    tell.append(f"CPU start of training {ROW}: {seconds:.1f} s ({parts})")
    _add(at_the_end, "start of training, library to be built", f"{seconds:.1f} s", "–", f"aim ≤ {START_AIM:.0f} s", "–")


def test_cpu_peak_memory(benchmark: Any, tell: list[str], at_the_end: list[str]) -> None:
    """Of a process that takes five steps."""
    found = benchmark.pedantic(
        lambda: {name: cpu_peers.peak_memory(ROW, name) for name in (OURS, TORCHVISION)}, rounds=1
    )
    share = found[OURS] / found[TORCHVISION]
    benchmark.extra_info.update(found)
    tell.append(f"CPU peak memory {ROW}: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in found.items()))
    sizes = [f"{found[name] / 1e9:.2f} GB" for name in (OURS, TORCHVISION)]
    _add(
        at_the_end, f"peak memory, {ROW}", sizes[0], f"torchvision {sizes[1]}", f"{share:.2f} (aim ≤ {MEMORY_AIM})", "–"
    )


def own_runners(work: Workload) -> dict[str, Callable[[], object]]:
    return {
        f"{OURS} {name}": StepRunner(OURS, *work, cpu_peers.CPU, amp=amp, kernels="native")
        for name, amp in cpu_peers.PRECISIONS.items()
    }


def _interleaved(benchmark: Any, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]] | None:
    """Seconds of each of `runs`, a step of each a round; None where the benchmark is switched off."""
    *others, last = runs
    taken: dict[str, list[float]] = {name: [] for name in others}
    for run in runs.values():
        for _ in range(2):
            run()

    def others_first() -> None:
        for name in others:
            began = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - began)

    benchmark.pedantic(runs[last], setup=others_first, rounds=rounds)
    if benchmark.disabled:
        return None
    own = list(benchmark.stats.stats.data)
    return {name: times[-len(own) :] for name, times in taken.items()} | {last: own}


def _report(
    benchmark: Any, tell: list[str], at_the_end: list[str], title: str, work: Workload, taken: dict[str, list[float]],
    peers: list[str], installed: dict[str, float], aim: Aim,
) -> None:  # fmt: skip
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    best = min(peers, key=seconds.__getitem__)
    ratios = {
        kind: median_ratio(taken[best], taken[f"{OURS} {kind}"]) for kind in aim._fields if f"{OURS} {kind}" in taken
    }
    stated = {kind: min(installed.values()) / seconds[f"{OURS} {kind}"] for kind in ratios} if installed else {}
    benchmark.group = f"CPU training step {title}"
    benchmark.extra_info.update(
        seconds=seconds, seconds_installed=installed, best_peer=best, ratios=ratios, ratios_installed=stated,
        threads=torch.get_num_threads(), cpu=cpu_name(), level=cpu_level(),
    )  # fmt: skip
    for name, median in sorted(seconds.items(), key=lambda item: -item[1]):
        as_it_comes = f"; as installed {work.batch / installed[name]:.1f}" if name in installed else ""
        tell.append(f"CPU step {title}: {name} {work.batch / median:.1f} img/s{as_it_comes}")
    for kind, ratio in ratios.items():
        wanted = getattr(aim, kind)
        own = work.batch / seconds[f"{OURS} {kind}"]
        others = f"{best} {work.batch / seconds[best]:.1f}"
        tuned = f"{ratio:.2f} ×" + (f" (aim {wanted} ×)" if wanted else "")
        untuned = f"{stated[kind]:.2f} ×" if stated else "–"
        _add(at_the_end, f"{title}, {kind}", f"{own:.1f}", others, tuned, untuned)


def _add(table: list[str], *cells: str) -> None:
    """A row of the table of aims, below its head."""
    head = ("on a CPU", "images/s", "best peer, allocator tuned", "times as fast", "as the best as installed")
    if not table:
        table += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    table.append("| " + " | ".join(cells) + " |")
