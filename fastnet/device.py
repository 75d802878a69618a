"""What "auto" means for --device, --amp and --workers, and which of their values the device can't do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Literal

import torch

from fastnet.arch import Kernels, family
from fastnet.errors import UserError
from kernels import launch
from kernels.cpu.library import library, unavailable
from kernels.device import gpu, has_bf16, is_gpu, unsupported
from kernels.mbconv import resolve as resolve_block
from kernels.nvidia import unusable

Amp = Literal["bf16", "fp16", "off"]


def tell(text: str) -> None:
    """One line for the user of a command whose output is its result."""
    print(text, file=sys.stderr)


def pick_device(name: str, log: Callable[[str], None] = tell) -> torch.device:
    """The device that --device means. Where "auto" takes the CPU although a GPU is there, `log` is told why; UserError
    where "cuda" is impossible."""
    if name == "cpu":
        return torch.device("cpu")
    reason = unusable()
    if reason is None and torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        reason = reason or "there is no NVIDIA GPU here: leave it out to use the CPU"
        raise UserError(f"--device cuda is impossible because {reason}.")
    if reason is not None:
        log(f"using the CPU because {reason}.")
    return torch.device("cpu")


def pick_amp(name: str, device: torch.device) -> Amp:
    """The precision that --amp means, PyTorch's kernels on a CPU (`training.tuning.pick_precision` knows ours);
    UserError where the device has no bf16."""
    if name == "auto":
        return "off" if not is_gpu(device) else "bf16" if has_bf16(device) else "fp16"
    if name == "bf16" and not has_bf16(device):
        card = gpu(device)
        raise UserError(
            f"--amp bf16 needs compute capability 8.0 or higher, and {card.name} has "
            f"{'.'.join(map(str, card.capability))}: use --amp fp16.",
            exit_status=2,
        )
    return name  # type: ignore[return-value]


def check_kernels(
    kernels: Kernels, device: torch.device, log: Callable[[str], None] = tell, *, variant: str = "b0"
) -> None:
    """Tells `log` where "auto" leaves a device, or any choice a variant, to PyTorch; UserError where Triton is
    asked for and cannot run, or the C++ kernels, which are compiled here if they have not been."""
    if not family(variant).has_kernels:
        if kernels != "torch" and (kernels != "auto" or is_gpu(device)):
            log(f"computing {variant} with PyTorch alone: the kernels are for SiLU with squeeze-and-excitation.")
        return
    if kernels == "native":
        try:
            resolve_block("native", torch.empty(0, device=device))
            library(log)
        except RuntimeError as error:
            raise UserError(f"--kernels native does not work here: {error}.", exit_status=2) from error
        return
    if kernels == "auto" and not is_gpu(device):
        if (missing := unavailable(log)) is not None:
            log(f"computing with PyTorch alone because {missing}.")
        return
    reason = unsupported(device)
    if reason is None or kernels == "torch":
        return
    if kernels == "auto":
        if is_gpu(device):
            log(f"computing with PyTorch alone because {reason}.")
    elif is_gpu(device) or not launch.INTERPRETED:
        raise UserError(f"--kernels {kernels} is impossible because {reason}: leave it out.", exit_status=2)


def pick_workers(workers: int | None, device: torch.device, sharing: int = 1) -> int:
    """All cores feed a GPU; when a CPU trains, half of them do, so that the step keeps its own. sharing: processes that
    do so at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None:
        return workers
    cores = max(1, cores // sharing)
    return min(16, cores) if device.type == "cuda" else max(1, cores // 2)
