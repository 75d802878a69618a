"""Where a training step's device time goes, by kernel: the most expensive ones, their bytes, and our kernels' share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.cases import kernel_names
from bench.contenders import Workload
from bench.measure import synchronise
from bench.shapes import model_blocks, model_shapes
from bench.stages import Case
from bench.traffic import DTYPE, operation
from kernels.block import traffic as mbconv_traffic

MOST = 10


class Spent(NamedTuple):
    seconds: float
    launches: int


def device_times(run: Callable[[], object], device: torch.device) -> dict[str, Spent]:
    """Seconds and launches of each kernel of one run, by name; on a CPU of each of PyTorch's operations."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        synchronise(device)
    found = {}
    for event in profiler.key_averages():
        if event.is_user_annotation:
            continue  # a range, such as the optimizer's, whose kernels are there by themselves
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[event.key] = Spent(microseconds * 1e-6, event.count)
    return found


def kernel_bytes(work: Workload) -> Counter[str]:
    """Bytes from memory of each of our kernels in a step on fused blocks, stem and head included."""
    found: Counter[str] = Counter()
    blocks = model_blocks(work.variant, work.resolution, work.batch)
    for steps in mbconv_traffic.model(blocks, DTYPE, from_memory=True):
        for launches in steps.values():
            found.update(launches)
    inside = {block.channels for block in blocks if block.expands}
    for shape in model_shapes(work.variant, work.resolution, work.batch):
        if shape.op == "bn_silu" and shape.channels not in inside:
            found.update(operation(shape))
    return found


def top_kernels(times: dict[str, Spent], work: Workload, bandwidth: float) -> Case:
    """Our kernels' share of all time, and the most expensive kernels: seconds, launches, share, and of ours bytes."""
    total = sum(spent.seconds for spent in times.values())
    ours, moved = kernel_names(), kernel_bytes(work)
    top = []
    for name, spent in sorted(times.items(), key=lambda item: -item[1].seconds)[:MOST]:
        one: Case = {"name": name, "seconds": spent.seconds, "launches": spent.launches, "share": spent.seconds / total}
        if name in moved and spent.seconds:
            one |= {"bytes": moved[name], "of_copy_bandwidth": moved[name] / spent.seconds / bandwidth}
        top.append(one)
    own = sum(spent.seconds for name, spent in times.items() if name in ours)
    return {"seconds": total, "own_share": own / total if total else 0.0, "top": top}


def show_top(found: Case) -> list[str]:
    lines = [
        f"our eager step: {1e3 * found['seconds']:.2f} ms of kernels, {found['own_share']:.0%} in ours; the longest:"
    ]
    for one in found["top"]:
        rate = f"{one['bytes'] / 1e6:9.0f} MB {one['of_copy_bandwidth']:5.0%} of copy" if "bytes" in one else ""
        lines.append(
            f"  {one['name'][:60]:<60}{1e3 * one['seconds']:9.3f} ms {one['share']:5.1%} in {one['launches']:4}{rate}"
        )
    return lines
