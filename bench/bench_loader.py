"""Images per second of our loaders and of torchvision's v2 transforms on a plain DataLoader, on real photos.

Same photos, same transforms (random crop resized to 200 pixels, flip, optionally colour jitter, normalise), same number
of processes or threads. The two run in turns, so that both see the same machine; the figure is the median of the
ratios of neighbours. Each pass is an epoch of warm workers, or five of images that are in a cache. Then each is
fed to a step that takes 5,000 images/s and no core: the share of the time that it waits.

`pytest bench -k pipeline --benchmark-only`
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

from data_pipeline import Augmentation, Index, build_index, choose_cache, make_loader
from data_pipeline.dataset.probe import scan
from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.loaders.loader import dali_installed
from kernels.cpu.resize import resizer

RESOLUTION, BATCH, WORKERS, PAIRS = 200, 64, 2, 5
STEP_RATE = 5000
SOURCES = ["torch", "dali", "ram", "disk"]
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


def ours(index: Index, augmentation: Augmentation, source: Any) -> Callable[[int], Iterator[Tensor]]:
    if source == "dali" and not dali_installed():
        pytest.skip("DALI is not installed: pip install nvidia-dali-cuda130")
    cached = source in ("ram", "disk")
    if cached:
        resizer(compiling=True)  # as for a data set that is worth it, which these photos are not
    made = make_loader(
        index,
        "train",
        backend="torch" if cached else source,
        cache=choose_cache(source, index, RESOLUTION) if cached else None,
        resolution=RESOLUTION,
        batch_size=BATCH,
        seed=0,
        train=True,
        augmentation=augmentation,
        workers=WORKERS,
    )
    return lambda epoch: (batch.images for batch in made.batches(epoch))


def images_per_second(epoch: Callable[[int], Iterator[Tensor]], number: int, epochs: int = 1) -> float:
    start = time.perf_counter()
    count = sum(len(images) for one in range(epochs * number, epochs * (number + 1)) for images in epoch(one))
    return count / (time.perf_counter() - start)


@pytest.fixture(scope="module")
def index(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield build_index(photos)


@pytest.mark.parametrize("augmentation", [PLAIN, Augmentation()], ids=["crop+flip", "crop+flip+colour"])
@pytest.mark.parametrize("source", SOURCES)
def test_pipeline_against_torchvision(
    benchmark: Any, index: Index, source: str, augmentation: Augmentation, tell: list[str]
) -> None:
    mine, peer = ours(index, augmentation, source), theirs(index, augmentation)
    # An epoch of cached photos takes so short a time that what the other left in caches and queues would be part of it.
    epochs = 5 if source in ("ram", "disk") else 1
    for epoch in (mine, peer):  # starts the workers and fills the page cache
        images_per_second(epoch, 0)
    images_per_second(mine, 1)  # what the first epoch left out is not in the cache yet
    pairs = [
        (images_per_second(mine, number, epochs), images_per_second(peer, number)) for number in range(2, PAIRS + 2)
    ]
    ratios = [a / b for a, b in pairs]
    figures = {
        "source": source,
        "workers": WORKERS,
        "images_per_second": round(statistics.median(a for a, _ in pairs), 1),
        "torchvision_images_per_second": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    benchmark.extra_info.update(figures)
    tell.append(f"{benchmark.name}: {figures}")
    # pytest-benchmark's own table: one more epoch of ours.
    benchmark.pedantic(lambda: images_per_second(mine, PAIRS + 2), rounds=1, iterations=1)


@pytest.mark.parametrize("source", ["torchvision", *SOURCES])
def test_pipeline_feeding_a_step(benchmark: Any, index: Index, source: str, tell: list[str]) -> None:
    epoch = theirs(index, PLAIN) if source == "torchvision" else ours(index, PLAIN, source)
    for number in range(2):
        images_per_second(epoch, number)
    shares = [_share_waiting(epoch, number) for number in range(2, PAIRS + 2)]
    figures = {"source": source, "step_images_per_second": STEP_RATE, "waiting": round(statistics.median(shares), 3)}
    benchmark.extra_info.update(figures)
    tell.append(f"{benchmark.name}: {figures}")
    benchmark.pedantic(lambda: _share_waiting(epoch, PAIRS + 2), rounds=1, iterations=1)


def _share_waiting(epoch: Callable[[int], Iterator[Tensor]], number: int) -> float:
    """Of an epoch after its first batch, which starts the workers."""
    waited, batches = 0.0, epoch(number)
    next(batches)
    start = asked = time.perf_counter()
    for images in batches:
        waited += time.perf_counter() - asked
        time.sleep(len(images) / STEP_RATE)
        asked = time.perf_counter()
    return waited / (asked - start)


def test_pipeline_index(benchmark: Any, photos: Path, tell: list[str]) -> None:
    """Files whose header and end are read, in one second of one core, from a warm disk."""
    paths = sorted(map(str, photos.glob("images/*/*.jpg")))

    def files_per_second() -> float:
        start = time.process_time()
        assert all(scan(path).reason is None for path in paths)
        return len(paths) / (time.process_time() - start)

    files_per_second()
    rate = statistics.median(files_per_second() for _ in range(PAIRS))
    benchmark.extra_info["files_per_core_second"] = round(rate)
    tell.append(f"{benchmark.name}: {rate:.0f} files per core and second")
    benchmark.pedantic(files_per_second, rounds=1, iterations=1)
