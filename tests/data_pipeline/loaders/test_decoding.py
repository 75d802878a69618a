"""Every kind of JPEG that cameras and editors write looks the same whoever decodes it: DALI on a GPU's JPEG engine, its
kernels or threads, DALI on a CPU, and torchvision. The pictures are made here."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from data_pipeline import Augmentation, Index, build_index, make_loader
from data_pipeline.dataset.probe import BASELINE, CMYK, PROGRESSIVE
from data_pipeline.loaders.augment import IMAGENET_STD
from data_pipeline.loaders.dali_options import DaliOptions

RESOLUTION = 64
FOUR_BY_THREE = (160, 120)


def picture(width: int, height: int) -> Image.Image:
    """Waves and ramps of colour, so that chroma that is upsampled or placed otherwise shows; the same view at any
    size, so that what resizers make up at a border is little."""
    y, x = np.mgrid[:height, :width] * (160 / max(160, width, height))
    red, green = 128 + 90 * np.sin(x / 9 + y / 31), 128 + 90 * np.cos(y / 11 - x / 23)
    pixels = np.stack([red, green, 30 + 180 * (x + y) / (x + y).max(initial=1)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def jpeg(size: tuple[int, int] = FOUR_BY_THREE, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    picture(*size).convert(mode).save(out, "JPEG", **{"quality": 92, **options})
    return out.getvalue()


def turned(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return jpeg(exif=tags)


@cache
def kinds() -> dict[str, bytes]:
    found = {f"exif {orientation}": turned(orientation) for orientation in range(1, 9)}
    found |= {f"chroma {name}": jpeg(subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")}
    # Odd sizes end in the middle of a block, and of a pixel of chroma.
    found |= {f"chroma {name}, odd": jpeg((159, 121), subsampling=name) for name in ("4:2:2", "4:2:0")}
    found |= {f"progressive {name}": jpeg(subsampling=name, progressive=True) for name in ("4:4:4", "4:2:0")}
    found |= {
        "gray": jpeg(mode="L"),
        "gray, progressive": jpeg(mode="L", progressive=True),
        "restart markers by row": jpeg(restart_marker_rows=1),
        "restart markers by block": jpeg(restart_marker_blocks=3),
        "Adobe RGB": jpeg(keep_rgb=True),
        "CMYK": jpeg(mode="CMYK"),
        "colour profile": jpeg(icc_profile=bytes(70_000)),
        "quality 30": jpeg(quality=30),
        "quality 100": jpeg(quality=100),
    }
    sizes = ((1, 1), (1, 300), (300, 1), (7, 9), (16, 8), (17, 1000), (1000, 17), (2400, 1600))
    return found | {f"{width} x {height}": jpeg((width, height)) for width, height in sizes}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Two classes, and the same pictures to train and to validate on, in one order."""
    root = tmp_path_factory.mktemp("kinds")
    for split in ("train", "val"):
        for at, (name, content) in enumerate(kinds().items()):
            folder = root / split / "ab"[at % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name.replace(':', '')}.jpg").write_bytes(content)
    return build_index(root, cache_dir=tmp_path_factory.mktemp("index"))


def test_the_pictures_are_what_they_are_called(index: Index) -> None:
    split = index.splits["val"]
    assert len(split) == len(kinds())
    assert index.excluded == ()
    of = {Path(path).stem: at for at, path in enumerate(split.paths)}
    assert [split.orientations[of[f"exif {n}"]] for n in range(1, 9)] == list(range(1, 9))
    assert [split.kinds[of[name]] for name in ("progressive 420", "CMYK", "gray")] == [PROGRESSIVE, CMYK, BASELINE]
    assert b"Adobe\0" in kinds()["Adobe RGB"]
    assert kinds()["restart markers by block"].count(b"\xff\xd3") >= 3
    for name, factors in (("4:4:4", 0x11), ("4:2:2", 0x21), ("4:2:0", 0x22)):
        content = kinds()[f"chroma {name}"]
        assert content[content.index(b"\xff\xc0") + 11] == factors


Views = dict[str, Tensor]


@pytest.fixture(scope="module")
def views(index: Index) -> Callable[..., Views]:
    """(backend, device, decode, split) -> each picture as the loader gives it: whole in validation, a window of it,
    sometimes flipped, in training."""

    @cache
    def load(backend: Any, device: str, decode: Any, split: Literal["train", "val"]) -> Views:
        plain = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
        made = make_loader(
            index, split, backend=backend, resolution=RESOLUTION, batch_size=len(kinds()), seed=2,
            train=split == "train", augmentation=plain, device=device, workers=int(backend == "dali"),
            dali=DaliOptions(dali_decode=decode),
        )  # fmt: skip
        (batch,) = made.batches(0)
        indices = made.plan.step(0, 0).indices
        made.close()
        assert made.quarantined == []
        scale = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
        names = [Path(index.splits[split].paths[at]).stem for at in indices]
        return dict(zip(names, batch.images.cpu() * scale, strict=True))

    return load


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("decode", ["window", "whole"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", list(kinds()))
def test_dali_shows_what_torchvision_shows(
    views: Callable[..., Views], kind: str, split: str, decode: str, device: str
) -> None:
    """To half an 8-bit step in the mean, and two steps for 99 of 100 values, as real photos are."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    name = kind.replace(":", "")
    off = views("dali", device, decode, split)[name] - views("torch", "cpu", "window", split)[name]
    assert off.mean().abs() <= 0.5
    assert off.abs().flatten().quantile(0.99) <= 2
