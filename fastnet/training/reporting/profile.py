"""`--profile`: where the time of some steps goes, as a table and as a trace for Perfetto (ui.perfetto.dev)."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

WARMUP, RECORDED = 10, 20
"""Steps. Both are cut to what an epoch has, so that no evaluation is among them."""
KERNELS = 10
PARTS = ("forward", "backward", "update")
"""The regions that `TrainStep.run` marks. Of a step that is replayed as a CUDA graph only its kernels can be told
apart."""


class StepProfiler:
    """Records one stretch of steps of a run; `step` is called behind each."""

    def __init__(self, folder: Path, device: torch.device, console: Console, log: Callable[[str], None]) -> None:
        self.file, self.device, self.console, self.log = folder / "profile.json.gz", device, console, log
        self._profile: profile | None = None
        self._left = 0
        self._steps = self._recorded = 0
        self._waited = self._began = 0.0

    def begin(self, steps: int) -> None:
        """An epoch begins, of so many steps."""
        if not self._recorded:
            self._left = min(WARMUP, steps // 2)
            self._steps = min(RECORDED, steps - self._left)

    def step(self, waited: float) -> None:
        """A step was issued, after `waited` seconds for its images."""
        if self._profile is not None:
            self._waited += waited
            self._recorded += 1
            if self._recorded == self._steps:
                self._end()
        elif not self._recorded:
            if self._left == 0:
                return
            self._left -= 1
            if self._left == 0:
                self._start()

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start(self) -> None:
        gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self._settle()
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profile.start()
        self._began = time.perf_counter()

    def _end(self) -> None:
        assert self._profile is not None
        self._settle()
        seconds = time.perf_counter() - self._began
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.file))
        self._tell(seconds)
        self._profile = None

    def _tell(self, seconds: float) -> None:
        steps = self._recorded
        parts, own = times(json.loads(gzip.decompress(self.file.read_bytes())), gpu=self.device.type == "cuda")
        table = Table(title=f"{steps} steps, {1e3 * seconds / steps:.1f} ms each", title_justify="left")
        for name in ("part", "ms a step", "share"):
            table.add_column(name, justify="left" if name == "part" else "right")

        def row(name: str, total: float) -> None:
            table.add_row(name, f"{1e3 * total / steps:.2f}", f"{100 * total / seconds:.0f} %")

        row("input (waiting for images)", self._waited)
        for name in PARTS:
            row(name, parts[name])
        table.add_section()
        for name, total in own.most_common(KERNELS):
            row(name if len(name) <= 60 else f"{name[:59]}…", total)
        self.console.print(table)
        self.log(f"trace: {self.file} (open it in ui.perfetto.dev)")


def times(trace: dict[str, Any], gpu: bool) -> tuple[Counter[str], Counter[str]]:
    """Seconds of each of PARTS, and of each kernel, or on a CPU of each operation without those that it calls. The
    profiler's own sums take minutes for a step of some thousand operations."""
    parts, own = Counter[str](), Counter[str]()
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if gpu else ("cpu_op",)
    marks = "gpu_user_annotation" if gpu else "user_annotation"
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        if event.get("cat") == marks and event["name"] in PARTS:
            parts[event["name"]] += event["dur"] / 1e6
        elif event.get("cat") in kinds:
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for events in threads.values():
        open_: list[dict[str, Any]] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while open_ and event["ts"] >= open_[-1]["ts"] + open_[-1]["dur"]:
                open_.pop()
            own[event["name"]] += event["dur"] / 1e6
            if open_ and not gpu:
                own[open_[-1]["name"]] -= event["dur"] / 1e6
            open_.append(event)
    return parts, own
