"""Small data sets of pictures, and loaders for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import Batch, Index, Loader, build_index, make_loader
from data_pipeline.loaders import loader

BACKENDS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not loader.dali_installed(), reason="DALI is not installed")),
]


PER_CLASS = {"train": 12, "val": 5}


def jpeg(number: int, **options: Any) -> bytes:
    """A smooth picture that only its number decides, of a size of its own."""
    width, height = 40 + 3 * (number % 7), 36 + 4 * (number % 5)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / (5 + number % 3) + number), 4 * y, 2 * (x + y)], 2)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def make(index: Index, split: Any = "train", **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(backend="torch", resolution=24, batch_size=5, seed=3, workers=0, augmentation=None)
    return make_loader(index, split, train=split == "train", **{**settings, **changes})


def everything(made: Loader, epoch: int = 0, start: int = 0) -> list[Batch]:
    return list(made.batches(epoch, start))


def two_folders(root: Path, each: int = 4) -> Index:
    for split in ("train", "val"):
        for at, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                (root / split / name / f"{number}.jpg").write_bytes(jpeg(at * each + number))
    return build_index(root, cache_dir=root / "cache")
