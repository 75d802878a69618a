"""The loader on torchvision: worker processes decode and resize, a whole batch each; colours on the device."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional as F

from data_pipeline.errors import DataError, went_bad
from data_pipeline.loader import Batch, Loader, Plan, Step


class _Prepared(NamedTuple):
    """What a worker hands over: 8-bit pixels [B, 3, R, R] and what they are; or the error that it met."""

    pixels: Tensor
    step: Step
    error: str


class _Batches(Dataset[_Prepared]):
    """Maps (epoch, batch) to a prepared batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, position: tuple[int, int]) -> _Prepared:
        split, side = self.plan.split, self.plan.resolution
        step = self.plan.step(*position)
        pixels = torch.empty(len(step.indices), 3, side, side, dtype=torch.uint8)
        for row, index in enumerate(step.indices):
            try:
                view = window(split.paths[index], split.sizes[index], step.params.windows[row], side)
            except (RuntimeError, OSError) as error:
                # Handed over, not raised: DataLoader would wrap the sentence in the worker's traceback.
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return _Prepared(pixels, step, went_bad(split.paths[index], reason))
            pixels[row] = view.flip(-1) if step.params.flips[row] else view
        return _Prepared(pixels, step, "")


def window(path: str, size: NDArray[np.int32], box: NDArray[np.int32], side: int) -> Tensor:
    """[3, side, side] uint8: `box` (x, y, width, height) of the upright image, resized with antialiasing.

    Raises:
        RuntimeError: the file cannot be decoded, or its `size` (width, height) is another one now.
    """
    image = decode_image(read_file(path), mode=ImageReadMode.RGB, apply_exif_orientation=True)
    if image.shape[2] != size[0] or image.shape[1] != size[1]:
        raise RuntimeError(f"it was {size[0]} x {size[1]} pixels and is {image.shape[2]} x {image.shape[1]} now")
    x, y, width, height = box.tolist()
    return F.resize(image[:, y : y + height, x : x + width], [side, side], antialias=True)


class _Positions(Sampler[tuple[int, int]]):
    """The positions that are asked for next; set before each pass, read by the DataLoader in this process."""

    def __init__(self) -> None:
        self.positions: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def _start_worker(_: int) -> None:
    # Ctrl-C reaches every process of the terminal: the trainer decides, workers end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(prepared: Any) -> Any:
    return prepared


class TorchLoader(Loader):
    """torchvision's decoder on `workers` processes that live until `close`."""

    backend = "torch"

    def __init__(self, plan: Plan, device: str | torch.device, workers: int) -> None:
        super().__init__(plan, device, workers)
        self._positions = _Positions()
        self._loader: DataLoader[_Prepared] | None = None

    def _start(self) -> DataLoader[_Prepared]:
        return DataLoader(
            _Batches(self.plan),
            batch_size=None,
            sampler=self._positions,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker if self.workers else None,
            # A generator of its own: starting a pass must not draw from the one that the model uses.
            generator=torch.Generator(),
        )

    def _produce(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._start()
        self._positions.positions = [(epoch, batch) for batch in range(start, self.steps_per_epoch)]
        passing = iter(self._loader)
        for _ in range(len(self._positions)):
            try:
                prepared = next(passing)
            except RuntimeError as error:
                self.close()
                raise DataError(
                    f"A data loading worker died ({str(error).splitlines()[0]}): the usual reason is too little memory "
                    "or /dev/shm, so use fewer --workers or a smaller --batch-size."
                ) from error
            if prepared.error:
                raise DataError(prepared.error)
            yield self._batch(prepared.pixels, prepared.step)

    def close(self) -> None:
        self._loader = None  # the last reference: its worker processes end
