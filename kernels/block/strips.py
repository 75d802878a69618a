"""How a depthwise convolution's images are cut into strips of columns, and the weight that every strip holds.

A tile is [UNITS, BLOCK_C]: UNITS strips, side by side and running on into the next images, by BLOCK_C channels. A lane
has two elements, or one where channels cannot be loaded in pairs: each of a pair would have its own mask and address,
for which there are no registers. A program walks down all its strips together, then takes the next ones.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated, unreachable"
# (Triton's kernels take no annotations but constexpr; a tuple grows under one name.)
# ruff: noqa: RUF005
# (Its compiler joins tuples by + alone.)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import aot, configs
from kernels import launch as L
from kernels.configs import Site
from kernels.device import REFERENCE, Gpu
from kernels.launch import tl

Padding = Literal["symmetric", "same"]
NUM_WARPS = 4
CONFIGURATIONS = ((3, 1), (3, 2), (5, 1), (5, 2))  # kernel size, stride
# Predicted, not measured: 32 channels keep a row's segment at 64 bytes of a 16-bit type, the unit that HBM transfers.
BLOCK_C = 32


def units_for(vec: int) -> int:
    """UNITS for a vector width."""
    return (2 if vec > 1 else 1) * 32 * NUM_WARPS // BLOCK_C


@L.helper
def load_weights(w_ptrs, COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    """COUNT elements of a channel block's weight, one after the other."""
    weights = ()
    for i in tl.static_range(COUNT):
        weights = weights + (tl.load(w_ptrs + i * BLOCK_C),)
    return weights


class Geometry(NamedTuple):
    """Where the weight lies: output (o, p) reads rows from o * stride - pad_top, columns from p * stride - pad_left."""

    kernel_size: int
    stride: int
    pad_top: int
    pad_left: int
    height: int
    width: int
    out_height: int
    out_width: int

    @property
    def lines(self) -> int:
        """Output rows that one input row reaches."""
        return (self.kernel_size - 1) // self.stride + 1


