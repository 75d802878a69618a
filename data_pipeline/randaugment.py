"""RandAugment (Cubuk et al. 2019) on a batch of 8-bit pixels, on its device, by torchvision's operations.

Which operations an image meets and how strong they are was drawn beforehand (`data_pipeline.augment`). Images of one
operation and strength lie next to each other while it is applied: at most 22 calls for each of the K operations however
large the batch, and nothing waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data_pipeline.augment import OPERATIONS

# Largest strengths: table 6 of AutoAugment (Cubuk et al. 2018), as torchvision's RandAugment takes them.
_SHEAR, _ROTATION, _CHANGE, _POSTERISED_BITS = 0.3, 30.0, 0.9, 4
_TRANSLATION = 150 / 331  # of the side


def _affine(
    pixels: Tensor, *, angle: float = 0.0, shift: tuple[int, int] = (0, 0), shear: tuple[float, float]
) -> Tensor:
    """Nearest pixels and black outside; shear as slopes, from the image's corner."""
    degrees = [math.degrees(math.atan(slope)) for slope in shear]
    return F.affine(pixels, angle=angle, translate=list(shift), scale=1.0, shear=degrees, center=[0, 0])


def _posterize(pixels: Tensor, strength: float) -> Tensor:
    return F.posterize(pixels, 8 - round(abs(strength) * _POSTERISED_BITS))


def _solarize(pixels: Tensor, strength: float) -> Tensor:
    return F.solarize(pixels, 255 * (1 - abs(strength)))


def _shift(pixels: Tensor, strength: float) -> int:
    return int(strength * _TRANSLATION * pixels.shape[-1])


_APPLY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda pixels, strength: pixels,
    "shear_x": lambda pixels, strength: _affine(pixels, shear=(strength * _SHEAR, 0.0)),
    "shear_y": lambda pixels, strength: _affine(pixels, shear=(0.0, strength * _SHEAR)),
    "translate_x": lambda pixels, strength: _affine(pixels, shift=(_shift(pixels, strength), 0), shear=(0.0, 0.0)),
    "translate_y": lambda pixels, strength: _affine(pixels, shift=(0, _shift(pixels, strength)), shear=(0.0, 0.0)),
    "rotate": lambda pixels, strength: F.rotate(pixels, strength * _ROTATION),
    "brightness": lambda pixels, strength: F.adjust_brightness(pixels, 1 + strength * _CHANGE),
    "color": lambda pixels, strength: F.adjust_saturation(pixels, 1 + strength * _CHANGE),
    "contrast": lambda pixels, strength: F.adjust_contrast(pixels, 1 + strength * _CHANGE),
    "sharpness": lambda pixels, strength: F.adjust_sharpness(pixels, 1 + strength * _CHANGE),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda pixels, strength: F.autocontrast(pixels),
    "equalize": lambda pixels, strength: F.equalize(pixels),
}


def apply(name: str, pixels: Tensor, strength: float) -> Tensor:
    """One operation on 8-bit pixels [N, 3, R, R]; `strength` from -1 to 1 of its largest, the sign being ignored by
    what knows no other way."""
    return _APPLY[name](pixels, strength)


def rand_augment(pixels: Tensor, operations: NDArray[np.uint8], strengths: NDArray[np.float32]) -> Tensor:
    """8-bit pixels [B, 3, R, R] after operations [B, K] of strengths [B, K], the first column first."""
    orders = np.stack([np.lexsort(columns) for columns in zip(strengths.T, operations.T, strict=True)])
    on_device = torch.from_numpy(orders)
    if pixels.is_cuda:  # a pinned copy that nothing waits for
        on_device = on_device.pin_memory().to(pixels.device, non_blocking=True)
    for step, (order, placed) in enumerate(zip(orders, on_device, strict=True)):
        moved = pixels[placed]
        for rows, number, strength in _groups(operations[order, step], strengths[order, step]):
            if OPERATIONS[number] != "identity":
                moved[rows] = apply(OPERATIONS[number], moved[rows], strength)
        pixels = torch.empty_like(moved).index_copy_(0, placed, moved)
    return pixels


def _groups(operations: NDArray[np.uint8], strengths: NDArray[np.float32]) -> Iterator[tuple[slice, int, float]]:
    """Runs of equal (operation, strength)."""
    changes = (np.diff(operations) != 0) | (np.diff(strengths) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(operations)]
    for first, last in itertools.pairwise(edges):
        yield slice(first, last), int(operations[first]), float(strengths[first])
