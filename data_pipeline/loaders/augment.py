"""One description of the augmentation and its randomness, read by every backend.

Every random number is a hash of (seed, epoch, image index, position in the draw): nothing depends on workers, threads,
batch size, order or backend, and the state of a loader is a position. numpy only; torch is not imported.

Images are described by their *oriented* size (after EXIF rotation), width first.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Share of the short side that evaluation looks at: 224 of 256 in the usual resize-then-centre-crop.
CROP_FRACTION = 0.875

# Output pixels on each side that evaluation resizes along and cuts off; training has none.
EVAL_MARGIN = 1

_ATTEMPTS = 10  # random crops tried before the centre crop, as in torchvision's RandomResizedCrop
_DRAWS = 4 * _ATTEMPTS + 5  # crops first, then flip, brightness, contrast, saturation, hue
_ORDER_STREAM, _DRAW_STREAM, _OPERATION_STREAM, _ERASING_STREAM, _BALANCE_STREAM = 1, 2, 3, 4, 5

# Operations of RandAugment, in the order of their numbers (Cubuk et al. 2019, section 3; the set of its appendix).
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_REVERSIBLE = OPERATIONS[1:10]  # strength goes both ways
MAX_MAGNITUDE = 30  # of RandAugment, as in the paper and torchvision; timm's scale ends at 10
# Share of the image, and height over width, of an erased rectangle (Zhong et al. 2017, section 4.2).
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)

# RGB -> YIQ with the coefficients of DALI's color_twist.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_INVERSE = np.linalg.inv(_YIQ)
_GRAY = 128.0  # the fixed point of a contrast change on 8-bit pixels, as in color_twist


class Normalization(NamedTuple):
    """What is subtracted from each channel's values of 0 to 1, and what they are then divided by."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


IMAGENET = Normalization()
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    brightness: float = 0.2
    """Brightness factor drawn from 1 ± this."""
    contrast: float = 0.2
    """Contrast factor drawn from 1 ± this."""
    saturation: float = 0.2
    """Saturation factor drawn from 1 ± this."""
    hue: float = 5.0
    """Hue rotation drawn from ± this, in degrees."""
    rand_augment_ops: int = 0
    """RandAugment: so many random operations on each training image, one after another; 0: none (paper: 2)."""
    rand_augment_magnitude: float = 9.0
    """Strength of RandAugment's operations, 0 to 30 (torchvision's scale; timm's m9 is 27)."""
    random_erasing: float = 0.0
    """Probability that a rectangle of the training image is filled with a random colour."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must be two shares of the area with 0 < low <= high <= 1, got {self.scale}")
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise ValueError(f"ratio must be two aspect ratios with 0 < low <= high, got {self.ratio}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip must be a probability between 0 and 1, got {self.hflip}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 180:
            raise ValueError(f"hue must lie between 0 and 180 degrees, got {self.hue}")
        if not 0 <= self.rand_augment_ops <= 16:
            raise ValueError(f"rand_augment_ops must lie between 0 and 16, got {self.rand_augment_ops}")
        if not 0 <= self.rand_augment_magnitude <= MAX_MAGNITUDE:
            raise ValueError(
                f"rand_augment_magnitude must lie between 0 and {MAX_MAGNITUDE}, got {self.rand_augment_magnitude}"
            )
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"random_erasing must be a probability between 0 and 1, got {self.random_erasing}")

    @property
    def changes_color(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0


class Params(NamedTuple):
    """What happens to each image of a batch: the window is resized, its margin cut off, flipped, put through the
    operations of RandAugment, recoloured, normalised, and a rectangle of it erased."""

    windows: NDArray[np.int32]
    """[N, 4]: x, y, width, height in oriented source pixels, always inside the image."""
    flips: NDArray[np.bool_]
    """[N]: mirrored left to right."""
    colors: NDArray[np.float32] | None
    """[N, 3, 4]: affine map of 8-bit RGB; None where colours stay as they are."""
    operations: NDArray[np.uint8] | None = None
    """[N, K]: numbers of `OPERATIONS`, first to last; None without RandAugment."""
    strengths: NDArray[np.float32] | None = None
    """[N, K]: of the operations, as a share of the strongest, negative where they go the other way."""
    erased: NDArray[np.float32] | None = None
    """[N, 4]: x, y, width, height of a rectangle as shares of the output's side, zeros where nothing is erased."""
    fills: NDArray[np.float32] | None = None
    """[N, 3]: what fills it, in normalised values."""


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*keys: ArrayLike) -> NDArray[np.uint64]:
    """Hash of broadcast integer keys to 64 bits."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        # int64 first, so that negative seeds wrap instead of raising.
        value = np.atleast_1d(np.asarray(key, np.int64)).astype(np.uint64)
        state = _mix((state ^ _mix(value)) + np.uint64(0x9E3779B97F4A7C15))
    return state


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation of range(n) in which the images of an epoch are visited."""
    return np.argsort(_hash(_ORDER_STREAM, seed, epoch, np.arange(n)), kind="stable").astype(np.int64)


