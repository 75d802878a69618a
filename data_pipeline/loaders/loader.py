"""The contract of a loader, whichever backend fills it: what is in each batch, and how unreadable files are handled.

A file that becomes unreadable during a run is quarantined: named once, and never asked for again. In training its row
goes to another image, so that the number and shape of batches stay: to the images that the epoch would have left out
with its incomplete last batch, in their order; only when those are used up, to the epoch's first ones once more.
Evaluation leaves it out, and its batch is one image smaller. Who is in which batch is a function of (seed, epoch, the
set of quarantined images) alone, so a loader that meets a bad file starts again from the batch that it was about to
give.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.dataset.index import Split
from data_pipeline.errors import BadFiles, DataError
from data_pipeline.loaders.augment import (
    CROP_FRACTION,
    IMAGENET,
    Augmentation,
    Interpolation,
    Normalization,
    Params,
    balanced_order,
    epoch_order,
    eval_margin,
    eval_params,
    train_params,
)
from data_pipeline.loaders.postprocess import finish
from data_pipeline.loaders.prefetch import SideStream, sent

# Files that may become unreadable before it is the disk that is to blame, at most half of a split: this many, or 1 %.
QUARANTINE_LIMIT, QUARANTINE_SHARE = 8, 0.01

_log = logging.getLogger("data_pipeline")


class Batch(NamedTuple):
    """images [B, 3, R, R] float32, channels_last, normalised; labels [B] int64."""

    images: Tensor
    labels: Tensor


class Step(NamedTuple):
    """What goes into one batch: positions in the split, and what happens to each image."""

    indices: NDArray[np.int64]
    params: Params


class Shard(NamedTuple):
    """What one of several processes takes of every batch: shares without overlap whose sizes differ by one at most."""

    rank: int = 0
    ranks: int = 1
    micro_batches: int = 1
    """How often each process divides its share again, to go through the model."""

    def rows(self, count: int) -> NDArray[np.int64]:
        """This process's rows of a batch of `count`, in order.

        Where the batch can be divided evenly, each row i comes with its opposite, count - 1 - i, which mixing pairs it
        with; and the n-th micro-batches of all processes make up the n-th of one process that divides the whole
        batch.
        """
        rank, ranks, micro_batches = self
        if count % (2 * ranks * micro_batches):
            return np.array_split(np.arange(count), ranks)[rank]
        whole, middle = np.split(np.arange(count // 2), [micro_batches // 2 * (count // micro_batches)])
        mine = whole.reshape(-1, ranks, count // micro_batches // ranks)[:, rank].ravel()
        front = np.concatenate([mine, middle.reshape(ranks, -1)[rank]])
        return np.concatenate([front, count - 1 - front[::-1]])


WHOLE = Shard()


@dataclass
class Plan:
    """What every batch of every epoch holds, before a file is opened. Cheap to copy into another process.

    Training visits the images in the order of `epoch_order(seed, epoch)`, or `balanced_order`, and drops the last,
    incomplete batch, or fills it with the epoch's first images;
    evaluation visits each image once, in the index's order, and its last batch is shorter. Quarantined images are
    replaced as the top of this file says.
    """

    split: Split
    resolution: int
    batch_size: int
    seed: int
    train: bool
    augmentation: Augmentation
    quarantined: frozenset[int] = field(default_factory=frozenset)
    """Positions in the split of images that are not asked for any more."""
    crop_fraction: float = CROP_FRACTION
    """Share of the short side that evaluation looks at."""
    interpolation: Interpolation = "bilinear"
    """How evaluation's view is resized; training's crops always by the bilinear filter."""
    normalization: Normalization = IMAGENET
    balanced: bool = False
    """Training draws small classes more often (`balanced_order`)."""
    filled: bool = False
    """Training fills an epoch's last batch rather than dropping it."""
    shard: Shard = WHOLE
    """The part of each batch that is this process's; order and crops know nothing of it."""

    def __post_init__(self) -> None:
        self._order: tuple[object, NDArray[np.int64]] | None = None

    @property
    def steps(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + bool(rest and (self.filled or not self.train))

    @property
    def margin(self) -> int:
        """Output pixels on each side that are resized along with every window and cut off."""
        return 0 if self.train else eval_margin(self.interpolation)

    def step(self, epoch: int, batch: int) -> Step:
        rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        if not self.train:
            indices = self._mine(np.arange(len(self.split))[rows])
            indices = indices[~self._is_quarantined(indices)]
            return Step(
                indices, eval_params(self.split.sizes[indices], self.resolution, self.crop_fraction, self.margin)
            )
        indices = self._mine(self.order(epoch)[rows])
        sizes = self.split.sizes[indices]
        return Step(indices, train_params(self.augmentation, self.seed, epoch, indices, sizes))

    def _mine(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        return batch[self.shard.rows(len(batch))]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """[steps * batch_size]: the images of a training epoch, one batch after another."""
        key, known = (epoch, self.quarantined), self._order  # read once: a thread may make batches ahead
        if known is None or known[0] != key:
            if self.balanced:
                order = balanced_order(self.seed, epoch, self.split.labels)
            else:
                order = epoch_order(self.seed, epoch, len(self.split))
            length = self.steps * self.batch_size
            used, rest = np.resize(order, length), order[length:]
            bad = self._is_quarantined(used)
            if bad.any():
                spare = np.concatenate([rest, used])
                used = used.copy()
                used[bad] = np.resize(spare[~self._is_quarantined(spare)], int(bad.sum()))
            self._order = known = key, used
        return known[1]

    def _is_quarantined(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.isin(indices, np.fromiter(self.quarantined, np.int64, len(self.quarantined)))


class Loader(ABC):
    """Batches of one split on one device. Its whole state is a position: (epoch, batch)."""

    backend: str
    quarantined: list[tuple[str, str]]
    """(path, reason) of every file that became unreadable since it was indexed, in the order in which they were
    found."""
    cache_note: str = ""
    """Which cache was chosen, and why."""

    def __init__(self, plan: Plan, device: str | torch.device, workers: int) -> None:
        self.plan = plan
        self.device = torch.device(device)
        self.workers = workers
        self.num_images = len(plan.split)
        self.steps_per_epoch = plan.steps
        self.quarantined = []
        self._passes = 0
        self._beside = SideStream(self.device)

    @property
    def seconds_held(self) -> float:
        """How long `batches` has waited so far because the device was behind, and not for a batch."""
        return self._beside.seconds_held

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; starting a pass ends an unfinished earlier one. On a GPU each
        is made while the device works on what was done with the one before.

        Files that became unreadable since they were indexed are quarantined, named in a warning of the logger
        "data_pipeline" and in `quarantined`.

        Raises:
            DataError: so many files became unreadable that the disk or the data set must be gone.
            RuntimeError: this pass is asked for more after another one started.
        """
        self._passes += 1
        this = self._passes
        while True:
            # An evaluation batch may have lost its only image.
            numbers = [
                n for n in range(start, self.steps_per_epoch) if self.plan.train or len(self.plan.step(epoch, n)[0])
            ]
            try:
                for number, batch in zip(numbers, self._beside.feed(self._produce(epoch, numbers)), strict=True):
                    yield batch
                    if this != self._passes:
                        raise RuntimeError(
                            "this pass over the loader ended when another one started or the loader was closed"
                        )
                    start = number + 1
                return
            except BadFiles as bad:
                self.quarantine(bad.reasons)

    def quarantine(self, reasons: dict[int, str]) -> None:
        """Never ask for these images (position in the split -> why) again.

        Raises:
            DataError: they are too many for an accident.
        """
        for index, reason in reasons.items():
            if index in self.plan.quarantined:
                continue
            path = self.plan.split.paths[index]
            self.quarantined.append((path, reason))
            self.plan.quarantined |= {index}
            _log.warning("%s can no longer be decoded (%s): it is left out from here on.", path, reason)
        count, limit = len(self.plan.quarantined), max(QUARANTINE_LIMIT, QUARANTINE_SHARE * self.num_images)
        if count > min(limit, self.num_images / 2):
            path, reason = self.quarantined[-1]
            raise DataError(
                f"{count} of {self.num_images} images can no longer be decoded, the last {path} ({reason}): "
                "check the disk and the data set, and continue with --resume."
            )

    @abstractmethod
    def _produce(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        """The batches of these numbers, one each, where no other pass is under way.

        Raises:
            BadFiles: instead of a batch that holds them; they may also lie in a later batch that is under way. It is
                called again afterwards, from the batch that it did not give.
        """

    @property
    def description(self) -> str:
        """The backend, and how it is set up."""
        return self.backend

    def close(self) -> None:
        """Give back threads, processes and buffers, and end an unfinished pass; `batches` starts them again."""
        self._passes += 1

    def _batch(self, pixels: Tensor, step: Step) -> Batch:
        (labels,) = sent([torch.from_numpy(self.plan.split.labels[step.indices])], self.device)
        return Batch(finish(pixels, step.params, self.device, self.plan.normalization), labels)


def old_dali() -> str | None:
    """DALI's version where it is one that ignores EXIF orientation (before 2.2)."""
    for cuda in ("130", "120"):
        with suppress(PackageNotFoundError):
            found = version(f"nvidia-dali-cuda{cuda}")
            return found if tuple(map(int, re.findall(r"\d+", found)[:2])) < (2, 2) else None
    return None


def dali_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
