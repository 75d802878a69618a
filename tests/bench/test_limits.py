"""The model of the machine code: what it reads, how often loops run, and how warps that issue share a scheduler."""

from __future__ import annotations

import ctypes
import shutil
from collections import defaultdict
from typing import Any

import pytest
import torch

import kernels
from bench.limits import __main__ as limits
from bench.limits import simulate
from bench.limits.cost import CARDS, flow, pipe_cycles, pipe_of
from bench.limits.loops import TRIPS, source_loops, trips
from bench.limits.simulate import Kind, Machine, Op, Pipe
from bench.sass import Instruction, Loop, loops, parse
from kernels.block import traffic as mbconv_traffic
from kernels.block.traffic import Block

SASS = """
//--------------------- .text._sum_kernel --------------------------
\t//## File "/home/me/kernels/batch_norm.py", line 214
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;    /* 0x0000000602047981 */
                                                                       /* 0x000ea8000c1e1d00 */
\t//## File "/home/me/kernels/batch_norm.py", line 217 inlined at "/home/me/kernels/batch_norm.py", line 214
        /*0010*/              @!P0 FADD R8, R4, R5 ;                    /* 0x0000000504087221 */
                                                                       /* 0x004fca0000000000 */
        /*0020*/              @P1  BRA `(.L_x_0) ;                      /* 0xfffffffc00001947 */
                                                                       /* 0x000fea000383ffff */
        /*0030*/                   EXIT ;                               /* 0x000000000000794d */
                                                                       /* 0x000fea0003800000 */
.L_x_1:
        /*0040*/                   BRA `(.L_x_1) ;                      /* 0xfffffffc00fc7947 */
                                                                       /* 0x000fc0000383ffff */
"""
FILE = "depthwise.py"
BLOCK = Block(8, 8, 48, 8, 2, 14, 14, 3, 1, residual=True, scaled=True)
H100 = next(card for card in CARDS if card.gpu.name == "H100")


def test_instructions_are_read_with_what_they_wait_for() -> None:
    load, add, branch, *_ = found = parse(SASS)
    assert (load.name, load.base, load.width, load.file, load.line) == ("LDG.E.128", "LDG", 16, "batch_norm.py", 214)
    assert (load.stall, load.writes, load.waits) == (4, 2, 0)
    assert (add.predicate, add.line, add.stall, add.waits) == ("@!P0", 217, 5, 0b000100)  # for what the load writes
    assert branch.target == load.index
    assert loops(found) == [Loop(0, 2, "batch_norm.py", 217)]  # the wait behind the end is none


def test_a_branch_by_a_uniform_predicate_may_not_be_taken() -> None:
    """On compute capability 12.0 the way around a loop is one; taken for certain, it leaves the loop out."""
    text = SASS.replace("@P1  BRA `(.L_x_0)", "BRA.U !UP1, `(.L_x_1)").replace(
        "0xfffffffc00001947", "0x0000000000001947"
    )
    _, _, branch, *_ = found = parse(text)
    assert (branch.predicate, branch.target) == ("!UP1", 4)
    assert flow(found, loops(found), {}) == ([1, 1, 1, 1, 0], set())


def test_every_kernel_of_a_block_says_how_often_its_loops_run() -> None:
    steps = mbconv_traffic.forward(BLOCK, torch.bfloat16) | mbconv_traffic.backward(BLOCK, torch.bfloat16)
    names = {name for step in steps.values() for name in step}
    functions = {spec.fn.fn.__name__: spec.fn for spec in kernels.all_specs()}
    arguments: Any = defaultdict(lambda: 1, EPILOGUE="none")
    for name in names:
        fn = functions[name]
        assert len(TRIPS.get(name, lambda _: ())(arguments)) == len(source_loops(fn.fn)), name


def test_a_loop_has_the_count_of_the_source_that_it_stands_in() -> None:
    fn = next(spec.fn for spec in kernels.all_specs() if spec.fn.fn.__name__ == "_depthwise_kernel")
    (outer, end), (inner, _) = source_loops(fn.fn)
    found = [
        Loop(0, 9, "depthwise.py", outer),
        Loop(2, 5, "depthwise.py", inner),
        Loop(3, 4, "depthwise.py", inner + 1),
    ]
    arguments = {"groups": 7, "partials": 2, "steps": 30}
    assert list(trips(fn, arguments, found).values()) == [4, 30, 30]
    with pytest.raises(RuntimeError, match="none of its own"):
        trips(fn, arguments, [Loop(0, 9, FILE, end + 500)])


