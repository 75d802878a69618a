"""The backward of an expansion whose weight is small, in one kernel: dx and dW1 from one read of dA1 and E.

    dE = bn_scale dA1 silu'(z(E)) - grad_offset - grad_slope (E - mean)        "bn_silu_grad" of `pointwise_operand`
    dx = dE W1 (+ dy where the block has a residual)               dW1 = dEᵀ x

`kernels.block.pointwise_gemm` and `kernels.block.pointwise_wgrad` each make dE, and read dA1 and E for it. Here a
program walks a run of row tiles, makes dE of all expanded channels, 64 at a time, and uses it for both products; dW1
stays in registers and leaves as one fp32 partial a program, which `batch_norm.sum_partials` adds up in a fixed order.
That fits where C_exp × C_in does: in the first blocks of every variant, whose images are the largest.

Bytes, in elements of the storage dtype: dA1 + E + 2 x (+ dy), against 2 dA1 + 2 E + 2 x (+ dy) apart. Activations are
made once instead of twice. Both forms are candidates of one site.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# (Triton's kernels take no annotations but constexpr; a tuple grows under one name.)
# ruff: noqa: RUF005
# (Its compiler joins tuples by + alone.)

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import aot, configs
from kernels import launch as L
from kernels.batch_norm import sum_partials, sum_traffic, tile_at
from kernels.block.pointwise_blocks import BARRIERS, in_place, needs_where
from kernels.block.pointwise_operand import VECTORS, bound, operand, operand_vectors, product, vector_width, widened
from kernels.block.strips import empty_nhwc
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl

BLOCK_W = 64
MOST_WIDE, MOST_NARROW = 192, 32  # 24 registers a thread of four warps for the sums of dW1


@L.jit
def _expand_backward_kernel(
    da_ptr,  # [M, W]
    e_ptr,
    norm_ptr,  # [6, W]
    w_ptr,  # [W, N]
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N], or None
    dx_ptr,
    partial_ptr,  # [P, W, N]
    row_count,
    rows_per_program,
    wide_vec,
    narrow_vec,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wide = wide_vec * VEC
    narrow = narrow_vec * VEC
    start = tl.program_id(0) * rows_per_program
    end = tl.minimum(start + rows_per_program, row_count)
    cols = tl.arange(0, BLOCK_N)[None, :]
    weights = ()
    sums = ()
    for i in tl.static_range(BLOCKS):
        channels = i * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        mask = (channels < wide) & (cols < narrow)
        weights = weights + (tl.load(w_ptr + channels * narrow + cols, mask=mask, other=0.0),)
        sums = sums + (tl.zeros([BLOCK_W, BLOCK_N], tl.float32),)
    for row in tl.range(bound(start), bound(end), BLOCK_M, num_stages=STAGES):
        offsets, mask = tile_at(row, end, 0, narrow, BLOCK_M, BLOCK_N)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        added = ()
        for i in tl.static_range(BLOCKS):
            vectors = operand_vectors(norm_ptr, i * BLOCK_W, wide, "bn_silu_grad", BLOCK_W)
            de = operand(
                da_ptr, e_ptr, None, None, vectors, row, end, row_count, 1, i * BLOCK_W, wide,
                "bn_silu_grad", 0, BLOCK_M, BLOCK_W,
            )  # fmt: skip
            dx = product(de, weights[i], dx, WIDEN)
            added = added + (product(tl.trans(de), x, sums[i], WIDEN),)
        sums = added
        if residual_ptr is not None:
            dx += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(BLOCKS):
        channels = i * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        mask = (channels < wide) & (cols < narrow)
        at = tl.program_id(0).to(tl.int64) * wide * narrow + channels * narrow + cols
        tl.store(partial_ptr + at, sums[i], mask=mask)


@dataclass(frozen=True)
class Form:
    """Row tiles of `m` in `programs` programs for each multiprocessor; `together` False: the two products apart, with
    configurations of their own."""

    m: int = 64
    num_warps: int = 4
    stages: int = 2
    programs: int = 2
    maxnreg: int | None = None
    together: bool = True

    def constexprs(self) -> dict[str, int]:
        return {"STAGES": self.stages, "BLOCK_M": self.m, "BLOCK_W": BLOCK_W}

    def bounds(self) -> dict[str, Any]:
        """A launch's bound on registers, if any."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}


APART = Form(together=False)
# Predicted by a model of the machine code, not measured: with two blocks of channels, whose operands the tensor cores
# read in place, three programs are resident.
THREE_PROGRAMS, TWO_PROGRAMS, WIDE_FORM = Form(programs=3, maxnreg=168), Form(maxnreg=255), Form()


def form_for(wide: int, capability: tuple[int, int]) -> Form | None:
    """For so many expanded channels on cards of that capability; None where they would spill."""
    if blocks_of(wide) == 2:
        return THREE_PROGRAMS if in_place(capability) else TWO_PROGRAMS
    return None if capability[0] == 12 else WIDE_FORM


def blocks_of(wide: int) -> int:
    """Blocks of expanded channels; no architecture has so few that it were one."""
    return max(L.cdiv(wide, BLOCK_W), 2)


