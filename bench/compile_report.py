"""What the compiler makes of each kernel, without a GPU: `python -m bench.compile_report`.

Builds every configuration that a launch can select for sm_90; for sm_80 every matrix product, and every strip once
where they differ only in what they are given; for sm_86, sm_89, sm_100 and sm_120 one of each kernel and the products
that may take half of the card's shared memory or more. It reads registers, stack, shared memory and access widths from
the machine code, and ends with status 1 where a limit is broken:

- nothing spills inside a loop: no local loads or stores there, and a stack of at most STACK bytes for what a program
  keeps across one; where a bound on registers is stated for a second program's sake, which by `bench.limits` is worth
  more than a few accesses to the first-level cache, a stack of BOUNDED_STACK bytes and as many accesses as fill it;
- shared memory within what one block may have, and within the bound by which a card's configurations are chosen;
- where a row starts on 16 bytes (VEC > 1), a kernel that walks images makes as many 16-byte accesses as a thread's
  share of each image's tile needs, and stores nothing of an image in narrower ones; no access anywhere is narrower
  than four bytes (per-channel vectors and per-sample scales are fp32 and may come in fours). Of a GEMM this is asked
  inside its loops; a kernel that walks strips holds two channels a lane, so four bytes are all that is asked of it;
- on sm_90 a GEMM of 16-bit operands multiplies by HGMMA;
- images are addressed by 64-bit offsets.

`bench/compile_baseline.json` holds registers and shared memory as one Triton version made them; for that version they
must still be the same. `--changed` builds only what is not known from there (`bench.compile_baseline`), and one of each
kernel for sm_90, to see that this machine's compiler makes what is stored.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from bench import compile_baseline
from bench.compile_baseline import Entry
from bench.sass import WIDTHS, tool
from kernels.device import SHARED_MEMORY

FULL_ARCH = 90
GEMM_ARCH = 80
ARCHS = (80, 86, 89, 90, 100, 120)
# CUDA C++ Programming Guide, "Technical specifications per compute capability", of a multiprocessor; a block may have
# 1 KiB less of its shared memory.
SHARED_PER_SM = {arch: SHARED_MEMORY[arch] + 1024 for arch in ARCHS}
WARPS_PER_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS_PER_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS_PER_SM = 65_536
STACK, BOUNDED_STACK = 16, 32  # bytes a thread


@dataclass(frozen=True)
class Report:
    """One configuration on one architecture. Widths: bytes of an access a thread -> how many such instructions."""

    name: str
    arch: int
    kind: str
    registers: int
    stack: int
    local_accesses: int
    """Within loops."""
    shared: int
    num_warps: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]
    wide_needed: tuple[int, int] | None = None
    """16-byte loads and stores of images that a thread must make; None where rows don't start on 16 bytes."""
    hgmma: bool | None = None
    """Whether HGMMA is used, None where it cannot be."""
    long_offsets: bool = True
    """Whether elements are reached by 64-bit offsets."""
    shared_bound: int | None = None
    """What decides whether a card has enough shared memory to choose it; None for what is chosen everywhere."""
    bounded: bool = False
    """Whether a bound on registers is stated."""

    @property
    def chosen(self) -> bool:
        """Whether a launch on this architecture can select it."""
        return self.shared_bound is None or self.shared_bound <= SHARED_MEMORY[self.arch]

    @property
    def spills(self) -> bool:
        if self.bounded:
            return self.stack > BOUNDED_STACK or self.local_accesses > BOUNDED_STACK // 4
        return bool(self.stack > STACK or self.local_accesses)

    def problems(self) -> list[str]:
        """Sentences about the limits that this configuration breaks."""
        where = f"{self.name} on sm_{self.arch}"
        found = []
        if self.shared_bound is not None and self.shared > self.shared_bound:
            found.append(f"{where} takes {self.shared} bytes of shared memory, bounded by {self.shared_bound}.")
        if not self.chosen:
            return found
        if self.spills:
            found.append(f"{where} spills: stack {self.stack} bytes, {self.local_accesses} local accesses in loops.")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{where} wants {self.shared} bytes of shared memory, {SHARED_MEMORY[self.arch]} exist.")
        if self.wide_needed is not None:
            for what, widths, needed in zip(
                ("loads", "stores"), (self.loads, self.stores), self.wide_needed, strict=True
            ):
                if widths.get(16, 0) < needed or min(widths, default=16) < 4:
                    found.append(f"{where} needs {needed} {what} of 16 bytes and none under 4, but has {widths}.")
            if self.kind in ("elementwise", "gemm") and set(self.stores) - {16}:
                found.append(f"{where} stores an image in pieces: {self.stores}.")
        if self.hgmma is False:
            found.append(f"{where} multiplies without HGMMA.")
        if not self.long_offsets:
            found.append(f"{where} has no 64-bit offset: an image of 2**31 elements would wrap.")
        return found


