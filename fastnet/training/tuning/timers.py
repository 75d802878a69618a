"""How long something takes on a device: a whole call, or each launch of our kernels within it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from kernels import launch
from kernels.configs import Site

Run = Callable[[], object]
Launched = Callable[[Site | None, Callable[[], None]], None]


class Timer(Protocol):
    def whole(self, run: Run) -> float:
        """Seconds of one call."""

    def launches(self, run: Run, launched: Launched) -> Mapping[Site, float]:
        """Seconds of the launches within one call, summed up by site; each goes through `launched(site, job)`."""

    def allocated(self) -> int:
        """Bytes that tensors hold on the device; 0 where that is not counted."""

    def settle(self) -> None:
        """Wait for the device; RuntimeError where a kernel has left it unusable."""

    def now(self) -> float:
        """Seconds on a clock, for what takes long."""

    def release(self) -> None:
        """Give the device's memory back, until the next measurement."""


class HostTimer:
    """By a clock of the host, where a call returns when its work is done."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.now = clock

    def whole(self, run: Run) -> float:
        start = self.now()
        run()
        return self.now() - start

    def launches(self, run: Run, launched: Launched) -> Mapping[Site, float]:
        found: dict[Site, float] = {}

        def observe(site: Site | None, job: Callable[[], None]) -> None:
            seconds = self.whole(lambda: launched(site, job))
            if site is not None:
                found[site] = found.get(site, 0.0) + seconds

        with launch.observing(observe):
            run()
        return found

    def allocated(self) -> int:
        return 0

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass


class CudaTimer:
    """By CUDA events. Each call starts behind work that overwrites the L2 and lasts until the host has queued the call:
    neither cached inputs nor gaps between launches are then measured."""

    now = staticmethod(time.perf_counter)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._repeats = 1
        self._cover: torch.Tensor | None = None
        self._cover_seconds = 1.0

    def whole(self, run: Run) -> float:
        start, end = self._event(), self._event()
        self._queue(run, start, end)
        self.settle()
        return start.elapsed_time(end) * 1e-3

    def launches(self, run: Run, launched: Launched) -> Mapping[Site, float]:
        events: list[tuple[Site, torch.cuda.Event, torch.cuda.Event]] = []

        # Also in autograd's threads, which launch on the stream of the forward pass.
        def observe(site: Site | None, job: Callable[[], None]) -> None:
            if site is None:
                launched(site, job)
                return
            start, end = self._event(), self._event()
            start.record()
            launched(site, job)
            end.record()
            events.append((site, start, end))

        with launch.observing(observe):
            self._queue(run, self._event(), self._event())
        self.settle()
        found: dict[Site, float] = {}
        for site, start, end in events:
            found[site] = found.get(site, 0.0) + start.elapsed_time(end) * 1e-3
        return found

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        self._cover = None
        torch.cuda.empty_cache()

    def _covering(self) -> torch.Tensor:
        if self._cover is None:
            l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            cover = torch.empty(max(2 * l2_bytes, 64 << 20) // 4, dtype=torch.int32, device=self.device)
            self._cover, self._cover_seconds = cover, min(self._between(cover.zero_) for _ in range(3))
        return self._cover

    def _queue(self, run: Run, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        cover = self._covering()
        for _ in range(self._repeats):
            cover.zero_()
        start.record()
        began = self.now()
        run()
        queued = self.now() - began
        end.record()
        self._repeats = min(64, 1 + int(1.5 * queued / self._cover_seconds))

    def _between(self, run: Run) -> float:
        start, end = self._event(), self._event()
        start.record()
        run()
        end.record()
        self.settle()
        return max(start.elapsed_time(end) * 1e-3, 1e-6)

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)
