"""Photos, loaders on caches of them, and what tests of any loader ask of batches."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline import Batch, Index, make_loader
from data_pipeline.loaders.cache import choose_cache
from data_pipeline.loaders.loader import Loader


def picture(number: int, width: int, height: int, **options: Any) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / (5 + number % 3) + number), 250 * y / height, 2 * (x + y) % 250], 2)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def write_photos(root: Path, each: int = 6) -> Path:
    for split, count in (("train", each), ("val", 3)):
        for at, name in enumerate(("a", "b ü")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                tags = Image.Exif()
                tags[0x0112] = 1 + (number + at) % 8
                content = picture(at * count + number, 60 + 7 * number, 90 - 5 * number, exif=tags)
                (root / split / name / f"{number}.jpg").write_bytes(content)
    return root


def make(index: Index, kind: Any, folder: Path, split: Any = "train", **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(resolution=24, batch_size=5, seed=3, workers=2, augmentation=None)
    settings |= changes
    pixels = choose_cache(kind, index, settings["resolution"], cache_dir=folder, side=settings.pop("cache_side", None))
    return make_loader(index, split, train=split == "train", cache=pixels, **settings)


def everything(made: Loader, epoch: int = 0, start: int = 0) -> list[Batch]:
    batches = list(made.batches(epoch, start))
    made.close()
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in zip(a, b, strict=True)
    )


def one_sentence(error: BaseException, *words: str) -> None:
    message = str(error)
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message, message