def wide_share(widths: dict[int, int]) -> float:
    """Share of the bytes that 16-byte accesses move; 1 where there are no accesses."""
    total = sum(width * count for width, count in widths.items())
    return widths.get(16, 0) * 16 / total if total else 1.0


def occupancy(registers: int, shared: int, num_warps: int, arch: int) -> float:
    """Share of a multiprocessor's warps that fit. Registers are given out in 256 a warp, shared memory in 128 bytes
    plus the 1 KB of a block that the driver keeps."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_PER_SM // registers_per_warp // num_warps
    by_shared = SHARED_PER_SM[arch] // (-(-shared // 128) * 128 + 1024)
    blocks = min(BLOCKS_PER_SM[arch], WARPS_PER_SM[arch] // num_warps, by_registers, by_shared)
    return blocks * num_warps / WARPS_PER_SM[arch]


_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG|LDL|STL)(\.[A-Z0-9.]+)?\s")


def access_widths(sass: str) -> dict[str, dict[int, int]]:
    """{"LDG" | "LDGSTS" | "STG" | "LDL" | "STL": {bytes a thread: instructions}} of a disassembly."""
    found: dict[str, dict[int, int]] = {name: {} for name in ("LDG", "LDGSTS", "STG", "LDL", "STL")}
    for name, suffixes in _ACCESS.findall(sass):
        width = next((WIDTHS[s] for s in suffixes.split(".") if s in WIDTHS), 4)
        found[name][width] = found[name].get(width, 0) + 1
    return found


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_LONG_OFFSET = re.compile(r"tt\.addptr .*!tt\.ptr<\w+>>?, (?:tensor<[0-9x]*x)?i64")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")


def loops(sass: str) -> str:
    """The instructions that lie between the target of a backward branch and the branch, a line each; a wait whose
    retries stand behind the end of the program is no loop."""
    instructions = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    targets = [(int(m[1], 16), address) for address, text in instructions if (m := _BRANCH.search(text))]
    ends = [address for address, text in instructions if text.strip() == "EXIT"]
    bodies = [(first, last) for first, last in targets if first < last and not any(first < e < last for e in ends)]
    return "\n".join(t + " " for a, t in instructions if any(first <= a <= last for first, last in bodies))


def _cuobjdump(cubin: Path, *flags: str) -> str:
    return subprocess.run([tool("cuobjdump"), *flags, cubin], capture_output=True, text=True, check=True).stdout


def _compile(task: tuple[str, int]) -> Report:
    """In a worker process: build the configuration of that name and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, arch = task
    spec = _specs()[name]
    source = ASTSource(spec.fn, spec.signature, spec.constexprs, spec.attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.maxnreg is not None:
        options["maxnreg"] = spec.maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _cuobjdump(cubin, "-res-usage", "-sass")
    images, inside = access_widths(sass), access_widths(loops(sass))
    hgmma = None
    if spec.kind == "gemm":
        images = inside
        half = any(kind in ("*fp16", "*bf16") for kind in spec.signature.values())
        hgmma = "HGMMA" in sass if arch == 90 and half else None
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", sass))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", sass))
    shared = int(compiled.metadata.shared)
    return Report(
        name=name,
        arch=arch,
        kind=spec.kind,
        registers=registers,
        stack=stack,
        local_accesses=sum(inside["LDL"].values()) + sum(inside["STL"].values()),
        shared=shared,
        num_warps=spec.num_warps,
        occupancy=occupancy(registers, shared, spec.num_warps, arch),
        loads={w: images["LDG"].get(w, 0) + images["LDGSTS"].get(w, 0) for w in images["LDG"] | images["LDGSTS"]},
        stores=images["STG"],
        wide_needed=_wide_needed(spec),
        hgmma=hgmma,
        shared_bound=None if spec.shared_bytes is None else spec.shared_bytes(divmod(arch, 10)),
        bounded=spec.maxnreg is not None,
        long_offsets=spec.kind == "small" or bool(_LONG_OFFSET.search(compiled.asm["ttir"])),
    )


