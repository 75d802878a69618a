"""The loader on NVIDIA DALI: the GPU decodes where there is one, DALI's CPU threads elsewhere.

Order, windows and flips are ours and go in through `external_source`; so the pipeline has no state of its own, and
starts at any position.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from data_pipeline.errors import BadFiles, DataError
from data_pipeline.loader import Batch, Loader, Plan, Step
from data_pipeline.probe import probe_image

PREFETCH = 2


class _Source:
    """Feeds DALI one batch of (file names, anchors, shapes, flips) after another, and remembers which are under way."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.positions: deque[tuple[int, int]] = deque()
        self.under_way: deque[Step] = deque()

    def __call__(self) -> tuple[list[NDArray[Any]], ...]:
        if not self.positions:
            raise StopIteration
        step = self.plan.step(*self.positions.popleft())
        self.under_way.append(step)
        names = [np.frombuffer(os.fsencode(self.plan.split.paths[index]), np.uint8) for index in step.indices]
        # DALI counts rows first.
        anchors = list(np.ascontiguousarray(step.params.windows[:, 1::-1]))
        shapes = list(np.ascontiguousarray(step.params.windows[:, :1:-1]))
        return names, anchors, shapes, list(step.params.flips.astype(np.int32))


def decoded_windows(names: Any, anchors: Any, shapes: Any, flips: Any, *, side: int, margin: int, device: str) -> Any:
    """Graph: 8-bit pixels [3, side, side] of a window of each upright image, resized with antialiasing, flipped.

    margin: output pixels on each side that are resized along and cut off.

    device: "mixed" decodes on the GPU, "cpu" on DALI's threads.
    """
    files = fn.io.file.read(names)
    images = fn.decoders.image_slice(
        files, start=anchors, shape=shapes, axis_names="HW", device=device, output_type=types.RGB
    )
    images = fn.resize(images, size=[side + 2 * margin] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.crop_mirror_normalize(
        images, crop=[side, side], mirror=flips, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0]
    )


@pipeline_def
def _pipeline(source: _Source, device: str) -> Any:
    fed = fn.external_source(
        source=source, num_outputs=4, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32], ndim=[1, 1, 1, 0]
    )
    plan = source.plan
    return decoded_windows(*fed, side=plan.resolution, margin=plan.margin, device=device)


class DaliLoader(Loader):
    """DALI on `workers` threads (at least one), on the GPU for a CUDA device."""

    backend = "dali"

    def __init__(self, plan: Plan, device: str | torch.device, workers: int) -> None:
        super().__init__(plan, device, workers)
        self._source = _Source(plan)
        self._pipe: Any = None

    def _start(self) -> Any:
        on_gpu = self.device.type == "cuda"
        pipe = _pipeline(
            self._source,
            "mixed" if on_gpu else "cpu",
            batch_size=self.plan.batch_size,
            num_threads=max(1, self.workers),
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            seed=0,
        )
        try:
            pipe.build()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"DALI cannot start on {self.device} ({reason}): use --loader torch.") from error
        return pipe

    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        if self._pipe is None:
            self._pipe = self._start()
        else:
            self._rewind()
        source = self._source
        source.positions.extend((epoch, number) for number in numbers)
        for _ in numbers:
            pixels = self._run()
            yield self._batch(pixels, source.under_way.popleft())

    def _run(self) -> Tensor:
        """The next batch of 8-bit pixels [B, 3, R, R]; on a CPU it is DALI's buffer, valid until the next call."""
        try:
            if self.device.type == "cpu":
                (output,) = self._pipe.run()
                return torch.from_dlpack(output.as_tensor())
            # In the order of torch's stream, and copied there, because DALI fills the buffer again.
            (output,) = self._pipe.run(torch.cuda.current_stream(self.device))
            return torch.from_dlpack(output.as_tensor()).clone()
        except RuntimeError as error:
            # A file that cannot be decoded ends the pipeline object: the next call builds another.
            failed = list(self._source.under_way)
            self._drop()
            if bad := self._bad_files(failed):
                raise BadFiles(bad) from None
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"DALI stopped ({reason}): use --loader torch, which names the file.") from error

    def _rewind(self) -> None:
        """Drop what an unfinished pass left under way, a few batches at most, and start over."""
        self._source.positions.clear()
        try:
            while True:
                self._pipe.run()
        except StopIteration:
            self._pipe.reset()
            self._source.under_way.clear()
        except RuntimeError:  # what was under way holds a bad file, and nobody asks for it any more
            self._drop()
            self._pipe = self._start()

    def _bad_files(self, steps: list[Step]) -> dict[int, str]:
        """DALI does not name the file: find those among the images under way that changed."""
        split, bad = self.plan.split, {}
        for index in (int(index) for step in steps for index in step.indices):
            path, (width, height) = split.paths[index], split.sizes[index]
            try:
                now = probe_image(path)[:2]
                if now != (width, height):
                    bad[index] = f"it was {width} x {height} pixels and is {now[0]} x {now[1]} now"
            except DataError as found:
                bad[index] = str(found)
        return bad

    def close(self) -> None:
        super().close()
        self._drop()

    def _drop(self) -> None:
        self._pipe = None
        self._source.positions.clear()
        self._source.under_way.clear()