def shared_bytes(form: Form, wide: int, narrow: int, capability: tuple[int, int]) -> int:
    """The most shared memory that a block of the launch takes, in 16 bits; derived as in
    `kernels.block.pointwise_blocks`,
    but that dA1 and E wait in registers everywhere but on sm_100."""
    blocks, n = blocks_of(wide), block_n(narrow)
    step = blocks * 4 * VECTORS["bn_silu_grad"] * BLOCK_W + 2 * 2 * form.m * n
    step += blocks * 2 * 2 * form.m * BLOCK_W * (capability[0] == 10)
    through = 2 * form.m * BLOCK_W + 2 * blocks * BLOCK_W * n
    return max(step * max(form.stages - 1 + in_place(capability), 1) + through + BARRIERS, 4 * BLOCK_W * n)


def block_n(narrow: int) -> int:
    return max(L.power_of_two(narrow), 16)


@configs.candidates_of("expand_backward")
def _candidates(site: Site, gpu: Gpu) -> tuple[Form, ...]:
    sizes: tuple[Any, ...] = site.sizes
    *_map, wide, narrow, _residual, dtype = sizes
    if dtype != "bfloat16" or vector_width(wide, narrow) == 1 or wide > MOST_WIDE or narrow > MOST_NARROW:
        return (APART,)
    form = form_for(wide, gpu.capability)
    return (APART,) if form is None else (form, APART)


@dataclass(frozen=True)
class Plan:
    """How the rows are shared out: `step` of them to each of `parts` programs. `site` is None where there is nothing
    to choose."""

    site: Site | None
    form: Form
    step: int
    parts: int


def plan(
    shape: tuple[int, ...], narrow: int, dtype: torch.dtype, *, residual: bool, gpu: Gpu = REFERENCE
) -> Plan:  # fmt: skip
    """For dA1 and E of `shape`."""
    images, wide, height, width = shape
    site = Site("expand_backward", (images, height, width, wide, narrow, residual, L.dtype_name(dtype)))
    form: Form = configs.choose(site, gpu)
    rows = images * height * width
    tiles = L.cdiv(rows, form.m)
    step = form.m * L.cdiv(tiles, min(form.programs * gpu.multiprocessors, tiles))
    alone = len(configs.candidates(site, gpu)) == 1
    return Plan(None if alone else site, form, step, L.cdiv(rows, step))


def together(
    da: Tensor, e: Tensor, weight: Tensor, norm: Tensor, x: Tensor, residual_gradient: Tensor | None, p: Plan
) -> tuple[Tensor, Tensor]:
    """dx [B, C_in, H, W] and dW1 [C_exp, C_in] fp32, with arguments as in `pointwise.expansion_backward`."""
    wide, narrow = da.shape[1], x.shape[1]
    vec = vector_width(wide, narrow)
    dx = empty_nhwc(x, narrow, *x.shape[2:])
    partial = L.empty((1, p.parts, wide * narrow), like=da)
    L.launch(
        _expand_backward_kernel, (p.parts,), L.nhwc(da), L.nhwc(e), norm, weight.to(da.dtype).contiguous(), L.nhwc(x),
        None if residual_gradient is None else L.nhwc(residual_gradient), dx, partial, da.numel() // wide, p.step,
        wide // vec, narrow // vec, like=da, num_warps=p.form.num_warps, site=p.site, WIDEN=widened(da.dtype), VEC=vec,
        BLOCKS=blocks_of(wide), BLOCK_N=block_n(narrow), **p.form.bounds(), **p.form.constexprs(),
    )  # fmt: skip
    dw = partial[0] if p.parts == 1 else sum_partials(partial, p.site)
    return dx, dw.view(wide, narrow)


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    images = ("da_ptr", "e_ptr", "w_ptr", "x_ptr", "residual_ptr", "dx_ptr")
    sizes = [(wide, narrow) for wide in (192, 128) for narrow in (32, 16)]
    for (wide, narrow), form in itertools.product(sizes, (WIDE_FORM, THREE_PROGRAMS, TWO_PROGRAMS)):
        where = {c for c in aot.CAPABILITIES if form_for(wide, c) == form}
        for without in ({}, {"residual_ptr": None}) if where else ():
            blocks = {"BLOCKS": blocks_of(wide), "BLOCK_N": block_n(narrow)}
            constexprs = {**without, "WIDEN": False, "VEC": 8, **blocks, **form.constexprs()}
            yield aot.spec(
                _expand_backward_kernel, "elementwise", "bf16", constexprs, images=images, num_warps=form.num_warps,
                maxnreg=form.maxnreg, shared_bytes=partial(needs_where, where, shared_bytes, form, wide, narrow),
            )  # fmt: skip


def together_traffic(
    shape: tuple[int, int, int, int],
    narrow: int,
    dtype: torch.dtype,
    p: Plan,
    *,
    residual: bool,
    from_memory: bool = False,
) -> dict[str, int]:
    """Bytes that each kernel of `together` moves; `from_memory` counts vectors and the weight once a launch."""
    images, wide, height, width = shape
    rows = images * height * width
    moved = rows * dtype.itemsize * (2 * wide + (2 + residual) * narrow) + 4 * p.parts * wide * narrow
    walks = 1 if from_memory else p.parts
    tiles = 1 if from_memory else sum(L.cdiv(min(p.step, rows - i * p.step), p.form.m) for i in range(p.parts))
    moved += walks * wide * narrow * dtype.itemsize + tiles * 4 * VECTORS["bn_silu_grad"] * wide
    found = {"_expand_backward_kernel": moved}
    return found if p.parts == 1 else found | {"_sum_partials_kernel": sum_traffic(1, p.parts, wide * narrow)}
