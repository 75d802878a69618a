"""What a launch costs on a GPU that is not here, from its machine code: instructions by pipe, warps in flight, bytes,
and a simulated time. A prediction, not a measurement.

A kernel is compiled for the card and disassembled; loops run as often as the launch's arguments say
(`bench.limits.loops`); each instruction takes its pipe for some cycles of a scheduler, of which a multiprocessor has
four; and `bench/limits/simulator/simulate.cpp` issues the warps that are resident together, with the stalls and
scoreboards that the code states.

How far to believe it: on an H100 it was 7 to 27 % faster than public figures for matrix products and attention, and
copies were exact. Bank conflicts, instruction cache misses and skew between schedulers are not in it, small images in
L2 are cheaper than it says. Ranking and gains are firmer than absolutes, sm_90 than the others: their latencies are
taken over from it, and their copy bandwidths and L2 are guesses.
"""

from __future__ import annotations

import functools
import linecache
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernels
from bench.compile_report import WARPS_PER_SM, occupancy
from bench.limits import simulate
from bench.limits.loops import trips
from bench.limits.simulate import Kind, Pipe
from bench.sass import Instruction, Loop, disassemble, last_exit, loops, parse, usage
from kernels.device import SHARED_MEMORY, Gpu
from kernels.launch import Launch, cdiv

SCHEDULERS = 4  # of a multiprocessor
DRAM_SECONDS, L2_SECONDS, L1_CYCLES = 353e-9, 154e-9, 34  # to a result, of an H100
START_CYCLES, BARRIER_CYCLES = 250, 20  # of a program; of a barrier
GAP_SECONDS = 1.2e-6  # between two launches of a CUDA graph


@dataclass(frozen=True)
class Card:
    """`bandwidth` is what a large copy reaches, read plus written; `fma_units` a scheduler's units of 16 lanes for
    fp32; `tensor` its fp16 operations a cycle with fp32 sums; `alu` cycles of an integer instruction."""

    gpu: Gpu
    bandwidth: float
    clock: float
    l2: float
    tensor: int
    fma_units: int = 2
    alu: int = 2

    @property
    def cycles(self) -> float:
        """Of all schedulers in a second."""
        return SCHEDULERS * self.gpu.multiprocessors * self.clock


def _card(
    name: str, capability: tuple[int, int], multiprocessors: int, bandwidth: float, clock: float, l2: float,
    tensor: int, **others: int,
) -> Card:  # fmt: skip
    gpu = Gpu(name, capability, multiprocessors, SHARED_MEMORY[10 * capability[0] + capability[1]])
    return Card(gpu, bandwidth * 1e12, clock * 1e9, l2 * 1e12, tensor, **others)


# Multiprocessors, boost clocks and tensor rates as the vendor states them. TB/s of a copy: H100 and H200 as published,
# the others 0.92 of the peak (A100 0.87), a guess; L2 a guess.
CARDS = (
    _card("RTX 3090", (8, 6), 82, 0.86, 1.695, 2.2, 128),
    _card("RTX 4090", (8, 9), 128, 0.93, 2.52, 4.5, 128),
    _card("RTX 5090", (12, 0), 170, 1.65, 2.407, 6.0, 128, alu=1),
    _card("L4", (8, 9), 58, 0.276, 2.04, 2.0, 256),
    _card("A100", (8, 0), 108, 1.77, 1.41, 4.5, 512, fma_units=1),
    _card("H100", (9, 0), 132, 3.0, 1.755, 7.4, 1024),
    _card("H200", (9, 0), 132, 4.3, 1.755, 7.4, 1024),
)