def balanced_order(seed: int, epoch: int, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] images of an epoch in which a class of n images has a share in proportion to the root of n.

    Small classes are gone through more than once, large ones not to the end; which of theirs are seen changes from
    epoch to epoch.
    """
    order = epoch_order(seed, epoch, len(labels))
    roots = np.sqrt(np.bincount(labels))
    ends = np.rint(np.cumsum(roots) / roots.sum() * len(labels)).astype(np.int64)
    counts = np.diff(ends, prepend=0)
    drawn = [np.resize(order[labels[order] == label], count) for label, count in enumerate(counts) if count]
    places = np.argsort(_hash(_BALANCE_STREAM, seed, epoch, np.arange(len(labels))), kind="stable")
    return np.concatenate(drawn)[places]


def _uniform(stream: int, seed: int, epoch: int, indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """[N, count] numbers in [0, 1)."""
    bits = _hash(stream, seed, epoch, indices[:, None], np.arange(count)[None])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _fallback_windows(sizes: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.int64]:
    """[N, 4]: the largest centred window whose aspect ratio lies within `ratio`."""
    width, height = sizes[:, 0], sizes[:, 1]
    aspect = width / height
    w = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width).astype(np.int64)
    h = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height).astype(np.int64)
    w, h = np.clip(w, 1, width), np.clip(h, 1, height)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=1)


def _random_windows(draws: NDArray[np.float64], sizes: NDArray[np.int64], aug: Augmentation) -> NDArray[np.int64]:
    """[N, 4]: crops of random area and log-uniform aspect; the first of ten that fits, else the centred fallback."""
    width, height = sizes[:, :1], sizes[:, 1:]
    area, aspect, along_x, along_y = np.moveaxis(draws.reshape(-1, _ATTEMPTS, 4), 2, 0)
    area = width * height * (aug.scale[0] + area * (aug.scale[1] - aug.scale[0]))
    low, high = np.log(aug.ratio[0]), np.log(aug.ratio[1])
    aspect = np.exp(low + aspect * (high - low))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    x = (along_x * (width - w + 1)).astype(np.int64)
    y = (along_y * (height - h + 1)).astype(np.int64)
    first = fits.argmax(axis=1)
    chosen = np.stack([x, y, w, h], axis=2)[np.arange(len(sizes)), first]
    return np.where(fits.any(axis=1)[:, None], chosen, _fallback_windows(sizes, aug.ratio))


def color_matrices(
    brightness: ArrayLike, contrast: ArrayLike, saturation: ArrayLike, hue: ArrayLike
) -> NDArray[np.float32]:
    """[N, 3, 4] affine maps of 8-bit RGB, as DALI's `color_twist` defines its arguments (hue in degrees).

    M = brightness * contrast * YIQ⁻¹ · rotate(hue) · scale(saturation) · YIQ,
    offset = brightness * (128 - 128 * contrast).
    """
    b, c, s, angle = (np.atleast_1d(np.asarray(v, np.float64)) for v in (brightness, contrast, saturation, hue))
    radians = np.deg2rad(angle)
    twist = np.zeros((len(b), 3, 3))
    twist[:, 0, 0] = 1
    twist[:, 1, 1] = twist[:, 2, 2] = s * np.cos(radians)
    twist[:, 1, 2] = s * np.sin(radians)
    twist[:, 2, 1] = -twist[:, 1, 2]
    affine = np.empty((len(b), 3, 4))
    affine[:, :, :3] = (b * c)[:, None, None] * (_YIQ_INVERSE @ twist @ _YIQ)
    affine[:, :, 3] = (b * (_GRAY - _GRAY * c))[:, None]
    return affine.astype(np.float32)


def train_params(aug: Augmentation, seed: int, epoch: int, indices: ArrayLike, sizes: ArrayLike) -> Params:
    """The random changes to images `indices` ([N]) of oriented `sizes` ([N, 2]: width, height) in one epoch."""
    indices, sizes = np.asarray(indices, np.int64), np.asarray(sizes, np.int64)
    draws = _uniform(_DRAW_STREAM, seed, epoch, indices, _DRAWS)
    crops, (flip, *color) = draws[:, : 4 * _ATTEMPTS], draws[:, 4 * _ATTEMPTS :].T
    colors = None
    if aug.changes_color:
        signed = [2 * draw - 1 for draw in color]
        strengths = (aug.brightness, aug.contrast, aug.saturation)
        brightness, contrast, saturation = (1 + s * draw for s, draw in zip(strengths, signed[:3], strict=True))
        colors = color_matrices(brightness, contrast, saturation, aug.hue * signed[3])
    operations = signed_strengths = erased = fills = None
    if aug.rand_augment_ops:
        which, sign = np.split(_uniform(_OPERATION_STREAM, seed, epoch, indices, 2 * aug.rand_augment_ops), 2, axis=1)
        operations = (which * len(OPERATIONS)).astype(np.uint8)
        reversed_ = (sign < 0.5) & np.isin(operations, [OPERATIONS.index(name) for name in _REVERSIBLE])
        magnitude = aug.rand_augment_magnitude / MAX_MAGNITUDE
        signed_strengths = np.where(reversed_, -magnitude, magnitude).astype(np.float32)
    if aug.random_erasing:
        erased, fills = _erased(_uniform(_ERASING_STREAM, seed, epoch, indices, 9), aug.random_erasing)
    windows = _random_windows(crops, sizes, aug).astype(np.int32)
    return Params(windows, flip < aug.hflip, colors, operations, signed_strengths, erased, fills)


def _erased(draws: NDArray[np.float64], probability: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rectangles [N, 4] of random area, log-uniform aspect and random place; fills [N, 3] from a normal
    distribution."""
    happens, area, aspect, along_x, along_y = draws[:, :5].T
    area = _ERASED_AREA[0] + area * (_ERASED_AREA[1] - _ERASED_AREA[0])
    low, high = np.log(_ERASED_RATIO)
    aspect = np.exp(low + aspect * (high - low))
    w, h = np.minimum(np.sqrt(area / aspect), 1), np.minimum(np.sqrt(area * aspect), 1)
    rectangles = np.stack([along_x * (1 - w), along_y * (1 - h), w, h], axis=1)
    # Box and Muller 1958; 1 - u lies in (0, 1].
    radius, angle = np.sqrt(-2 * np.log(1 - draws[:, 5:7])), 2 * np.pi * draws[:, 7:9]
    fills = np.concatenate([radius * np.cos(angle), (radius * np.sin(angle))[:, :1]], axis=1)
    return np.where(happens[:, None] < probability, rectangles, 0).astype(np.float32), fills.astype(np.float32)


