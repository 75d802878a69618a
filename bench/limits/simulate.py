"""`bench/limits/simulator/simulate.cpp`, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from pathlib import Path
from typing import Any

from kernels.cpu.build import build

SOURCES = Path(__file__).with_name("simulator")
Pipe = IntEnum("Pipe", "FMA HEAVY ALU XU LSU UNIFORM CONTROL TENSOR", start=0)
Kind = IntEnum(
    "Kind",
    "PLAIN BACK EXIT JUMP BARRIER COPY_COMMIT COPY_WAIT GROUP_PRODUCT GROUP_WAIT LOAD STORE COPY EXIT_BEFORE_BACK",
    start=0,
)


class Op(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "pipe", "stall", "writes", "reads", "waits", "target")),
        *((name, ctypes.c_int32) for name in ("trips", "left")),
        *((name, ctypes.c_float) for name in ("cycles", "latency", "dram", "l2")),
    ]


class Machine(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("dram", "l2", "dram_latency", "l2_latency", "l1_latency")),
        *((name, ctypes.c_double) for name in ("launch", "barrier")),
        ("fma_units", ctypes.c_int32),
    ]


class Result(ctypes.Structure):
    _fields_ = [("cycles", ctypes.c_double), ("issued", ctypes.c_double), ("finished", ctypes.c_int32)]


@functools.cache
def _library() -> Any:
    loaded = ctypes.CDLL(str(build("plain", sources=SOURCES)))
    integers = [ctypes.c_int] * 4
    loaded.simulate.argtypes = [ctypes.c_void_p, *integers, ctypes.POINTER(Machine), ctypes.POINTER(Result)]
    loaded.simulate.restype = None
    return loaded


def run(ops: Any, warps: int, resident: int, programs: int, machine: Machine) -> Result:
    """Issue `programs` programs of `warps` warps a scheduler, `resident` at a time. RuntimeError where they never
    end."""
    result = Result()
    _library().simulate(ops, len(ops), warps, resident, programs, machine, result)
    if result.finished != programs:
        raise RuntimeError(f"only {result.finished} of {programs} programs ended: a wait that nothing ends")
    return result
