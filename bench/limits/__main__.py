"""What bounds each step of the fused blocks' schedule on a GPU that is not here: `python -m bench.limits`.

Every launch of a training step is recorded, compiled for the card and costed from its machine code
(`bench.limits.cost`): its bytes, the instructions that each pipe has to take, the warps that are resident, and the time
that a simulation of their issue takes. A step's bound is its longest resource; what lies between it and the simulated
time is latency that nothing hides. All of it is predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bench import traffic
from bench.launches import Vectors, describe, schedule
from bench.limits.cost import CARDS, GAP_SECONDS, Card, Cost, arguments_of, cost
from bench.shapes import model_blocks
from fastnet.scaling import SCALED
from kernels.block import pointwise
from kernels.block import traffic as mbconv_traffic
from kernels.block.traffic import Block, Bytes
from kernels.device import pretend
from kernels.launch import Launch, dry

DTYPE = torch.bfloat16
META = torch.device("meta")
# An estimate for B0@224: compiled, a step moves 18 byte-passes where it moves 25 eagerly. Nothing is fused over a batch
# norm's statistics.
COMPILED = 0.72


class Step(NamedTuple):
    """A launch of one block: step of the schedule, and its bytes from memory and altogether."""

    name: str
    launch: Launch
    moved: int
    accessed: int


def residual_expand(block: Block, prev: Block) -> Callable[[], object]:
    """F1 of a block that makes the previous one's output as it loads."""
    x = torch.empty(block.images, block.in_channels, block.height, block.width, dtype=DTYPE, device=META)
    x = x.contiguous(memory_format=torch.channels_last)
    vector, scale = x.new_empty(block.in_channels, dtype=torch.float32), x.new_empty(block.images, dtype=torch.float32)
    v, w = Vectors(*[vector] * 5), x.new_empty(block.channels, block.in_channels)
    residual = x if prev.residual else None

    def launch() -> object:
        return pointwise.residual_add_forward(x, residual, scale if prev.scaled else None, v.norm_vectors(), w)

    return launch


def recorded(block: Block, prev: Block | None, defer_residual: bool, card: Card) -> Iterator[Step]:
    """The launches of one block's step, as it stands between its neighbours in a model."""
    moved: dict[bool, dict[str, Bytes]] = {}
    with pretend(card.gpu):
        for cached in (True, False):
            forward = mbconv_traffic.forward(
                block, DTYPE, prev=prev, defer_residual=defer_residual, from_memory=cached, gpu=card.gpu
            )  # fmt: skip
            moved[cached] = forward | mbconv_traffic.backward(block, DTYPE, from_memory=cached, gpu=card.gpu)
        for name, step in schedule(block, DTYPE, META):
            if name not in moved[True]:
                continue
            ours = residual_expand(block, prev) if name == "F1 expand" and prev is not None else step.ours
            with dry() as launches:
                ours()
            by_kernel: dict[str, Launch] = {}
            for launch in launches:
                by_kernel.setdefault(launch.kernel.fn.__name__, launch)
            for kernel, once in moved[True][name].items():  # what an earlier step has made is made again, and left out
                yield Step(name, by_kernel[kernel], once, moved[False][name][kernel])


def launch_costs(variant: str, resolution: int, batch: int, card: Card) -> Iterator[tuple[Block, str, Cost]]:
    """Every launch of the blocks of a training step: its block, its step of the schedule, what it costs."""
    blocks = model_blocks(variant, resolution, batch)
    known: dict[object, Cost] = {}
    for prev, block, following in zip([None, *blocks], blocks, [*blocks[1:], None], strict=False):
        defer_residual = following is not None and following.expands
        for name, launch, moved, accessed in recorded(block, prev if block.expands else None, defer_residual, card):
            numbers = {n: v for n, v in arguments_of(launch).items() if isinstance(v, int | str | None)}
            key = launch.kernel.fn, launch.grid, *numbers.items(), moved
            if key not in known:
                known[key] = cost(launch, moved, accessed, card)
            yield block, name, known[key]


class Sum(NamedTuple):
    """Launches together: how many, seconds of their bytes, of each launch's longest resource, simulated, and which
    resource how much of the second."""

    launches: int
    memory: float
    bound: float
    simulated: float
    by: dict[str, float]