def rectangles_in_pixels(erased: NDArray[np.float32], side: int) -> NDArray[np.int32]:
    """[N, 4] x, y, width, height of `Params.erased` on an image of `side` pixels, edges rounded."""
    corner = np.rint(erased[:, :2] * side)
    end = np.rint((erased[:, :2] + erased[:, 2:]) * side)
    return np.concatenate([corner, end - corner], axis=1).astype(np.int32)


def eval_margin(interpolation: Interpolation) -> int:
    """Output pixels around evaluation's view that are resized along: as far as the filter reaches beyond a pixel."""
    return EVAL_MARGIN if interpolation == "bilinear" else 2 * EVAL_MARGIN


def eval_params(
    sizes: ArrayLike, resolution: int, crop_fraction: float = CROP_FRACTION, margin: int = EVAL_MARGIN
) -> Params:
    """The centre of each image, for oriented `sizes` [N, 2]: the square of `crop_fraction` of the short side.

    To half a source pixel the same view as resizing the short side to resolution / crop_fraction and cropping the
    centre, without resizing what the crop throws away. `margin` output pixels around it are resized along and cut off,
    so that the antialiasing filter finds real pixels beyond the border: what resizers make up there differs.
    """
    sizes = np.asarray(sizes, np.int64)
    short = sizes.min(axis=1)
    side = np.clip(np.rint(crop_fraction * short * (1 + 2 * margin / resolution)), 1, short).astype(np.int64)
    windows = np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], axis=1)
    return Params(windows.astype(np.int32), np.zeros(len(sizes), np.bool_), None)
