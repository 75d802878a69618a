"""What "auto" means for --device, --amp and --workers."""

from __future__ import annotations

import os

import torch

from fastnet.errors import UserError
from fastnet.step import Amp


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda finds no usable GPU: check the driver, or train with --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_amp(name: str, device: torch.device) -> Amp:
    if name == "auto":
        return "bf16" if device.type == "cuda" else "off"
    return name  # type: ignore[return-value]


def pick_workers(workers: int | None, device: torch.device, sharing: int = 1) -> int:
    """All cores feed a GPU; when a CPU trains, half of them do, so that the step keeps its own. sharing: processes that
    do so at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None:
        return workers
    cores = max(1, cores // sharing)
    return min(16, cores) if device.type == "cuda" else max(1, cores // 2)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    # A CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