def total(costs: Sequence[Cost], card: Card) -> Sum:
    memory = bound = simulated = 0.0
    by: dict[str, float] = defaultdict(float)
    for one in costs:
        bounds = one.bounds(card)
        longest = max(bounds, key=lambda name: bounds[name])
        by[longest] += bounds[longest]
        memory, bound, simulated = memory + bounds["memory"], bound + bounds[longest], simulated + one.seconds
    return Sum(len(costs), memory, bound, simulated, by)


def report(variant: str, resolution: int, batch: int, cards: Sequence[Card]) -> Iterator[str]:
    """A table a card: every step of the schedule, then the whole beside what peers move."""
    work = traffic.Work(variant, resolution, batch)
    peer = traffic.eager(work)
    for card in cards:
        costs = [(name, found) for _, name, found in launch_costs(variant, resolution, batch, card)]
        yield (
            f"efficientnet_{variant} at {resolution}, batch {batch}, bf16, blocks on {card.gpu.name} "
            f"({card.bandwidth / 1e12:.2f} TB/s): predicted"
        )
        yield f"  {'step':<24}{'launches':>9}{'bytes':>9}{'bound':>9}{'time, ms':>10}  by; warps, IPC of the longest"
        names = list(dict.fromkeys(name for name, _ in costs))
        sums = {name: total([c for n, c in costs if n == name], card) for name in names}
        for name, found in sorted(sums.items(), key=lambda item: -item[1].simulated):
            longest = max((c for n, c in costs if n == name), key=lambda c: c.seconds)
            by = ", ".join(
                f"{n} {t / found.bound:.0%}" for n, t in sorted(found.by.items(), key=lambda item: -item[1])[:2]
            )
            yield (
                f"  {name:<24}{found.launches:>9}{1e3 * found.memory:>9.3f}{1e3 * found.bound:>9.3f}"
                f"{1e3 * found.simulated:>10.3f}  {by}; {longest.warps}, {longest.ipc:.2f}"
            )
        whole = total([c for _, c in costs], card)
        gaps = whole.launches * GAP_SECONDS
        yield (
            f"  {'together':<24}{whole.launches:>9}{1e3 * whole.memory:>9.3f}{1e3 * whole.bound:>9.3f}"
            f"{1e3 * whole.simulated:>10.3f}, with the gaps between launches {1e3 * (whole.simulated + gaps):.3f}"
        )
        yield (
            f"  the whole step of eager PyTorch moves {peer / card.bandwidth * 1e3:.2f} ms, of a compiled peer about "
            f"{COMPILED * peer / card.bandwidth * 1e3:.2f} ms of bytes\n"
        )


def by_block(variant: str, resolution: int, batch: int, card: Card) -> Iterator[str]:
    """Every launch of more than a microsecond over its bytes, that with most to gain first."""
    lines: dict[str, float] = defaultdict(float)
    for block, name, found in launch_costs(variant, resolution, batch, card):
        memory = found.bounds(card)["memory"]
        text = (
            f"{name:<24}{found.kernel.strip('_'):<32}{1e6 * memory:8.1f}{1e6 * found.seconds:8.1f} us, "
            f"{found.registers} registers, {found.warps} warps, IPC {found.ipc:.2f}  {describe(block)}"
        )
        lines[text] += found.seconds - memory
    worst = sorted(lines.items(), key=lambda item: -item[1])[:40]
    yield from (f"{1e6 * lost:8.1f} us lost  {text}" for text, lost in worst if lost > 1e-6)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [card.gpu.name for card in CARDS]
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="b0", choices=SCALED)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--cards", nargs="+", choices=names, default=names, metavar="CARD", help=", ".join(names))
    parser.add_argument("--launches", action="store_true", help="the launches that lose most against their bytes")
    options = parser.parse_args(arguments)
    cards = [card for card in CARDS if card.gpu.name in options.cards]
    shape = options.variant, options.resolution, options.batch
    lines = (line for card in cards for line in by_block(*shape, card)) if options.launches else report(*shape, cards)
    for line in lines:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
