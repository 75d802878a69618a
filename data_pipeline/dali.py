"""The loader on NVIDIA DALI: the GPU decodes where there is one, DALI's CPU threads elsewhere.

Order, windows and flips are ours and go in through `external_source`; so the pipeline has no state of its own, and
one built anew at any position continues exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, Loader, finish

PREFETCH = 2


class _Source:
    """Feeds DALI one batch of (file name, anchor, shape, flip) after another, from position (epoch, start)."""

    def __init__(self, loader: DaliLoader, epoch: int, start: int) -> None:
        self.loader, self.epoch, self.next = loader, epoch, start

    def __call__(self) -> tuple[list[NDArray[Any]], ...]:
        loader = self.loader
        if self.next >= loader.steps_per_epoch:
            raise StopIteration
        indices = loader.indices(self.epoch, self.next)
        params = loader.params(self.epoch, indices)
        self.next += 1
        names = [np.frombuffer(loader.split.paths[i].encode("utf-8", "surrogateescape"), np.uint8) for i in indices]
        # DALI counts rows first.
        anchors = [np.array([y, x], np.int32) for x, y, _, _ in params.windows]
        shapes = [np.array([height, width], np.int32) for _, _, width, height in params.windows]
        return names, anchors, shapes, [np.array(flip, np.int32) for flip in params.flips]


def decoded_windows(names: Any, anchors: Any, shapes: Any, flips: Any, *, side: int, device: str) -> Any:
    """Graph: the window of each upright image, resized to [side, side, 3] 8-bit pixels with antialiasing, flipped.

    device: "mixed" decodes on the GPU, "cpu" on DALI's threads.
    """
    files = fn.io.file.read(names)
    images = fn.decoders.image_slice(
        files, anchors, shapes, axis_names="HW", device=device, output_type=types.RGB, normalized_anchor=False,
        normalized_shape=False,
    )  # fmt: skip
    images = fn.resize(images, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(images, horizontal=flips)


@pipeline_def(enable_conditionals=False)
def _pipeline(source: _Source, side: int, device: str) -> Any:
    fed = fn.external_source(
        source=source, num_outputs=4, batch=True, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
        ndim=[1, 1, 1, 0],
    )  # fmt: skip
    return decoded_windows(*fed, side=side, device=device)


class DaliLoader(Loader):
    """DALI on `workers` threads, on the GPU for device "cuda"."""

    backend = "dali"

    def _build(self, epoch: int, start: int) -> Any:
        gpu = self.device.type == "cuda"
        pipeline = _pipeline(
            _Source(self, epoch, start),
            self.resolution,
            "mixed" if gpu else "cpu",
            batch_size=self.batch_size,
            num_threads=max(1, self.workers),
            device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=PREFETCH,
            seed=0,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"DALI cannot start on {self.device} ({reason}): use --loader torch.") from error
        return pipeline

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        pipeline = self._build(epoch, start)
        for batch in range(start, self.steps_per_epoch):
            indices = self.indices(epoch, batch)
            try:
                (output,) = pipeline.run()
            except RuntimeError as error:
                raise DataError(_name_the_file(error)) from error
            colors = self.params(epoch, indices).colors
            labels = torch.from_numpy(self.split.labels[indices])
            images = finish(self._take(output, len(indices)), colors, self.device)
            yield Batch(images, labels.to(self.device, non_blocking=True))

    def _take(self, output: Any, count: int) -> Tensor:
        """Copy DALI's buffer, which it will fill again, into a tensor [B, R, R, 3]."""
        pixels = torch.empty(count, self.resolution, self.resolution, 3, dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=stream)
        return pixels


def _name_the_file(error: RuntimeError) -> str:
    text = " ".join(str(error).split())
    return f"DALI cannot decode a file any more: restore or remove it and continue with --resume ({text[:300]})."
