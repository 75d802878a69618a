"""The contract of a loader, whichever backend fills it, and the last step that all backends share."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Params,
    epoch_order,
    eval_params,
    train_params,
)
from data_pipeline.errors import DataError
from data_pipeline.food101 import Index, Split


class Batch(NamedTuple):
    """images [B, 3, R, R] float32, channels_last, normalised by ImageNet's mean and deviation; labels [B] int64."""

    images: Tensor
    labels: Tensor


class Loader(ABC):
    """Batches of one split. Its whole state is a position: (epoch, batch).

    Training visits the images in the order of `epoch_order(seed, epoch)` and drops the last, incomplete batch;
    evaluation visits each image once, in the index's order, and its last batch is shorter.
    """

    backend: str

    def __init__(
        self,
        split: Split,
        *,
        resolution: int,
        batch_size: int,
        seed: int,
        train: bool,
        augmentation: Augmentation | None,
        device: str,
        workers: int,
    ) -> None:
        self.split = split
        self.resolution = resolution
        self.batch_size = batch_size
        self.seed = seed
        self.train = train
        self.augmentation = augmentation or Augmentation()
        self.device = torch.device(device)
        self.workers = workers
        self.num_images = len(split.paths)
        whole, rest = divmod(self.num_images, batch_size)
        self.steps_per_epoch = whole if train else whole + bool(rest)

    def indices(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """Positions in the split of the images of one batch."""
        order = epoch_order(self.seed, epoch, self.num_images) if self.train else np.arange(self.num_images)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def params(self, epoch: int, indices: NDArray[np.int64]) -> Params:
        sizes = self.split.sizes[indices]
        if not self.train:
            return eval_params(sizes)
        return train_params(self.augmentation, self.seed, epoch, indices, sizes)

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on. Raises DataError that names a file that went bad since it
        was indexed."""

    def close(self) -> None:
        """Give back threads, processes and buffers."""


def finish(pixels: Tensor, colors: NDArray[np.float32] | None, device: torch.device) -> Tensor:
    """8-bit pixels [B, R, R, 3], cropped, resized and flipped -> images [B, 3, R, R] as in `Batch`.

    The colour affine comes first and is clamped to the range of 8-bit pixels, as color_twist's output is.
    """
    images = pixels.to(device, non_blocking=True).float()
    if colors is not None:
        # x [B, R*R, 3] times M^T [B, 3, 3] keeps the pixels where they are: channels_last.
        matrices = torch.from_numpy(colors).to(device)
        flat = images.view(len(images), -1, 3)
        images = torch.baddbmm(matrices[:, None, :, 3], flat, matrices[:, :, :3].mT).clamp_(0, 255).view_as(images)
    scale = 255 * torch.tensor(IMAGENET_STD, device=device)
    shift = torch.tensor(IMAGENET_MEAN, device=device) / torch.tensor(IMAGENET_STD, device=device)
    return images.div_(scale).sub_(shift).permute(0, 3, 1, 2)


def dali_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def make_loader(
    index: Index,
    split: Literal["train", "val"],
    *,
    backend: Literal["auto", "dali", "torch"] = "auto",
    resolution: int,
    batch_size: int,
    seed: int,
    train: bool,
    augmentation: Augmentation | None,
    device: str = "cpu",
    workers: int,
) -> Loader:
    """A loader of `index.splits[split]` that gives square images of `resolution` pixels on `device`.

    "auto" is DALI on a GPU where it is installed, and torch elsewhere: on a CPU torch's decoder is the faster one.
    workers: threads of DALI, or processes of the torch loader (0: none, in this process).

    Raises:
        DataError: "dali" where DALI is not installed or cannot start.
    """
    if backend == "auto":
        backend = "dali" if device == "cuda" and dali_installed() else "torch"
    common = dict(
        resolution=resolution,
        batch_size=batch_size,
        seed=seed,
        train=train,
        augmentation=augmentation,
        device=device,
        workers=workers,
    )
    if backend == "torch":
        from data_pipeline.torch_loader import TorchLoader

        return TorchLoader(index.splits[split], **common)  # type: ignore[arg-type]
    if not dali_installed():
        raise DataError("--loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use --loader torch.")
    from data_pipeline.dali import DaliLoader

    return DaliLoader(index.splits[split], **common)  # type: ignore[arg-type]
