"""What is measured of a CPU in a process of its own: peers as they are installed, the start of a run, peak memory.

    python -m bench.cpu_peers installed b0 224 16 eager
    python -m bench.cpu_peers start b0 224 16
    python -m bench.cpu_peers memory b0 224 16 torchvision

prints JSON: median seconds of each peer with the allocator as PyTorch's users have it; seconds of each part of a start
from the caches as they are; bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from bench.contenders import OURS, StepRunner, Workload, compared_peers
from bench.measure import interleaved, summarise
from fastnet.allocator import keep_memory
from fastnet.config import RunOptions
from fastnet.device import Amp, tell
from fastnet.model import efficientnet
from fastnet.training.tuning import make_tuner, pick_precision
from kernels.cpu.library import library

Mode = Literal["eager", "compiled"]

ROUNDS = 2  # behind one that isn't counted: a step takes seconds with glibc's allocator
CPU = torch.device("cpu")
PRECISIONS: dict[str, Amp] = {"bf16": "bf16", "fp32": "off"}


def runners(work: Workload, mode: Mode, *, bf16: bool) -> dict[str, StepRunner]:
    """By name; compiled in fp32 alone."""
    kinds = PRECISIONS if bf16 else {"fp32": PRECISIONS["fp32"]}
    return {
        f"{name} {mode} {kind}": StepRunner(
            name, *work, CPU, amp=amp, compile_options={} if mode == "compiled" else None
        )
        for name in compared_peers()
        for kind, amp in kinds.items()
    }


def as_installed(work: Workload, mode: Mode, *, bf16: bool) -> dict[str, float]:
    """Median seconds by name, in a process of their own, with glibc's allocator untouched."""
    found: dict[str, float] = _apart("installed", work, mode, *(["bf16"] * bf16))
    return found


def peak_memory(work: Workload, name: str) -> int:
    """Bytes that a process took at most which trains a model, ours in C++ in fp32."""
    return int(_apart("memory", work, name))


def _apart(what: str, work: Workload, *others: str) -> Any:
    command = [sys.executable, "-m", "bench.cpu_peers", what, *map(str, work), *others]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def _start(work: Workload) -> dict[str, float]:
    found, began = {}, time.perf_counter()

    def done(part: str) -> None:
        nonlocal began
        found[part], began = time.perf_counter() - began, time.perf_counter()

    keep_memory(CPU)
    library(tell)
    done("compiling")
    amp = pick_precision("auto", CPU, "auto", work.variant, tell)
    model = efficientnet(work.variant).to(memory_format=torch.channels_last)
    tuner = make_tuner(RunOptions(), "auto", CPU, amp, tell)
    assert tuner is not None
    tuner.prepare(model.train(), work.resolution, work.batch, training=True)
    tuner.prepare(model, work.resolution, work.batch, training=False)
    done("checking and measuring")
    StepRunner(OURS, *work, CPU, amp=amp)()
    done("first step")
    return found


def _memory(work: Workload, name: str) -> int:
    keep_memory(CPU)
    options: dict[str, Any] = {"kernels": "native"} if name == OURS else {}
    step = StepRunner(name, *work, CPU, **options)
    for _ in range(5):
        step()
    # Not getrusage's, which begins with that of the process that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    what, variant, resolution, batch, *others = sys.argv[1:]
    work = Workload(variant, int(resolution), int(batch))
    if what == "start":
        print(json.dumps(_start(work)))
    elif what == "memory":
        print(json.dumps(_memory(work, others[0])))
    else:
        found = runners(work, "compiled" if others[0] == "compiled" else "eager", bf16="bf16" in others)
        for run in found.values():
            run()
        print(json.dumps({name: summarise(s).median for name, s in interleaved(found, CPU, rounds=ROUNDS).items()}))


if __name__ == "__main__":
    main()
