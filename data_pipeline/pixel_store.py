"""Decoded images: 8-bit pixels at the short side that the largest crop needs.

A stored image is the upright photo, resized with antialiasing so that its short side is `short_side(resolution)` (never
enlarged). Its place and size follow from the index alone, so a store can be filled in any order. Windows are drawn in
the photo's own pixels, as without a cache, and then scaled to the stored image (`PixelStore.boxes`).
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.augment import CROP_FRACTION
from data_pipeline.errors import BadFiles
from data_pipeline.food101 import Split

_log = logging.getLogger("data_pipeline")


def short_side(resolution: int) -> int:
    """Pixels of the short side that a training crop of the whole image, and evaluation's centre crop, need."""
    return math.ceil(resolution / CROP_FRACTION)


def stored_sizes(sizes: NDArray[np.int32], side: int) -> NDArray[np.int32]:
    """[N, 2] widths and heights -> those of the stored images."""
    scale = np.minimum(1.0, side / sizes.min(axis=1, keepdims=True))
    return np.maximum(1, np.rint(sizes * scale)).astype(np.int32)


def stored_bytes(split: Split, resolution: int) -> int:
    return int(3 * stored_sizes(split.sizes, short_side(resolution)).astype(np.int64).prod(axis=1).sum())


class PixelStore:
    """Images of one split as ragged 8-bit pixels in one buffer.

    buffer: uint8 [total]; image i is `buffer[offsets[i]:]`, rows of RGB pixels. Not pinned, on a GPU either: torch
        rounds pinned memory up to a power of two, and no image goes to the device from here.
    offsets: int64 [N], in bytes. sizes: int32 [N, 2], stored width and height.
    """

    def __init__(
        self,
        split: Split,
        side: int,
        buffer: Tensor | None = None,
        *,
        ready: NDArray[np.bool_] | None = None,
    ) -> None:
        self.split = split
        self.sizes = stored_sizes(split.sizes, side)
        lengths = 3 * self.sizes.astype(np.int64).prod(axis=1)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self.total = int(lengths.sum())
        self.buffer = torch.empty(self.total, dtype=torch.uint8) if buffer is None else buffer
        self.ready = np.zeros(len(split), np.bool_) if ready is None else ready
        """[N]: the image is in the buffer, and was seen to be whole. Processes that share a buffer share this too: two
        may decode one image at once, into the same bytes."""
        self.checksums: NDArray[np.uint32] | None = None
        """[N] CRC-32 of each image, where the buffer came from a file."""

    def image(self, index: int) -> Tensor:
        """[H, W, 3]: the stored pixels, where `ready`."""
        width, height = self.sizes[index].tolist()
        start = int(self.offsets[index])
        return self.buffer[start : start + 3 * width * height].view(height, width, 3)

    def boxes(self, indices: NDArray[np.int64], windows: NDArray[np.int32]) -> NDArray[np.int32]:
        """[B, 4] x, y, width, height in the photos' own pixels -> in those of the stored images, edges rounded."""
        scale = self.sizes[indices] / self.split.sizes[indices]
        start, end = windows[:, :2] * scale, (windows[:, :2] + windows[:, 2:]) * scale
        rounded = np.rint(end)
        first = np.where(np.rint(start) < rounded, np.rint(start), np.floor(start))  # at least one pixel
        return np.concatenate([first, np.maximum(rounded - first, 1)], axis=1).astype(np.int32)

    def ensure(self, index: int) -> Tensor:
        """`image`, after decoding it where it is not in the buffer, or is damaged there.

        Raises:
            BadFiles: it cannot be decoded.
        """
        pixels = self.image(index)
        if not self.ready[index]:
            if self.checksums is None:
                self.decode(index, pixels)
            elif zlib.crc32(pixels.numpy().data) != self.checksums[index]:
                _log.warning("the cached pixels of %s are damaged: decoded again.", self.split.paths[index])
                self.decode(index, pixels)
            self.ready[index] = True
        return pixels

    def decoded(self, index: int) -> Tensor:
        """[H, W, 3]: the pixels to store, decoded now; the buffer is left alone.

        Raises:
            BadFiles: it cannot be decoded.
        """
        width, height = self.sizes[index].tolist()
        pixels = torch.empty(height, width, 3, dtype=torch.uint8)
        self.decode(index, pixels)
        return pixels

    def decode(self, index: int, out: Tensor) -> None:
        """Write the pixels to store to `out` [H, W, 3].

        Raises:
            BadFiles: they cannot be decoded.
        """
        from data_pipeline.torch_loader import reason_of, window

        split = self.split
        size = split.sizes[index]
        box = np.array([0, 0, *size], np.int32)
        side = tuple(self.sizes[index].tolist())
        try:
            image = window(split.paths[index], int(split.orientations[index]), size, box, side)
        except (RuntimeError, OSError) as error:
            raise BadFiles({index: reason_of(error)}) from None
        out.copy_(image.permute(1, 2, 0))

    def complete(self, threads: int) -> dict[int, str]:
        """Make every image `ready`; the bad ones stay behind: position in the split -> why."""
        missing = np.flatnonzero(~self.ready)
        return {
            index: str(found)
            for index, found in for_each(self.ensure, missing, max(1, threads))
            if isinstance(found, str)
        }


def for_each(act: Any, indices: Iterable[int], threads: int) -> Iterator[tuple[int, Any]]:
    """(index, what `act` gave, or the reason of BadFiles) in the order of `indices`."""

    def one(index: int) -> tuple[int, Any]:
        try:
            return index, act(index)
        except BadFiles as bad:
            return index, bad.reasons[index]

    with one_thread_each(threads) as pool:
        yield from pool.map(one, (int(index) for index in indices))


def one_thread_each(threads: int) -> ThreadPoolExecutor:
    """A pool in whose threads torch does not start threads of its own."""
    return ThreadPoolExecutor(threads, "pixels", torch.set_num_threads, (1,))
