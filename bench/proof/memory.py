"""Stage of the proof about memory: the largest batch whose training step fits into a card of 24 GB, ours and timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from bench.contenders import OURS, TIMM, StepRunner, Workload, compared_peers
from bench.measure import peak_memory, synchronise
from bench.stages import Case, Context, Stage, attempt, free_memory

# What tensors may take of 24 GB: a process's context, cuDNN's and cuBLAS's workspaces and a desktop take the rest.
GIGABYTES = 22.5
WORKS = (
    Workload("b4", 380, 8),
    Workload("b7", 600, 2),
)  # with the smaller of the two batches that a guess is made from
MODELS = (OURS, TIMM)
SECONDS = 25  # of a model, as an allowance


def largest_batch(fits: Callable[[int], bool], guess: int) -> int:
    """The largest batch that fits, by multiples of four from 8 on; 0 where none does. `fits` is asked around `guess`
    first, and where it is monotonic the answer is exact."""
    step = 4 if guess >= 8 else 1
    low, high = 0, 0  # the largest known to fit, the smallest known not to
    batch, stride = max(guess // step, 1), 1
    while not high or high - low > 1:
        if fits(batch * step):
            low = batch
            batch = low + stride if not high else (low + high) // 2
        else:
            high = batch
            batch = max(high - stride, 1) if not low else (low + high) // 2
            if high == 1:
                break
        stride *= 2
    return low * step


def measured(model: str, work: Workload, limit: int, device: torch.device) -> Case:
    """The largest batch and what was predicted from two small ones, of which peak memory is a line."""
    peaks = []
    for batch in (work.batch, 2 * work.batch):
        runner = StepRunner(model, work.variant, work.resolution, batch, device, amp="bf16")
        runner()  # the optimizer makes its state
        peaks.append(peak_memory(runner, device))
        del runner
        free_memory()
    slope = (peaks[1] - peaks[0]) / work.batch
    fixed = peaks[0] - slope * work.batch

    def fits(batch: int) -> bool:
        def two_steps() -> Case:
            runner = StepRunner(model, work.variant, work.resolution, batch, device, amp="bf16")
            for _ in range(2):
                runner()
            synchronise(device)
            return {}

        failed = attempt(two_steps).get("error", "")
        free_memory()
        if failed and not failed.startswith("out of memory"):
            raise RuntimeError(failed)
        return not failed

    guess = int((limit - fixed) / slope)
    return {
        "largest_batch": largest_batch(fits, guess), "predicted": guess, "bytes_an_image": slope, "fixed_bytes": fixed,
        "limit_bytes": limit,
    }  # fmt: skip


def memory_stage(works: Sequence[Workload]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    def run(context: Context) -> Iterator[tuple[str, Case]]:
        if context.tiny:
            context.leave_out("the largest batch that fits into 24 GB: no GPU")
            return
        total = torch.cuda.get_device_properties(context.device).total_memory
        free = torch.cuda.mem_get_info(context.device)[0]
        limit = min(int(GIGABYTES * 2**30), free)
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # of no batch used again
        torch.cuda.set_per_process_memory_fraction(limit / total, context.device)
        try:
            for work in works:
                for model in MODELS:
                    key = f"{model} {work.variant}@{work.resolution}"
                    if model != OURS and model not in compared_peers():
                        context.leave_out(f"{key}: not installed")
                    elif key not in context.cases("largest batch") and context.has_time(
                        SECONDS, f"largest batch, {key}"
                    ):
                        yield key, attempt(lambda m=model, w=work: measured(m, w, limit, context.device))  # type: ignore[misc]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, context.device)
            torch.backends.cudnn.benchmark = benchmark

    return run


def show_memory(cases: dict[str, Case]) -> str:
    return "\n".join(
        f"{key:<32} batch {found['largest_batch']:5d} in {found['limit_bytes'] / 2**30:.1f} GB, eager, AMP bf16 "
        f"({found['bytes_an_image'] / 2**20:.0f} MB an image, {found['fixed_bytes'] / 2**20:.0f} MB besides)"
        for key, found in cases.items()
    )


MEMORY = Stage("largest batch", memory_stage(WORKS), show_memory)
