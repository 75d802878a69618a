"""The loader on cached pixels: threads crop, resize and finish one image at a time, from a `PixelStore`; an image that
has no place there is decoded, as without a cache.

torch resizes 8-bit channels_last pixels with antialiasing in vector instructions and without the interpreter's lock, so
threads suffice; one image's pixels stay in a core's cache until they are written to the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data_pipeline.errors import BadFiles
from data_pipeline.loaders.cache import PixelCache
from data_pipeline.loaders.loader import Batch, Loader, Plan, Step
from data_pipeline.loaders.pixel_store import one_thread_each
from data_pipeline.loaders.postprocess import Finish
from data_pipeline.loaders.prefetch import staging
from data_pipeline.loaders.torch_loader import reason_of, view

AHEAD = 3  # batches under way at once
_ROWS = 8  # images a job


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
        self.finish = Finish(step.params, side) if on_cpu else None
        kind = torch.float32 if on_cpu else torch.uint8
        self.rows = staging((count, side, side, 3), kind, loader.device)
        self.boxes = loader.store.boxes(step.indices, step.params.windows).tolist()
        self.jobs: list[Future[dict[int, str]]] = [
            pool.submit(self._fill, range(first, min(first + _ROWS, count))) for first in range(0, count, _ROWS)
        ]

    @torch.inference_mode()  # which is a thread's own, and the consumer's may have made `rows`
    def _fill(self, rows: range) -> dict[int, str]:
        """Write these rows; the images that could not be read."""
        bad: dict[int, str] = {}
        scratch = torch.empty(3 * max(width * height for _, _, width, height in self.boxes), dtype=torch.uint8)
        for row in rows:
            try:
                seen = self._view(row, scratch)
            except BadFiles as found:
                bad |= found.reasons
                continue
            if self.finish is None:
                self.rows[row] = seen
            else:
                self.finish.image(row, seen, self.rows[row])
        return bad

    def _view(self, row: int, scratch: Tensor) -> Tensor:
        """[side, side, 3] 8-bit pixels, flipped."""
        index, params = int(self.step.indices[row]), self.step.params
        store, plan, flip = self.loader.store, self.loader.plan, bool(params.flips[row])
        if index < store.count:
            pixels = store.ensure(index)
            return resized(pixels, self.boxes[row], plan.resolution, store.margin(plan.margin), flip, scratch)
        try:
            seen = view(plan.split, index, params.windows[row], plan.resolution, plan.margin)
        except (RuntimeError, OSError) as error:
            raise BadFiles({index: reason_of(error)}) from None
        return (seen.flip(-1) if flip else seen).permute(1, 2, 0)

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
