"""Pictures resized in C++ are torch's, to the bit, and a loader of cached pixels gives the same ones by either."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline import build_index
from data_pipeline.loaders import cached_loader
from data_pipeline.loaders.augment import Augmentation, train_params
from data_pipeline.loaders.cached_loader import resized
from data_pipeline.loaders.postprocess import Finish
from kernels.cpu import resize
from kernels.cpu.build import BuildError
from kernels.cpu.resize import Resizer, resizer
from tests.batches import everything, make, same, write_photos

# (picture's height and width, box, side, margin): shrunk, enlarged, as large, one way each, thin, at the last pixel.
CASES = [
    ((90, 120), (7, 5, 100, 80), 31, 0), ((33, 20), (1, 2, 19, 31), 64, 1), ((26, 26), (0, 0, 26, 26), 24, 1),
    ((50, 40), (3, 3, 24, 47), 24, 0), ((70, 9), (8, 1, 1, 69), 33, 0), ((5, 200), (199, 4, 1, 1), 17, 1),
    ((300, 280), (0, 0, 280, 300), 3, 0), ((2, 3), (0, 0, 3, 2), 1, 0), ((41, 57), (20, 11, 37, 30), 40, 0),
    ((64, 48), (0, 0, 48, 64), 47, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> Resizer:
    found = resizer(compiling=True)
    if found is None:
        pytest.skip("this CPU has no AVX2")
    return found


def call(
    ours: Resizer, picture: Tensor, box: tuple[int, ...], side: int, margin: int, flip: bool, finish: bool
) -> Tensor:
    out = torch.full((side, side, 3), torch.nan) if finish else torch.full((side, side, 3), 7, dtype=torch.uint8)
    last = finisher(side)
    ours(
        torch.tensor([picture.data_ptr()]), torch.tensor([picture.shape[1::-1]]), torch.tensor([box]),
        torch.tensor([flip]), side, margin, torch.tensor([out.data_ptr()]),
        *((last.scale, last.black) if finish else ()),
    )  # fmt: skip
    return out


def finisher(side: int) -> Finish:
    plain = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
    return Finish(train_params(plain, 0, 0, np.arange(1), np.array([[9, 9]])), side)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_torchs_to_the_bit(ours: Resizer, case: tuple) -> None:
    (height, width), box, side, margin = case
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for picture in (noise, torch.full_like(noise, 255), (noise > 127).to(torch.uint8) * 255):
        for flip in (False, True):
            scratch = torch.empty(3 * box[2] * box[3], dtype=torch.uint8)
            theirs = resized(picture, box, side, margin, flip, scratch)
            assert torch.equal(call(ours, picture, box, side, margin, flip, False), theirs)
            values = torch.empty(side, side, 3)
            finisher(side).image(0, theirs, values)
            assert torch.equal(call(ours, picture, box, side, margin, flip, True), values)


def test_nothing_behind_the_picture_is_read(ours: Resizer) -> None:
    """The last pixels lie at the end of a page that nothing follows."""
    size, page = (11, 13), mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    libc = ctypes.CDLL(None, use_errno=True)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    picture = whole[page - 3 * size[0] * size[1] : page].view(*size, 3)
    picture[:] = torch.arange(picture.numel()).remainder(251).view(picture.shape)
    expected = call(ours, picture.clone(), (2, 1, 11, 10), 9, 0, False, False)
    pointer = ctypes.c_void_p(whole.data_ptr() + page)
    assert libc.mprotect(pointer, page, 0) == 0
    try:
        assert torch.equal(call(ours, picture, (2, 1, 11, 10), 9, 0, False, False), expected)
    finally:
        libc.mprotect(pointer, page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("box", [(0, 0, 6, 4), (-1, 0, 3, 3), (0, 3, 5, 2), (2, 2, 0, 1)])
def test_a_box_that_leaves_its_picture_is_refused(ours: Resizer, box: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must lie within its picture"):
        call(ours, torch.zeros(4, 5, 3, dtype=torch.uint8), box, 8, 0, False, False)


def test_loaders_give_the_same_by_either(
    ours: Resizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = build_index(write_photos(tmp_path / "photos"), cache_dir=tmp_path / "index")
    plain = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
    for augmentation in (plain, Augmentation(), Augmentation(random_erasing=1.0), Augmentation(rand_augment_ops=1)):
        batches = {}
        for by in ("C++", "torch"):
            with monkeypatch.context() as patch:
                patch.setattr(cached_loader, "resizer", lambda compiling, by=by: ours if by == "C++" else None)
                made = [make(index, "ram", tmp_path, split, augmentation=augmentation) for split in ("train", "val")]
                assert all((loader.resizer is not None) == (by == "C++") for loader in made)  # type: ignore[attr-defined]
                batches[by] = [batch for loader in made for batch in everything(loader)]
        assert same(batches["C++"], batches["torch"])

    def none(compiling: bool) -> None:
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(cached_loader, "resizer", none)
    assert make(index, "ram", tmp_path).resizer is None  # type: ignore[attr-defined]
    assert "resized by torch" not in caplog.text  # for twelve photos
    monkeypatch.setattr(cached_loader, "WORTH_COMPILING", 10)
    assert make(index, "ram", tmp_path).resizer is None  # type: ignore[attr-defined]
    assert "resized by torch, at some half the speed, as there is no C++ compiler" in caplog.text


def test_a_cpu_whose_torch_rounds_otherwise_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert resize.resizer.__wrapped__(compiling=True) is None
