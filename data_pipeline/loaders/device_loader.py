"""The loader on pixels that live on the device: a batch is one small copy of parameters and one kernel.

Images go to the device when they are first asked for, decoded by threads or read from the cache on disk where there is
one; from then on a pass needs no file. Order, windows, flips and colours are those of every other backend, and windows
are scaled as for the other caches, so all of them show the same view to within the rounding to 8 bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import BadFiles
from data_pipeline.loaders.augment import rectangles_in_pixels
from data_pipeline.loaders.loader import Batch, Loader, Plan, Step
from data_pipeline.loaders.pixel_store import PixelStore, one_thread_each
from data_pipeline.loaders.prefetch import sent, staging
from kernels.augment import augment, augment_table

AHEAD = 3  # batches whose images are being decoded, where they are not on the device yet


class DeviceStore:
    """The images of one split in one uint8 buffer on `device`, laid out as `host` says.

    host: where they come from; its own buffer may be empty, then they are decoded.
    bad: images that it is known not to have, position in the split -> why.
    """

    def __init__(self, host: PixelStore, bad: dict[int, str], device: torch.device) -> None:
        self.host, self.bad = host, bad
        self.pixels = torch.empty(host.total, dtype=torch.uint8, device=device)
        self.ready = np.zeros(len(host.sizes), np.bool_)
        """[N]: the image is on the device."""

    def fetch(self, index: int) -> Tensor:
        """[height, width, 3] on the host; may be called from any thread.

        Raises:
            BadFiles: it cannot be decoded.
        """
        return self.host.ensure(index) if self.host.buffer.numel() else self.host.decoded(index)

    def put(self, images: dict[int, Tensor]) -> None:
        """Copy what `fetch` gave to the device, from pinned memory, so that nothing waits for it."""
        staged = staging([sum(image.numel() for image in images.values())], torch.uint8, self.pixels.device)
        parts = staged.split([image.numel() for image in images.values()])
        for (index, image), part in zip(images.items(), parts, strict=True):
            start = int(self.host.offsets[index])
            self.pixels[start : start + len(part)].copy_(part.copy_(image.view(-1)), non_blocking=True)
            self.ready[index] = True


class _UnderWay(NamedTuple):
    step: Step
    jobs: dict[int, Future[Tensor]]
    """Images that were not on the device when this was made."""


class DeviceLoader(Loader):
    """`workers` threads (at least one) decode during the first pass."""

    def __init__(self, plan: Plan, device: str | torch.device, workers: int, store: DeviceStore) -> None:
        super().__init__(plan, device, workers)
        self.backend = "device"
        self.store = store
        self._pool: ThreadPoolExecutor | None = None
        self.quarantine(store.bad)

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        ahead, under_way = iter(numbers), deque[_UnderWay]()
        try:
            for _ in numbers:
                while len(under_way) < AHEAD and (number := next(ahead, None)) is not None:
                    under_way.append(self._begin(self.plan.step(epoch, number)))
                step, jobs = under_way.popleft()
                self._place(jobs)
                yield self._make(step)
        finally:
            for _, jobs in under_way:
                for job in jobs.values():
                    job.cancel()

    def _begin(self, step: Step) -> _UnderWay:
        missing = step.indices[~self.store.ready[step.indices]].tolist()
        if missing and self._pool is None:
            self._pool = one_thread_each(max(1, self.workers))
        return _UnderWay(step, {i: self._pool.submit(self.store.fetch, i) for i in missing} if self._pool else {})

    def _place(self, jobs: dict[int, Future[Tensor]]) -> None:
        images: dict[int, Tensor] = {}
        bad: dict[int, str] = {}
        for index, job in jobs.items():
            try:
                images[index] = job.result()
            except BadFiles as found:
                bad |= found.reasons
        if images:
            self.store.put(images)
        if bad:
            raise BadFiles(bad)
        if self._pool is not None and self.store.ready.all():
            self._pool.shutdown(wait=False)
            self._pool = None

    def _make(self, step: Step) -> Batch:
        """The batch, from pixels that are all there: nothing here waits for the device."""
        params, plan, host = step.params, self.plan, self.store.host
        side = plan.resolution
        # RandAugment works on 8-bit pixels, and `finish` does the rest.
        fused = params.operations is None
        erased = fills = None
        if fused and params.erased is not None and params.fills is not None:
            erased, fills = torch.from_numpy(rectangles_in_pixels(params.erased, side)), torch.from_numpy(params.fills)
        table = augment_table(
            torch.from_numpy(host.boxes(step.indices, params.windows)),
            torch.from_numpy(params.flips),
            colors=torch.from_numpy(params.colors) if fused and params.colors is not None else None,
            erased=erased,
            fills=fills,
            **(plan.normalization._asdict() if fused else {}),
        )
        parameters, offsets, sizes, labels = sent(
            [
                table,
                torch.from_numpy(host.offsets[step.indices]),
                torch.from_numpy(host.sizes[step.indices]),
                torch.from_numpy(plan.split.labels[step.indices]),
            ],
            self.device,
        )
        images = augment(
            self.store.pixels,
            offsets,
            sizes,
            parameters,
            resolution=side,
            margin=host.margin(plan.margin),
            dtype=torch.float32 if fused else torch.uint8,
        )
        return Batch(images, labels) if fused else self._batch(images, step)

    def close(self) -> None:
        super().close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