def _wide_needed(spec: Any) -> tuple[int, int] | None:
    """A thread's share of a tile in 16-byte accesses, for each image that is read and for the one written, if any."""
    if spec.kind == "small" or spec.constexprs.get("VEC", 1) == 1:
        return None
    if spec.kind == "strips":
        return 0, 0
    if spec.kind == "gemm":
        return _gemm_needed(spec)
    if "UNROLL" not in spec.constexprs:
        return None  # only kernels that walk `launch.Tile`s state how much of an image a thread moves at once
    # Pointers of a 16-bit type in some configuration are images; those missing here are constants (None).
    of_kernel = [s for s in _specs().values() if s.fn is spec.fn]
    images = {name for s in of_kernel for name, kind in s.signature.items() if kind in ("*fp16", "*bf16")}
    present = images - set(spec.constexprs)
    c = spec.constexprs
    size = {"*fp16": 2, "*bf16": 2, "*fp32": 4}[spec.signature[next(iter(present))]]
    each = c["UNROLL"] * c["ROWS"] * c["BLOCK_C"] * size // (spec.num_warps * 32 * 16)
    written = 1 if spec.kind == "elementwise" else 0
    return (len(present) - written) * each, written * each


def _gemm_needed(spec: Any) -> tuple[int, int]:
    """A thread's share of the tiles that a step of the loop loads, and of the one that it stores."""
    c = spec.constexprs
    size = {"*fp16": 2, "*bf16": 2, "*fp32": 4}
    if "BLOCK_W" in c:  # a weight gradient: both operands are images, and the result is stored after the loop
        tiles = {f"{side}{x}_ptr": c[block] for side, block in (("wide", "BLOCK_W"), ("narrow", "BLOCK_N"))
                 for x in ("", "_x")}  # fmt: skip
        read, written = sum(c["BLOCK_M"] * n for pointer, n in tiles.items() if pointer not in c), 0
        first = "wide_ptr"
    else:
        written = c["BLOCK_M"] * c["BLOCK_N"]
        read = c["BLOCK_M"] * c["BLOCK_K"] * (1 + ("x_ptr" not in c)) + written * ("image_ptr" not in c)
        read += 0 if c["SINGLE"] else c["BLOCK_N"] * c["BLOCK_K"]
        first = "a_ptr"
    share = size[spec.signature[first]] / (spec.num_warps * 32 * 16)
    return int(read * share), int(written * share)


@functools.cache
def _specs() -> dict[str, Any]:
    import kernels

    return {spec.name: spec for spec in kernels.all_specs()}


_OPTIONAL = re.compile(r"\bno_\w+,|\bSPAN=\d,")


def select(
    specs: Iterable[Any], archs: Sequence[int], only: Sequence[str] = (), *, quick: bool = False
) -> list[tuple[str, int]]:
    """What is built for which architecture, as the top of this file says; the first of each kernel alone if `quick`.
    `only` keeps names that contain all of it."""
    specs = [spec for spec in specs if all(part in spec.name for part in only)]
    chosen = []
    for arch in archs:
        bounds = {spec.name: spec.shared_bytes and spec.shared_bytes(divmod(arch, 10)) for spec in specs}
        here = [spec for spec in specs if spec.shared_bytes is None or bounds[spec.name] is not None]
        order = sorted(here, key=lambda spec: "[bf16" not in spec.name)
        found = list({spec.name.partition("[")[0]: spec for spec in reversed(order)}.values())
        # One of those that differ in what they are given, and for strips only in the middle of a block.
        given = {_OPTIONAL.sub("", spec.name): spec for spec in reversed(here) if "[fp16" not in spec.name}
        whole = [spec for spec in reversed(given.values()) if "NORM=False" not in spec.name]
        several = [spec for spec in whole if spec.kind == "gemm" or (spec.kind == "strips" and "[bf16" in spec.name)]
        if arch == FULL_ARCH and not quick:
            found = here
        elif arch == GEMM_ARCH and not quick:
            found += [spec for spec in here if spec.kind == "gemm"] + several
        elif not quick:
            found += [spec for spec in several if 2 * (bounds[spec.name] or 0) > SHARED_MEMORY[arch]]
        chosen += [(name, arch) for name in dict.fromkeys(spec.name for spec in found)]
    return chosen


