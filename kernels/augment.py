"""From ragged 8-bit photos to a training batch in one pass: crop, resize, flip, colours, erasing, normalise, cast.

Source image b is [H_b, W_b, 3] 8-bit pixels at `offsets[b]` of one buffer. Its window (x, y, w, h), in source pixels
and possibly fractional, becomes S = R + 2 margin pixels a side, of which `margin` on each are not made. Output column
i, or R - 1 - i where the image is flipped, looks at

    c_i = x + (i + margin + 1/2) w / S,     s = max(w / S, 1)
    p_i = Σ_j t_ij pixel_j / Σ_j t_ij,      t_ij = max(0, 1 - |j + 1/2 - c_i| / s),    floor(x) <= j < ceil(x + w)

and rows likewise: the antialiased bilinear filter of PIL, torchvision and `F.interpolate` on the cropped window (the
same taps for a whole-numbered window), with the weights found as they are needed. Unlike theirs the result is not
rounded to 8 bits on the way. Then

    out = clamp(A p + a, low, high)         outside the erased rectangle,      fill inside it

where A, a join the colours' affine map and the normalisation, and low and high are normalised black and white.

A program makes ROWS x COLUMNS output pixels of one image. It walks the source rows that they look at; each is
resampled across once and added to the output rows that it belongs to. Bytes: what the window holds (3 w h) once from
memory, and the batch written once (3 R² elements); a torchvision chain on tensors (crop, resize, flip, convert,
colours, normalise) writes and reads the R² image five times more. A thread keeps a pixel's three channels, so stores
are three elements apart; the lines that they share meet in the L2 cache. Inside a program each source row is read
once a tap, some 2 max(w / S, 1) of them, which the L1 cache serves.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take no annotations but constexpr.)

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import aot, augment_reference
from kernels import launch as L
from kernels.launch import tl

# Predicted, not measured: a warp makes 32 columns, which loses 11 % of the lanes at 200 pixels and none at 224; 8 rows
# share what was resampled across, so that shrinking to a half costs 2.5 source rows an output row instead of 4. Wider
# programs need more registers at the stores and spill in 8 bits on sm_100 (Triton 3.6).
ROWS, COLUMNS, NUM_WARPS = 8, 32, 1
TAPS = 4  # loads of this many source pixels are under way before the first is used

# A row of the table: window 4, flip 1, affine 12, low 3, high 3, erased rectangle 4, fill 3, unused 2.
TABLE_WIDTH = 32
MAX_SIDE = 2**14
OUTPUTS = {**L.STORAGE_DTYPES, torch.uint8: "u8"}


@L.helper
def _triangle(pixel, centre, support):
    return tl.maximum(1.0 - tl.abs(pixel + 0.5 - centre) / support, 0.0)


@L.jit
def _augment_kernel(
    pixels_ptr,  # uint8
    offset_ptr,  # int64 [B]
    size_ptr,  # int32 [B, 2]: width, height
    table_ptr,  # [B, TABLE_WIDTH]
    out_ptr,  # [B, side, side, 3]
    side,
    margin,
    ROUND: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across, down = tl.cdiv(side, COLUMNS), tl.cdiv(side, ROWS)
    program = tl.program_id(0)
    image = (program // (across * down)).to(tl.int64)
    row0 = program // across % down * ROWS
    col = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = row0 + tl.arange(0, ROWS)[:, None]

    table = table_ptr + image * 32
    width, height = tl.load(size_ptr + 2 * image), tl.load(size_ptr + 2 * image + 1)
    x, y = tl.load(table), tl.load(table + 1)
    w, h = tl.load(table + 2), tl.load(table + 3)
    flip = tl.load(table + 4)
    resized = (side + 2 * margin).to(tl.float32)

    # Across: positions are counted from the window's first pixel, so that large images lose no accuracy.
    left = tl.floor(x).to(tl.int32)
    columns = tl.minimum(tl.ceil(x + w).to(tl.int32), width) - left
    step_x = w / resized
    support_x = tl.maximum(step_x, 1.0)
    inner = tl.minimum(col, side - 1)  # beyond the border no weights would add up to zero
    seen = tl.where(flip != 0, side - 1 - inner, inner)
    centre_x = (x - left.to(tl.float32)) + (seen.to(tl.float32) + (margin + 0.5)) * step_x
    first = tl.maximum(tl.floor(centre_x - support_x + 0.5).to(tl.int32), 0)
    taps = tl.ceil(2 * support_x).to(tl.int32) + 1
    total = tl.zeros([1, COLUMNS], tl.float32)
    tap = 0
    while tap < taps:
        at = first + tap
        total += tl.where(at < columns, _triangle(at.to(tl.float32), centre_x, support_x), 0.0)
        tap += 1
    inverse_x = 1.0 / total

    # Down: the source rows that any of the ROWS looks at.
    top = tl.floor(y).to(tl.int32)
    rows = tl.minimum(tl.ceil(y + h).to(tl.int32), height) - top
    step_y = h / resized
    support_y = tl.maximum(step_y, 1.0)
    above = y - top.to(tl.float32)
    centre_y = above + (tl.minimum(row, side - 1).to(tl.float32) + (margin + 0.5)) * step_y
    low_row = above + (row0.to(tl.float32) + (margin + 0.5)) * step_y
    at_row = tl.maximum(tl.floor(low_row - support_y + 0.5).to(tl.int32), 0)
    end_row = tl.minimum(tl.ceil(low_row + (ROWS - 1) * step_y + support_y).to(tl.int32), rows)

    red = tl.zeros([ROWS, COLUMNS], tl.float32)
    green = tl.zeros([ROWS, COLUMNS], tl.float32)
    blue = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_y = tl.zeros([ROWS, 1], tl.float32)
    source = pixels_ptr + tl.load(offset_ptr + image)
    while at_row < end_row:
        line = source + ((top + at_row).to(tl.int64) * width + left) * 3
        r = tl.zeros([1, COLUMNS], tl.float32)
        g = tl.zeros([1, COLUMNS], tl.float32)
        b = tl.zeros([1, COLUMNS], tl.float32)
        tap = 0
        while tap < taps:
            for ahead in tl.static_range(TAPS):
                at = first + (tap + ahead)
                weight = _triangle(at.to(tl.float32), centre_x, support_x)
                mask = (at < columns) & (weight > 0.0)
                r += weight * tl.load(line + at * 3, mask=mask, other=0).to(tl.float32)
                g += weight * tl.load(line + at * 3 + 1, mask=mask, other=0).to(tl.float32)
                b += weight * tl.load(line + at * 3 + 2, mask=mask, other=0).to(tl.float32)
            tap += TAPS
        weight_y = _triangle(at_row.to(tl.float32), centre_y, support_y)
        total_y += weight_y
        red += weight_y * (r * inverse_x)
        green += weight_y * (g * inverse_x)
        blue += weight_y * (b * inverse_x)
        at_row += 1
    inverse_y = 1.0 / total_y
    red, green, blue = red * inverse_y, green * inverse_y, blue * inverse_y

    erased_x, erased_y = tl.load(table + 23), tl.load(table + 24)
    along_x, along_y = col.to(tl.float32) - erased_x, row.to(tl.float32) - erased_y
    inside_x = tl.where(along_x >= 0.0, along_x < tl.load(table + 25), False)
    inside_y = tl.where(along_y >= 0.0, along_y < tl.load(table + 26), False)
    inside = inside_x & inside_y
    place = ((image * side + row) * side + col) * 3
    mask = (row < side) & (col < side)
    for c in tl.static_range(3):
        affine = table + 5 + 4 * c
        value = tl.load(affine) * red + tl.load(affine + 1) * green + tl.load(affine + 2) * blue + tl.load(affine + 3)
        value = tl.minimum(tl.maximum(value, tl.load(table + 17 + c)), tl.load(table + 20 + c))
        value = tl.where(inside, tl.load(table + 27 + c), value)
        if ROUND:
            value = tl.floor(value + 0.5)
        tl.store(out_ptr + (place + c), value.to(out_ptr.dtype.element_ty), mask=mask)


def augment_table(
    windows: Tensor,
    flips: Tensor,
    *,
    colors: Tensor | None = None,
    erased: Tensor | None = None,
    fills: Tensor | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1 / 255, 1 / 255, 1 / 255),
) -> Tensor:
    """fp32 [B, TABLE_WIDTH] for `augment`, on the device of `windows`: made on the host, it is one small copy.

    windows [B, 4]: x, y, width, height in source pixels, inside the image. flips [B]: mirrored left to right.
    colors [B, 3, 4]: affine map of 8-bit RGB, its result clamped to 0 .. 255. erased [B, 4] and fills [B, 3]: a
    rectangle x, y, width, height in output pixels (none where a side is 0), and the normalised values that it holds.
    mean, std: of pixels between 0 and 1; the defaults leave 8-bit values as they are.
    """
    count = len(windows)
    device = windows.device
    deviation = torch.tensor(std, dtype=torch.float64, device=device)
    low = -torch.tensor(mean, dtype=torch.float64, device=device) / deviation
    affine = torch.eye(3, 4, device=device).expand(count, 3, 4) if colors is None else colors
    affine = affine.double() / (255 * deviation)[:, None]
    affine[:, :, 3] += low
    table = torch.zeros(count, TABLE_WIDTH, device=device)
    table[:, :4] = windows
    table[:, 4] = flips
    table[:, 5:17] = affine.flatten(1)
    table[:, 17:20] = low
    table[:, 20:23] = low + 1 / deviation
    if erased is not None and fills is not None:
        table[:, 23:27] = erased
        table[:, 27:30] = fills
    return table


def augment(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    table: Tensor,
    *,
    resolution: int,
    margin: int = 0,
    dtype: torch.dtype = torch.float32,
    impl: L.Impl = "auto",
) -> Tensor:
    """[B, 3, resolution, resolution] channels_last of `dtype`: fp32, fp16, bf16, or uint8, rounded.

    pixels: uint8 [total], images as [height, width, 3] one after another. offsets int64 [B]: where each begins; sizes
    int32 [B, 2]: width and height. table: `augment_table`. margin: output pixels on each side that the window is
    resized along with and that are cut off. Offsets must be those of whole images inside `pixels`: on a GPU they are
    not looked at before the kernel runs.

    Raises ValueError or TypeError for a wrong shape, dtype or device, RuntimeError where `impl="triton"` cannot run.
    """
    _check(pixels, offsets, sizes, table, resolution, margin, dtype)
    # The table is fp32, so that "auto" is decided by the device alone.
    if L.resolve(impl, table) == "torch":
        return augment_reference.augment(
            pixels, offsets, sizes, table, resolution=resolution, margin=margin, dtype=dtype
        )
    images = L.empty((len(offsets), resolution, resolution, 3), like=pixels, dtype=dtype)
    grid = (len(offsets) * L.cdiv(resolution, ROWS) * L.cdiv(resolution, COLUMNS),)
    L.launch(
        _augment_kernel, grid, pixels, offsets, sizes, table, images, resolution, margin,
        like=pixels, num_warps=NUM_WARPS, **_constexprs(dtype),
    )  # fmt: skip
    return images.permute(0, 3, 1, 2)


def _constexprs(dtype: torch.dtype) -> dict[str, Any]:
    return {"ROUND": dtype == torch.uint8, "TAPS": TAPS, "ROWS": ROWS, "COLUMNS": COLUMNS}


def _check(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, table: Tensor, resolution: int, margin: int, dtype: torch.dtype
) -> None:
    count = len(offsets)
    expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "pixels": (pixels, torch.uint8, (pixels.numel(),)),
        "offsets": (offsets, torch.int64, (count,)),
        "sizes": (sizes, torch.int32, (count, 2)),
        "table": (table, torch.float32, (count, TABLE_WIDTH)),
    }
    for name, (tensor, kind, shape) in expected.items():
        if tensor.dtype != kind:
            raise TypeError(f"{name} must be {kind}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != pixels.device:
            raise ValueError(f"{name} is on {tensor.device} and pixels on {pixels.device}: move one of them")
    if count == 0 or not 1 <= resolution <= MAX_SIDE or not 0 <= margin <= MAX_SIDE:
        raise ValueError(
            f"augment needs an image or more, a resolution of 1 to {MAX_SIDE} and a margin of 0 or more, "
            f"got {count}, {resolution} and {margin}"
        )
    if dtype not in OUTPUTS:
        raise TypeError(f"augment makes float32, float16, bfloat16 or uint8, got {dtype}")


def aot_specs() -> Iterator[aot.KernelSpec]:
    """Every configuration that a launch in this file can select."""
    others = {"pixels_ptr": "*u8", "offset_ptr": "*i64", "size_ptr": "*i32"}
    for dtype, name in OUTPUTS.items():
        made = aot.spec(
            _augment_kernel, "elementwise", name, _constexprs(dtype), images=["out_ptr"], num_warps=NUM_WARPS
        )
        yield dataclasses.replace(made, signature={**made.signature, **others})


def traffic(windows: Sequence[tuple[int, int]], resolution: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that have to move between memory and the chip: each window (width, height) once, the batch once."""
    read = sum(3 * w * h for w, h in windows)
    return {"_augment_kernel": read + len(windows) * (3 * resolution**2 * dtype.itemsize + 4 * TABLE_WIDTH + 16)}
