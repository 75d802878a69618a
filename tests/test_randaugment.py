"""RandAugment and random erasing: torchvision's operations, and draws that only (seed, epoch, image) decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from data_pipeline.augment import (
    MAX_MAGNITUDE,
    OPERATIONS,
    Augmentation,
    Params,
    rectangles_in_pixels,
    train_params,
)
from data_pipeline.randaugment import apply, rand_augment

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


def test_every_operation_changes_a_picture() -> None:
    picture = pictures()[:1]
    assert {name for name in OPERATIONS if torch.equal(apply(name, picture, 0.9), picture)} == {"identity"}


def params(aug: Augmentation, indices: Any, epoch: int = 0) -> Params:
    indices = np.asarray(indices)
    return train_params(aug, 7, epoch, indices, np.full((len(indices), 2), 100))


def test_a_batch_is_each_image_by_itself_in_any_company() -> None:
    drawn = params(Augmentation(rand_augment_ops=3, rand_augment_magnitude=20), np.arange(40))
    assert drawn.operations is not None
    assert drawn.strengths is not None
    assert len(np.unique(drawn.operations)) == len(OPERATIONS)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    before = pixels.clone()
    whole = rand_augment(pixels, drawn.operations, drawn.strengths)
    assert torch.equal(pixels, before), "the input was written to"
    for row in range(0, 40, 3):
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