def build(tasks: Sequence[tuple[str, int]], processes: int = 2) -> list[Report]:
    """Compile in `processes` processes. RuntimeError under TRITON_INTERPRET, where nothing is compiled."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter compiles nothing")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, tasks, chunksize=4))


@functools.cache
def _rules() -> str:
    """The source of this file: what a configuration is held to, and how its figures are read."""
    return compile_baseline.plain(Path(__file__).read_text())


def keys(tasks: Iterable[tuple[str, int]]) -> dict[str, str]:
    """{"sm_90 kernel[…]": key} of what is built, as the baseline names it."""
    return {f"sm_{arch} {name}": compile_baseline.key_of(_specs()[name], arch, _rules()) for name, arch in tasks}


def changed(
    tasks: Sequence[tuple[str, int]], triton_version: str, always: Iterable[tuple[str, int]] = ()
) -> list[tuple[str, int]]:
    """Those of `tasks` whose figures do not follow from the baseline, and those of `always`."""
    version, stored = compile_baseline.load()
    known = {name: entry.key for name, entry in stored.items()} if version == triton_version else {}
    now = keys(tasks)
    kept = set(always)
    return [task for task in tasks if task in kept or known.get(name := f"sm_{task[1]} {task[0]}") != now[name]]


def entries(reports: Iterable[Report]) -> dict[str, Entry]:
    """What the baseline stores of them; without a key where a limit is broken."""
    found = {}
    for r in reports:
        (name, key), = keys([(r.name, r.arch)]).items()  # fmt: skip
        found[name] = Entry(r.registers, r.shared, "" if r.problems() else key)
    return found


def table(reports: Sequence[Report]) -> str:
    """One line a kernel and architecture, over all its configurations: the worst of each column."""
    rows: dict[tuple[str, int], list[Report]] = {}
    for report in reports:
        rows.setdefault((report.name.partition("[")[0], report.arch), []).append(report)
    head = (
        f"{'kernel':<36}{'sm':>4}{'built':>7}{'registers':>12}{'spill':>7}{'shared':>8}{'occupancy':>12}{'16-byte':>9}"
    )
    lines = [head]
    for (kernel, arch), built in rows.items():
        registers = sorted({r.registers for r in built})
        aligned = [wide_share(r.loads) for r in built if r.wide_needed and r.wide_needed[0]]
        lines.append(
            f"{kernel:<36}{arch:>4}{len(built):>7}{f'{registers[0]}-{registers[-1]}':>12}"
            f"{sum(r.spills for r in built):>7}{max(r.shared for r in built):>8}"
            f"{min(r.occupancy for r in built):>12.0%}{f'{min(aligned):.0%}' if aligned else '-':>9}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_report", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--only", nargs="+", default=[], help="configurations whose name contains all of these")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel on each architecture")
    parser.add_argument("--changed", action="store_true", help="what is not known from the baseline, and a sample")
    parser.add_argument("--json", type=Path, help="write every configuration's figures to this file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--update-baseline", action="store_true", help="store what was built as the new baseline")
    options = parser.parse_args(arguments)
    whole = not options.only and not options.quick and set(options.arch) == set(ARCHS)
    if options.update_baseline and not whole:
        parser.error("--update-baseline needs every configuration: leave out --arch, --only and --quick.")

    import triton

    version = triton.__version__
    specs = _specs()
    every = tasks = select(specs.values(), options.arch, options.only, quick=options.quick)
    if not tasks:
        parser.error(f"no configuration contains {' and '.join(options.only)}.")
    if options.changed:
        tasks = changed(every, version, select(specs.values(), [FULL_ARCH], options.only, quick=True))
    reports = build(tasks, options.processes)
    print(f"triton {version}, {len(reports)} builds of {len(specs)} configurations\n")
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    built = entries(reports)
    stored_version, stored = compile_baseline.load()
    if options.changed and stored_version == version:
        built = {name: stored[name] for name in keys(every) if name in stored and name not in built} | built
    if options.update_baseline:
        compile_baseline.write(built, version)
    problems = [problem for r in reports for problem in r.problems()]
    problems += compile_baseline.differences(built, version, complete=whole)
    print(f"\n{len(problems)} problems" + "".join(f"\n  {problem}" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
