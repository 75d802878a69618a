"""Memory that a CPU's process keeps: freed blocks stay with the process instead of going back to the system.

glibc gives every large block back as it is freed, and the next step's takes a page fault for each of its 4 KB pages. A
training step frees and takes gigabytes, and a fault costs more than the arithmetic on a page, most of all on a virtual
machine. Nothing here happens on import: a command asks for it, once its device is known to be a CPU.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

from data_pipeline.memory import available_memory

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
NEVER, NONE = -1, 0
MADV_HUGEPAGE = 14  # sys/mman.h of Linux
HUGE_PAGE = 2 << 20
RESERVED_SHARE = 0.75
"""Of the machine's free memory, as address space for blocks on huge pages; what is not touched takes no memory."""


_kept: str | None = None


def kept_memory() -> str | None:
    """What `keep_memory` did in this process, in words for the log; None where nothing."""
    return _kept


def keep_memory(device: torch.device) -> None:
    """Make glibc keep what is freed where `device` is a CPU, on huge pages where the system gives them for the asking.

    Once a process; nothing for another device or with another C library.
    """
    global _kept
    if _kept or device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # No block as a mapping of its own, which is unmapped as it is freed; and no shrinking of the heap.
    if not all([libc.mallopt(M_MMAP_MAX, NONE), libc.mallopt(M_TRIM_THRESHOLD, NEVER)]):
        return
    _kept = "freed memory stays with the process"
    if _advise_huge_pages(libc):
        _kept += ", on huge pages"


def _advise_huge_pages(libc: ctypes.CDLL) -> bool:
    """Grow the heap's address space once and ask for huge pages there; False where the system doesn't take advice.

    The heap grows by a block that is freed at once, untouched: later blocks are cut from it.
    """
    try:
        asked = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    size = int(RESERVED_SHARE * available_memory())
    if not asked or size < HUGE_PAGE:
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:  # a limit on address space, or a system that promises no more than it has
        return False
    start = -(-block // HUGE_PAGE) * HUGE_PAGE
    advised = libc.madvise(start, (block + size - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE) == 0
    libc.free(block)
    return advised
