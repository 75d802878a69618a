"""How a model sees a photo: resolution, crop, interpolation and normalisation, as its weights were evaluated with.

timm: `timm/models/efficientnet.py`, the table `default_cfgs`. torchvision: `EfficientNet_B*_Weights.*.transforms()`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from data_pipeline.loaders.augment import CROP_FRACTION, IMAGENET, Interpolation, Normalization

HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class View:
    """crop_fraction: share of the short side. resolution: pixels, None where it is not known."""

    resolution: int | None = None
    crop_fraction: float = CROP_FRACTION
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET.mean
    std: tuple[float, float, float] = IMAGENET.std

    @property
    def normalization(self) -> Normalization:
        return Normalization(self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def changed(self, values: Mapping[str, Any]) -> View:
        """With those of `values` (under the fields' names) that are not None.

        Raises ValueError, which names the value, where one makes no sense.
        """
        given = {field.name: values[field.name] for field in fields(self) if values.get(field.name) is not None}
        for name in ("mean", "std"):
            if name in given:
                given[name] = tuple(float(value) for value in given[name])
                low = 0.0 if name == "mean" else 1e-6
                if len(given[name]) != 3 or not all(low <= value <= 1 for value in given[name]):
                    raise ValueError(f"{name} must be three numbers between 0 and 1, not {values[name]}.")
        if given.get("interpolation", "bilinear") not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be bilinear or bicubic, not {given['interpolation']}.")
        if not 0.1 <= given.get("crop_fraction", 1) <= 1:
            raise ValueError(f"crop-fraction {given['crop_fraction']} must lie between 0.1 and 1.")
        return replace(self, **given)


_SIZES = {
    "b0": (224, 0.875), "b1": (240, 0.882), "b2": (260, 0.890), "b3": (300, 0.904), "b4": (380, 0.922),
    "b5": (456, 0.934), "b6": (528, 0.942), "b7": (600, 0.949),
    "lite0": (224, 0.875), "lite1": (240, 0.882), "lite2": (260, 0.890), "lite3": (300, 0.904), "lite4": (380, 0.920),
}  # fmt: skip
"""Resolution and crop of timm's tf_efficientnet_*, and of the efficientnet_* that have no weights."""

_OWN_SIZES = {
    "b0.ra": (224, 0.875), "b0.ra4": (224, 0.9), "b1.ra4": (240, 0.9), "b1": (224, 0.875), "b2": (256, 0.875),
    "b3": (288, 0.875), "b4": (320, 0.875), "b5.sw_in12k_ft": (448, 1.0), "b5.sw_in12k": (416, 0.95),
}  # fmt: skip
"""Those of timm's efficientnet_*, by variant and the beginning of the tag; the longest that fits counts."""

_NAME = re.compile(r"(tf_)?efficientnet_(b[0-7]|lite[0-4])(?:[.\-]([a-z0-9_]+))?")


def timm_view(name: str) -> View | None:
    """The view of a model of timm, by its name with or without a tag, such as "efficientnet_b0.ra4_e3600_r224_in1k";
    None where there is no such name in it."""
    found = _NAME.search(name)
    if found is None:
        return None
    tf, variant, tag = found[1], found[2], found[3] or ""
    size = _SIZES[variant]
    if not tf:
        known = [key for key in _OWN_SIZES if f"{variant}.{tag}".startswith(key)]
        size = _OWN_SIZES[max(known, key=len)] if known else size
    half = tag.startswith("ap") or (tf and variant.startswith("lite")) or (not tf and tag.startswith("ra4"))
    interpolation: Interpolation = "bilinear" if tf and variant in ("lite3", "lite4") else "bicubic"
    side, crop = size
    return View(side, whole_pixels(side, crop), interpolation, *(HALF if half else IMAGENET))


def whole_pixels(side: int, crop: float) -> float:
    """The share of the short side that timm shows: it resizes that to side / crop, rounded down, and cuts `side`."""
    return min(1.0, side / math.floor(side / crop))


def view_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a View that timm's `pretrained_cfg` gives, or the arguments of its or torchvision's train.py."""
    size = config.get("input_size") or ()
    side = size[-1] if size else config.get("img_size") or config.get("val_crop_size")
    crop, whole = config.get("crop_pct"), config.get("val_resize_size")
    if side and whole:
        crop = side / whole
    elif side and crop:
        crop = whole_pixels(side, crop)
    interpolation = config.get("interpolation")
    return {
        "resolution": side,
        "crop_fraction": crop,
        "interpolation": interpolation if interpolation in ("bilinear", "bicubic") else None,
        "mean": config.get("mean"),
        "std": config.get("std"),
    }


def torchvision_view(variant: str, file: str) -> View:
    """What torchvision publishes for a file of weights; for one of another name, for the variant's best."""
    from torchvision.models import get_model_weights

    every = get_model_weights(f"efficientnet_{variant}")
    entry = next((one for one in every if str(one.url).endswith(f"/{file}")), every.DEFAULT)
    transforms = entry.transforms()
    side = transforms.crop_size[0]
    return View(
        side,
        side / transforms.resize_size[0],
        transforms.interpolation.value,
        tuple(transforms.mean),
        tuple(transforms.std),
    )


def foreign_view(
    style: str, variant: str, file: str, names: Iterable[str], configs: Iterable[Mapping[str, Any]]
) -> View:
    """The view of weights of another library: what `configs` say, the last of all, over what is published for them.

    style: whose file it is. names: where a name of timm's may stand, the surest first.
    """
    if style == "torchvision":
        view = torchvision_view(variant, file)
    else:
        family = f"{'' if style == 'timm' else 'tf_'}efficientnet_{variant}"
        known = (name[name.index(family) :] for name in names if style != "efficientnet_pytorch" and family in name)
        view = next(filter(None, map(timm_view, known)), None) or timm_view(family) or View()
    for config in configs:
        view = view.changed(view_of_config(config))
    return view
