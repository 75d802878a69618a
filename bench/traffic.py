"""`python -m bench.traffic --variant b0 --resolution 224`: bytes of a training step, by kernel, block and image.

One byte-pass is the image's activations (timm's `macts`) times two bytes. Eager PyTorch is counted where operations are
dispatched; what the kernels move is what their files state, which tests hold to bytes counted under the interpreter.
"at the kernels" counts every access; "from memory" counts an element once where programs of one launch share it and a
cache serves all but the first. Nothing is executed and no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # so that the Triton path can be walked on a machine without a GPU

import torch

from bench.contenders import OURS, TORCHVISION, available_peers, build
from bench.count_dispatch import step_bytes
from bench.shapes import OpShape, activations, model_blocks, model_shapes
from fastnet.scaling import SCALED
from kernels.block import traffic as mbconv_traffic
from kernels.ops import bn_silu as batch_norm_silu
from kernels.ops import bn_silu_squeeze_excite as batch_norm_silu_squeeze_excite
from kernels.ops import drop_connect

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Work:
    variant: str
    resolution: int
    batch: int

    @property
    def byte_pass(self) -> int:
        """Bytes of one pass over the batch."""
        return 2 * self.batch * activations(self.variant, self.resolution)


def eager(work: Work, name: str = OURS) -> int:
    """Bytes of a step of eager PyTorch: our model without kernels, or a peer's."""
    options = {"kernels": "torch"} if name == OURS else {}
    return _dispatched(work, name, **options)


def _dispatched(work: Work, name: str, **options: str) -> int:
    return step_bytes(lambda: build(name, work.variant, **options), work.batch, work.resolution).total()


def operation(shape: OpShape) -> Counter[str]:
    """Bytes by launch of one call of a fused operation, forward and backward."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    if shape.op == "bn_silu":
        return Counter(batch_norm_silu.traffic(size, DTYPE))
    if shape.op == "bn_silu_squeeze_excite":
        return Counter(batch_norm_silu_squeeze_excite.traffic(size, DTYPE, shape.squeezed))
    return Counter(drop_connect.bn_traffic(size, DTYPE, with_residual=shape.residual))


def operations(work: Work) -> int:
    """Bytes of a step on the fused operations between PyTorch's convolutions (--kernels triton-ops)."""
    shapes = model_shapes(work.variant, work.resolution, work.batch)
    ours = sum(calls * operation(shape).total() for shape, calls in shapes.items())
    return ours + _dispatched(work, OURS, kernels="triton-ops")


def block_steps(work: Work, *, from_memory: bool) -> list[dict[str, int]]:
    """Bytes of each step of the schedule of every fused block, forward and backward."""
    blocks = model_blocks(work.variant, work.resolution, work.batch)
    found = mbconv_traffic.model(blocks, DTYPE, from_memory=from_memory)
    return [{step: sum(launches.values()) for step, launches in steps.items()} for steps in found]


def ends(work: Work) -> dict[str, int]:
    """Bytes outside the blocks of the fused model: stem's and head's norms by our kernels, all else by PyTorch."""
    norms = [s for s in model_shapes(work.variant, work.resolution, work.batch) if s.op == "bn_silu"]
    channels = {block.channels for block in model_blocks(work.variant, work.resolution, work.batch) if block.expands}
    outer = [shape for shape in norms if shape.channels not in channels]
    assert len(outer) == 2, "stem and head have widths of their own"
    return {
        "stem and head, norm and SiLU": sum(operation(shape).total() for shape in outer),
        "convolutions of stem and head, pooling, classifier, loss": _dispatched(work, OURS, kernels="triton"),
    }


def fused(work: Work, *, from_memory: bool) -> dict[str, int]:
    """Bytes of a step on fused blocks (--kernels triton), by step of the schedule and part of the model."""
    total: Counter[str] = Counter()
    for steps in block_steps(work, from_memory=from_memory):
        total.update(steps)
    return {step: total[step] for step in sorted(total, key=_forward_first)} | ends(work)


def _forward_first(step: str) -> tuple[bool, str]:
    return not step.startswith("F"), step


def in_blocks(parts: dict[str, int]) -> int:
    """Of `fused`, what the blocks move."""
    return sum(count for part, count in parts.items() if part[0] in "FB" and part[1].isdigit())


def report(work: Work) -> str:
    """The tables that the command prints."""
    at_kernels, memory = fused(work, from_memory=False), fused(work, from_memory=True)
    single = operations(work)
    rows: list[tuple[str, int, int | None]] = [("eager PyTorch, this model", eager(work), None)]
    if TORCHVISION in available_peers()[0]:
        rows.append(("eager PyTorch, torchvision's", eager(work, TORCHVISION), None))
    rows += [
        ("fused operations (triton-ops)", single, None),
        ("fused blocks (triton)", sum(memory.values()), sum(at_kernels.values())),
        ("  of it in the blocks", in_blocks(memory), in_blocks(at_kernels)),
    ]
    megabyte, one = 1e6 * work.batch, work.byte_pass

    def line(name: str, memory_bytes: int, kernel_bytes: int | None) -> str:
        figures = f"{memory_bytes / megabyte:10.2f} {memory_bytes / one:8.3f}"
        return f"{name:58} {figures}" + (f" {kernel_bytes / one:15.3f}" if kernel_bytes is not None else "")

    head = f"{'':58} {'MB/image':>10} {'passes':>8} {'at the kernels':>15}"
    lines = [
        f"efficientnet_{work.variant} at {work.resolution}, batch {work.batch}, bf16, one training step; "
        f"a byte-pass is {one / megabyte:.2f} MB an image",
        "", head, *(line(*row) for row in rows),
        "", "fused blocks, by step of the schedule", head,
        *(line(name, memory[name], at_kernels[name]) for name in memory),
        "", "fused blocks, by block", head,
    ]  # fmt: skip
    steps = (block_steps(work, from_memory=cached) for cached in (True, False))
    blocks = model_blocks(work.variant, work.resolution, work.batch)
    for i, (block, *moved) in enumerate(zip(blocks, *steps, strict=True)):
        name = (
            f"{i:2} {block.in_channels}→{block.channels}→{block.out_channels} k{block.kernel_size} s{block.stride} "
            f"at {block.height}"
        )
        sums = [sum(found.values()) for found in moved]
        lines.append(line(name, *sums))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="b0", choices=SCALED)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)
    if options.resolution < 32 or options.batch < 2:
        parser.error("--resolution must be 32 or more and --batch 2 or more")
    print(report(Work(options.variant, options.resolution, options.batch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
