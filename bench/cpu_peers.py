"""The peers' training step on a CPU, eager or compiled, in fp32 and bf16.

    python -m bench.cpu_peers b0 224 16 eager

prints, as JSON, the median seconds of each in a process whose allocator is as PyTorch's users have it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch

from bench.contenders import StepRunner, Workload, compared_peers
from bench.measure import interleaved, summarise
from fastnet.device import Amp
from kernels.cpu.build import cpu_levels

Mode = Literal["eager", "compiled"]

ROUNDS = 5
CPU = torch.device("cpu")


def runners(work: Workload, mode: Mode) -> dict[str, StepRunner]:
    """By name. bf16 only where the CPU computes it: elsewhere PyTorch's takes many times as long."""
    precisions: list[Amp] = ["off", "bf16"] if "avx512-bf16" in cpu_levels() else ["off"]
    return {
        f"{name} {mode}{' bf16' * (amp == 'bf16')}": StepRunner(
            name, *work, CPU, amp=amp, compile_options={} if mode == "compiled" else None
        )
        for name in compared_peers()
        for amp in precisions
    }


def as_installed(work: Workload, mode: Mode) -> dict[str, float]:
    """Median seconds by name, in a process of their own, with glibc's allocator untouched."""
    command = [sys.executable, "-m", "bench.cpu_peers", *map(str, work), mode]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    variant, resolution, batch, mode = sys.argv[1:]
    found = runners(Workload(variant, int(resolution), int(batch)), "compiled" if mode == "compiled" else "eager")
    for run in found.values():
        run()
        run()
    print(json.dumps({name: summarise(s).median for name, s in interleaved(found, CPU, rounds=ROUNDS).items()}))


if __name__ == "__main__":
    main()
