"""RandAugment (Cubuk et al. 2019) on a batch of 8-bit pixels, on its device, by torchvision's operations.

Which operations an image meets and how strong they are was drawn beforehand (`data_pipeline.loaders.augment`). Images
of one operation and strength lie next to each other while it is applied: at most 12 calls for each of the K operations
however large the batch, and one more for every 32 images that are moved (sheared, shifted, turned). Nothing waits for
the
device: torchvision's functions of these and of sharpness copy small tensors of numbers to it, and wait for each. Here
the numbers of the whole batch are one copy that nothing waits for, and the result is theirs to the last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample
from torchvision.transforms.v2 import functional as F

from data_pipeline.loaders.augment import OPERATIONS
from data_pipeline.loaders.prefetch import sent

# Largest strengths: table 6 of AutoAugment (Cubuk et al. 2018), as torchvision's RandAugment takes them.
_SHEAR, _ROTATION, _CHANGE, _POSTERISED_BITS = 0.3, 30.0, 0.9, 4
_TRANSLATION = 150 / 331  # of the side
_MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_MOVE_NUMBERS = [OPERATIONS.index(name) for name in _MOVES]  # one after another
_AT_ONCE = 32  # images that are moved at once, as float32


# --- operations that move pixels ------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _map(name: str, strength: float, side: int) -> NDArray[np.float32]:
    """[3, 2]: from an output pixel (x, y, 1), counted from the centre, to the place that it shows, from -1 to 1.

    Shears are slopes, from the image's corner; x' = A x + c with A the inverse of turn times shear, c of the shift.
    """
    angle, slope_x, slope_y, centre = 0.0, 0.0, 0.0, -0.5 * side
    shift = [0.0, 0.0]
    if name == "rotate":
        # Clockwise and from 0 to 360 degrees, as torchvision counts.
        angle, centre = math.radians(-(strength * _ROTATION % 360)), 0.0
    elif name == "shear_x":
        slope_x = strength * _SHEAR
    elif name == "shear_y":
        slope_y = strength * _SHEAR
    else:
        shift["xy".index(name[-1])] = float(int(strength * _TRANSLATION * side))
    # By way of degrees, for torchvision's rounding.
    tilt_x, tilt_y = (math.radians(math.degrees(math.atan(slope))) for slope in (slope_x, slope_y))
    a = math.cos(angle - tilt_y) / math.cos(tilt_y)
    c = math.sin(angle - tilt_y) / math.cos(tilt_y)
    b, d = -(a * math.tan(tilt_x) + math.sin(angle)), math.cos(angle) - c * math.tan(tilt_x)
    x, y = (centre + along for along in shift)
    rows = [[d, -b, centre - d * x + b * y], [-c, a, centre + c * x - a * y]]
    return np.ascontiguousarray(np.array(rows, np.float32).T / np.float32(0.5 * side))


def _moved(pixels: Tensor, maps: Tensor) -> Tensor:
    """8-bit pixels [N, 3, R, R] as `maps` [N, 3, 2] say: nearest pixels, and black outside."""
    side = pixels.shape[-1]
    along = torch.linspace((1.0 - side) * 0.5, (side - 1.0) * 0.5, side, device=pixels.device)
    places = torch.ones(side, side, 3, device=pixels.device)
    places[..., 0], places[..., 1] = along, along[:, None]
    grid = places.view(1, side * side, 3).expand(len(maps), -1, -1).bmm(maps).view(-1, side, side, 2)
    found = grid_sample(pixels.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return found.round_().to(torch.uint8)


# --- operations on values -------------------------------------------------------------------------------------------


def _sharpness(pixels: Tensor, factor: float) -> Tensor:
    """Away from (`factor` > 1) or towards (< 1) the mean of a pixel and its neighbours, the pixel counted five times;
    the border stays."""
    if pixels.shape[-1] <= 2:
        return pixels
    values = pixels.float()
    weight = torch.full((3, 1, 3, 3), 1.0 / 13.0, device=pixels.device)
    weight[:, :, 1, 1].fill_(5.0 / 13.0)
    blurred = conv2d(values, weight, groups=3).round_()
    inner = values[..., 1:-1, 1:-1]
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return values.clamp_(0, 255).to(torch.uint8)


def _posterize(pixels: Tensor, strength: float) -> Tensor:
    return F.posterize(pixels, 8 - round(abs(strength) * _POSTERISED_BITS))


def _solarize(pixels: Tensor, strength: float) -> Tensor:
    return F.solarize(pixels, 255 * (1 - abs(strength)))


_APPLY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": lambda pixels, strength: F.adjust_brightness(pixels, 1 + strength * _CHANGE),
    "color": lambda pixels, strength: F.adjust_saturation(pixels, 1 + strength * _CHANGE),
    "contrast": lambda pixels, strength: F.adjust_contrast(pixels, 1 + strength * _CHANGE),
    "sharpness": lambda pixels, strength: _sharpness(pixels, 1 + strength * _CHANGE),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda pixels, strength: F.autocontrast(pixels),
    "equalize": lambda pixels, strength: F.equalize(pixels),
}


def apply(name: str, pixels: Tensor, strength: float) -> Tensor:
    """One operation on 8-bit pixels [N, 3, R, R]; `strength` from -1 to 1 of its largest, the sign being ignored by
    what knows no other way."""
    if name in _MOVES:
        (one,) = sent([torch.from_numpy(_map(name, strength, pixels.shape[-1]))], pixels.device)
        return _moved(pixels, one.expand(len(pixels), -1, -1))
    return pixels if name == "identity" else _APPLY[name](pixels, strength)


def rand_augment(pixels: Tensor, operations: NDArray[np.uint8], strengths: NDArray[np.float32]) -> Tensor:
    """8-bit pixels [B, 3, R, R] after operations [B, K] of strengths [B, K], the first column first."""
    orders = np.stack([np.lexsort(columns) for columns in zip(strengths.T, operations.T, strict=True)])
    numbers = np.take_along_axis(operations.T, orders, axis=1)
    sizes = np.take_along_axis(strengths.T, orders, axis=1)
    maps = np.zeros((*orders.shape, 3, 2), np.float32)
    for at in zip(*np.nonzero(np.isin(numbers, _MOVE_NUMBERS)), strict=True):
        maps[at] = _map(OPERATIONS[numbers[at]], float(sizes[at]), pixels.shape[-1])
    places, maps_there = sent([torch.from_numpy(orders), torch.from_numpy(maps)], pixels.device)
    for step, placed in enumerate(places):
        changed = pixels[placed]
        first, last = np.searchsorted(numbers[step], (_MOVE_NUMBERS[0], _MOVE_NUMBERS[-1] + 1)).tolist()
        for start in range(first, last, _AT_ONCE):
            rows = slice(start, min(start + _AT_ONCE, last))
            changed[rows] = _moved(changed[rows], maps_there[step, rows])
        for rows, number, strength in _groups(numbers[step], sizes[step]):
            if OPERATIONS[number] in _APPLY:
                changed[rows] = _APPLY[OPERATIONS[number]](changed[rows], strength)
        pixels = torch.empty_like(changed).index_copy_(0, placed, changed)
    return pixels


def _groups(operations: NDArray[np.uint8], strengths: NDArray[np.float32]) -> Iterator[tuple[slice, int, float]]:
    """Runs of equal (operation, strength)."""
    changes = (np.diff(operations) != 0) | (np.diff(strengths) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(operations)]
    for first, last in itertools.pairwise(edges):
        yield slice(first, last), int(operations[first]), float(strengths[first])