_FMA = {"FFMA", "FFMA2", "FMUL", "FMUL2", "FADD", "FADD2", "HFMA2", "HADD2", "HMUL2"}
_HEAVY = {"IMAD", "IDP"}
_XU = {"MUFU", "F2F", "I2F", "F2I"}
_LSU = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "ATOM", "ATOMS", "RED", "LDL", "STL", "LD", "ST"}
_CONTROL = {
    "BRA", "EXIT", "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "BSSY", "BSYNC", "WARPGROUP", "FENCE", "MEMBAR",
    "LDC", "S2R", "CS2R", "YIELD", "WARPSYNC", "S2UR",
}  # fmt: skip
_LATENCY = {
    "MUFU": 20, "F2F": 20, "I2F": 20, "F2I": 20, "LDS": 26, "LDSM": 30, "SHFL": 24, "LDC": 38, "S2R": 25, "S2UR": 25,
    "R2UR": 12, "STS": 4, "STSM": 4, "STG": 4, "IMAD": 5, "LDG": 0, "LDL": 36, "STL": 4, "HMMA": 33,
}  # fmt: skip
_GLOBAL = {"LDG": Kind.LOAD, "LDGSTS": Kind.COPY, "STG": Kind.STORE}


def pipe_of(i: Instruction) -> Pipe:
    """The pipe that an instruction goes to; what is not known goes to the ALU."""
    if i.base in _FMA:
        return Pipe.FMA
    if i.base in _HEAVY:
        return Pipe.HEAVY
    if i.base in _XU:
        return Pipe.XU
    if i.base in _LSU:
        return Pipe.LSU
    if i.base in ("HGMMA", "HMMA"):
        return Pipe.TENSOR
    if i.base in _CONTROL:
        return Pipe.CONTROL
    return Pipe.UNIFORM if i.base.startswith("U") or i.base == "R2UR" else Pipe.ALU


