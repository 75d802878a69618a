"""How the products of the 1×1 convolutions are cut up, and what a block of them needs of the card.

A configuration fits a card if `shared_bytes`, an upper bound, is at most what one of its blocks may have. Derived from
how Triton pipelines the loops of `kernels.block.pointwise_gemm` and held to what it compiles (`bench.compile_report`):

- A loop of S stages keeps what a step loads S - 1 times, S times where the tensor cores read it in place (HGMMA and
  later), each step being A's tile and its batch norm's input, the vectors, scales and gates of the prologue, and W's
  tile, or where K is one block the image of "gate_sums", since the loop is then over rows.
- With K in one block W's tile is beside that, for the whole launch.
- A prologue's result goes to the tensor cores through a tile of its own, and Y is transposed through one; neither is
  needed while the other is, nor Y's while a loop over K runs.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from kernels import configs
from kernels import launch as L
from kernels.block.pointwise_operand import GRADIENTS, SILU, VECTORS, Prologue, span_for, vector_width
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.ops.excite import MAX_CHUNKS

Epilogue = Literal["none", "statistics", "residual", "bias", "gate_sums"]


@dataclass(frozen=True)
class Blocks:
    """A row tile of `m` by `n` output channels, summed over K in steps of `k`; `single`: one step is all of K.

    A launch has `programs` for each multiprocessor; with six, one, two or three resident ones end together. `maxnreg`
    bounds registers, so that more are resident.
    """

    m: int
    n: int
    k: int
    num_warps: int
    stages: int
    single: bool = False
    programs: int = 6
    maxnreg: int | None = None

    def constexprs(self) -> dict[str, int | bool]:
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {"SINGLE": self.single, "STAGES": self.stages, **sizes}

    def bounds(self) -> dict[str, Any]:
        """A launch's bound on registers, if any."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}


def blocks_for(
    k: int, n: int, prologue: Prologue, epilogue: Epilogue, dtype: torch.dtype, direct: bool = True
) -> Blocks:
    """The default for a product [M, k] × [k, n]; `direct` is `in_place` of the card.

    Predicted by a model of the machine code (`bench.limits`), not measured. Output channels are the rows of the tensor
    cores' tile, 64 at least on sm_90, so that a statistic of a channel lives in two lanes and needs few shuffles and
    registers. What binds most launches is how many warps hide each other's waits: with 128 registers two programs of
    eight warps are resident, or four of four, which is worth more than larger tiles. A prologue with SiLU is bound by
    special functions: 32 channels a step waste few lanes on K = 96, 144, 240, 480, 672, and 128 output channels make
    it seldom twice. Without it A is narrow and read again from L2 by every block of columns: W stays in registers or
    shared memory. The sums of a gate need the registers: 32 rows, or where K is long few warps. Stages are those at
    which nothing spills on any architecture.
    """
    ragged = vector_width(k, n) == 1
    if dtype == torch.float32:
        return Blocks(32 if ragged and prologue == "residual_add" else 64, 64, 16, 8, 3 if prologue == "none" else 2)
    if ragged:
        return Blocks(32 if prologue == "residual_add" else 64, 64, 32, 4, 1)
    wide, bound = n > 64, 128 if direct else None
    if prologue in SILU:
        if wide or prologue == "bn_silu":
            return Blocks(64, 128 if wide else 64, 32, 8, 3, maxnreg=bound)
        return Blocks(64, 64, 32, 4, 4, maxnreg=bound) if prologue == "bn_silu_gate" else Blocks(64, 64, 32, 4, 3)
    block_k = whole(k)
    if epilogue == "gate_sums":
        if k > 128:
            return Blocks(64, 64, 64, 4, 3) if direct else Blocks(64, 64, 32, 8, 2)
        if k > 16:
            return Blocks(32, 64, block_k, 4, 3 if k <= 64 else 2, single=True)
        return Blocks(64, 64, block_k, 4, 2, single=True)
    if k <= 64:
        return Blocks(64, 64, block_k, 4, 3, single=True)
    if prologue == "residual_add" and not wide:  # no expansion is as narrow; larger tiles spill on sm_80
        return Blocks(64, 64, 32, 8, 2)
    if k > 128:
        return Blocks(64, 128, 64, 8, 3, maxnreg=bound) if wide else Blocks(64, 64, 64, 4, 3)
    return Blocks(64, 128, 32, 8, 3) if wide else Blocks(128, 64, block_k, 8, 2, single=True)


