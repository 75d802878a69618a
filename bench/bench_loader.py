"""Images per second of our loaders and of torchvision's v2 transforms on a plain DataLoader, on real photos.

Same photos, same transforms (random crop resized to 200 pixels, flip, optionally colour jitter, normalise), same number
of processes or threads. The two run in turns, so that both see the same machine; the figure is the median of the
ratios of neighbours. Each pass is an epoch of warm workers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from data_pipeline import Augmentation, Index, build_index, make_loader
from data_pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.loader import dali_installed

RESOLUTION, BATCH, WORKERS, PAIRS = 200, 64, 2, 5
PLAIN = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)


class Photos(Dataset[tuple[Tensor, int]]):
    """What torchvision's own training reference does for each image, with its faster decoder."""

    def __init__(self, index: Index, augmentation: Augmentation) -> None:
        self.paths, self.labels = index.splits["train"].paths, index.splits["train"].labels.tolist()
        aug = augmentation
        steps: list[Any] = [
            v2.RandomResizedCrop(RESOLUTION, aug.scale, aug.ratio, antialias=True),
            v2.RandomHorizontalFlip(aug.hflip),
        ]
        if aug.changes_color:
            steps.append(v2.ColorJitter(aug.brightness, aug.contrast, aug.saturation, aug.hue / 360))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        image = decode_image(self.paths[at], mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return self.transform(image), self.labels[at]


def theirs(index: Index, augmentation: Augmentation) -> Callable[[int], Iterator[Tensor]]:
    data = DataLoader(
        Photos(index, augmentation),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )

    def epoch(_: int) -> Iterator[Tensor]:
        for images, _labels in data:
            yield images.contiguous(memory_format=torch.channels_last)

    return epoch


def ours(index: Index, augmentation: Augmentation, backend: Any) -> Callable[[int], Iterator[Tensor]]:
    made = make_loader(
        index,
        "train",
        backend=backend,
        resolution=RESOLUTION,
        batch_size=BATCH,
        seed=0,
        train=True,
        augmentation=augmentation,
        workers=WORKERS,
    )
    return lambda epoch: (batch.images for batch in made.batches(epoch))


def images_per_second(epoch: Callable[[int], Iterator[Tensor]], number: int) -> float:
    start = time.perf_counter()
    count = sum(len(images) for images in epoch(number))
    return count / (time.perf_counter() - start)


@pytest.fixture(scope="module")
def index(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(photos, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("augmentation", [PLAIN, Augmentation()], ids=["crop+flip", "crop+flip+colour"])
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_loader_against_torchvision(benchmark: Any, index: Index, backend: str, augmentation: Augmentation) -> None:
    if backend == "dali" and not dali_installed():
        pytest.skip("DALI is not installed: pip install nvidia-dali-cuda130")
    mine, peer = ours(index, augmentation, backend), theirs(index, augmentation)
    for epoch in (mine, peer):  # starts the workers and fills the page cache
        images_per_second(epoch, 0)
    pairs = [(images_per_second(mine, number), images_per_second(peer, number)) for number in range(1, PAIRS + 1)]
    ratios = [a / b for a, b in pairs]
    figures = {
        "backend": backend,
        "workers": WORKERS,
        "images_per_second": round(statistics.median(a for a, _ in pairs), 1),
        "torchvision_images_per_second": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    benchmark.extra_info.update(figures)
    print(f"\n{figures}")
    # pytest-benchmark's own table: one more epoch of ours.
    benchmark.pedantic(lambda: images_per_second(mine, PAIRS + 1), rounds=1, iterations=1)
