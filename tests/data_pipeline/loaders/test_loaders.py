"""Both loaders keep one contract: same images in the same order whatever the workers, backend and point of start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data_pipeline import Augmentation, DataError, Index, Loader, build_index
from data_pipeline.loaders import loader
from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD, train_params
from data_pipeline.loaders.torch_loader import upright
from tests.batches import same
from tests.loaders import BACKENDS, everything, jpeg, make


@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(index: Index, backend: str) -> None:
    made = make(index, backend=backend)
    assert (made.backend, made.num_images, made.steps_per_epoch) == (backend, 24, 4)
    batches = everything(made)
    assert len(batches) == 4
    for images, labels in batches:
        assert images.shape == (5, 3, 24, 24)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (5,)
        assert labels.dtype == torch.int64
    pixels = torch.cat([batch.images for batch in batches]) * torch.tensor(IMAGENET_STD)[:, None, None]
    pixels += torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    made.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_covers_each_image_once_in_order(index: Index, backend: str) -> None:
    made = make(index, "val", backend=backend, batch_size=4)
    for _ in range(2):
        batches = everything(made)
        assert [len(batch.labels) for batch in batches] == [4, 4, 2]
        assert torch.cat([batch.labels for batch in batches]).tolist() == index.splits["val"].labels.tolist()
    one_by_one = make(index, "val", batch_size=1)
    ours = torch.cat([batch.images for batch in batches])
    expected = torch.cat([batch.images for batch in everything(one_by_one)])
    assert (ours - expected).abs().max() < 3 / 255 / 0.22  # at most three steps of an 8-bit pixel
    # No two pictures are alike, so this tells an image from its neighbour.
    distances = torch.cdist(ours.flatten(1), expected.flatten(1))
    assert distances.argmin(1).tolist() == list(range(10))
    made.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_start_continues_what_was_interrupted(index: Index, backend: str) -> None:
    whole = {epoch: everything(make(index, backend=backend), epoch) for epoch in (0, 1)}
    assert not same(whole[0], whole[1])
    for start in range(6):
        resumed = make(index, backend=backend)
        assert same(everything(resumed, 1, start), whole[1][start:])
        resumed.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_may_be_left_and_another_begun(index: Index, backend: str, workers: int) -> None:
    whole = [everything(make(index, backend=backend), epoch) for epoch in range(3)]
    made = make(index, backend=backend, workers=workers)
    for epoch in (0, 2, 1):
        left = made.batches(0)
        assert torch.equal(next(left).images, whole[0][0].images)
        assert same(everything(made, epoch), whole[epoch])
        assert same(everything(made, epoch, 2), whole[epoch][2:])
        with pytest.raises(RuntimeError, match="another one started"):
            next(left)
    made.close()
    assert same(everything(made, 1), whole[1])
    made.close()


def test_workers_and_threads_change_nothing(index: Index) -> None:
    """With different batch sizes too: 24 images in fours and in eights are the same 24 images."""
    aug = Augmentation()
    alone = everything(make(index, augmentation=aug, batch_size=8), 4)
    for workers in (1, 2):
        made = make(index, augmentation=aug, batch_size=8, workers=workers)
        assert same(everything(made, 4), alone)
        made.close()
    fours = everything(make(index, augmentation=aug, batch_size=4), 4)
    together = [torch.cat([batch.images for batch in batches]) for batches in (alone, fours)]
    assert torch.equal(*together)


def test_dali_threads_change_nothing(index: Index) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    one, three = (everything(make(index, backend="dali", workers=workers)) for workers in (1, 3))
    assert same(one, three)


def test_loading_leaves_torchs_random_state_alone(index: Index) -> None:
    before = torch.get_rng_state()
    everything(make(index))
    assert torch.equal(torch.get_rng_state(), before)


def reference(path: str, window: np.ndarray, flip: bool, color: np.ndarray | None, side: int) -> Tensor:
    """The contract said with other tools: PIL decodes and rotates, torchvision resizes in float, then step by step."""
    with Image.open(path) as image:
        x, y, w, h = window.tolist()
        way = _rotation(image)
        upright = image.convert("RGB") if way is None else image.convert("RGB").transpose(way)
        pixels = np.asarray(upright)[y : y + h, x : x + w]
    tensor = F.resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1).double(), [side, side], antialias=True)
    tensor = tensor.flip(-1) if flip else tensor
    if color is not None:
        affine = torch.from_numpy(color).double()
        tensor = torch.einsum("ij,jhw->ihw", affine[:, :3], tensor) + affine[:, 3, None, None]
    return F.normalize(tensor.clamp(0, 255) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))


def _rotation(image: Image.Image) -> Image.Transpose | None:
    return {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(image.getexif().get(0x0112, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_what_the_augmentation_says(index: Index, backend: str) -> None:
    aug = Augmentation(brightness=0.1, contrast=0.1, saturation=0.1, hue=5.0)
    made = make(index, backend=backend, augmentation=aug, resolution=20)
    split = index.splits["train"]
    # In batches: the position in the epoch's order tells which image it is.
    for number, (images, labels) in enumerate(everything(made, 2)):
        indices = made.plan.step(2, number).indices
        params = train_params(aug, 3, 2, indices, split.sizes[indices])
        assert params.colors is not None
        for row, at in enumerate(indices):
            assert labels[row] == split.labels[at]
            args = split.paths[at], params.windows[row], bool(params.flips[row]), params.colors[row]
            off = (images[row] - reference(*args, side=20)).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255
            assert off.mean() < 0.6, (backend, at)
            assert off.max() < 4, (backend, at)
    made.close()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_applied(tmp_path: Path, backend: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.jpg").write_bytes(jpeg(3, exif=tags))
    index = build_index(tmp_path, cache_dir=tmp_path / "cache")
    made = make(index, "val", backend=backend, batch_size=2)
    (batch,) = everything(made)
    path, window = index.splits["val"].paths[0], made.plan.step(0, 0).params.windows[0]
    off = (batch.images[0] - reference(path, window, False, None, 24 + 2)[:, 1:-1, 1:-1]).abs() * 0.225 * 255
    assert off.max() < 3


def test_upright_is_pils_rotation() -> None:
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.getexif()[0x0112] = orientation
        way = _rotation(image)
        turned = image if way is None else image.transpose(way)
        assert torch.equal(upright(pixels, orientation), torch.from_numpy(np.array(turned)).permute(2, 0, 1))


def test_auto_is_torch_on_a_cpu(index: Index) -> None:
    assert make(index, backend="auto").backend == "torch"


def test_without_dali_auto_falls_back_and_dali_says_what_to_install(
    index: Index, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(loader, "dali_installed", lambda: False)
    assert make(index, backend="auto", device="cuda").backend == "torch"
    assert not recwarn.list
    with pytest.raises(DataError, match="pip install nvidia-dali-cuda130"):
        make(index, backend="dali")


@pytest.mark.parametrize(
    ("installed", "old"), [("2.1.0", True), ("1.53.0", True), ("2.2.0", False), ("2.10.0rc1", False)]
)
def test_a_dali_that_ignores_exif_is_not_used(
    installed: str, old: bool, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "version", lambda name: installed)
    monkeypatch.setattr(loader, "dali_installed", lambda: True)
    assert loader.old_dali() == (installed if old else None)
    if old:
        assert make(index, backend="auto", device="cuda").backend == "torch"
        with pytest.raises(DataError, match=f"needs DALI 2.2 or newer, as {installed} ignores"):
            make(index, backend="dali")


def test_without_a_gpu_dali_says_so(index: Index) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made: Any = make(index, backend="dali", device="cuda")
    with pytest.raises(DataError, match=r"DALI cannot start on cuda .*--loader torch"):
        made._start()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gpu_every_loader_says_so(index: Index, backend: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DataError, match=r"torch can use no GPU here .*: use --device cpu.$"):
        next(make(index, backend=backend, device="cuda").batches(0))


@pytest.mark.parametrize("change", [{"resolution": 0}, {"batch_size": 0}, {"workers": -1}, {"backend": "pil"}])
def test_settings_that_make_no_sense_are_refused(index: Index, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        make(index, **change)


def _differences(a: Loader, b: Loader) -> tuple[Tensor, Tensor]:
    """Of each image: difference of the means, and the 99th percentile of the differences; in 1/255."""
    scale = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    means, highest = [], []
    for x, y in zip(a.batches(0), b.batches(0), strict=True):
        assert torch.equal(x.labels, y.labels)
        off = ((x.images - y.images) * scale).flatten(1)
        means.append(off.mean(1).abs())
        highest.append(off.abs().quantile(0.99, dim=1))
    return torch.cat(means), torch.cat(highest)


@pytest.mark.parametrize(
    ("split", "resolution"), [("val", 64), ("val", 200), pytest.param("train", 200, marks=pytest.mark.slow)]
)
def test_backends_agree_on_real_photos(photos: Path, tmp_path: Path, split: str, resolution: int) -> None:
    """At most 0.5/255 on the mean of any image and 2/255 at its 99th percentile.

    Training windows end where the image is cut: there torch weighs the pixels that are left, DALI repeats the last one,
    which shows where a photo shrinks to a few dozen pixels. Evaluation has a margin, and agrees at any resolution.
    """
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    index = build_index(photos, cache_dir=tmp_path)
    common = dict(resolution=resolution, batch_size=50, workers=1, augmentation=Augmentation())
    means, highest = _differences(*(make(index, split, backend=backend, **common) for backend in ("torch", "dali")))
    assert len(means) == (200 if split == "val" else 600)
    assert means.max() <= 0.5
    assert highest.max() <= 2


def test_evaluation_sees_what_resize_and_centre_crop_see(photos: Path, tmp_path: Path) -> None:
    """torchvision's Resize to resolution / 0.875 and CenterCrop, on square photos: elsewhere CenterCrop rounds to a
    whole output pixel and our window to a whole source pixel."""
    index = build_index(photos, cache_dir=tmp_path)
    split = index.splits["val"]
    made = make(index, "val", resolution=112, batch_size=1)
    square = np.flatnonzero(split.sizes[:, 0] == split.sizes[:, 1])
    assert len(square) > 20
    for number in square[:20]:
        image = next(made.batches(0, int(number))).images[0]
        pixels = torch.from_numpy(np.asarray(Image.open(split.paths[number]).convert("RGB")).copy()).permute(2, 0, 1)
        theirs = F.center_crop(F.resize(pixels, [128], antialias=True), [112, 112])
        ours = (image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]) * 255
        assert (ours - theirs).mean().abs() < 0.1
        assert (ours - theirs).abs().quantile(0.99) <= 2
