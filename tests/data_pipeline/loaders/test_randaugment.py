"""RandAugment and random erasing: torchvision's operations, and draws that only (seed, epoch, image) decide."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data_pipeline import build_index, choose_cache, make_loader
from data_pipeline.loaders.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_MAGNITUDE,
    OPERATIONS,
    Augmentation,
    Params,
    rectangles_in_pixels,
    train_params,
)
from data_pipeline.loaders.postprocess import Finish, finish
from data_pipeline.loaders.randaugment import apply, rand_augment
from tests.batches import write_photos

SIDE = 33


def pictures(count: int = 3) -> Tensor:
    """Smooth 8-bit pictures of little contrast, the last of one colour."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    planes = [torch.stack([60 + 3 * x + n * y, 200 - 2 * y - x, 90 + (x * y) % 70]) for n in range(count - 1)]
    return torch.stack([*planes, torch.full((3, SIDE, SIDE), 77)]).clamp(0, 255).to(torch.uint8)


def theirs(name: str, pixels: Tensor, magnitude: int, negative: bool) -> Tensor:
    """torchvision's RandAugment, with its choice made."""
    camel = {"autocontrast": "AutoContrast"}.get(name, "".join(part.capitalize() for part in name.split("_")))
    transform = v2.RandAugment(magnitude=magnitude)
    make, signed = transform._AUGMENTATION_SPACE[camel]
    strengths = make(MAX_MAGNITUDE + 1, SIDE, SIDE)
    value = 0.0 if strengths is None else float(strengths[magnitude])
    value = -value if negative and signed else value
    result: Tensor = transform._apply_image_or_video_transform(pixels, camel, value, InterpolationMode.NEAREST, {})
    return result


