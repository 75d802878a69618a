"""Everything there is to measure on a GPU, in four parts of at most eight minutes: `python -m bench.proof --part 1`.

1: what ten minutes are best spent on: kernel tests, copy bandwidth, the training step of B0@224 and B1@232 with its
   memory against timm's and torchvision's, and B0's against ResNet-50's; every fused block of B0 against PyTorch eager
   and compiled; the largest batches of B4@380 and B7@600 that fit into 24 GB.
2: every launch of every block beside cuBLAS, cuDNN and Inductor and what limits it, and with each of its candidate
   configurations; the fused operations; tiles.
3: B1@240, B4@380, B7@600, inference, the peers in reduce-overhead and max-autotune. 4: loaders, training from files.

Figures go to bench/results/<gpu>/<date>-<commit>.json after every case; --resume continues the newest file of this
commit, GPU, torch and triton, also with another part. What breaks the tolerance rule is timed all the same and marked
"not correct", by how much; what is grossly wrong (`kernels.tolerance`) is not timed, and ends the part where it is a
test of the kernels or the step. Parts 1 to 3 need torch, triton and numpy; the kernels' tests are left out without
pytest, and peers are compared where they are installed. What a GPU has no memory for is recorded as such. Without a GPU
the same command runs at tiny sizes to its end, says what it left out, and writes to --out only; with TRITON_INTERPRET=1
our kernels run too, through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

from bench.contenders import OURS, OWN_FORMS, Entry, compared_peers, with_resnet50
from bench.proof.blocks import BLOCKS, BLOCKS_COMPILED, LAUNCHES, LAUNCHES_COMPILED
from bench.proof.caches import AUTOTUNED, CACHES, caches
from bench.proof.candidates import CANDIDATES
from bench.proof.kernels import ANATOMY, BANDWIDTH, COMPILED, KERNELS, TILES
from bench.proof.memory import MEMORY
from bench.proof.parity import parity
from bench.proof.pipeline import END_TO_END, LOADERS
from bench.proof.steps import CHECK, INFERENCE, STEPS_B0_B1, STEPS_LARGE, inference, steps
from bench.stages import Stage, run_part
from fastnet.device import pick_device

B0, B1 = STEPS_B0_B1
MODES = (
    Entry(OURS, graph=True), Entry(OURS, {}, graph=True),
    *(Entry(name, {"mode": mode}) for mode in ("reduce-overhead", "max-autotune") for name in compared_peers()),
)  # fmt: skip
PARTS: dict[int, tuple[Stage, ...]] = {
    1: (
        BANDWIDTH,
        parity(STEPS_B0_B1),
        CHECK,
        steps("steps", [B0], with_resnet50()),
        BLOCKS,
        MEMORY,
        steps("steps, B1", [B1]),
        steps("steps, our kernels", [B0], OWN_FORMS),
        BLOCKS_COMPILED,
    ),
    2: (BANDWIDTH, CHECK, LAUNCHES, CANDIDATES, KERNELS, LAUNCHES_COMPILED, TILES, ANATOMY, COMPILED),
    3: (
        BANDWIDTH,
        CHECK,
        caches("compile caches, large", STEPS_LARGE[:2], 150),
        steps("steps, large", STEPS_LARGE),
        inference(INFERENCE),
        caches(AUTOTUNED, [B0], 300, "max-autotune"),
        steps("steps, max-autotune", [B0], MODES),
    ),
    4: (CHECK, LOADERS, END_TO_END),
}
# Short of eight: a compilation that has begun cannot be stopped. A CPU is in no hurry.
PART_MINUTES, CPU_MINUTES = 7.5, 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, required=True, choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<gpu>)")
    parser.add_argument("--resume", action="store_true", help="continue the newest results that fit")
    options = parser.parse_args(arguments)
    device = pick_device("auto")
    # One place for everything compiled, so that a later call finds it.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHES / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHES / "triton"))
    torch.backends.cudnn.benchmark = True  # shapes are fixed: every contender gets the fastest convolutions
    if device.type != "cuda":
        print("no GPU: tiny sizes on the CPU, to see that everything runs; what needs a GPU is left out")
    try:
        minutes = PART_MINUTES if device.type == "cuda" else CPU_MINUTES
        return run_part(options.part, PARTS[options.part], device, options.out, resume=options.resume, minutes=minutes)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
