"""The loader on torchvision: decode and resize in worker processes, a whole batch each, colours on the device."""

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

from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, Loader, finish


class _Prepared(NamedTuple):
    """What a worker hands over: 8-bit pixels [B, R, R, 3], labels [B], colour matrices; or the error that it met."""

    pixels: Tensor
    labels: Tensor
    colors: NDArray[np.float32] | None
    error: str


class _Batches(Dataset[_Prepared]):
    """Maps (epoch, batch) to a prepared batch."""

    def __init__(self, loader: TorchLoader) -> None:
        self.loader = loader

    def __getitem__(self, position: tuple[int, int]) -> _Prepared:
        loader, (epoch, batch) = self.loader, position
        indices = loader.indices(epoch, batch)
        params = loader.params(epoch, indices)
        labels = torch.from_numpy(loader.split.labels[indices])
        side = loader.resolution
        pixels = torch.empty(len(indices), side, side, 3, dtype=torch.uint8)
        for row, index in enumerate(indices):
            try:
                image = _view(loader.split.paths[index], loader.split.sizes[index], params.windows[row], side)
            except (RuntimeError, OSError) as error:
                reason = f"{loader.split.paths[index]} cannot be decoded any more ({str(error).splitlines()[0]})"
                return _Prepared(pixels, labels, None, reason)
            if params.flips[row]:
                image = image.flip(-1)
            pixels[row] = image.permute(1, 2, 0)
        return _Prepared(pixels, labels, params.colors, "")


def _view(path: str, size: NDArray[np.int64], window: NDArray[np.int32], side: int) -> Tensor:
    """[3, side, side] uint8: the window of the upright image, resized with antialiasing."""
    image = decode_image(read_file(path), mode=ImageReadMode.RGB, apply_exif_orientation=True)
    if tuple(image.shape[:0:-1]) != tuple(size):
        raise RuntimeError(f"its size is {image.shape[2]} x {image.shape[1]} now")
    x, y, width, height = window.tolist()
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    torch.set_num_threads(1)


class TorchLoader(Loader):
    """torchvision's decoder on `workers` processes that live as long as the loader."""

    backend = "torch"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._positions = _Positions()
        self._loader: DataLoader[_Prepared] | None = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=self._positions,
            num_workers=self.workers,
            collate_fn=lambda prepared: prepared,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker if self.workers else None,
            # A generator of its own: starting a pass must not draw from the one that the model uses.
            generator=torch.Generator(),
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        assert self._loader is not None, "the loader is closed"
        self._positions.positions = [(epoch, batch) for batch in range(start, self.steps_per_epoch)]
        for prepared in self._loader:
            if prepared.error:
                raise DataError(f"{prepared.error}: restore or remove it and continue with --resume.")
            images = finish(prepared.pixels, prepared.colors, self.device)
            yield Batch(images, prepared.labels.to(self.device, non_blocking=True))

    def close(self) -> None:
        self._loader = None  # drops the worker processes
