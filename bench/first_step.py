"""Seconds from asking for compilation to the end of the first training step, in this process, as JSON on stdout.

    python -m bench.first_step fastnet --variant b0 --resolution 64 --batch 4

The caller sets the caches (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR): empty ones give the cold time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import ROOT


def in_subprocess(
    name: str,
    caches: Path,
    *,
    variant: str,
    resolution: int,
    batch: int,
    amp: str = "off",
    mode: str = "default",
    timeout: float = 1200,
) -> dict[str, Any]:
    """Run this module in a fresh process with its own Inductor and Triton caches under `caches`.

    RuntimeError with the last line of its output where it fails, subprocess.TimeoutExpired after `timeout` seconds.
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_step", name, "--variant", variant, "--resolution", str(resolution),
         "--batch", str(batch), "--amp", amp, "--mode", mode],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_step")
    parser.add_argument("name")
    parser.add_argument("--variant", default="b0")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--mode", default="default", help="torch.compile's mode")
    options = parser.parse_args()

    import torch

    from bench.contenders import StepRunner
    from bench.measure import synchronise

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as in the proof, whose caches this fills
    shape = (options.variant, options.resolution, options.batch, device)
    # One eager step of another model first: what a process pays once (allocator, libraries) is not compilation.
    StepRunner(options.name, options.variant, 32, 2, device, amp=options.amp)()
    synchronise(device)
    runner = StepRunner(options.name, *shape, amp=options.amp, compile_options={"mode": options.mode})
    began = time.perf_counter()
    runner()
    synchronise(device)
    first = time.perf_counter() - began
    began = time.perf_counter()
    runner()
    synchronise(device)
    print(json.dumps({"first_step": first, "second_step": time.perf_counter() - began}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
