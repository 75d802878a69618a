"""Machine code as `nvdisasm -hex -g -c` writes it: instructions with their control bits and source lines, and loops.

From Volta to Blackwell an instruction is 128 bits, of which the upper half holds what the hardware does not find out by
itself: how many cycles until the next one of the warp may issue, which of six scoreboards it sets and waits for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_FILE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/")
_UPPER_HALF = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_UNIFORM = re.compile(r"BRA\.U\S* (!?UP\d),")  # a branch by a predicate of the whole warp, which is an operand
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
NO_BARRIER = 7


@dataclass
class Instruction:
    """One instruction. `stall` are cycles until the next of its warp, `writes` and `reads` the scoreboards that it
    clears when its result is there and its operands are read, `waits` a mask of those that it waits for; `target` the
    index that a branch goes to."""

    index: int
    text: str
    predicate: str
    file: str
    line: int
    stall: int = 1
    writes: int = NO_BARRIER
    reads: int = NO_BARRIER
    waits: int = 0
    target: int | None = None

    @property
    def name(self) -> str:
        """With modifiers: LDG.E.128."""
        return self.text.split()[0]

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes a thread, for an access to memory."""
        return next((WIDTHS[part] for part in self.name.split(".") if part in WIDTHS), 4)


@dataclass(frozen=True)
class Loop:
    """From `head` to the backward branch `tail`, which stands at `line` of `file`; `lines` are all places (file, line)
    that its instructions come from."""

    head: int
    tail: int
    file: str
    line: int
    lines: frozenset[tuple[str, int]] = field(default=frozenset(), compare=False)

    def holds(self, index: int) -> bool:
        return self.head <= index <= self.tail


def tool(name: str) -> Path:
    """One of the CUDA tools that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: bytes) -> str:
    """The text of a compiled kernel, with encodings and source lines."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        found = subprocess.run([tool("nvdisasm"), "-hex", "-g", "-c", file], capture_output=True, text=True, check=True)
    return found.stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        found = subprocess.run([tool("cuobjdump"), "-res-usage", file], capture_output=True, text=True, check=True)
    registers, stack = (max(int(n) for n in re.findall(rf"{name}:(\d+)", found.stdout)) for name in ("REG", "STACK"))
    return registers, stack


def parse(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    targets: dict[int, str] = {}
    file, line, in_code = "", 0, False
    for row in text.splitlines():
        if row.startswith("//---------------------"):
            in_code = ".text." in row
        if not in_code:
            continue
        if m := _FILE.search(row):
            file, line = m[1].rsplit("/", 1)[-1], int(m[2])
        elif m := _LABEL.match(row):
            labels[m[1]] = len(found)
        elif m := _INSTRUCTION.match(row):
            body, predicate = m[1].strip(), ""
            if body.startswith("@"):
                predicate, _, body = body.partition(" ")
                body = body.strip()
            elif u := _UNIFORM.match(body):
                predicate = u[1]
            if t := _TARGET.search(body):
                targets[len(found)] = t[1]
            found.append(Instruction(len(found), body, predicate, file, line))
        elif (m := _UPPER_HALF.match(row)) and found:
            control = int(m[1], 16) >> 41
            last = found[-1]
            last.stall, last.waits = control & 15, control >> 11 & 63
            last.writes, last.reads = control >> 5 & 7, control >> 8 & 7
    for index, name in targets.items():
        found[index].target = labels[name]
    return found


def last_exit(instructions: Sequence[Instruction]) -> int:
    return max(i.index for i in instructions if i.base == "EXIT")


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Backward branches, the outer before the inner. A wait's retries, which stand behind the end of the program, are
    no loops; a branch back behind a conditional exit is one."""
    end = last_exit(instructions)
    found = [
        Loop(
            i.target, i.index, i.file, i.line,
            frozenset((j.file, j.line) for j in instructions[i.target : i.index + 1]),
        )
        for i in instructions
        if i.base == "BRA" and i.target is not None and i.target < i.index
        and (i.index < end or instructions[i.index - 1].base == "EXIT")
    ]  # fmt: skip
    return sorted(found, key=lambda loop: (loop.head, -loop.tail))
