"""The loader on cached pixels: threads crop, resize and finish one image at a time, from a `PixelStore`; an image that
has no place there is decoded, as without a cache.

C++ (`kernels.cpu.resize`), or torch where there is no compiler, works in vector instructions and without the
interpreter's lock, so threads suffice; one image's pixels stay in a core's cache until they are written to the batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from data_pipeline.errors import BadFiles
from data_pipeline.loaders.cache import PixelCache
from data_pipeline.loaders.loader import Batch, Loader, Plan, Step
from data_pipeline.loaders.pixel_store import one_thread_each
from data_pipeline.loaders.postprocess import Finish
from data_pipeline.loaders.prefetch import staging
from data_pipeline.loaders.torch_loader import reason_of, view
from kernels.cpu.build import BuildError
from kernels.cpu.resize import Resizer, resizer

AHEAD = 3  # batches under way at once
_ROWS = 8  # images a job
WORTH_COMPILING = 2000  # images: a few passes over them save the seconds that it takes

_log = logging.getLogger("data_pipeline")


class CachedLoader(Loader):
    """`workers` threads (at least one) that live until `close`."""

    def __init__(
        self, plan: Plan, device: str | torch.device, workers: int, cache: PixelCache, split: Literal["train", "val"]
    ) -> None:
        super().__init__(plan, device, workers)
        self.backend = f"cached ({cache.kind})"
        cache.check(split, plan)
        self.store, bad = cache.store(split, max(1, workers))
        self._pool: ThreadPoolExecutor | None = None
        self.resizer = _resizer(len(plan.split))
        self.quarantine(bad)

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        if self._pool is None:
            self._pool = one_thread_each(max(1, self.workers))
        ahead, under_way = iter(numbers), deque[_UnderWay]()
        try:
            for _ in numbers:
                while len(under_way) < AHEAD and (number := next(ahead, None)) is not None:
                    under_way.append(_UnderWay(self, self.plan.step(epoch, number), self._pool))
                yield under_way.popleft().batch()
        finally:
            for batch in under_way:
                batch.cancel()

    def close(self) -> None:
        super().close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class _UnderWay:
    """One batch, which the threads of `pool` fill: finished images on a CPU, 8-bit pixels for a GPU."""

    def __init__(self, loader: CachedLoader, step: Step, pool: ThreadPoolExecutor) -> None:
        self.loader, self.step = loader, step
        count, side = len(step.indices), loader.plan.resolution
        on_cpu = loader.device.type == "cpu"
        self.finish = Finish(step.params, side, loader.plan.normalization) if on_cpu else None
        kind = torch.float32 if on_cpu else torch.uint8
        self.rows = staging((count, side, side, 3), kind, loader.device)
        self.boxes = loader.store.boxes(step.indices, step.params.windows)
        self.jobs: list[Future[dict[int, str]]] = [
            pool.submit(self._fill, range(first, min(first + _ROWS, count))) for first in range(0, count, _ROWS)
        ]

    @torch.inference_mode()  # which is a thread's own, and the consumer's may have made `rows`
    def _fill(self, rows: range) -> dict[int, str]:
        """Write these rows; the images that could not be read."""
        bad: dict[int, str] = {}
        stored: list[int] = []
        store, plan = self.loader.store, self.loader.plan
        for row in rows:
            index = int(self.step.indices[row])
            try:
                if index < store.count:
                    store.ensure(index)
                    stored.append(row)
                else:
                    window = self.step.params.windows[row]
                    seen = view(plan.split, index, window, plan.resolution, plan.margin, plan.interpolation)
                    self._take(row, (seen.flip(-1) if self.step.params.flips[row] else seen).permute(1, 2, 0))
            except BadFiles as found:
                bad |= found.reasons
            except (RuntimeError, OSError) as error:
                bad[index] = reason_of(error)
        if stored and self.loader.resizer is not None:
            self._resize(np.array(stored), self.loader.resizer)
        elif stored:
            scratch = torch.empty(3 * int(self.boxes[stored, 2:].prod(axis=1).max()), dtype=torch.uint8)
            for row in stored:
                pixels, flip = store.image(int(self.step.indices[row])), bool(self.step.params.flips[row])
                box, margin = self.boxes[row].tolist(), store.margin(plan.margin)
                self._take(row, resized(pixels, box, plan.resolution, margin, flip, scratch))
        return bad

    def _resize(self, rows: NDArray[np.int64], resize: Resizer) -> None:
        """As `resized` and `_take`, to the bit, by one call into C++."""
        store, plan, indices = self.loader.store, self.loader.plan, self.step.indices[rows]
        whole = self.finish is None or self.finish.normalises_only
        out = self.rows if whole else torch.empty((len(rows), *self.rows.shape[1:]), dtype=torch.uint8)
        places = rows if whole else np.arange(len(rows))
        size = out[0].numel() * out.element_size()
        resize(
            torch.from_numpy(store.buffer.data_ptr() + store.offsets[indices]),
            torch.from_numpy(store.sizes[indices]),
            torch.from_numpy(self.boxes[rows]),
            torch.from_numpy(self.step.params.flips[rows]),
            plan.resolution,
            store.margin(plan.margin),
            torch.from_numpy(out.data_ptr() + places * size),
            *((self.finish.scale, self.finish.black) if whole and self.finish is not None else ()),
        )
        if self.finish is None:
            return
        for at, row in enumerate(rows.tolist()):
            if whole:
                self.finish.erase(row, self.rows[row])
            else:
                self.finish.image(row, out[at], self.rows[row])

    def _take(self, row: int, seen: Tensor) -> None:
        """8-bit pixels [side, side, 3], flipped, into the batch."""
        if self.finish is None:
            self.rows[row] = seen
        else:
            self.finish.image(row, seen, self.rows[row])

    def batch(self) -> Batch:
        bad: dict[int, str] = {}
        for job in self.jobs:
            bad |= job.result()
        if bad:
            raise BadFiles(bad)
        images = self.rows.permute(0, 3, 1, 2)
        if self.finish is None:
            return self.loader._batch(images, self.step)
        return Batch(images, torch.from_numpy(self.loader.plan.split.labels[self.step.indices]))

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()


def _resizer(images: int) -> Resizer | None:
    """The one in C++, where it is there, or worth its compilation; None is torch."""
    try:
        return resizer(compiling=images >= WORTH_COMPILING)
    except BuildError as error:
        if images >= WORTH_COMPILING:
            _log.warning("cached images are resized by torch, at some half the speed, as %s.", error)
        return None


def resized(pixels: Tensor, box: Sequence[int], side: int, margin: int, flip: bool, scratch: Tensor) -> Tensor:
    """[side, side, 3]: `box` (x, y, width, height) of 8-bit pixels [H, W, 3], resized with antialiasing to a square
    that is `margin` pixels larger on each side; that is cut off, and what is left mirrored.

    scratch: uint8, room for the box; overwritten.
    """
    x, y, width, height = box
    whole = side + 2 * margin
    cut = pixels[y : y + height, x : x + width].permute(2, 0, 1)[None]
    if (height, width) != (whole, whole):
        # A copy first: torch reads crops of channels_last pixels slowly. By lines, and to memory that is in the cache
        # of this core: new memory for each crop would cost a page fault every 4 KB.
        lines = scratch[: 3 * width * height].view(height, 3 * width)
        lines.copy_(pixels.flatten(1)[y : y + height, 3 * x : 3 * (x + width)])
        cut = lines.view(1, height, width, 3).permute(0, 3, 1, 2)
        cut = interpolate(cut, (whole, whole), mode="bilinear", antialias=True)
    cut = cut[:, :, margin : margin + side, margin : margin + side]
    return (cut.flip(-1) if flip else cut)[0].permute(1, 2, 0)
