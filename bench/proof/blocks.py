"""Stages of the proof about the fused block: whole blocks against PyTorch, and each step of its schedule by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.cases import BATCH, DIRECTIONS, RESOLUTION, VARIANT, BlockCase, Direction, block_errors, launch_errors
from bench.launches import Launch, describe, schedule
from bench.measure import ColdCache, peak_memory, sample, summarise
from bench.shapes import model_blocks
from bench.stages import Case, Context, Stage, attempt, free_memory, not_correct, verdict
from fastnet.arch import Kernels
from kernels.block import traffic as mbconv_traffic
from kernels.block.traffic import Block
from kernels.device import gpu
from kernels.launch import INTERPRETED

TINY_BLOCK = Block(2, 8, 16, 8, 2, 3, 3, 3, 1, residual=True, scaled=True)
FUSED: Kernels = "triton"
COMPILED = "compiled"  # PyTorch's block through torch.compile
# Vectors alone: nothing that a compiler could do better with images.
VECTOR_STEPS = ("F4 excite", "B3 excite backward", "B4 combine")
SAME_JOB = ("ours", "eager", COMPILED)


def timed_blocks(*, tiny: bool) -> dict[Block, int]:
    """Every distinct block of B0 at batch 128, and how often it occurs; tiny: one that no model has."""
    return {TINY_BLOCK: 1} if tiny else dict(Counter(model_blocks(VARIANT, RESOLUTION, BATCH)))


def _bandwidth(context: Context) -> float:
    found: float = context.cases("copy bandwidth")["large copy"]["bytes_per_second"]
    return found


def _setting(context: Context) -> tuple[torch.dtype, ColdCache | None, float]:
    """Type, cold cache and seconds for one timing."""
    if context.tiny:
        return torch.float32, None, 0.0
    return torch.bfloat16, ColdCache(context.device), 0.1


def _least(context: Context) -> dict[str, int]:
    return {"least": 1} if context.tiny else {}


def block_bytes(block: Block, dtype: torch.dtype) -> dict[Direction, int]:
    """Bytes from memory of the fused block."""
    steps = (
        mbconv_traffic.forward(block, dtype, from_memory=True),
        mbconv_traffic.backward(block, dtype, from_memory=True),
    )
    return {d: sum(sum(by.values()) for by in of.values()) for d, of in zip(DIRECTIONS, steps, strict=True)}


def check(block: Block, dtype: torch.dtype, device: torch.device) -> Case:
    """`verdict` on the block, with half of its images, and so on, where the GPU has no memory for the oracle's fp64."""
    images = block.images
    while True:
        try:
            found = verdict(block_errors(block, dtype, device))
            return found if block.images == images else found | {"checked_images": block.images}
        except torch.OutOfMemoryError:
            if block.images == 1:
                raise
        block = block._replace(images=block.images // 2)
        free_memory()


def time_block(block: Block, names: Sequence[str], context: Context) -> Case:
    """Forward and backward of the block by each of `names`, peak memory beside, bytes and predicted seconds of ours.

    RuntimeError where the fused block is grossly wrong.
    """
    dtype, cold, seconds = _setting(context)
    moved = block_bytes(block, dtype)
    found: Case = {"bytes": moved, "predicted": {d: moved[d] / _bandwidth(context) for d in DIRECTIONS}}
    if FUSED in names:
        found |= check(block, dtype, context.device)
    for name in names:
        kernels: Any = "torch" if name == COMPILED else name
        case = BlockCase(block, kernels, dtype, context.device)
        if name == COMPILED:
            # Backward runs many times on one graph, which forbids donating its buffers.
            torch._functorch.config.donated_buffer = False
            torch.compiler.reset()  # a shape more would count as a recompilation
            case.run = torch.compile(case.module, dynamic=False)
        output = case.forward()
        runs: dict[Direction, Callable[[], object]] = {
            "forward": case.forward,
            "backward": lambda case=case, output=output: case.backward(output),  # type: ignore[misc]
        }
        one: Case = {}
        for direction in DIRECTIONS:
            timing = summarise(sample(runs[direction], context.device, cold=cold, seconds=seconds, **_least(context)))
            one[direction] = timing.to_json()
        del output
        runs.clear()
        before = torch.cuda.memory_allocated(context.device) if context.device.type == "cuda" else 0
        one["peak_bytes"] = peak_memory(lambda case=case: case.backward(case.forward()), context.device) - before  # type: ignore[misc]
        one["seconds"] = one["forward"]["median"] + one["backward"]["median"]
        found[name] = one
    return found


def blocks_stage(stage: str, names: Sequence[str]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    def run(context: Context) -> Iterator[tuple[str, Case]]:
        used = list(names)
        if context.tiny:
            used = [name for name in names if name == "torch" or (name != COMPILED and INTERPRETED)]
        if used != list(names):
            missing = " and ".join(name for name in names if name not in used)
            context.leave_out(f"{missing} on the blocks: needs a GPU; times on a CPU say nothing")
        for block, times in timed_blocks(tiny=context.tiny).items() if used else ():
            key = describe(block)
            if key not in context.cases(stage) and context.has_time(20, f"{stage} {key}"):
                fused = context.cases("blocks").get(key, {}).get(FUSED, {}).get("seconds")
                extra = {"times": times} | ({"fused_seconds": fused} if fused and FUSED not in used else {})
                yield key, attempt(lambda block=block, extra=extra: time_block(block, used, context) | extra)  # type: ignore[misc]

    return run


def show_blocks(cases: dict[str, Case]) -> str:
    names = [name for name in (FUSED, "triton-ops", "torch", COMPILED) if name in next(iter(cases.values()))]
    heads = "".join(f"{name + ' ms':>15}{'MB':>7}" for name in names)
    lines = [f"forward and backward{'':24}{'predicted':>10}{heads}  predicted / fused"]
    sums: Counter[str] = Counter()
    for key, found in cases.items():
        predicted = sum(found["predicted"].values())
        cells = "".join(f"{1e3 * found[n]['seconds']:15.3f}{found[n]['peak_bytes'] / 1e6:7.0f}" for n in names)
        fused = found[FUSED]["seconds"] if FUSED in found else found.get("fused_seconds")
        share = f"{predicted / fused:8.0%}" if fused else ""
        error = f", error {found['error_share']:.2f} of what is allowed" if "error_share" in found else ""
        lines.append(f"{found['times']} x {key:<40}{1e3 * predicted:10.3f}{cells}{share}{error}{not_correct(found)}")
        sums.update({n: found["times"] * found[n]["seconds"] for n in names})
        sums["predicted"] += found["times"] * predicted
    cells = "".join(f"{1e3 * sums[name]:15.3f}{'':7}" for name in names)
    lines.append(f"{'all of these':<44}{1e3 * sums['predicted']:10.3f}{cells}")
    return "\n".join(lines)


def time_launch(launch: Launch, names: Sequence[str], context: Context, cold: ColdCache | None) -> Case:
    seconds = 0.0 if context.tiny else 0.05
    runs: dict[str, Callable[[], object]] = {
        "ours": launch.ours,
        "eager": lambda: launch.job(*launch.arguments),
    }
    if launch.library is not None:
        runs["library"] = launch.library
    if COMPILED in names:
        torch.compiler.reset()
        compiled = torch.compile(launch.job, dynamic=False)
        runs[COMPILED] = lambda: compiled(*launch.arguments)
    with torch.no_grad():
        return {
            name: summarise(sample(runs[name], context.device, cold=cold, seconds=seconds, **_least(context))).to_json()
            for name in names
            if name in runs
        }


def _check_launch(launch: Launch) -> Case:
    """`verdict`, or nothing where the GPU has no memory for the oracle's fp64: the block has been checked on fewer
    images."""
    try:
        return verdict(launch_errors(launch))
    except torch.OutOfMemoryError:
        pass
    free_memory()
    return {}


def _time_schedule(block: Block, names: Sequence[str], context: Context, known: Case) -> Case:
    """Every step of `block`: timings by name, bytes and their seconds at the copy's rate; `known` are what another
    stage has timed."""
    dtype, cold, _ = _setting(context)
    card, bandwidth = gpu(context.device), _bandwidth(context)
    work = mbconv_traffic.forward(block, dtype, from_memory=True, gpu=card)
    work |= mbconv_traffic.backward(block, dtype, from_memory=True, gpu=card)
    steps: Case = {}
    for step, launch in schedule(block, dtype, context.device):
        if names == (COMPILED,) and step in VECTOR_STEPS:
            continue
        moved = sum(work[step].values())
        found: Case = {"bytes": moved, "predicted": moved / bandwidth}
        if "ours" in names:
            found |= _check_launch(launch)
        found |= time_launch(launch, names, context, cold)
        if step in known and "ours" not in found:
            found |= {name: known[step][name] for name in ("ours", "eager") if name in known[step]}
        if "ours" in found:
            rate = found["bytes"] / found["ours"]["median"]
            found |= {"gb_per_second": rate / 1e9, "of_copy_bandwidth": rate / bandwidth}
        steps[step] = found | {"fastest": fastest(found)}
    wrong = [step for step, one in steps.items() if "not_correct" in one]
    return {"steps": steps} | ({"not_correct": ", ".join(wrong)} if wrong else {})


def fastest(found: Case) -> str:
    """Which of `SAME_JOB` takes the shortest median; the library's product alone is not the same job."""
    return min((name for name in SAME_JOB if name in found), key=lambda name: float(found[name]["median"]))


def launches_stage(stage: str, names: tuple[str, ...]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    def run(context: Context) -> Iterator[tuple[str, Case]]:
        if context.tiny:
            what = "torch.compile" if names == (COMPILED,) else "our kernels" if not INTERPRETED else "real sizes"
            context.leave_out(f"{what} on the steps: needs a GPU; times on a CPU say nothing")
        used = tuple(n for n in names if not context.tiny or (n == "ours" and INTERPRETED) or n in ("eager", "library"))
        for block, times in timed_blocks(tiny=context.tiny).items() if used else ():
            key = describe(block)
            if key not in context.cases(stage) and context.has_time(20, f"{stage} {key}"):
                known = context.cases("launches").get(key, {}).get("steps", {})
                yield (
                    key,
                    attempt(
                        lambda block=block, known=known, times=times: (  # type: ignore[misc]
                            _time_schedule(block, used, context, known) | {"times": times}
                        )
                    ),
                )

    return run


def show_launches(cases: dict[str, Case]) -> str:
    lines = [
        f"{'us':<26}{'ours':>9}{'GB/s':>7}{'% copy':>8}{'bytes':>9}{'library':>9}{'eager':>9}{'compiled':>9}  fastest"
    ]
    slower: Counter[str] = Counter()
    for key, found in cases.items():
        lines.append(f"{found['times']} x {key}")
        for step, one in found["steps"].items():
            lines.append(_launch_line(step, one))
            if one["fastest"] != "ours":
                slower[step] += 1
    lines.append("bytes: what they alone take at the copy's rate; `python -m bench.limits` says what else binds")
    lines.append("library: the bare product or convolution (cuBLAS, cuDNN) without what our launch does around it")
    found_slower = ", ".join(f"{step} in {count}" for step, count in slower.items())
    lines.append(f"of {len(cases)} blocks the same job is faster elsewhere: {found_slower or 'nowhere'}")
    return "\n".join(lines)


def _launch_line(step: str, one: Case) -> str:
    def us(name: str) -> str:
        return f"{1e6 * one[name]['median']:9.1f}" if name in one else f"{'-':>9}"

    rate = f"{one['gb_per_second']:7.0f}{one['of_copy_bandwidth']:8.0%}" if "ours" in one else " " * 15
    line = f"  {step:<24}{us('ours')}{rate}{1e6 * one['predicted']:9.1f}{us('library')}{us('eager')}{us(COMPILED)}"
    return f"{line}  {one['fastest']}{not_correct(one)}"


def blocks(name: str, names: Sequence[str]) -> Stage:
    return Stage(name, blocks_stage(name, names), show_blocks)


def launches(name: str, names: tuple[str, ...]) -> Stage:
    return Stage(name, launches_stage(name, names), show_launches)


BLOCKS = blocks("blocks", (FUSED, "triton-ops", "torch"))
BLOCKS_COMPILED = blocks("blocks, compiled", (COMPILED,))
LAUNCHES = launches("launches", ("ours", "eager", "library"))
LAUNCHES_COMPILED = launches("launches, compiled", (COMPILED,))
