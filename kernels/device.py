"""Which GPU a launch is for, and the one rule of where the Triton kernels run.

Whatever asks "auto" (an operation's `impl`, a model's kernels, mixed precision) asks `unsupported` here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

try:
    import triton
except ImportError:
    triton = None

LEAST_CAPABILITY = (8, 0)  # the first with bf16 and asynchronous copies in hardware


@dataclass(frozen=True)
class Gpu:
    """What a launch needs to know of its card; `shared_memory` is what one block may have, in bytes."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def arch(self) -> int:
        """86 for 8.6, as compilers name it."""
        return 10 * self.capability[0] + self.capability[1]


# What plans are made for where there is no GPU: on a CPU, in the interpreter, for meta and fake tensors.
REFERENCE = Gpu("NVIDIA H100", (9, 0), 132, 232_448)

# CUDA C++ Programming Guide, "Technical specifications per compute capability": shared memory of a block.
SHARED_MEMORY = {
    75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448,
    120: 101_376, 121: 101_376,
}  # fmt: skip

_pretended: Gpu | None = None


def describe(index: int) -> Gpu:
    """The properties of CUDA device `index`."""
    found = torch.cuda.get_device_properties(index)
    return Gpu(
        found.name, (found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin
    )  # fmt: skip


_described = functools.cache(describe)


def gpu(device: torch.device) -> Gpu:
    """The card of a device; `REFERENCE` for one that is no CUDA device or has no driver, as fake tensors' may."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda" or not torch.cuda.is_available():
        return REFERENCE
    return _described(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def pretend(card: Gpu) -> Iterator[None]:
    """Take every device for this card, in every thread, as long as the block runs: for tests."""
    global _pretended
    before, _pretended = _pretended, card
    try:
        yield
    finally:
        _pretended = before


def is_gpu(device: torch.device) -> bool:
    """Whether a device is a CUDA device, or taken for one."""
    return _pretended is not None or device.type == "cuda"


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16: GPUs from compute capability 8.0 on (older ones only emulate it), and CPUs."""
    return not is_gpu(device) or gpu(device).capability >= (8, 0)


def unsupported(device: torch.device) -> str | None:
    """Why the Triton kernels don't run on a device, as a clause that can follow "because"; None where they do."""
    if triton is None:
        return "the triton package is not installed"
    if not is_gpu(device):
        return f"the Triton kernels need an NVIDIA GPU, and this is a {device.type} device"
    if _pretended is None and torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, and this one is AMD's"
    card = gpu(device)
    if card.capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, card.capability))
        return f"the Triton kernels need compute capability {least} or higher, and {card.name} has {has}"
    return None
