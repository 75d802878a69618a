"""Filling the compile caches before anything is timed, so that a part of the proof can end in its time.

Each job is a process that compiles a model and takes a training step of it. As many run at once as the GPU has memory
for; what fits nowhere is compiled when it is timed.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.contenders import OURS, RESNET50, Workload, compared_peers
from bench.first_step import in_subprocess
from bench.machine import free_gigabytes
from bench.stages import Case, Context, Stage

CACHES = Path(tempfile.gettempdir()) / "fastnet-proof-caches"
AUTOTUNED = "compile caches, max-autotune"


def models_to_compile(work: Workload) -> list[str]:
    """What is compiled at that size to be compared."""
    return [OURS, *compared_peers(), *([RESNET50] if work.with_resnet50 else [])]


class CacheFiller:
    """Fills the compile caches in processes of their own while nothing is being timed: at most `at_once`, and as many
    as `gigabytes` of the GPU hold."""

    def __init__(
        self,
        jobs: Sequence[tuple[str, Workload]],
        seconds: float,
        *,
        gigabytes: float,
        mode: str = "default",
        at_once: int = 3,
    ) -> None:
        self._until = time.monotonic() + seconds
        self._mode = mode
        self._lock = threading.Lock()
        self.found: dict[str, Case] = {}
        most = max((work.gigabytes for _, work in jobs), default=1.0)
        self._pool = ThreadPoolExecutor(max(1, min(at_once, int(gigabytes / most))))
        fitting = [(model, work) for model, work in jobs if work.gigabytes <= gigabytes]
        for model, work in jobs:
            if work.gigabytes > gigabytes:
                sentence = f"not compiled beforehand: it may take {work.gigabytes:.0f} GB, and {gigabytes:.0f} are free"
                self.found[f"{model} {work}"] = {"error": sentence}
        self._futures = [self._pool.submit(self._fill, *job) for job in fitting]

    def _fill(self, model: str, work: Workload) -> None:
        left = self._until - time.monotonic()
        case: Case = {"error": "no time left"}
        if left > 20:
            try:
                case = in_subprocess(
                    model, CACHES, variant=work.variant, resolution=work.resolution, batch=work.batch,
                    amp="bf16", mode=self._mode, timeout=left,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                case = {"error": "not compiled in time; what is cached so far stays: run this part again with --resume"}
            except RuntimeError as error:
                case = {"error": str(error)[:300]}
        with self._lock:
            self.found[f"{model} {work}"] = case

    def wait(self) -> dict[str, Case]:
        for future in self._futures:
            future.result()
        self._pool.shutdown()
        return self.found


def caches_stage(
    name: str, works: Sequence[Workload], seconds: float, mode: str = "default"
) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """Compile everything once before anything is timed; what does not end in time is compiled later or left out."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        if context.tiny:
            context.leave_out("compiled steps: a CPU spends minutes on each (see `pytest bench/bench_compile.py`)")
            return
        done = context.cases(name)
        fitting = [work.fitting(context.device) for work in works]
        jobs = [(model, work) for work in fitting for model in models_to_compile(work)]
        if mode != "default":
            jobs = [(model, work) for model, work in jobs if model in compared_peers()]
        jobs = [(model, work) for model, work in jobs if f"{model} {work}" not in done]
        # Autotuning times kernels: one process at a time then.
        at_once = 3 if mode == "default" else 1
        filler = CacheFiller(
            jobs, seconds, gigabytes=free_gigabytes(context.device) - 1, mode=mode, at_once=at_once
        )  # fmt: skip
        for case, found in filler.wait().items():
            if "error" in found:
                context.leave_out(f"filling the compile cache for {case}: {found['error']}")
            else:
                yield case, found

    return run


def show_caches(cases: dict[str, Case]) -> str:
    return "\n".join(
        f"{case}: first step after {found['first_step']:.0f} s, contended" for case, found in cases.items()
    )


def caches(name: str, works: Sequence[Workload], seconds: float, mode: str = "default") -> Stage:
    return Stage(name, caches_stage(name, works, seconds, mode), show_caches)
