"""`python -m fastnet.evaluate RUN_OR_FILE`: top-1, top-5 and loss on the validation split."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from fastnet.errors import run_command


def evaluate(
    target: str,
    /,
    data: str | None = None,
    resolution: int | None = None,
    batch_size: int = 64,
    loader: Literal["auto", "dali", "torch"] = "auto",
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto",
) -> int:
    """Evaluate a run, or a file of weights, on the validation split: top-1, top-5 and loss.

    Args:
        target: A run's folder, or a .safetensors file that fastnet wrote.
        data: Data set; default: the one that the run was trained on.
        resolution: Image side in pixels; default: the run's.
        batch_size: Images a batch.
        loader: Input pipeline.
        workers: Loader threads or processes.
        device: Where to run.
        amp: Mixed precision; auto is bf16 on CUDA and off on a CPU.
    """
    from fastnet.evaluation import evaluate_run

    result = evaluate_run(Path(target), data, resolution, batch_size, loader, workers, device, amp)
    print(f"top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  loss {result.loss:.4f}  ({result.images} images)")
    return 0


def main() -> None:
    import tyro

    sys.exit(run_command(lambda: tyro.cli(evaluate, prog="python -m fastnet.evaluate")))


if __name__ == "__main__":
    main()