def pipe_cycles(i: Instruction, card: Card) -> float:
    """Cycles that its pipe is taken by one warp's instruction."""
    pipe = pipe_of(i)
    if pipe == Pipe.LSU:  # a wavefront a cycle and multiprocessor
        if i.base in ("LDSM", "STSM"):
            return SCHEDULERS * int(i.name.rsplit(".", 1)[-1]) if i.name[-1] in "24" else SCHEDULERS
        return SCHEDULERS * (1 if i.base == "SHFL" else max(i.width // 4, 1))
    if pipe == Pipe.TENSOR:
        shape = re.search(r"\.(\d+)x(\d+)x(\d+)", i.name)
        if shape:  # a warp group's, of which a scheduler has one warp
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k / SCHEDULERS / card.tensor
        return 2 * 16 * 8 * (8 if ".1688" in i.name else 16) / card.tensor
    return {Pipe.FMA: 2, Pipe.HEAVY: 2, Pipe.ALU: card.alu, Pipe.XU: 8, Pipe.UNIFORM: 2}.get(pipe, 0)


@dataclass(frozen=True)
class Built:
    """A kernel's machine code and what it takes of a multiprocessor."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    registers: int
    stack: int
    shared: int


_built: dict[Any, Built] = {}


def arguments_of(launch: Launch) -> dict[str, Any]:
    """A launch's arguments by name, constexprs among them."""
    names = [name for name in launch.kernel.arg_names if name not in launch.options]
    return dict(zip(names, launch.args, strict=True)) | launch.options


def build(launch: Launch, arch: int) -> Built:
    """Compile what the launch needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments, signature, constants, attrs = arguments_of(launch), {}, {}, {}
    for at, name in enumerate(launch.kernel.arg_names):
        value = arguments[name]
        if name in launch.options or value is None:
            signature[name], constants[name] = "constexpr", value
        elif hasattr(value, "data_ptr"):
            kind = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(value.dtype).removeprefix("torch.")]
            signature[name], attrs[(at,)] = f"*{kind}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: launch.options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in launch.options}
    if options.get("maxnreg", 0) is None:
        del options["maxnreg"]
    key = launch.kernel.fn, *signature.items(), *((n, str(c)) for n, c in constants.items()), *options.items(), arch
    if key not in _built:
        source = ASTSource(launch.kernel, signature, constants, attrs)
        compiled = kernels.launch.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        code = parse(disassemble(compiled.asm["cubin"]))
        registers, stack = usage(compiled.asm["cubin"])
        _built[key] = Built(tuple(code), tuple(loops(code)), registers, stack, int(compiled.metadata.shared))
    return _built[key]


def flow(code: Sequence[Instruction], found: Sequence[Loop], counts: Mapping[Loop, int]) -> tuple[list[int], set[int]]:
    """How often each instruction runs in a program, and the forward branches that are taken: past a loop that does not
    run, and where nothing else is possible."""
    end, tails = last_exit(code), {loop.tail for loop in found}
    taken: set[int] = set()
    dead: set[int] = set()
    for i in code:
        if i.base != "BRA" or i.target is None or i.target <= i.index or i.index in tails:
            continue
        inner = [loop for loop in found if i.index < loop.head and loop.tail < i.target]
        if (i.predicate and inner and all(counts[loop] == 0 for loop in inner)) or (not i.predicate and i.index < end):
            taken.add(i.index)
            dead.update(range(i.index + 1, i.target))
    last = max([end, *tails])
    often = []
    for i in code:
        around = [counts[loop] for loop in found if loop.holds(i.index)]
        often.append(0 if i.index in dead or i.index > last else math.prod(around))
    return often, taken


_IMAGES = {
    "x_ptr", "dy_ptr", "a_ptr", "dy_row", "y_row", "image_ptr", "residual_ptr", "x_ptrs", "y_ptr", "dx_ptr",
    "residual_sum_ptr", "y_ptrs",
}  # fmt: skip
_NEAR = {"gate_ptr", "drop_scale_ptr", "q_ptr", "w_ptrs"}
_ACCESS = re.compile(r"tl\.(?:load|store)\(\s*(\w+)")


@functools.cache
def _where(file: str, line: int) -> str:
    """What the access at a line of the kernels goes to: an "image", "near" vectors (first-level cache) or "other"."""
    path = next(Path(kernels.__file__).parent.rglob(file), None)
    text = " ".join(linecache.getline(str(path), line + n) for n in range(3))
    match = _ACCESS.search(text)
    pointer = match[1] if match else ""
    return "image" if pointer in _IMAGES else "near" if pointer in _NEAR else "other"


@dataclass(frozen=True)
class Cost:
    """One launch on one card. `busy` are cycles of a scheduler by resource, over all warps: "issue" counts
    instructions. `seconds` is the simulated time without the gap to the next launch."""

    kernel: str
    programs: int
    registers: int
    stack: int
    warps: int  # of a multiprocessor, resident together
    bytes: int
    busy: Mapping[str, float]
    ipc: float
    seconds: float

    def bounds(self, card: Card) -> dict[str, float]:
        """Seconds that each resource takes by itself."""
        return {"memory": self.bytes / card.bandwidth} | {n: c / card.cycles for n, c in self.busy.items()}


def cost(launch: Launch, moved: int, accessed: int, card: Card) -> Cost:
    """`moved` and `accessed` are its bytes from memory and altogether, as `kernels.block.traffic` counts them."""
    built = build(launch, card.gpu.arch)
    code, arguments = built.instructions, arguments_of(launch)
    counts = trips(launch.kernel, arguments, built.loops)
    often, taken = flow(code, built.loops, counts)
    num_warps, programs = launch.options["num_warps"], math.prod(launch.grid)
    share = occupancy(built.registers, built.shared, num_warps, card.gpu.arch)
    resident = max(round(share * WARPS_PER_SM[card.gpu.arch] / num_warps), 1)
    busy: dict[str, float] = defaultdict(float)
    touched: Counter[str] = Counter()
    for i, n in zip(code, often, strict=True):
        busy["issue"] += n
        busy[pipe_of(i).name.lower()] += n * pipe_cycles(i, card)
        if n and i.base in _GLOBAL:
            touched[_where(i.file, i.line)] += n * i.width * 32
    busy["fma"] = max((busy["fma"] + busy["heavy"]) / card.fma_units, busy["heavy"])
    kept = ("issue", "fma", "alu", "xu", "lsu", "tensor")
    total = {name: busy[name] * programs * num_warps for name in kept}
    image, every = (n * programs * num_warps for n in (touched["image"], touched.total()))
    rates = moved / image if image else 0.0, min(accessed / every, 1.0) if every else 0.0
    ops = _operations(built, card, often, taken, counts, rates)
    seconds, ipc = _simulated(ops, card, programs, num_warps, resident, busy["issue"])
    name = launch.kernel.fn.__name__
    in_flight = num_warps * min(resident, cdiv(programs, card.gpu.multiprocessors))
    return Cost(name, programs, built.registers, built.stack, in_flight, moved, total, ipc, seconds)


def _operations(
    built: Built, card: Card, often: Sequence[int], taken: set[int], counts: Mapping[Loop, int],
    rates: tuple[float, float],
) -> Any:  # fmt: skip
    code, end = built.instructions, last_exit(built.instructions)
    tails = {loop.tail: loop for loop in built.loops}
    ops = (simulate.Op * len(code))()
    for i, op in zip(code, ops, strict=True):
        op.pipe, op.stall, op.writes, op.reads, op.waits = pipe_of(i), i.stall, i.writes, i.reads, i.waits
        op.cycles, op.latency, op.target = pipe_cycles(i, card), _LATENCY.get(i.base, 6), -1
        if i.index in tails:
            op.kind, op.target, op.trips = Kind.BACK, i.target, max(counts[tails[i.index]], 1)
        elif i.index in taken:
            op.kind, op.target = Kind.JUMP, i.target
        elif i.base == "EXIT" and i.index + 1 in tails:
            op.kind = Kind.EXIT_BEFORE_BACK
        elif i.base == "EXIT" and (not i.predicate or i.index == end):
            op.kind = Kind.EXIT
        elif i.base == "BAR":
            op.kind = Kind.BARRIER
        elif i.base == "LDGDEPBAR":
            op.kind = Kind.COPY_COMMIT
        elif i.base == "DEPBAR" or i.name.startswith("WARPGROUP.DEPBAR"):
            op.kind = Kind.COPY_WAIT if i.base == "DEPBAR" else Kind.GROUP_WAIT
            op.left = int(i.text.split(",")[1].strip(), 16)
        elif i.base == "HGMMA":
            op.kind, op.left = Kind.GROUP_PRODUCT, int("gsb0" in i.text)
        elif i.base in _GLOBAL:
            op.kind, where = _GLOBAL[i.base], _where(i.file, i.line)
            size = 32 * i.width
            op.dram = size * rates[0] * (where == "image")
            op.l2 = size * rates[1] * (where != "near")
    return ops


ENOUGH = 400_000  # instructions of a scheduler that are simulated; longer launches go on at the same pace


def _simulated(
    ops: Any, card: Card, programs: int, num_warps: int, resident: int, each: float
) -> tuple[float, float]:  # fmt: skip
    """Seconds, and instructions a cycle and scheduler."""
    busy_share = min(programs / card.gpu.multiprocessors, 1.0)  # of the multiprocessors
    per = card.clock * card.gpu.multiprocessors * max(busy_share, 0.05) * SCHEDULERS
    machine = simulate.Machine(
        min(card.bandwidth / per, 15.0), min(card.l2 / per, 16.0), DRAM_SECONDS * card.clock, L2_SECONDS * card.clock,
        L1_CYCLES, START_CYCLES, BARRIER_CYCLES, card.fma_units,
    )  # fmt: skip
    warps, queue = max(num_warps // SCHEDULERS, 1), cdiv(programs, card.gpu.multiprocessors)
    resident = min(resident, queue)
    most = max(3 * resident, math.ceil(ENOUGH / max(each * warps, 1)))
    if queue <= most + resident:
        found = simulate.run(ops, warps, resident, queue, machine)
        return found.cycles / card.clock, found.issued / found.cycles
    most = max(most // resident, 2) * resident
    one, two = (simulate.run(ops, warps, resident, n, machine) for n in (most, 2 * most))
    cycles = one.cycles + (two.cycles - one.cycles) * (queue - most) / most
    return cycles / card.clock, two.issued / two.cycles
