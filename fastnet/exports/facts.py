"""What a stranger has to know of a file: the names of its classes, how a photo becomes its input, where it is from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import fastnet
from fastnet.loading.checkpoint import notes_of
from fastnet.loading.trained import Trained

NORMALISED = "float32 [batch, 3, height, width], RGB, (pixel / 255 - mean) / std"
PHOTO = "uint8 [height, width, 3], RGB, upright, of any size"


def facts_of(trained: Trained, *, preprocessing: bool = False, precision: str = "fp32") -> dict[str, Any]:
    """What every export carries, by name; JSON holds it.

    class_names are in the order of the outputs. crop_fraction is the share of the short side that the model looks at,
    in the middle, resized to resolution x resolution pixels with antialiasing. mean and std are of pixels from 0 to 1.
    precision: of the weights.
    """
    config, view = trained.model.config, trained.view
    return {
        "architecture": f"efficientnet_{config.variant}",
        "class_names": [trained.class_name(label) for label in range(config.num_classes)],
        "resolution": view.resolution,
        "crop_fraction": view.crop_fraction,
        "interpolation": view.interpolation,
        "mean": list(view.mean),
        "std": list(view.std),
        "color_order": "RGB",
        "input": PHOTO if preprocessing else NORMALISED,
        "output": "probabilities [classes]" if preprocessing else "logits [batch, classes]",
        "precision": precision,
        "run_id": run_id(trained),
        "weights": trained.path.name,
        "made_by": f"{fastnet.DISTRIBUTION} {fastnet.__version__}",
    }


def run_id(trained: Trained) -> str | None:
    """The run that a checkpoint is of, as its trackers call it; None for weights of no run."""
    if trained.run is None:
        return None
    noted = (notes_of(path).get("run_id") for path in (trained.path, trained.run / "last.safetensors"))
    return next((name for name in noted if name), trained.run.resolve().name)


def as_text(facts: Mapping[str, Any]) -> dict[str, str]:
    """For a format that keeps strings: texts as they are, all else as JSON."""
    return {name: json.dumps(facts[name]) for name in _JSON} | {name: facts[name] for name in _TEXT}


def from_text(texts: Mapping[str, str]) -> dict[str, Any]:
    """The inverse. KeyError or ValueError where these are not of an export of ours."""
    return {name: json.loads(texts[name]) if name in _JSON else texts[name] for name in (*_JSON, *_TEXT)}


_JSON = ("class_names", "resolution", "crop_fraction", "mean", "std", "run_id")
_TEXT = ("architecture", "interpolation", "color_order", "input", "output", "precision", "weights", "made_by")
