"""Decoded pixels in RAM and on disk: the same everywhere, built once and whole, refused where they don't fit."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline import Augmentation, DataError, Index, build_index, make_loader
from data_pipeline.loaders import cache
from data_pipeline.loaders.cache import choose_cache, disk_store
from data_pipeline.loaders.cached_loader import CachedLoader, resized
from data_pipeline.loaders.pixel_store import Content, Photos, PixelStore, Views, stored_bytes, training_side
from tests.batches import everything, make, same, write_photos


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_photos(tmp_path_factory.mktemp("photos")), cache_dir=tmp_path_factory.mktemp("index"))


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), side=st.integers(1, 600))
def test_stored_sizes(width: int, height: int, side: int) -> None:
    stored = Photos(side).sizes(build_split((width, height)))[0]
    assert stored.min() == min(side, width, height)
    assert (stored <= (width, height)).all()
    # The shape stays, to half a pixel of the longer side.
    assert abs(stored.max() - max(width, height) * stored.min() / min(width, height)) <= 0.5


@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    far=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_boxes_stay_inside_and_cover_the_window(
    size: tuple[int, int], corner: tuple[float, float], far: tuple[float, float]
) -> None:
    first = np.minimum((np.array(size) * corner).astype(int), np.array(size) - 1)
    extent = np.maximum(1, ((np.array(size) - first) * far).astype(int))
    split = build_split(size)
    store = PixelStore(split, Photos(100))
    box = store.boxes(np.array([0]), np.array([[*first, *extent]], np.int32))[0]
    stored = store.sizes[0]
    assert (box[:2] >= 0).all()
    assert (box[2:] >= 1).all()
    assert (box[:2] + box[2:] <= stored).all()
    scale = stored / size
    assert (np.abs(box[:2] - first * scale) <= 1).all()
    assert (np.abs(box[:2] + box[2:] - (first + extent) * scale) <= 1).all()


def build_split(size: tuple[int, int]) -> Any:
    from data_pipeline.dataset.index import Split

    one = np.ones(1, np.uint8)
    return Split(("x",), np.zeros(1, np.int64), np.array([size], np.int32), one, one)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_is_cached_is_the_upright_photo(index: Index, tmp_path: Path, kind: str) -> None:
    whole: Any = make(index, kind, tmp_path)
    small: Any = make(index, kind, tmp_path, cache_side=28)
    for made in (whole, small):
        assert made.store.complete(2) == {}
        for at, path in enumerate(index.splits["train"].paths):
            turned = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            width, height = made.store.sizes[at].tolist()
            expected = np.asarray(turned.resize((width, height), Image.Resampling.LANCZOS), int)
            off = np.abs(made.store.image(at).numpy().astype(int) - expected)
            assert min(width, height) == (28 if made is small else min(turned.size))
            assert off.mean() < 0.5
            assert off.max() <= 0


@pytest.mark.parametrize("scale", [0.08, 0.25, 1.0])
def test_the_smallest_crop_holds_two_pixels_for_each_of_the_views(scale: float) -> None:
    side = training_side(200, Augmentation(scale=(scale, 1.0)))
    assert side * scale**0.5 == pytest.approx(400, abs=1)


def test_what_a_cache_was_not_made_for_is_refused(index: Index, tmp_path: Path) -> None:
    pixels = choose_cache("ram", index, 24, augmentation=Augmentation(scale=(0.5, 1)))
    common: dict[str, Any] = dict(batch_size=5, seed=3, workers=1, cache=pixels)
    for split, train, changed in (
        ("train", True, dict(resolution=24, augmentation=Augmentation())),
        ("train", True, dict(resolution=32, augmentation=Augmentation(scale=(0.5, 1)))),
        ("train", False, dict(resolution=24, augmentation=None)),
        ("val", False, dict(resolution=32, augmentation=None)),
        ("val", False, dict(resolution=24, augmentation=None, crop_fraction=1.0)),
    ):
        with pytest.raises(ValueError, match="the cache holds"):
            make_loader(index, split, train=train, **common, **changed)  # type: ignore[arg-type]
    # Who gives the side himself is believed.
    pixels = choose_cache("ram", index, 24, side=16)
    make_loader(index, "train", train=True, resolution=24, augmentation=None, **(common | {"cache": pixels}))


def test_every_cache_gives_the_same_bits_whatever_the_threads(index: Index, tmp_path: Path) -> None:
    whole = {epoch: everything(make(index, "ram", tmp_path, workers=1), epoch) for epoch in (0, 1)}
    assert not same(whole[0], whole[1])
    made = make(index, "ram", tmp_path)
    for epoch in (0, 1, 0):  # the second time from the store
        assert same(list(made.batches(epoch)), whole[epoch])
    made.close()
    for workers in (0, 1, 3):
        assert same(everything(make(index, "disk", tmp_path, workers=workers), 1), whole[1])
    for start in range(4):
        assert same(everything(make(index, "ram", tmp_path), 1, start), whole[1][start:])
    sixes = everything(make(index, "disk", tmp_path, batch_size=6), 1)
    twos = everything(make(index, "disk", tmp_path, batch_size=2), 1)
    assert torch.equal(torch.cat([b.images for b in sixes]), torch.cat([b.images for b in twos]))


def test_batches_are_for_training_and_for_inference_alike(index: Index, tmp_path: Path) -> None:
    made = make(index, "ram", tmp_path, "val")
    with torch.inference_mode():
        expected = list(made.batches(0))
    batches = list(made.batches(0))
    made.close()
    assert same(batches, expected)
    weight = torch.ones(1, requires_grad=True)
    (batches[0].images * weight).sum().backward()  # refused for tensors of inference mode


def test_resized_is_torchvisions_resize() -> None:
    from torchvision.transforms.v2 import functional as F

    pixels = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8)
    scratch = torch.empty(50 * 70 * 3, dtype=torch.uint8)
    for box in ([3, 4, 60, 40], [0, 0, 70, 50], [69, 49, 1, 1], [10, 0, 1, 50], [5, 5, 18, 18]):
        x, y, width, height = box
        for margin in (0, 1):
            cut = pixels.permute(2, 0, 1)[:, y : y + height, x : x + width]
            whole = F.resize(cut, [16 + 2 * margin] * 2, antialias=True)[:, margin : margin + 16, margin : margin + 16]
            for flip in (False, True):
                expected = whole.flip(-1) if flip else whole
                assert torch.equal(resized(pixels, box, 16, margin, flip, scratch), expected.permute(1, 2, 0))


# --- the choice -----------------------------------------------------------------------------------------------------


CONTENTS: dict[str, Content] = {"train": Photos(170), "val": Views(24)}  # at 24 pixels: every photo in full


def room(monkeypatch: pytest.MonkeyPatch, memory: float, disk: float) -> None:
    monkeypatch.setattr(cache, "available_memory", lambda: int(memory))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": int(disk)}))


def test_auto_says_what_it_took_and_why(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(kind: Any, memory: float, disk: float) -> cache.PixelCache:
        room(monkeypatch, memory, disk)
        return choose_cache(kind, index, 24, cache_dir=tmp_path / "not" / "there")

    views, need = (
        sum(stored_bytes(index.splits[name], CONTENTS[name]) for name in names) for names in (["val"], CONTENTS)
    )
    assert views == 6 * 24 * 24 * 3
    assert choose("none", 0, 0).kind == "none"
    ram = choose("auto", 1e12, 0)
    assert (ram.kind, ram.limit) == ("ram", None)
    assert "12 training images at short side 170 and 6 validation images of 24 x 24 are 0.2 MB" in ram.reason
    assert "1000.0 GB of memory" in ram.reason
    assert choose("auto", need, 1e12).kind == "disk"
    assert choose("auto", need / cache.RAM_SHARE + 1, 1e12).kind == "ram"
    neither = choose("auto", 0, need - 1)
    assert neither.kind == "none"
    for words in ("0.0 MB of memory", "free in", "images are decoded every time"):
        assert words in neither.reason
    # What was asked for is replaced by what fits, in words.
    for kind in ("ram", "disk"):
        assert choose(kind, 0, 0).kind == "none"
        part = choose(kind, need / cache.RAM_SHARE - 10, 0)
        assert part.kind == "ram"
        assert "11 training images are kept and the others decoded each time" in part.reason
    assert choose("disk", 1e12, 0).kind == "ram"
    assert "0.0 MB are free in" in choose("disk", 1e12, 0).reason
    # Hardly any would be kept.
    assert choose("ram", (views + (need - views) / 15) / cache.RAM_SHARE, 0).kind == "none"
    with pytest.raises(ValueError, match="cache"):
        choose("floppy", 0, 0)


def test_what_has_no_place_in_memory_is_decoded_as_without_a_cache(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(make(index, "none", tmp_path, workers=0, backend="torch"))
    need = sum(stored_bytes(index.splits[name], content) for name, content in CONTENTS.items())
    room(monkeypatch, 0.6 * need / cache.RAM_SHARE, 0)
    made: Any = make(index, "ram", tmp_path)
    assert 0 < made.store.count < 12
    assert made.store.buffer.numel() < 0.6 * need
    for _ in range(2):  # the second time from the store
        assert same(list(made.batches(0)), expected)
    assert made.store.ready.sum() == made.store.count  # two images are left over in each epoch, of which both are there
    for path in index.splits["train"].paths:
        assert Path(path).exists()
    made.close()
    val: Any = make(index, "ram", tmp_path, "val")
    assert val.store.count == 6


def test_a_cache_that_is_there_fits_a_full_disk(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, content in CONTENTS.items():
        disk_store(index, split, content, 1, tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert choose_cache("disk", index, 24, cache_dir=tmp_path).kind == "disk"


def test_processes_of_one_machine_decode_an_image_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [torch.zeros(10**6, dtype=torch.uint8) for _ in index.splits]

    def process() -> PixelStore:
        places = iter(shared)
        return choose_cache("ram", index, 24, memory=lambda size: next(places)[:size]).store("train", 1)[0]

    first, second = process(), process()
    pixels = first.ensure(3).clone()
    assert second.ready.tolist() == [i == 3 for i in range(len(second.split))]
    monkeypatch.setattr(PixelStore, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(second.ensure(3), pixels)


def test_one_process_chooses_for_all(index: Index) -> None:
    assert choose_cache("ram", index, 24, agree=lambda choose: cache.Choice("disk", "because")).kind == "disk"
    with pytest.raises(DataError, match="needs a GPU"):
        choose_cache("gpu", index, 24, agree=lambda choose: choose())


def test_for_a_gpu_the_store_is_no_pinned_memory_either(index: Index, tmp_path: Path) -> None:
    """torch rounds pinned memory up to a power of two: up to twice of what was found to fit."""
    made: Any = make(index, "ram", tmp_path, device="cuda")
    assert made.store.buffer.numel() == stored_bytes(index.splits["train"], CONTENTS["train"])
    assert not made.store.buffer.is_pinned()


def test_available_memory_is_that_of_this_machine() -> None:
    assert 1e6 < cache.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_loaders_of_other_resolutions_share_one_store(index: Index, tmp_path: Path) -> None:
    """Progressive resizing: the pixels are those of the largest resolution."""
    pixels = choose_cache("ram", index, 32)
    settings: dict[str, Any] = dict(batch_size=5, seed=3, workers=1, augmentation=None, train=True, cache=pixels)
    small, large = (make_loader(index, "train", resolution=side, **settings) for side in (16, 32))
    assert isinstance(small, CachedLoader)
    assert isinstance(large, CachedLoader)
    assert small.store is large.store
    assert [batch.images.shape[2] for batch in small.batches(0)] == [16, 16]
    assert small.store.ready.sum() == 10
    assert next(large.batches(0)).images.shape[2] == 32
    small.close()
    large.close()


def test_a_pass_may_be_left_and_another_begun(index: Index, tmp_path: Path) -> None:
    whole = everything(make(index, "ram", tmp_path))
    made = make(index, "ram", tmp_path)
    left = made.batches(0)
    assert torch.equal(next(left).images, whole[0].images)
    assert same(list(made.batches(0)), whole)
    with pytest.raises(RuntimeError, match="another one started"):
        next(left)
    made.close()
    assert same(everything(made), whole)