def test_a_branch_of_an_inlined_function_belongs_to_the_loop_around_it() -> None:
    fn = next(spec.fn for spec in kernels.all_specs() if spec.fn.fn.__name__ == "_depthwise_kernel")
    (outer, _), (inner, last) = source_loops(fn.fn)
    helper = outer - 40
    found = [
        Loop(2, 5, "batch_norm.py", inner, frozenset((FILE, line) for line in (helper, inner + 1, last))),
        Loop(0, 9, FILE, helper, frozenset({("batch_norm.py", 1), (FILE, outer + 1), (FILE, inner + 1)})),
    ]
    assert list(trips(fn, {"groups": 7, "partials": 2, "steps": 30}, found).values()) == [30, 4]


def test_pipes_are_taken_as_long_as_the_card_needs() -> None:
    def taken(text: str, card: Any = H100) -> tuple[Pipe, float]:
        i = Instruction(0, text, "", "", 0)
        return pipe_of(i), pipe_cycles(i, card)

    assert taken("FFMA R1, R2, R3, R4") == (Pipe.FMA, 2)
    assert taken("MUFU.EX2 R1, R2") == (Pipe.XU, 8)
    assert taken("LDS.128 R4, [R2]") == (Pipe.LSU, 16)
    # 64 × 64 × 16 products of a warp group at 1024 operations a cycle and scheduler.
    assert taken("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]") == (Pipe.TENSOR, 32)
    gaming = next(card for card in CARDS if card.gpu.capability == (8, 6))
    assert taken("HMMA.16816.F32.BF16 R4, R8, R10, R4", gaming) == (Pipe.TENSOR, 32)


def machine(**options: float) -> Machine:
    stated: dict[str, Any] = {
        "dram": 4.0, "l2": 16.0, "dram_latency": 600, "l2_latency": 270, "l1_latency": 30, "launch": 0, "barrier": 0,
        "fma_units": 2,
    }  # fmt: skip
    return Machine(*(stated | options).values())


def listing(*ops: dict[str, Any]) -> Any:
    found = (Op * len(ops))()
    for op, fields in zip(found, ops, strict=True):
        for name, value in ({"stall": 1, "writes": 7, "reads": 7, "target": -1} | fields).items():
            setattr(op, name, value)
    return found


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_warps_hide_each_others_waits_until_a_pipe_or_memory_is_full() -> None:
    assert ctypes.sizeof(Op) == 4 * 13
    exp = {"kind": Kind.PLAIN, "pipe": Pipe.XU, "cycles": 8, "latency": 20, "writes": 0}
    use = {"kind": Kind.PLAIN, "pipe": Pipe.FMA, "cycles": 2, "waits": 1, "stall": 4}
    back = {"kind": Kind.BACK, "pipe": Pipe.CONTROL, "target": 0, "trips": 100, "stall": 5}
    end = {"kind": Kind.EXIT, "pipe": Pipe.CONTROL}
    ops = listing(exp, use, back, end)
    alone, four, eight = (simulate.run(ops, 1, n, n, machine()).cycles for n in (1, 4, 8))
    assert 100 * 31 <= alone <= 100 * 33  # each trip waits for the result: 20 + 4 + 8
    assert four < 1.3 * alone  # four fit into one's waits
    assert 8 * 100 * 8 <= eight <= 8 * 100 * 8.5  # the pipe is full
    load = {"kind": Kind.LOAD, "pipe": Pipe.LSU, "cycles": 4, "writes": 0, "dram": 512.0}
    ops = listing(load, use, back, end)
    assert simulate.run(ops, 1, 1, 1, machine()).cycles >= 100 * 600
    many = simulate.run(ops, 1, 16, 16, machine()).cycles
    assert 16 * 100 * 512 / 4 <= many <= 16 * 100 * 512 / 4 * 1.1  # bytes at the rate of memory


def test_every_launch_of_a_block_is_recorded_once_with_its_bytes() -> None:
    prev = BLOCK._replace(residual=False, scaled=False)
    found = list(limits.recorded(BLOCK, prev, False, H100))
    steps = mbconv_traffic.forward(BLOCK, torch.bfloat16, prev=prev, from_memory=True)
    steps |= mbconv_traffic.backward(BLOCK, torch.bfloat16, from_memory=True)
    expected = [(step, kernel, moved) for step, by in steps.items() for kernel, moved in by.items()]
    assert sorted((s.name, s.launch.kernel.fn.__name__, s.moved) for s in found) == sorted(expected)