def whole(k: int) -> int:
    """BLOCK_K where one step is all of K."""
    return max(L.power_of_two(k), 16)


class Other(NamedTuple):
    """A configuration to try beside the default in bf16 training, where all channels come in eights, for products with
    one of these prologues and sizes in these ranges; its `k` 0 stands for all of K. `in_place`: only where the tensor
    cores read operands from shared memory; as registers they would spill. `half`: in fp16 too, whose default may not
    fit."""

    prologues: tuple[Prologue, ...]
    k: range
    n: range
    blocks: Blocks
    in_place: bool = False
    half: bool = False


ANY, WIDE, LONG = range(1, 2**31), range(65, 2**31), range(129, 2**31)
# Predicted by a model of the machine code, not measured: best first. A line here is all that another one takes.
OTHERS = (
    # Twice the rows and warps: half the barriers, and W is read half as often.
    Other(("none", "residual_add"), range(65), ANY, Blocks(128, 64, 0, 8, 3, single=True)),
    # All of K in one step: A is loaded once, with three times the shared memory of steps.
    Other(("none", "residual_add"), range(65, 129), WIDE, Blocks(64, 128, 0, 8, 3, single=True)),
    Other(("none",), LONG, WIDE, Blocks(64, 64, 64, 4, 3)),
    # Twice the channels a step halve its barriers and waits.
    Other(("bn_silu_gate",), ANY, ANY, Blocks(64, 64, 64, 4, 2)),
    Other(("bn_silu_grad",), ANY, ANY, Blocks(64, 64, 64, 4, 2), in_place=True),
    Other(("bn_grad",), LONG, ANY, Blocks(64, 64, 64, 8, 3), in_place=True),
    # One program where a bound on registers allows two.
    Other(("bn_silu_gate", "bn_silu_grad"), ANY, WIDE, Blocks(64, 128, 32, 8, 3)),
    Other(("none", "residual_add"), LONG, WIDE, Blocks(64, 128, 64, 8, 3)),
    # Twice the rows: half the barriers. (Of fewer channels no thread of half as many would have 16 bytes.)
    Other(("bn_grad",), range(17, 129), ANY, Blocks(64, 64, 0, 4, 2, single=True)),
    Other(("bn_grad",), LONG, ANY, Blocks(64, 64, 32, 8, 2)),
)


def in_place(capability: tuple[int, int]) -> bool:
    """Whether the tensor cores read operands from shared memory (HGMMA and later), rather than from registers."""
    return capability[0] in (9, 10)


