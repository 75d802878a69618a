"""Seventeen kinds of odd or damaged image in one data set: no loader stops, and what is left out is named."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import Index, Loader, build_index, choose_cache, make_loader
from data_pipeline.loaders.loader import dali_installed

DALI = pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
SOURCES = ["torch", pytest.param("dali", marks=DALI), "ram", "disk"]
RNG = np.random.default_rng(0)


def encoded(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    out = io.BytesIO()
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([5 * x % 256, 7 * y % 256, (3 * x + 2 * y) % 256], 2).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


def sixteen_bit() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(out, "PNG")
    return out.getvalue()


def rotated() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


def bits_flipped() -> bytes:
    """Among the pixels of a JPEG: decoders make something of it, or refuse it; either is right."""
    content = bytearray(encoded(size=(80, 60)))
    start = content.index(b"\xff\xda") + 14
    for at in RNG.integers(start, len(content) - 2, 20):
        content[at] ^= 1 << int(RNG.integers(8))
    return bytes(content)


JPEG = encoded()
Content = bytes | Callable[[Path], object]
LEFT_OUT: dict[str, Content] = {
    "truncated": JPEG[: len(JPEG) // 2],
    "empty": b"",
    "garbage": RNG.bytes(3000),
    "header only": JPEG[: JPEG.index(b"\xff\xda")],
    "16-bit": sixteen_bit(),
    "jpeg 2000": encoded("JPEG2000"),
    "directory": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to("nowhere"),
}
KEPT: dict[str, Content] = {
    "bit flips": bits_flipped(),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "cmyk": encoded(mode="CMYK"),
    "gray": encoded(mode="L"),
    "1x1": encoded(size=(1, 1)),
    "progressive": encoded(progressive=True),
    "exif-rotated": encoded(exif=rotated()),
    "vanishes": JPEG,
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Path]:
    """All kinds in both splits, under names with spaces, and enough good photos beside them; one is gone since."""
    root = tmp_path_factory.mktemp("odd ünd 写真")
    for split in ("train", "val"):
        for name in ("a b", "ç"):
            (root / split / name).mkdir(parents=True)
            for number in range(6):
                (root / split / name / f"good {number}.jpg").write_bytes(encoded(size=(40 + number, 30)))
        for kind, content in (LEFT_OUT | KEPT).items():
            path = root / split / "a b" / f"{kind}.jpg"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
    cache = tmp_path_factory.mktemp("cache")
    index = build_index(root, cache_dir=cache)
    for split in ("train", "val"):
        (root / split / "a b" / "vanishes.jpg").unlink()
    return index, cache


def names(found: Any) -> set[str]:
    return {Path(path).stem for path, _ in found}


def make(odd: tuple[Index, Path], split: Any, source: Any) -> Loader:
    index, folder = odd
    return make_loader(
        index,
        split,
        backend="dali" if source == "dali" else "torch",
        resolution=16,
        batch_size=4,
        seed=0,
        train=split == "train",
        augmentation=None,
        workers=1,
        cache=choose_cache(source, index, 16, cache_dir=folder) if source in ("ram", "disk") else None,
    )


def test_the_index_names_what_it_leaves_out(odd: tuple[Index, Path]) -> None:
    index, _ = odd
    assert len(LEFT_OUT) + len(KEPT) == 17
    assert names(index.excluded) == set(LEFT_OUT)
    assert len(index.excluded) == 2 * len(LEFT_OUT)
    assert all(reason and "\n" not in reason for _, reason in index.excluded)


@pytest.mark.parametrize("source", SOURCES)
def test_no_loader_stops(odd: tuple[Index, Path], source: str) -> None:
    index, _ = odd
    for split in ("train", "val"):
        made = make(odd, split, source)
        seen = 0
        for epoch in range(3):
            for images, labels in made.batches(epoch):
                assert images.isfinite().all()
                assert len(images) == len(labels)
                seen += len(labels)
        steps = made.steps_per_epoch
        made.close()
        # Whether flipped bits decode is the decoder's to say.
        assert {"vanishes"} <= names(made.quarantined) <= {"vanishes", "bit flips"}
        lost = len(made.quarantined)
        assert seen == 3 * (4 * steps if split == "train" else len(index.splits["val"]) - lost)


@pytest.mark.parametrize("source", SOURCES)
def test_a_data_set_that_cannot_be_written_to_is_enough(odd: tuple[Index, Path], source: str) -> None:
    index, _ = odd
    folders = [index.root, *(path for path in index.root.rglob("*") if path.is_dir() and not path.is_symlink())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        made = make(odd, "val", source)
        before = {path: os.lstat(path).st_mtime_ns for path in index.root.rglob("*")}
        assert torch.cat([labels for _, labels in made.batches(0)]).numel() >= len(index.splits["val"]) - 2
        made.close()
        assert {path: os.lstat(path).st_mtime_ns for path in index.root.rglob("*")} == before
    finally:
        for folder in folders:
            folder.chmod(0o755)
