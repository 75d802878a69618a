"""Timing: CUDA events behind a cold L2 on a GPU, perf_counter on a CPU; medians with spread; interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Seconds. `spread` is the distance between the quartiles, as a share of the median."""

    median: float
    spread: float
    best: float
    runs: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def summarise(seconds: Sequence[float]) -> Timing:
    """Raises ValueError for no samples at all."""
    if not seconds:
        raise ValueError("no samples to summarise")
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Timing(median, (high - low) / median if median else 0.0, min(seconds), len(seconds))


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator / denominator: drift that slows both members of a pair cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class ColdCache:
    """Overwrites a buffer of four times the L2 before each run.

    The timed code then starts with none of its inputs cached and with an L2 full of dirty lines, so that each byte it
    brings in pushes one out, as in the middle of a training step: nothing is hidden by writes that never leave the L2.
    The overwriting also keeps the GPU busy while the host queues the timed code, so that launch gaps stay out.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(4 * l2_bytes, 256 << 20) // 4, dtype=torch.int32, device=device)
        self.repeats = 1

    def cover(self, host_seconds: float) -> None:
        """Overwrite often enough to last `host_seconds`."""
        self.buffer.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.buffer.zero_()
        end.record()
        end.synchronize()
        self.repeats = 1 + int(host_seconds / (start.elapsed_time(end) * 1e-3))

    def __call__(self) -> None:
        for _ in range(self.repeats):
            self.buffer.zero_()


def sample(
    run: Callable[[], object],
    device: torch.device,
    *,
    cold: ColdCache | None = None,
    seconds: float = 0.3,
    least: int = 10,
    most: int = 200,
) -> list[float]:
    """Seconds of each of `least` to `most` runs within about `seconds`, after two runs that are not counted."""
    run()
    synchronise(device)
    began = time.perf_counter()
    run()
    queued = time.perf_counter() - began
    synchronise(device)
    whole = time.perf_counter() - began
    if cold is not None:
        cold.cover(1.5 * queued)
    count = max(least, min(most, int(seconds / max(whole, 1e-9))))
    if device.type != "cuda":
        return [_host_seconds(run) for _ in range(count)]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        if cold is not None:
            cold()
        start.record()
        run()
        end.record()
    synchronise(device)
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    inner: int = 1,
    until: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of one run of each, round by round, each round starting with the next one of them.

    A sample is `inner` runs, divided by `inner`. Stops after the round in which time.monotonic() passes `until`.
    Whoever calls has warmed up.
    """
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    with no_garbage_collection():
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                taken[name].append(_timed(runs[name], device, inner))
            if time.monotonic() > until:
                break
    return taken


def _timed(run: Callable[[], object], device: torch.device, inner: int) -> float:
    def several() -> None:
        for _ in range(inner):
            run()

    if device.type != "cuda":
        return _host_seconds(several) / inner
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    several()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / inner


def _host_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, megabytes: int | None = None) -> tuple[float, Timing]:
    """(bytes/s read plus written by a large copy within `device`, the timing); 2 GiB on a GPU, 64 MB elsewhere."""
    size = (megabytes or (2048 if device.type == "cuda" else 64)) << 20
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target: Tensor = torch.empty_like(source)
    timing = summarise(sample(lambda: target.copy_(source), device, seconds=0.5, least=20))
    return 2 * size / timing.median, timing


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of device memory held by tensors during `run`; 0 where it cannot be told."""
    if device.type != "cuda":
        return 0
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device)
