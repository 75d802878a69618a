"""How often each loop of a kernel runs in a launch: counts from its arguments, one for each loop that is not unrolled,
in the order of the source, for a program that has its full share of work."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.sass import Loop
from kernels.launch import cdiv

Arguments = Mapping[str, Any]  # of a launch by name, constexprs among them


def _tiles(a: Arguments) -> tuple[int]:
    return (cdiv(a["rows_per_program"], a["UNROLL"] * a["ROWS"]),)


def _partials(a: Arguments) -> tuple[int]:
    return (cdiv(a["partials"], a["BLOCK_P"]),)


def _channels(a: Arguments) -> tuple[int, int]:
    return (cdiv(a["channels"], a["BLOCK_C"]),) * 2


def _pointwise(a: Arguments) -> tuple[int, int]:
    most = a["area"] if a["EPILOGUE"] == "gate_sums" else a["row_count"]
    return cdiv(min(a["rows_per_program"], most), a["BLOCK_M"]), cdiv(a["k_vec"] * a["VEC"], a["BLOCK_K"])


TRIPS: dict[str, Callable[[Arguments], tuple[int, ...]]] = {
    "_stats_kernel": _tiles,
    "_bn_silu_reduce_kernel": _tiles,
    "_bn_drop_connect_reduce_kernel": _tiles,
    "_squeeze_kernel": lambda a: (cdiv(min(a["rows_per_program"], a["area"]), a["UNROLL"] * a["ROWS"]),),
    "_sum_partials_kernel": _partials,
    "_merge_counted_stats_kernel": lambda a: _partials(a) * 2,
    "_excite_kernel": _channels,
    "_excite_backward_kernel": _channels,
    "_excite_parameters_kernel": lambda a: (cdiv(a["images"], a["BLOCK_B"]),),
    "_depthwise_kernel": lambda a: (cdiv(a["groups"], a["partials"]), a["steps"]),
    "_depthwise_backward_kernel": lambda a: (cdiv(a["groups"], a["partials"]), a["lead"], a["band_rows"]),
    "_pointwise_kernel": _pointwise,
    "_expand_backward_kernel": lambda a: (cdiv(a["rows_per_program"], a["BLOCK_M"]),),
    "_pointwise_wgrad_kernel": lambda a: (cdiv(a["rows_per_program"], a["BLOCK_M"]),),
}


@functools.cache
def source_loops(fn: Any) -> tuple[tuple[int, int], ...]:
    """First and last line of every loop of a kernel that runs on the GPU, in the order of the source; `static_range`
    is unrolled and none."""
    lines, first = inspect.getsourcelines(fn)
    found = [
        (first + node.lineno - 1, first + (node.end_lineno or node.lineno) - 1)
        for node in ast.walk(ast.parse(textwrap.dedent("".join(lines))))
        if isinstance(node, ast.While) or (isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter))
    ]
    return tuple(sorted(found))


def trips(kernel: Any, arguments: Arguments, loops: Sequence[Loop]) -> dict[Loop, int]:
    """How often each of the compiled `loops` of a Triton `kernel` runs.

    Raises RuntimeError where TRIPS does not know the kernel, or a loop of the machine code is none of the source's.
    """
    lines = source_loops(kernel.fn)
    name = kernel.fn.__name__
    counts = TRIPS.get(name, lambda _: ())(arguments)
    if len(counts) != len(lines):
        raise RuntimeError(
            f"{name} has {len(lines)} loops and TRIPS in bench/limits/loops.py counts {len(counts)}: update it"
        )
    found = {}
    file = Path(inspect.getsourcefile(kernel.fn) or "").name
    for loop in loops:
        around = [i for i, (first, last) in enumerate(lines) if loop.file == file and first <= loop.line <= last]
        if not around:  # the branch belongs to a function that was inlined: the innermost loop that holds all the rest
            own = {at for name, at in loop.lines if name == file and any(a <= at <= b for a, b in lines)}
            around = [i for i, (first, last) in enumerate(lines) if own and first <= min(own) and max(own) <= last]
        if not around:
            raise RuntimeError(f"{name}: the loop that ends at line {loop.line} of {loop.file} is none of its own")
        exact = [i for i in around if lines[i][0] == loop.line]
        found[loop] = counts[(exact or around)[-1]]
    return found
