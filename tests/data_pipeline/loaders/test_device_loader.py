"""Pixels on the device: the views of every other cache, from a kernel, without a file after the first pass.

On a CPU the "device" is the CPU and the kernel its PyTorch twin, or Triton's interpreter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import Augmentation, DataError, Index, build_index, choose_cache, make_loader
from data_pipeline.loaders import cache
from data_pipeline.loaders import device_loader as device_augment
from data_pipeline.loaders.augment import IMAGENET_STD, rectangles_in_pixels
from data_pipeline.loaders.cache import PixelCache, disk_store
from data_pipeline.loaders.loader import Loader
from data_pipeline.loaders.pixel_store import Content, Photos, PixelStore, Views, stored_bytes
from kernels.augment import augment
from tests.batches import everything, same, write_photos

PLAIN = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_photos(tmp_path_factory.mktemp("photos")), cache_dir=tmp_path_factory.mktemp("index"))


def make(index: Index, folder: Path, split: Any = "train", *, kind: Any = "gpu", **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(resolution=24, batch_size=5, seed=3, workers=2, augmentation=None) | changes
    pixels = PixelCache(kind, "", index, settings["resolution"], folder)
    return make_loader(index, split, train=split == "train", cache=pixels, **settings)


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_the_other_caches_but_for_their_rounding(index: Index, tmp_path: Path, split: str) -> None:
    for aug in (PLAIN, Augmentation()):
        ours, theirs = (make(index, tmp_path, split, kind=kind, augmentation=aug) for kind in ("gpu", "ram"))
        assert ours.backend == "device"
        for a, b in zip(ours.batches(1), theirs.batches(1), strict=True):
            assert torch.equal(a.labels, b.labels)
            assert a.images.shape == b.images.shape
            assert a.images.dtype == torch.float32
            assert a.images.is_contiguous(memory_format=torch.channels_last)
            off = (a.images - b.images).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
            # Theirs round to 8 bits, twice where both directions are resized; colours stretch that by up to 1.5.
            assert off.max() < (1.1 if aug is PLAIN else 3)
            assert off.mean() < 0.5
        ours.close()
        theirs.close()


def test_the_same_bits_whatever_the_threads_and_the_start(index: Index, tmp_path: Path) -> None:
    whole = everything(make(index, tmp_path), 1)
    for workers in (0, 1):
        assert same(everything(make(index, tmp_path, workers=workers), 1), whole)
    for start in range(4):
        assert same(everything(make(index, tmp_path), 1, start), whole[start:])
    made = make(index, tmp_path)
    next(made.batches(0))  # a pass that is left
    assert same(everything(made, 1), whole)


def test_the_interpreted_kernel_makes_the_same_batch(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aug = Augmentation(random_erasing=1.0)
    settings: dict[str, Any] = dict(batch_size=3, resolution=16, augmentation=aug)
    twin = next(make(index, tmp_path, **settings).batches(0))
    monkeypatch.setattr(device_augment, "augment", functools.partial(augment, impl="triton"))
    made = make(index, tmp_path, **settings)
    kernel = next(made.batches(0))
    assert torch.equal(kernel.labels, twin.labels)
    torch.testing.assert_close(kernel.images, twin.images, rtol=0, atol=1e-4)
    drawn = made.plan.step(0, 0).params
    assert drawn.erased is not None
    assert drawn.fills is not None
    for row, (x, y, w, h) in enumerate(rectangles_in_pixels(drawn.erased, 16).tolist()):
        assert w * h > 0
        assert (kernel.images[row, :, y : y + h, x : x + w] == torch.from_numpy(drawn.fills[row])[:, None, None]).all()


def test_rand_augment_sees_8_bit_pixels_between_crop_and_colours(index: Index, tmp_path: Path) -> None:
    aug = Augmentation(rand_augment_ops=2, rand_augment_magnitude=12, random_erasing=0.5)
    ours, theirs = (everything(make(index, tmp_path, kind=kind, augmentation=aug)) for kind in ("gpu", "ram"))
    scale = 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    off = torch.cat([((a.images - b.images) * scale).abs().mean((1, 2, 3)) for a, b in zip(ours, theirs, strict=True)])
    # One step of an 8-bit pixel, which operations such as equalize and solarize make larger on few images.
    assert off.median() < 1
    plain = everything(make(index, tmp_path))
    assert not any(torch.equal(a.images, b.images) for a, b in zip(ours, plain, strict=True))


def test_after_the_first_pass_no_file_is_needed(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", each=5)
    index = build_index(root, cache_dir=tmp_path)
    made: Any = make(index, tmp_path)
    expected = [list(made.batches(epoch)) for epoch in (0, 1)]
    assert made.store.ready.all()
    (root / "train").rename(tmp_path / "elsewhere")
    for epoch in (0, 1):
        assert same(list(made.batches(epoch)), expected[epoch])
    made.close()


def test_training_and_validation_share_no_store_and_loaders_of_a_split_do(index: Index) -> None:
    pixels = PixelCache("gpu", "", index, 24)
    common: dict[str, Any] = dict(resolution=24, batch_size=4, seed=0, workers=1, augmentation=None, cache=pixels)
    first: Any = make_loader(index, "train", train=True, **common)
    again: Any = make_loader(index, "train", train=True, **{**common, "resolution": 16})
    other: Any = make_loader(index, "val", train=False, **common)
    assert first.store is again.store
    assert first.store is not other.store
    list(first.batches(0))
    assert again.store.ready.all()
    assert next(again.batches(0)).images.shape == (4, 3, 16, 16)


def test_a_cache_on_disk_is_read_instead_of_the_photos(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(make(index, tmp_path))
    disk_store(index, "train", Photos(170), 1, tmp_path)
    monkeypatch.setattr(PixelStore, "decode", lambda *_: pytest.fail("decoded"))
    assert same(everything(make(index, tmp_path)), expected)


def test_a_file_that_cannot_be_decoded_is_quarantined_and_nothing_else_is_lost(tmp_path: Path) -> None:
    index = build_index(write_photos(tmp_path / "photos"), cache_dir=tmp_path)
    for at in (4, 9):
        Path(index.splits["train"].paths[at]).write_bytes(b"garbage")
    made, other = make(index, tmp_path, batch_size=3), make(index, tmp_path, batch_size=3, kind="ram")
    for epoch in range(2):
        ours, theirs = list(made.batches(epoch)), list(other.batches(epoch))
        assert [len(batch.labels) for batch in ours] == [3] * 4
        if epoch:  # from here on both know both
            assert [b.labels.tolist() for b in ours] == [b.labels.tolist() for b in theirs]
    assert {path for path, _ in made.quarantined} == {index.splits["train"].paths[at] for at in (4, 9)}
    made.close()
    other.close()


def test_without_a_gpu_the_flag_is_refused(index: Index) -> None:
    with pytest.raises(DataError, match=r"--cache gpu needs a GPU .*: use --cache ram\.$"):
        choose_cache("gpu", index, 24)


def test_what_does_not_fit_goes_to_ram_in_words_and_auto_takes_the_first_that_fits(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents: dict[str, Content] = {"train": Photos(170), "val": Views(24)}
    need = sum(stored_bytes(index.splits[name], content) for name, content in contents.items())
    for free, fits in ((need / cache.GPU_SHARE + 1, True), (need / cache.GPU_SHARE - 1, False)):
        monkeypatch.setattr(cache, "gpu_memory", lambda device, free=free: int(free))
        for asked in ("auto", "gpu"):
            found = choose_cache(asked, index, 24, device="cuda", cache_dir=tmp_path)
            assert found.kind == ("gpu" if fits else "ram")
            for words in (f"{need / 1e6:.1f} MB", f"{free / 1e6:.1f} MB are free", "60%"):
                assert words in found.reason


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_images_are_the_cpus(photos: Path, tmp_path: Path, cuda: torch.device) -> None:
    index = build_index(photos, cache_dir=tmp_path)
    settings: dict[str, Any] = dict(resolution=200, batch_size=60, workers=4, augmentation=Augmentation())
    made, on_cpu = make(index, tmp_path, device=cuda, **settings), make(index, tmp_path, device="cpu", **settings)
    for a, b in zip(made.batches(0), on_cpu.batches(0), strict=True):
        torch.testing.assert_close(a.images.cpu(), b.images, rtol=0, atol=1e-3)
        assert torch.equal(a.labels.cpu(), b.labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(made.batches(1))) == made.steps_per_epoch
    finally:
        torch.cuda.set_sync_debug_mode("default")
