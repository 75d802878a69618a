"""Stage of the proof about launch configurations: every candidate of each launch of a fused block, which is fastest.

What `kernels.configs` predicts best stands beside what was. Training measures the same for itself before its first
step.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.cases import BlockCase
from bench.launches import describe
from bench.measure import ColdCache, synchronise
from bench.proof.blocks import FUSED, timed_blocks
from bench.stages import Case, Context, Stage, attempt
from kernels import configs
from kernels.block.traffic import Block
from kernels.configs import Config, Site
from kernels.device import gpu
from kernels.launch import INTERPRETED, observing

RUNS = 12
Times = dict[Site, dict[Config, list[float]]]


class LaunchTimer:
    """Seconds of each launch with a site, from `clock()` before it to `clock()` after it. A site's launches in one run
    of a block are added up: a kernel and the sum of its partials are chosen together."""

    def __init__(self, clock: Callable[[], Any], seconds_between: Callable[[Any, Any], float]) -> None:
        self.clock, self.seconds_between = clock, seconds_between
        self.marks: list[tuple[Site, Any, Any]] = []

    def __call__(self, site: Site | None, run: Callable[[], object]) -> None:
        before = self.clock()
        run()
        if site is not None:
            self.marks.append((site, before, self.clock()))

    def take(self) -> Counter[Site]:
        """Seconds by site since the last call."""
        found: Counter[Site] = Counter()
        for site, before, after in self.marks:
            found[site] += self.seconds_between(before, after)  # type: ignore[assignment]
        self.marks.clear()
        return found


def cuda_timer() -> LaunchTimer:
    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return LaunchTimer(now, lambda before, after: before.elapsed_time(after) * 1e-3)


def rounds_of(sites: Sequence[Site], candidates: Callable[[Site], tuple[Config, ...]]) -> list[dict[Site, Config]]:
    """Every candidate of every site once: round i tries candidate i everywhere, and the first where there is none."""
    most = max((len(candidates(site)) for site in sites), default=0)
    return [{site: (c := candidates(site))[i if i < len(c) else 0] for site in sites} for i in range(most)]


def time_candidates(
    step: Callable[[], object],
    timer: LaunchTimer,
    candidates: Callable[[Site], tuple[Config, ...]],
    *,
    runs: int,
    before: Callable[[], object] = lambda: None,
    settle: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds of each site's launches in `step` with each of its candidates. `before` comes ahead of each run, `settle`
    before its times are read."""

    def measured() -> Counter[Site]:
        before()
        with observing(timer):
            step()
        settle()
        return timer.take()

    sites = list(measured())
    times: Times = defaultdict(lambda: defaultdict(list))
    for choices in rounds_of(sites, candidates):
        with configs.trying(choices):
            measured()  # compiles
            for _ in range(runs):
                for site, seconds in measured().items():
                    if site in choices:
                        times[site][choices[site]].append(seconds)
    return times


def summary(times: Times, candidates: Callable[[Site], tuple[Config, ...]]) -> Case:
    """By site: the median of each candidate in the order of prediction, and which was fastest."""
    found: Case = {}
    for site, by_config in times.items():
        medians = [statistics.median(by_config[config]) for config in candidates(site)]
        found[f"{site.kernel} {' '.join(map(str, site.sizes))}"] = {
            "candidates": [configs.to_json(config) for config in candidates(site)],
            "seconds": medians,
            "fastest": medians.index(min(medians)),
        }
    return found


def _time_block(block: Block, context: Context) -> Case:
    dtype = torch.float32 if context.tiny else torch.bfloat16
    case = BlockCase(block, FUSED, dtype, context.device)
    card = gpu(context.device)
    if context.tiny:
        import time

        timer, cold = LaunchTimer(time.perf_counter, lambda before, after: after - before), None
    else:
        timer, cold = cuda_timer(), ColdCache(context.device)
    times = time_candidates(
        lambda: case.backward(case.forward()),
        timer,
        lambda site: configs.candidates(site, card),
        runs=1 if context.tiny else RUNS,
        before=cold or (lambda: None),
        settle=lambda: synchronise(context.device),
    )
    return {"sites": summary(times, lambda site: configs.candidates(site, card))}


def candidates_stage(context: Context) -> Iterator[tuple[str, Case]]:
    if context.tiny and not INTERPRETED:
        context.leave_out("the candidate configurations of our kernels: needs a GPU")
        return
    for block, times in timed_blocks(tiny=context.tiny).items():
        key = describe(block)
        if key not in context.cases("candidates") and context.has_time(20, f"candidates {key}"):
            yield key, attempt(lambda block=block, times=times: _time_block(block, context) | {"times": times})  # type: ignore[misc]


def show_candidates(cases: dict[str, Case]) -> str:
    lines = ["us by candidate, predicted best first; * is the fastest. Launches without an alternative are left out"]
    predicted = fastest = 0.0
    for key, found in cases.items():
        lines.append(f"{found['times']} x {key}")
        for site, one in found["sites"].items():
            predicted += found["times"] * one["seconds"][0]
            fastest += found["times"] * min(one["seconds"])
            if len(one["seconds"]) > 1:
                cells = [f"{1e6 * s:.1f}{'*' * (i == one['fastest'])}" for i, s in enumerate(one["seconds"])]
                lines.append(f"  {site:<90} {'  '.join(cells)}")
    lines.append(f"all launches: {1e3 * predicted:.3f} ms as predicted, {1e3 * fastest:.3f} ms by the fastest of each")
    return "\n".join(lines)


CANDIDATES = Stage("candidates", candidates_stage, show_candidates)
