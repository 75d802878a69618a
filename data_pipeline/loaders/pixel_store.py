"""Decoded images as 8-bit pixels: what is kept of each photo, and where it lies.

Of a training photo the upright image is kept, large enough for the crops that a run draws (`training_side`); a photo
that is no larger is kept as it is. Windows are drawn in the photo's own pixels, as without a cache, and then scaled to
the stored image (`PixelStore.boxes`). Of a validation photo the finished view is kept. Place and size follow from the
index alone, so a store can be filled in any order.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipeline.dataset.index import Split
from data_pipeline.errors import BadFiles
from data_pipeline.loaders.augment import CROP_FRACTION, Augmentation, Interpolation, eval_margin, eval_params

# Stored pixels along a side for each output pixel of the smallest crop: with fewer, shrinking twice changes the energy
# of the differences between neighbours by more than 3 % in the finest of pictures
# (tests/data_pipeline/loaders/test_one_picture.py).
PIXELS_A_PIXEL = 2.0

_log = logging.getLogger("data_pipeline")


def training_side(resolution: int, augmentation: Augmentation) -> int:
    """Pixels of the short side of a stored training photo from which every crop of `augmentation` to `resolution` is
    as sharp as from the photo itself."""
    return math.ceil(PIXELS_A_PIXEL * resolution / math.sqrt(augmentation.scale[0]))


@dataclass(frozen=True)
class Photos:
    """What is stored of each photo: all of it, with a short side of `side` pixels at most."""

    side: int

    @property
    def name(self) -> str:
        """Of the folder on disk, and of what is in it."""
        return f"photos-{self.side}"

    def __str__(self) -> str:
        return f"training images at short side {self.side}"

    def sizes(self, split: Split) -> NDArray[np.int32]:
        """[N, 2]: stored widths and heights."""
        scale = np.minimum(1.0, self.side / split.sizes.min(axis=1, keepdims=True, initial=2**31 - 1))
        return np.maximum(1, np.rint(split.sizes * scale)).astype(np.int32)

    def decoded(self, split: Split, index: int, size: tuple[int, int]) -> Tensor:
        """[height, width, 3] of stored size (width, height).

        Shrunk by Lanczos' filter, which keeps what lies below the new limit of detail, where the crop's triangle and
        a cubic would each take a part of it.
        """
        from data_pipeline.loaders.torch_loader import decoded

        own = split.sizes[index]
        image = decoded(split.paths[index], int(split.orientations[index]), own).permute(1, 2, 0)
        if size == tuple(own.tolist()):
            return image
        shrunk = Image.fromarray(image.contiguous().numpy()).resize(size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(shrunk))


@dataclass(frozen=True)
class Views:
    """What is stored of each photo: the view that evaluation at this resolution and crop has of it."""

    resolution: int
    crop_fraction: float = CROP_FRACTION
    interpolation: Interpolation = "bilinear"

    @property
    def name(self) -> str:
        how = "" if self.interpolation == "bilinear" else f"-{self.interpolation}"
        return f"views-{self.resolution}-{self.crop_fraction:.6g}{how}"

    def __str__(self) -> str:
        return f"validation images of {self.resolution} x {self.resolution}"

    def sizes(self, split: Split) -> NDArray[np.int32]:
        return np.full((len(split), 2), self.resolution, np.int32)

    def decoded(self, split: Split, index: int, size: tuple[int, int]) -> Tensor:
        from data_pipeline.loaders.torch_loader import view

        margin = eval_margin(self.interpolation)
        window = eval_params(split.sizes[[index]], self.resolution, self.crop_fraction, margin).windows[0]
        return view(split, index, window, self.resolution, margin, self.interpolation).permute(1, 2, 0)


Content = Photos | Views


def contents_of(
    splits: Iterable[str],
    resolution: int,
    augmentation: Augmentation | None,
    side: int | None,
    crop_fraction: float,
    interpolation: Interpolation,
) -> dict[str, Content]:
    """What is kept of each split."""
    photos = Photos(side or training_side(resolution, augmentation or Augmentation()))
    return {name: photos if name == "train" else Views(resolution, crop_fraction, interpolation) for name in splits}


def stored_bytes(split: Split, content: Content) -> int:
    return int(_lengths(content.sizes(split)).sum())


def _lengths(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    return 3 * sizes.astype(np.int64).prod(axis=1)


class PixelStore:
    """Images of one split as ragged 8-bit pixels in one buffer.

    buffer: uint8 [total]; image i is `buffer[offsets[i]:]`, rows of RGB pixels. Not pinned, on a GPU either: torch
        rounds pinned memory up to a power of two, and no image goes to the device from here.
    offsets: int64 [N], in bytes. sizes: int32 [N, 2], stored width and height.
    limit: bytes that the buffer may have; the images from `count` on have no place in it.
    """

    def __init__(
        self,
        split: Split,
        content: Content,
        buffer: Tensor | None = None,
        *,
        ready: NDArray[np.bool_] | None = None,
        limit: int | None = None,
    ) -> None:
        self.split, self.content = split, content
        self.sizes = content.sizes(split)
        ends = np.cumsum(_lengths(self.sizes))
        self.offsets = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self._ends = ends
        self.count = len(split) if limit is None else self.places(limit)
        """Images that have a place: the first so many of the split."""
        self.total = int(ends[self.count - 1]) if self.count else 0
        self.buffer = torch.empty(self.total, dtype=torch.uint8) if buffer is None else buffer
        self.ready = np.zeros(len(split), np.bool_) if ready is None else ready
        """[N]: the image is in the buffer, and was seen to be whole. Processes that share a buffer share this too: two
        may decode one image at once, into the same bytes."""
        self.checksums: NDArray[np.uint32] | None = None
        """[N] CRC-32 of each image, where the buffer came from a file."""

    def places(self, limit: int) -> int:
        """How many images fit into so many bytes."""
        return int(np.searchsorted(self._ends, limit, side="right"))

    def image(self, index: int) -> Tensor:
        """[H, W, 3]: the stored pixels, where `ready`."""
        width, height = self.sizes[index].tolist()
        start = int(self.offsets[index])
        return self.buffer[start : start + 3 * width * height].view(height, width, 3)

    def margin(self, margin: int) -> int:
        """Output pixels around `boxes` that are resized along and cut off, where it is `margin` in the photo."""
        return 0 if isinstance(self.content, Views) else margin

    def boxes(self, indices: NDArray[np.int64], windows: NDArray[np.int32]) -> NDArray[np.int32]:
        """[B, 4] x, y, width, height in the photos' own pixels -> in those of the stored images, edges rounded; of a
        stored view all of it."""
        if isinstance(self.content, Views):
            return np.concatenate([np.zeros_like(self.sizes[indices]), self.sizes[indices]], axis=1)
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
        from data_pipeline.loaders.torch_loader import reason_of

        width, height = self.sizes[index].tolist()
        try:
            image = self.content.decoded(self.split, index, (width, height))
        except (RuntimeError, OSError) as error:
            raise BadFiles({index: reason_of(error)}) from None
        out.copy_(image)

    def complete(self, threads: int) -> dict[int, str]:
        """Make every image that has a place `ready`; the bad ones stay behind: position in the split -> why."""
        missing = np.flatnonzero(~self.ready[: self.count])
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
