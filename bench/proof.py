"""Everything there is to measure on a GPU, in four parts of at most eight minutes: `python -m bench.proof --part 1`.

1: kernel tests, copy bandwidth, every operation against PyTorch eager and compiled, tiles, the training step of B0@224
   and B1@232 against timm's and torchvision's. 2: B1@240, B4@380, B7@600, inference. 3: the peers in max-autotune.
4: the loaders and caches, the augment kernel, and training from them against the model alone.

Figures go to bench/results/<gpu>/<date>-<commit>.json after every case; --resume continues the newest file of this
commit, GPU, torch and triton, also with another part. What is not correct is not timed. Parts 1 to 3 need torch and
triton, and numpy for the configuration; peers are compared where they are installed. Without a GPU the same command
runs at tiny sizes to its end, says what it left out, and writes to --out only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

from bench.proof_kernels import ANATOMY, BANDWIDTH, COMPILED, KERNELS, TILES, parity
from bench.proof_pipeline import END_TO_END, KERNEL, LOADERS
from bench.proof_steps import AUTOTUNED, CACHES, CHECK, INFERENCE, STEPS_B0_B1, STEPS_LARGE, caches, inference, steps
from bench.stages import Stage, run_part

PARTS: dict[int, tuple[Stage, ...]] = {
    1: (BANDWIDTH, parity(STEPS_B0_B1), CHECK, KERNELS, steps("steps", STEPS_B0_B1), TILES, ANATOMY, COMPILED),
    2: (
        BANDWIDTH,
        CHECK,
        caches("compile caches, large", STEPS_LARGE[:2], 150),
        steps("steps, large", STEPS_LARGE),
        inference(INFERENCE),
    ),
    3: (
        BANDWIDTH,
        CHECK,
        caches(AUTOTUNED, STEPS_B0_B1[:1], 300, "max-autotune"),
        steps("steps, max-autotune", STEPS_B0_B1[:1], {"mode": "max-autotune"}),
    ),
    4: (CHECK, LOADERS, KERNEL, END_TO_END),
}
# Short of eight: a compilation that has begun cannot be stopped.
PART_MINUTES = 7.5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, required=True, choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<gpu>)")
    parser.add_argument("--resume", action="store_true", help="continue the newest results that fit")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # One place for everything compiled, so that a later call finds it.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHES / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHES / "triton"))
    torch.backends.cudnn.benchmark = True  # shapes are fixed: every contender gets the fastest convolutions
    if device.type != "cuda":
        print("no GPU: tiny sizes on the CPU, to see that everything runs; what needs a GPU is left out")
    try:
        return run_part(
            options.part, PARTS[options.part], device, options.out, resume=options.resume, minutes=PART_MINUTES
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