def selectable(
    k: int, n: int, prologue: Prologue, epilogue: Epilogue, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[Blocks, ...]:
    """The default and the others for a product on cards of that capability, whether or not they fit."""
    found = [blocks_for(k, n, prologue, epilogue, dtype, in_place(capability))]
    inference = epilogue == "bias" or (prologue == "none" and epilogue == "none")
    if dtype != torch.float32 and vector_width(k, n) > 1 and not inference:
        for other in OTHERS:
            meant = prologue in other.prologues and k in other.k and n in other.n
            meant = meant and (other.half or dtype == torch.bfloat16)
            if meant and (in_place(capability) or not other.in_place):
                blocks = other.blocks
                found.append(replace(blocks, k=whole(k)) if blocks.k == 0 else blocks)
    return tuple(dict.fromkeys(_unspilled(blocks, prologue, capability) for blocks in found))


def _unspilled(blocks: Blocks, prologue: Prologue, capability: tuple[int, int]) -> Blocks:
    """What takes the place of blocks that spill on cards of that capability alone."""
    if in_place(capability) or capability == (8, 0):
        return blocks
    if prologue == "residual_add" and blocks == Blocks(64, 128, 64, 8, 3):
        return replace(blocks, k=32)
    # ptxas, unless a bound is stated, trades a few spilled bytes for one more resident program.
    if capability[0] == 12 and blocks in (Blocks(64, 64, 128, 4, 2, single=True), Blocks(64, 64, 32, 4, 4)):
        return replace(blocks, maxnreg=255)
    return blocks


def shared_bytes(
    blocks: Blocks, prologue: Prologue, epilogue: Epilogue, dtype: torch.dtype, span: int, capability: tuple[int, int]
) -> int:
    """The most shared memory that a block of the launch takes; `span` as the gate's in `pointwise_operand`."""
    b, size = blocks, dtype.itemsize
    direct = in_place(capability)
    a, w, y = b.m * b.k * size, b.n * b.k * size, b.m * b.n * size
    vectors = 4 * b.k * VECTORS[prologue] * (not b.single)
    step = a * (1 + (prologue in (*GRADIENTS, "residual_add"))) + vectors
    if prologue in ("bn_grad", "residual_add"):
        step += 4 * b.m
    if prologue == "bn_silu_gate":
        step += 4 * b.k * (span or b.m)
    step += y * (epilogue == "gate_sums") if b.single else w
    loop = step * max(b.stages - 1 + direct, 1) + BARRIERS
    through = a * (prologue != "none" or not direct)
    if b.single:
        return loop + w + max(through, y)
    return max(loop + through, y * 4 // size)


BARRIERS = 128


@configs.candidates_of("pointwise")
def _candidates(site: Site, gpu: Gpu) -> tuple[Blocks, ...]:
    sizes: tuple[Any, ...] = site.sizes
    _images, height, width, k, n, prologue, epilogue, name = sizes
    dtype, vec = getattr(torch, name), vector_width(k, n)

    def needs(b: Blocks) -> int:
        span = span_for(b.m, height * width, vec, dtype)
        return shared_bytes(b, prologue, epilogue, dtype, span, gpu.capability)

    return configs.fitting(selectable(k, n, prologue, epilogue, dtype, gpu.capability), needs, gpu)


@dataclass(frozen=True)
class Plan:
    """How a product is cut up: what the launch, the partials and the byte count have in common."""

    site: Site
    blocks: Blocks
    vec: int
    step: int  # rows a program walks
    parts: int  # partials of a column; with gate_sums of a column and image
    tiles: int  # row tiles altogether
    column_blocks: int


def plan(
    shape: tuple[int, ...],
    k: int,
    n: int,
    prologue: Prologue,
    epilogue: Epilogue,
    dtype: torch.dtype,
    gpu: Gpu = REFERENCE,
) -> Plan:
    images, _, height, width = shape
    site = Site("pointwise", (images, height, width, k, n, prologue, epilogue, L.dtype_name(dtype)))
    blocks: Blocks = configs.choose(site, gpu)
    columns = L.cdiv(n, blocks.n)
    aligned = epilogue == "gate_sums"
    rows, lanes = (height * width, images * columns) if aligned else (images * height * width, columns)
    tiles = L.cdiv(rows, blocks.m)
    most = min(blocks.programs * gpu.multiprocessors // lanes, MAX_CHUNKS if aligned else L.MAX_PARTIALS, tiles)
    step = blocks.m * L.cdiv(tiles, max(most, 1))
    return Plan(site, blocks, vector_width(k, n), step, L.cdiv(rows, step), tiles * (images if aligned else 1), columns)


def needs_where(where: Set[tuple[int, int]], needs: Callable[..., int], *of: Any) -> int | None:
    """`needs(*of)`, whose last argument is a capability; None where it is none of these, so that no card selects it."""
    return needs(*of) if of[-1] in where else None