@pytest.mark.parametrize("magnitude", [0, 9, 22, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str, magnitude: int) -> None:
    for negative in (False, True):
        for single in pictures():
            found = apply(name, single[None], (-1 if negative else 1) * magnitude / MAX_MAGNITUDE)[0]
            assert found.dtype == torch.uint8
            expected = theirs(name, single, magnitude, negative)
            off = (found.int() - expected.int()).abs()
            # A strength in float32 here and in float64 there: values are cut to 8 bits on either side of a whole one,
            # and few pixels are taken from the other neighbour.
            assert (off > 1).float().mean() < 0.005, (name, negative)
            assert (off == 1).float().mean() < 0.03, (name, negative)


@pytest.mark.parametrize("side", [2, 3, 32, 33, 200])
def test_what_is_done_without_torchvision_is_its_to_the_last_bit(side: int) -> None:
    """Where its functions copy numbers to the device: each move, for which a place between two pixels decides by its
    rounding, and sharpness."""
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)

    def affine(shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        degrees = [math.degrees(math.atan(slope)) for slope in shear]
        return F.affine(pixels, angle=0.0, translate=list(shift), scale=1.0, shear=degrees, center=[0, 0])

    for magnitude in range(-MAX_MAGNITUDE, MAX_MAGNITUDE + 1, 3 if side < 100 else 15):
        strength = float(np.float32(magnitude / MAX_MAGNITUDE))
        shift = int(strength * 150 / 331 * side)
        expected = {
            "shear_x": affine(shear=(0.3 * strength, 0.0)),
            "shear_y": affine(shear=(0.0, 0.3 * strength)),
            "translate_x": affine((shift, 0)),
            "translate_y": affine((0, shift)),
            "rotate": F.rotate(pixels, 30.0 * strength),
            "sharpness": F.adjust_sharpness(pixels, 1 + 0.9 * strength),
        }
        assert [name for name, there in expected.items() if not torch.equal(apply(name, pixels, strength), there)] == []


def test_every_operation_changes_a_picture() -> None:
    picture = pictures()[:1]
    assert {name for name in OPERATIONS if torch.equal(apply(name, picture, 0.9), picture)} == {"identity"}


def params(aug: Augmentation, indices: Any, epoch: int = 0) -> Params:
    indices = np.asarray(indices)
    return train_params(aug, 7, epoch, indices, np.full((len(indices), 2), 100))


def test_a_batch_is_each_image_by_itself_in_any_company() -> None:
    drawn = params(Augmentation(rand_augment_ops=3, rand_augment_magnitude=20), np.arange(120))
    assert drawn.operations is not None
    assert drawn.strengths is not None
    assert len(np.unique(drawn.operations)) == len(OPERATIONS)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (120, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    before = pixels.clone()
    whole = rand_augment(pixels, drawn.operations, drawn.strengths)
    assert torch.equal(pixels, before), "the input was written to"
    for row in range(0, 120, 5):
        one = pixels[row : row + 1]
        for number, strength in zip(drawn.operations[row], drawn.strengths[row], strict=True):
            one = apply(OPERATIONS[number], one, float(strength))
        assert torch.equal(whole[row], one[0]), row


def test_operations_and_signs_are_drawn_evenly() -> None:
    drawn = params(Augmentation(rand_augment_ops=2, rand_augment_magnitude=15), np.arange(14_000))
    assert drawn.operations is not None
    assert drawn.strengths is not None
    counts = np.bincount(drawn.operations.ravel(), minlength=14)
    assert (abs(counts - 2000) < 5 * 2000**0.5).all()
    assert set(np.unique(drawn.strengths)) == {-0.5, 0.5}
    for number, name in enumerate(OPERATIONS):
        negative = (drawn.strengths[drawn.operations == number] < 0).mean()
        both_ways = 1 <= number <= 9
        assert abs(negative - 0.5 * both_ways) < 0.06, name


def test_erased_rectangles_are_of_the_papers_size_and_inside() -> None:
    drawn = params(Augmentation(random_erasing=0.25), np.arange(20_000))
    assert drawn.erased is not None
    assert drawn.fills is not None
    x, y, w, h = drawn.erased.T
    happens = w > 0
    assert abs(happens.mean() - 0.25) < 0.015
    area, ratio = (w * h)[happens], h[happens] / w[happens]
    assert 0.015 < area.min() < 0.03
    assert 0.32 < area.max() < 1 / 3 + 1e-6
    assert ratio.min() > 0.299
    assert ratio.max() < 3.34
    assert min(x.min(), y.min()) >= 0
    assert max((x + w).max(), (y + h).max()) <= 1 + 1e-6
    assert not drawn.erased[~happens].any()
    assert abs(drawn.fills.mean()) < 0.02
    assert abs(drawn.fills.std() - 1) < 0.02
    pixels = rectangles_in_pixels(drawn.erased, 20)
    assert (pixels >= 0).all()
    assert ((pixels[:, :2] + pixels[:, 2:]) <= 20).all()
    assert rectangles_in_pixels(np.array([[0.1, 0.25, 0.5, 0.26]], np.float32), 20).tolist() == [[2, 5, 10, 5]]


def test_draws_depend_on_seed_epoch_and_image_alone_and_leave_the_other_draws_as_they_were() -> None:
    aug = Augmentation(rand_augment_ops=2, random_erasing=0.5)
    whole, part = params(aug, np.arange(50)), params(aug, [31, 4])
    for name in ("operations", "strengths", "erased", "fills"):
        assert np.array_equal(getattr(whole, name)[[31, 4]], getattr(part, name)), name
        assert not np.array_equal(getattr(params(aug, np.arange(50), epoch=1), name), getattr(whole, name)), name
    plain = params(Augmentation(), np.arange(50))
    assert (plain.operations, plain.strengths, plain.erased, plain.fills) == (None,) * 4
    assert np.array_equal(plain.windows, whole.windows)
    assert plain.colors is not None
    assert np.array_equal(plain.colors, whole.colors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"rand_augment_ops": -1}, {"rand_augment_magnitude": 31}, {"random_erasing": 1.5}, {"random_erasing": -0.1}],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Augmentation(**change)


def test_the_last_step_does_the_same_to_one_image_and_to_a_batch() -> None:
    """What a CPU runs an image at a time, and a GPU on the batch: each operation, colours, normalisation, erasing."""
    aug = Augmentation(rand_augment_ops=2, rand_augment_magnitude=20, random_erasing=0.5)
    for changed in (aug, replace(aug, brightness=0, contrast=0, saturation=0, hue=0)):
        drawn = params(changed, np.arange(24))
        pixels = torch.randint(0, 256, (24, SIDE, SIDE, 3), dtype=torch.uint8)
        step = Finish(drawn, SIDE)
        whole = step.batch(pixels)
        for row in range(24):
            alone = torch.empty(SIDE, SIDE, 3)
            step.image(row, pixels[row], alone)
            torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-5)
        assert drawn.erased is not None
        assert drawn.fills is not None
        x, y, w, h = rectangles_in_pixels(drawn.erased, SIDE).T
        assert 6 < (w > 0).sum() < 18
        for row in np.flatnonzero(w).tolist():
            seen = whole[row, y[row] : y[row] + h[row], x[row] : x[row] + w[row]]
            assert (seen == torch.from_numpy(drawn.fills[row])).all()
        plain = Finish(drawn._replace(erased=None, fills=None), SIDE).batch(pixels)
        kept = (plain == whole).all(-1).sum((1, 2))
        assert (kept >= SIDE**2 - torch.from_numpy(w * h)).all()


def test_every_loader_augments_alike(tmp_path: Path) -> None:
    """Decoded every time or kept in RAM, by processes or threads: what the last step makes of plain images."""
    plain = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
    aug = replace(plain, rand_augment_ops=2, random_erasing=0.5)
    index = build_index(write_photos(tmp_path, 12), cache_dir=tmp_path / "cache")
    scale, shift = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_STD, IMAGENET_MEAN))
    for kind in ("none", "ram"):
        pixels = choose_cache(kind, index, 32)
        given: dict[str, Any] = dict(resolution=32, batch_size=24, seed=1, train=True, workers=1, cache=pixels)
        loaders = [make_loader(index, "train", backend="torch", augmentation=a, **given) for a in (plain, aug)]
        before, after = (next(loader.batches(0)).images for loader in loaders)
        drawn = loaders[1].plan.step(0, 0).params
        assert drawn.operations is not None
        rounded = (before * scale + shift).round().to(torch.uint8)
        assert torch.equal(finish(rounded, drawn, torch.device("cpu")), after), kind
        assert not torch.equal(before, after)
        for loader in loaders:
            loader.close()
