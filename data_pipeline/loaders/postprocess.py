"""The last step of a batch, which all loaders share: from 8-bit pixels to what the model takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from data_pipeline.loaders.augment import IMAGENET, Normalization, Params, rectangles_in_pixels
from data_pipeline.loaders.prefetch import sent

_AT_ONCE = 32  # images of a batch on a GPU whose intermediate values are in memory at once


class Finish:
    """The last step of a batch: RandAugment's operations; colours and normalisation, as one affine map of each image's
    8-bit pixels; erasing.

    The colour affine is clamped to the range of 8-bit pixels, as color_twist's output is. It is folded with the
    normalisation, so the clamp is between normalised black and white.
    """

    def __init__(self, params: Params, side: int, normalization: Normalization = IMAGENET) -> None:
        colors, count = params.colors, len(params.windows)
        self.operations, self.strengths = params.operations, params.strengths
        self.erased = None if params.erased is None else rectangles_in_pixels(params.erased, side)
        self.fills = None if params.fills is None else torch.from_numpy(params.fills)
        mean, std = map(torch.tensor, normalization)
        self.scale = 1 / (255 * std)
        self.black = -mean / std
        self.white = self.black + 255 * self.scale
        self.side = side
        self.changes_color = colors is not None
        affine = torch.eye(3, 4).expand(count, 3, 4) if colors is None else torch.from_numpy(colors)
        self.affine = affine * self.scale[:, None]
        """[N, 3, 4]"""
        self.affine[:, :, 3] += self.black

    @cached_property
    def _lines(self) -> tuple[Tensor, Tensor]:
        """Scale and offset of a line of pixels, where colours stay as they are."""
        return self.scale.repeat(self.side), self.black.repeat(self.side)

    @cached_property
    def _groups(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Several pixels at once through a block-diagonal matrix, because a product with 3 columns has no vector code
        (200 pixels, one core: 0.13 ms with 8 pixels, 0.4 ms with one): the matrix and the offset of each image, and
        black and white of a line."""
        count, at_once = len(self.affine), math.gcd(8, self.side * self.side)
        blocks = torch.zeros(count, at_once, 3, at_once, 3)
        for at in range(at_once):
            blocks[:, at, :, at] = self.affine[:, :, :3].transpose(1, 2)
        bounds = self.black.repeat(self.side), self.white.repeat(self.side)
        return blocks.view(count, 3 * at_once, 3 * at_once), self.affine[:, :, 3].repeat(1, at_once), bounds

    def image(self, row: int, pixels: Tensor, out: Tensor) -> None:
        """8-bit pixels [R, R, 3] of image `row` -> out [R, R, 3] float32, contiguous. Fast on one CPU thread."""
        lines = out.view(self.side, 3 * self.side)
        pixels = self._operated(pixels[None], slice(row, row + 1))[0]
        if self.changes_color:
            matrices, offsets, bounds = self._groups
            groups = out.view(-1, matrices.shape[1])
            torch.addmm(offsets[row], pixels.reshape(groups.shape).float(), matrices[row], out=groups)
            torch.clamp(lines, *bounds, out=lines)
        else:
            scale, offset = self._lines
            lines.copy_(pixels.reshape(lines.shape)).mul_(scale).add_(offset)
        self.erase(row, out)

    @property
    def normalises_only(self) -> bool:
        """Whether a pixel becomes pixel * scale + black, but for what `erase` fills."""
        return not self.changes_color and self.operations is None

    def erase(self, row: int, out: Tensor) -> None:
        """Fill the rectangle of image `row` in out [R, R, 3], if it has one."""
        if self.erased is not None and self.fills is not None:
            x, y, width, height = self.erased[row].tolist()
            out[y : y + height, x : x + width] = self.fills[row]

    def batch(self, pixels: Tensor) -> Tensor:
        """8-bit pixels [N, R, R, 3] on a GPU -> float32 of the same shape; nothing here waits for the device."""
        erasing = [] if self.erased is None or self.fills is None else [torch.from_numpy(self.erased), self.fills]
        given = [self.affine.transpose(1, 2), self.black, self.white, *erasing]
        affine, black, white, *erased = sent(given, pixels.device)
        pixels = self._operated(pixels, slice(None))
        images = torch.empty(pixels.shape, device=pixels.device)
        along = torch.arange(self.side, device=pixels.device)[:, None]
        for first in range(0, len(pixels), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            mapped = images[some].flatten(1, 2)
            torch.baddbmm(affine[some, 3:], pixels[some].flatten(1, 2).float(), affine[some, :3], out=mapped)
            torch.clamp(mapped, black, white, out=mapped)
            if erased:
                corners, fills = (values[some, None] for values in erased)
                inside = (along >= corners[..., :2]) & (along < corners[..., :2] + corners[..., 2:])
                # [N, R, 2]: of columns, and of rows.
                mask = inside[:, None, :, 0, None] & inside[:, :, None, 1, None]
                images[some] = torch.where(mask, fills[:, None], images[some])
        return images

    def _operated(self, pixels: Tensor, rows: slice) -> Tensor:
        """8-bit pixels [N, R, R, 3] of these rows of the batch after RandAugment."""
        if self.operations is None or self.strengths is None:
            return pixels
        from data_pipeline.loaders.randaugment import rand_augment

        changed = rand_augment(pixels.permute(0, 3, 1, 2), self.operations[rows], self.strengths[rows])
        return changed.permute(0, 2, 3, 1)


def finish(pixels: Tensor, params: Params, device: torch.device, normalization: Normalization = IMAGENET) -> Tensor:
    """8-bit pixels [B, 3, R, R], fastest in channels_last -> images [B, 3, R, R] as in `Batch`."""
    count, _, side, _ = pixels.shape
    rows, last_step = pixels.permute(0, 2, 3, 1), Finish(params, side, normalization)
    if device.type != "cpu":
        return last_step.batch(rows.to(device, non_blocking=True).contiguous()).permute(0, 3, 1, 2)
    images = torch.empty(rows.shape)
    with _one_thread():
        for row in range(count):  # one image at a time stays in a core's cache
            last_step.image(row, rows[row], images[row])
    return images.permute(0, 3, 1, 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many short operations: beside busy decoders, waiting for torch's other threads costs far more than they do
    (64 images of 200 pixels on 2 busy cores: 35 ms with one thread, 730 ms with two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
