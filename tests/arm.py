"""The CPU library for Arm on another machine: cross-compiled by ziglang, and emulated by unicorn (QEMU's processor)."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm

from kernels.cpu.build import FLAGS, LEVELS, SOURCES
from kernels.cpu.library import STORAGE_DTYPES, Library

OMP = "#pragma once\nstatic inline int omp_get_thread_num() { return 0; }\n"  # one thread alone
ARGUMENTS, HEAP, END, STACK_END, RETURN = 0x1000_0000, 0x3000_0000, 0x6000_0000, 0x7000_0000, 0x7F00_0000  # addresses
PAGE = 4096
STACK = 8 << 20
EXIT, EXIT_GROUP, MREMAP, MMAP = 93, 94, 216, 222  # asm-generic/unistd.h
ENOSYS = 38
LOAD, SYMTAB = 1, 2  # elf.h
AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_ENTRY, AT_RANDOM = 3, 4, 5, 6, 9, 25
MASK = (1 << 64) - 1


def compiled(folder: Path) -> Path:
    """A static program of all operations, on one thread."""
    (folder / "omp.h").write_text(OMP)
    (folder / "main.cpp").write_text("int main() { return 0; }\n")
    flags = [flag for flag in (*FLAGS, *LEVELS["neon"]) if flag not in ("-fopenmp", "-fPIC")]
    out = folder / "operations"
    command = [
        sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static", "-no-pie", "-w", *flags,
        f"-I{folder}", str(folder / "main.cpp"), *map(str, sorted(SOURCES.glob("*.cpp"))), "-rdynamic", "-o", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return out


class Emulated(Library):
    """The operations of such a program, in memory of their own: a call copies tensors there and back."""

    def __init__(self, program: Path) -> None:
        self.path = program
        self.uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.symbols: dict[str, int] = {}
        self.heap, self.ended = HEAP, False
        entry, headers = self._load(program.read_bytes())
        self.uc.mem_map(ARGUMENTS, END - ARGUMENTS)
        self.uc.mem_map(STACK_END - STACK, STACK)
        self.uc.mem_map(RETURN, PAGE)
        self.uc.hook_add(UC_HOOK_INTR, self._system_call)
        self.uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors are on
        # As Linux starts a program, once, for what it prepares: argc, argv, environment, auxiliary vector.
        words = [1, STACK_END - 128, 0, 0, AT_PAGESZ, PAGE, AT_RANDOM, STACK_END - 64, *headers, AT_ENTRY, entry, 0, 0]
        self.stack = STACK_END - PAGE
        self.uc.mem_write(self.stack, struct.pack(f"<{len(words)}Q", *words))
        self.uc.reg_write(arm.UC_ARM64_REG_SP, self.stack)
        self.uc.emu_start(entry, RETURN)
        assert self.ended
        self.stack -= 16 * PAGE

    def _load(self, data: bytes) -> tuple[int, list[int]]:
        """(entry, what the auxiliary vector says of the program's headers)."""
        entry, first, sections_at = struct.unpack_from("<QQQ", data, 24)
        size, count, section_size, sections_count = struct.unpack_from("<HHHH", data, 54)
        mapped, base = 0, None
        for i in range(count):
            kind, _, offset, address, _, stored, held = struct.unpack_from("<IIQQQQQ", data, first + i * size)
            if kind != LOAD:
                continue
            low, high = max(mapped, address // PAGE * PAGE), -(-(address + held) // PAGE) * PAGE
            if high > low:
                self.uc.mem_map(low, high - low)
                mapped = high
            self.uc.mem_write(address, data[offset : offset + stored])
            base = address if offset == 0 else base
        assert base is not None
        sections = [
            struct.unpack_from("<IIQQQQIIQQ", data, sections_at + i * section_size) for i in range(sections_count)
        ]
        for section in sections:
            if section[1] == SYMTAB:
                names = sections[section[6]][4]
                for at in range(section[4], section[4] + section[5], 24):
                    name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
                    self.symbols[data[names + name : data.index(b"\0", names + name)].decode()] = value
        return entry, [AT_PHDR, base + first, AT_PHENT, size, AT_PHNUM, count]

    def _system_call(self, uc: Uc, _: int, __: Any) -> None:
        call, answer = uc.reg_read(arm.UC_ARM64_REG_X8), 0
        if call in (EXIT, EXIT_GROUP):
            self.ended = True
            uc.emu_stop()
        elif call == MMAP:
            answer = self.heap  # never to be given back
            self.heap += -(-uc.reg_read(arm.UC_ARM64_REG_X1) // PAGE) * PAGE
            assert self.heap <= END, "no memory is left: take a new one"
        elif call == MREMAP:
            answer = -ENOSYS & MASK
        # Nothing of what else a program asks for at its start is needed; brk's answer is that there is no more.
        uc.reg_write(arm.UC_ARM64_REG_X0, answer)

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        uc, free, places = self.uc, ARGUMENTS, dict[int, tuple[int, torch.UntypedStorage]]()
        whole, real, stacked = [1], list[int](), list[int]()  # registers, and what they don't hold; one thread
        for value in arguments:
            if isinstance(value, float):
                (real if len(real) < 8 else stacked).append(int.from_bytes(struct.pack("<d", value), "little"))
                continue
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in places:
                    places[storage.data_ptr()] = free, storage
                    uc.mem_write(free, _bytes(storage).numpy().tobytes())
                    free += -(-storage.nbytes() // PAGE) * PAGE + PAGE  # what is written past an end reaches no other
                    assert free <= HEAP, "the tensors are too large"
                value = places[storage.data_ptr()][0] + value.data_ptr() - storage.data_ptr()
            (whole if len(whole) < 8 else stacked).append((value or 0) & MASK)
        for at, word in enumerate(whole):
            uc.reg_write(arm.UC_ARM64_REG_X0 + at, word)
        for at, word in enumerate(real):
            uc.reg_write(arm.UC_ARM64_REG_D0 + at, word)
        top = self.stack - -(-len(stacked) // 2) * 16
        uc.mem_write(top, struct.pack(f"<{len(stacked)}Q", *stacked))
        uc.reg_write(arm.UC_ARM64_REG_SP, top)
        uc.reg_write(arm.UC_ARM64_REG_LR, RETURN)
        table = self.symbols[f"fastnet_{name}"] + 8 * STORAGE_DTYPES.index(dtype)
        uc.emu_start(*struct.unpack("<Q", uc.mem_read(table, 8)), RETURN)
        if uc.reg_read(arm.UC_ARM64_REG_X0) & 0xFFFF_FFFF:
            raise MemoryError(name)
        for at, storage in places.values():
            _bytes(storage).copy_(torch.frombuffer(uc.mem_read(at, storage.nbytes()), dtype=torch.uint8))


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
