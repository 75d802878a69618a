"""Windows of 8-bit pictures, resized, mirrored and normalised in one pass by C++ on a CPU with AVX2.

Bit for bit what torch makes of them there (`pixels/resize.cpp`), so who has no compiler gets the same images, later.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import BuildError, build, find

SOURCES = Path(__file__).with_name("pixels")
# The normalisation's product and sum are rounded each, as torch's are.
FLAGS = ("-ffp-contract=off",)


class Resizer:
    """The function of a compiled library. Calls leave the interpreter's lock to others."""

    def __init__(self, path: Path) -> None:
        try:
            self._function = ctypes.CDLL(str(path)).fastnet_resize
        except OSError as error:
            raise BuildError(f"{path} does not load ({error}): delete it") from error

    def __call__(
        self,
        pictures: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        flips: Tensor,
        side: int,
        margin: int,
        outs: Tensor,
        scale: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        """Write N images [side, side, 3] to the addresses `outs`: as float32, pixel * scale + offset, where these [3]
        are given, else as uint8.

        pictures: [N] addresses of uint8 pixels [height, width, 3]; sizes: [N, 2] their width and height; boxes: [N, 4]
        x, y, width, height of the window within, which is resized to side + 2 * margin pixels a side, whose border of
        `margin` is cut off; flips: [N] bool, whether the rest is mirrored. The others int64.

        Raises ValueError where shapes differ or a box leaves its picture, MemoryError where memory ends.
        """
        count = len(pictures)
        shapes = [tuple(t.shape) for t in (pictures, sizes, boxes, flips, outs)]
        if shapes != [(count,), (count, 2), (count, 4), (count,), (count,)]:
            raise ValueError(f"pictures, sizes, boxes, flips and outs must be of as many images, got {shapes}")
        corner, extent = boxes[:, :2], boxes[:, 2:]
        if side < 1 or margin < 0 or ((corner < 0) | (extent < 1) | (corner + extent > sizes)).any():
            raise ValueError("each box must lie within its picture and hold at least one pixel")
        given = [t.to(torch.int64).contiguous() for t in (pictures, sizes, boxes)]
        given += [flips.to(torch.uint8).contiguous(), outs.to(torch.int64).contiguous()]
        factors = [None if t is None else t.to(torch.float32).contiguous() for t in (scale, offset)]
        addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*given, *factors)]
        edges = ctypes.c_long(side), ctypes.c_long(margin)
        if self._function(ctypes.c_long(count), *addresses[:5], *edges, *addresses[5:]):
            raise MemoryError("can't allocate memory for resized images")


@functools.cache
def resizer(compiling: bool) -> Resizer | None:
    """This CPU's, compiled where the cache has none and `compiling`; None where it has none, or the CPU no AVX2.

    Raises BuildError.
    """
    if "AVX" not in torch.backends.cpu.get_cpu_capability():  # torch's own form, which rounds otherwise
        return None
    path = build(extra=FLAGS, sources=SOURCES) if compiling else find(extra=FLAGS, sources=SOURCES)
    return None if path is None else Resizer(path)
