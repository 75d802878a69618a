"""Stages of the proof about copy bandwidth and the fused operations: each against PyTorch, the choice of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.cases import DIRECTIONS, OpCase, image_bytes, kernel_names, op_errors, timed_shapes
from bench.measure import ColdCache, copy_bandwidth, sample, summarise, synchronise
from bench.stages import Case, Context, Stage, attempt, not_correct, verdict
from kernels import launch

DTYPE = torch.bfloat16


def bandwidth_stage(context: Context) -> Iterator[tuple[str, Case]]:
    if "large copy" not in context.cases("copy bandwidth"):
        rate, timing = copy_bandwidth(context.device)
        yield "large copy", {"bytes_per_second": rate, "timing": timing.to_json()}


def show_bandwidth(cases: dict[str, Case]) -> str:
    found = cases["large copy"]
    return f"{found['bytes_per_second'] / 1e9:.0f} GB/s, ±{found['timing']['spread']:.1%}"


def implementation(case: OpCase, name: str) -> Callable[[], Tensor]:
    """Forward of one operation by our kernels ("triton"), by PyTorch ("eager") or by torch.compile ("compiled")."""
    if name == "triton":
        return lambda: case.forward(case.public(), impl="triton")
    if name == "eager":
        return lambda: case.forward(case.reference())
    # Backward runs many times on one graph, which forbids donating its buffers.
    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()  # a shape more would count as a recompilation
    compiled = torch.compile(case.reference(), dynamic=False)
    return lambda: case.forward(compiled)


def time_case(case: OpCase, names: Sequence[str], cold: ColdCache | None, bandwidth: float, *, seconds: float) -> Case:
    """Median seconds, GB/s and share of copy bandwidth by direction and implementation; RuntimeError where gross."""
    found: Case = {}
    if "triton" in names:
        found |= verdict(op_errors(case))
    for name in names:
        forward = implementation(case, name)
        output = forward()
        runs: dict[str, Callable[[], object]] = {
            "forward": forward,
            "backward": lambda output=output: case.backward(output),  # type: ignore[misc]
        }
        for direction in DIRECTIONS:
            timing = summarise(sample(runs[direction], case.device, cold=cold, seconds=seconds))
            # The bytes are those of our kernels for every implementation: work done, not traffic caused.
            rate = image_bytes(case.shape, case.dtype, direction) / timing.median
            found.setdefault(direction, {})[name] = {
                "timing": timing.to_json(),
                "gb_per_second": rate / 1e9,
                "of_copy_bandwidth": rate / bandwidth,
            }
    return found


def kernels_stage(stage: str, names: Sequence[str]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """`names` of implementations on every timed shape; on a CPU eager PyTorch alone, at tiny sizes."""

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        if context.tiny:
            context.leave_out(f"{' and '.join(names)} on the operations, cold L2, bf16, batch 128: needs a GPU")
        used = [name for name in names if name == "eager" or not context.tiny]
        bandwidth = context.cases("copy bandwidth")["large copy"]["bytes_per_second"]
        cold = None if context.tiny else ColdCache(context.device)
        dtype, seconds = (torch.float32, 0.02) if context.tiny else (DTYPE, 0.15)
        for shape in timed_shapes(tiny=context.tiny) if used else ():
            key = f"{shape.op} {shape}"
            if key not in context.cases(stage) and context.has_time(10, f"{stage} {key}"):
                yield (
                    key,
                    attempt(
                        lambda shape=shape: time_case(  # type: ignore[misc]
                            OpCase(shape, dtype, context.device), used, cold, bandwidth, seconds=seconds
                        )
                    ),
                )

    return run


def show_kernels(cases: dict[str, Case]) -> str:
    if all(set(found["forward"]) == {"eager"} for found in cases.values()):
        return f"{len(cases)} operations ran forward and backward; their times on a CPU say nothing and are not shown"
    lines = [f"{'':62}{'us':>9}{'GB/s':>8}{'% of copy':>11}{'eager us':>10}"]
    for key, found in cases.items():
        for direction in DIRECTIONS:
            by = found[direction]
            name, first = next(iter(by.items()))
            eager = f"{1e6 * by['eager']['timing']['median']:.1f}" if "eager" in by else "-"
            lines.append(
                f"{key + ', ' + direction:62}{1e6 * first['timing']['median']:9.1f}{first['gb_per_second']:8.0f}"
                f"{first['of_copy_bandwidth']:11.1%}{eager:>10}  {name}{not_correct(found)}"
            )
    return "\n".join(lines)


def tiles_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """Every selectable tile on every timed shape, forward and backward: what `kernels.launch.tile_for` should say."""
    if context.tiny:
        context.leave_out("the choice of tiles by measurement: needs a GPU")
        return
    cold = ColdCache(context.device)
    for shape in timed_shapes():
        key = f"{shape.op} {shape}"
        if key not in context.cases("tiles") and context.has_time(20, f"tiles of {key}"):
            yield key, attempt(lambda shape=shape: _sweep(OpCase(shape, DTYPE, context.device), cold))  # type: ignore[misc]


def _sweep(case: OpCase, cold: ColdCache) -> Case:
    found: Case = {"chosen": launch.tile_for(case.shape.channels).block_c}
    for tile in launch.TILES:
        with patch.object(launch, "tile_for", lambda channels, tile=tile: tile):
            output = case.forward(case.public(), impl="triton")
            runs: dict[str, Callable[[], object]] = {
                "forward": lambda: case.forward(case.public(), impl="triton"),
                "backward": lambda output=output: case.backward(output),  # type: ignore[misc]
            }
            for direction in DIRECTIONS:
                timing = summarise(sample(runs[direction], case.device, cold=cold, seconds=0.05))
                found.setdefault(direction, {})[str(tile.block_c)] = timing.to_json()
    return found


def show_tiles(cases: dict[str, Case]) -> str:
    lines = ["us by channels a tile; * is the fastest, [ ] the one chosen today"]
    for key, found in cases.items():
        for direction in DIRECTIONS:
            times = {tile: timing["median"] for tile, timing in found[direction].items()}
            cells = []
            for tile, seconds in times.items():
                cell = f"{tile}: {1e6 * seconds:.1f}{'*' if seconds == min(times.values()) else ''}"
                cells.append(f"[{cell}]" if tile == str(found["chosen"]) else cell)
            lines.append(f"{key + ', ' + direction:62} {'  '.join(cells)}")
    return "\n".join(lines)


def anatomy_stage(context: Context) -> Iterator[tuple[str, Case]]:
    """Device time of each single kernel of an operation, from the profiler, after a cold start in each direction."""
    if context.tiny:
        context.leave_out("each kernel's share of its operation: needs a GPU")
        return
    cold = ColdCache(context.device)
    for shape in timed_shapes():
        key = f"{shape.op} {shape}"
        if key not in context.cases("anatomy") and context.has_time(10, f"anatomy of {key}"):
            yield key, attempt(lambda shape=shape: _profile(OpCase(shape, DTYPE, context.device), cold))  # type: ignore[misc]


def _profile(case: OpCase, cold: ColdCache, runs: int = 10) -> Case:
    from torch.profiler import ProfilerActivity, profile

    def once() -> None:
        cold()
        output = case.forward(case.public(), impl="triton")
        cold()
        case.backward(output)

    once()
    synchronise(case.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            once()
        synchronise(case.device)
    own = kernel_names()
    found: dict[str, Any] = {}
    for event in profiler.key_averages():
        if event.key in own:
            found[event.key] = {"seconds": event.self_device_time_total * 1e-6 / runs, "launches": event.count / runs}
    return {"kernels": found, "runs": runs}


def show_anatomy(cases: dict[str, Case]) -> str:
    lines = []
    for key, found in cases.items():
        lines.append(key)
        for name, one in found["kernels"].items():
            lines.append(f"  {name:<40}{1e6 * one['seconds']:9.1f} us in {one['launches']:.0f} launches")
    return "\n".join(lines)


BANDWIDTH = Stage("copy bandwidth", bandwidth_stage, show_bandwidth)
KERNELS = Stage("kernels", kernels_stage("kernels", ("triton", "eager")), show_kernels)
COMPILED = Stage("kernels, compiled", kernels_stage("kernels, compiled", ("compiled",)), show_kernels)
TILES = Stage("tiles", tiles_stage, show_tiles)
ANATOMY = Stage("anatomy", anatomy_stage, show_anatomy)