def geometry(height: int, width: int, kernel_size: int, stride: int, padding: Padding = "symmetric") -> Geometry:
    """ "symmetric" pads k // 2 on every side; "same" is TF's, which puts an odd pixel right and below."""
    out = L.cdiv(height, stride), L.cdiv(width, stride)
    if padding == "symmetric":
        pads = (kernel_size // 2, kernel_size // 2)
    else:
        extra = (max((o - 1) * stride + kernel_size - n, 0) for o, n in zip(out, (height, width), strict=True))
        pads = tuple(n // 2 for n in extra)
    return Geometry(kernel_size, stride, *pads, height, width, *out)


@dataclass(frozen=True)
class Strips:
    """Strips of `columns` outputs (of inputs' strides in backward), in about `programs` programs for each
    multiprocessor. `maxnreg` is stated, because ptxas otherwise trades a few spilled bytes for one more resident
    program. `separate`, in backward: what surrounds the convolution has a pass of its own."""

    columns: int
    programs: int
    maxnreg: int = 255
    separate: bool = False


Candidates = Mapping[tuple[int, int], tuple[Strips, ...]]  # by kernel size and stride, predicted best first


def several(surrounded: bool, vec: int, dtype: torch.dtype) -> bool:
    """Whether a launch has more than one to choose from: in bf16 training, where all channels come in
    eights."""
    return surrounded and vec > 1 and dtype == torch.bfloat16


def strip_candidates(site: Site, found: Candidates) -> tuple[Strips, ...]:
    """All fit every card: their shared memory, for merging statistics, is a few KiB. Where there is no choice the last,
    which spills in no type."""
    sizes: tuple[Any, ...] = site.sizes
    _images, channels, *_, k, stride, _norm, surrounded, dtype = sizes
    many = several(surrounded, L.vector_width(channels), getattr(torch, dtype))
    return found[k, stride] if many else found[k, stride][-1:]


def strips_site(
    kernel: str, shape: tuple[int, ...], g: Geometry, dtype: torch.dtype, norm: bool, surrounded: bool
) -> Site:
    """The site of a depthwise launch for x of `shape`; `surrounded`: with statistics, or with the norm behind it."""
    return Site(kernel, (*shape, g.kernel_size, g.stride, norm, surrounded, L.dtype_name(dtype)))


@dataclass(frozen=True)
class Plan:
    """How strips are dealt to programs: `groups` tiles, each `tile_units` of all `units` strips in one of `bands`,
    walked by `partials` programs for each of `blocks` blocks of channels."""

    site: Site
    config: Strips
    strips: int
    bands: int
    band_rows: int
    units: int
    tile_units: int
    groups: int
    blocks: int
    partials: int

    def constexprs(self, vec: int) -> dict[str, int]:
        return {"COLUMNS": self.config.columns, "UNITS": self.tile_units, "BLOCK_C": BLOCK_C, "VEC": vec}


def make_plan(
    site: Site, config: Strips, shape: tuple[int, ...], rows: int, columns: int, lines: int, programs: int
) -> Plan:
    """Deal `columns` columns of each image of x's `shape` out in strips, to about `programs` programs of equal work.

    Rows are cut into bands, which read `lines` - 1 rows of their neighbour's, only where there would be fewer programs
    otherwise, and then have at least eight times as many rows as they read twice.
    """
    images, channels = shape[:2]
    blocks = L.cdiv(channels, BLOCK_C)
    strips = L.cdiv(columns, config.columns)
    units = units_for(L.vector_width(channels))
    sides = L.cdiv(images * strips, units)
    bands = max(min(programs // (sides * blocks), rows // (8 * max(lines - 1, 1))), 1)
    band_rows = L.cdiv(rows, bands)
    bands = L.cdiv(rows, band_rows)
    groups = sides * bands
    walk = L.cdiv(groups, max(programs // blocks, 1))
    partials = L.cdiv(groups, walk)
    return Plan(site, config, strips, bands, band_rows, images * strips, units, groups, blocks, partials)


# Predicted by a model of the machine code, not measured, by kernel size and stride. First strips so narrow that three
# or four programs are resident and hide what one waits for. The last are wider: they load and activate an element less
# often, where that counts for more.
FORWARD = {
    (3, 1): (Strips(4, 12, 128), Strips(6, 12, 168), Strips(8, 8)),
    (3, 2): (Strips(3, 12, 128), Strips(3, 12, 168), Strips(4, 8)),
    (5, 1): (Strips(4, 12, 168), Strips(2, 12, 168), Strips(4, 8)),
    (5, 2): (Strips(2, 12, 168), Strips(3, 8)),
}  # fmt: skip


@configs.candidates_of("depthwise")
def _forward_candidates(site: Site, gpu: Gpu) -> tuple[Strips, ...]:
    return strip_candidates(site, FORWARD)


def forward_plan(
    shape: tuple[int, ...], dtype: torch.dtype, g: Geometry, *, norm: bool, stats: bool, gpu: Gpu = REFERENCE
) -> tuple[Plan, int]:
    """The plan for x of `shape`, and the input rows (times the stride) that a program walks down a band."""
    site = strips_site("depthwise", shape, g, dtype, norm, stats)
    config: Strips = configs.choose(site, gpu)
    programs = config.programs * gpu.multiprocessors
    plan = make_plan(site, config, shape, g.out_height, g.out_width, g.lines, programs)
    if plan.bands > 1:
        return plan, plan.band_rows + g.lines - 1
    return plan, (g.height - 1 + g.pad_top) // g.stride - g.pad_top // g.stride + 1


# Predicted by a model of the machine code, not measured, by kernel size and stride. At k 3 first strips so narrow that
# three programs are resident and hide what one waits for, in two rounds, as each writes k² + 2 sums a channel. At k 5
# first dy made once, which neighbouring strips otherwise make again. The others move fewer bytes, or load and activate
# an element less often; the last spills in no type.
BACKWARD = {
    (3, 1): (Strips(3, 6, 168), Strips(2, 8, 128), Strips(4, 4)),
    (3, 2): (Strips(2, 6, 168), Strips(3, 4)),
    (5, 1): (Strips(4, 4, separate=True), Strips(2, 4)),
    (5, 2): (Strips(2, 6, 168, separate=True), Strips(2, 4)),
}  # fmt: skip


@configs.candidates_of("depthwise_backward")
def _backward_candidates(site: Site, gpu: Gpu) -> tuple[Strips, ...]:
    return strip_candidates(site, BACKWARD)


def backward_plan(
    shape: tuple[int, ...], dtype: torch.dtype, g: Geometry, *, norm: bool, out_norm: bool, gpu: Gpu = REFERENCE
) -> tuple[Plan, int]:
    """The plan for x of `shape`, and the rows of dy that a program loads before its band's first row of x."""
    site = strips_site("depthwise_backward", shape, g, dtype, norm, out_norm)
    config: Strips = configs.choose(site, gpu)
    rows, columns = (
        (size - 1 + pad) // g.stride - pad // g.stride + 1
        for size, pad in ((g.height, g.pad_top), (g.width, g.pad_left))
    )
    plan = make_plan(site, config, shape, rows, columns, g.lines, config.programs * gpu.multiprocessors)
    return plan, g.lines - 1 if plan.bands > 1 else g.pad_top // g.stride


def pack_weight(weight: Tensor) -> Tensor:
    """[C, 1, k, k] as [blocks, k * k, BLOCK_C], zero past the last channel."""
    channels = weight.shape[0]
    packed = weight.detach().reshape(channels, -1)
    missing = -channels % BLOCK_C
    if missing:
        packed = F.pad(packed, (0, 0, 0, missing))
    return packed.view(-1, BLOCK_C, packed.shape[1]).transpose(1, 2).contiguous()


def empty_nhwc(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels_last tensor of as many images as `like`."""
    return L.empty((like.shape[0], height, width, channels), like=like, dtype=like.dtype).permute(0, 3, 1, 2)


def strip_specs(
    fn: Any,
    images: Iterable[str],
    modes: Iterable[dict[str, Any]],
    candidates: Candidates,
    surroundings: str,
    alone: Mapping[str, Any] | None = None,
) -> Iterator[aot.KernelSpec]:
    """Every storage dtype × mode × kernel size and stride × vector width × candidate of a kernel that walks strips, the
    one that holds most registers first, as it stands for all where only one is built. `surroundings` is the mode's
    entry that says whether there is more than the convolution, `alone` what takes its place in a mode where that has a
    pass of its own."""
    images, modes = tuple(images), tuple(modes)
    for dtype, name in L.STORAGE_DTYPES.items():
        for mode in modes:
            for k, stride in ((5, 1), *(c for c in CONFIGURATIONS if c != (5, 1))):
                built = {(c.columns, c.maxnreg, c.separate): c for c in reversed(candidates[k, stride])}
                for config, vec in ((c, v) for c in built.values() for v in (8, 1)):
                    if config != candidates[k, stride][-1] and not several(mode[surroundings], vec, dtype):
                        continue
                    shape = {"K": k, "STRIDE": stride, "COLUMNS": config.columns, "UNITS": units_for(vec)}
                    surrounded = mode if alone is None or not config.separate else {**mode, **alone}
                    constexprs = {**surrounded, **shape, "BLOCK_C": BLOCK_C, "VEC": vec}
                    yield aot.spec(
                        fn, "strips", name, constexprs, images=images, num_warps=NUM_WARPS, maxnreg=config.maxnreg
                    )


def inside(first: int, end: int, size: int) -> int:
    """How many of first..end - 1 lie in 0..size - 1."""
    return max(min(end, size) - max(first, 0), 0)


def weight_bytes(area: int, units: int, again: bool) -> int:
    """Bytes of a program's weight, of `area` elements a channel: each strip of a tile loads its own copy, all but one
    from the first-level cache."""
    return 4 * area * BLOCK_C * (units if again else 1)
