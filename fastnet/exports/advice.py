"""Three lines of Python that tell the class of a photo from an exported file, where this project is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastnet.exports.formats import FACTS_FILE, Target
from fastnet.model import ModelConfig

_IMPORT_PIL = "from PIL import Image, ImageOps"
_UPRIGHT = 'ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")'


def three_lines(
    to: Target,
    path: Path,
    facts: Mapping[str, Any],
    config: ModelConfig,
    *,
    preprocessing: bool,
    precision: str = "f32",
) -> str:
    """Needed are PIL, numpy and the library that the file is for. precision: OpenVINO's hint."""
    if to == "timm":
        return _timm(path)
    if to == "torchvision":
        return _torchvision(path, facts, config)
    photo = _UPRIGHT if preprocessing else _view(facts)
    pixels = "numpy.asarray(photo)" if preprocessing else _normalised(facts)
    opened, names, ran = {
        "onnx": (
            f'import json, numpy, onnxruntime; {_IMPORT_PIL}; model = onnxruntime.InferenceSession({str(path)!r})',
            'json.loads(model.get_modelmeta().custom_metadata_map["class_names"])',
            f'model.run(None, {{"{"photo" if preprocessing else "images"}": {pixels}}})[0]',
        ),
        "pt2": (
            f'import json, numpy, torch; {_IMPORT_PIL}; facts = {{"{FACTS_FILE}": ""}}; '
            f'model = torch.export.load({str(path)!r}, extra_files=facts).module()',
            f'json.loads(facts["{FACTS_FILE}"])["class_names"]',
            f"model(torch.tensor({pixels}))",
        ),
        "openvino": (
            f'import json, numpy, openvino; {_IMPORT_PIL}; file = openvino.Core().read_model({str(path)!r}); '
            f'model = openvino.compile_model(file, "CPU", {{"INFERENCE_PRECISION_HINT": "{precision}"}})',
            'json.loads(file.get_rt_info(["model_info", "class_names"]).astype(str))',
            f"model({pixels})[0]",
        ),
    }[to]  # fmt: skip
    return f"{opened}\nphoto = {photo}\nprint({names}[{ran}.argmax()])"


def _view(facts: Mapping[str, Any]) -> str:
    """To half a pixel what `predict` looks at: PIL resizes the square in the middle, with real pixels around it."""
    side, bleed = facts["resolution"], round((1 - facts["crop_fraction"]) / 2, 6)
    return f"ImageOps.fit({_UPRIGHT}, ({side}, {side}), Image.Resampling.{facts['interpolation'].upper()}, {bleed:g})"


def _normalised(facts: Mapping[str, Any]) -> str:
    return (
        f'((numpy.asarray(photo) / 255 - {facts["mean"]}) / {facts["std"]}).astype("float32").transpose(2, 0, 1)[None]'
    )


def _timm(path: Path) -> str:
    return (
        f"import timm.data, torch; {_IMPORT_PIL}; "
        f"model = timm.create_model({f'local-dir:{path}'!r}, pretrained=True).eval()\n"
        f"photo = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))({_UPRIGHT})\n"
        'print(model.pretrained_cfg["label_names"][model(photo[None]).argmax()])'
    )


def _torchvision(path: Path, facts: Mapping[str, Any], config: ModelConfig) -> str:
    norm = f"functools.partial(torch.nn.BatchNorm2d, eps={config.bn_eps:g}, momentum={config.bn_momentum:g})"
    pixels = "F.normalize(F.to_tensor(photo), file['mean'], file['std'])[None]"
    return (
        f"import functools, torch, torchvision; from torchvision.transforms import functional as F; {_IMPORT_PIL}; "
        f"file = torch.load({str(path)!r}); photo = {_view(facts)}\n"
        f"model = torchvision.models.efficientnet_{config.variant}(num_classes={config.num_classes}, "
        f'norm_layer={norm}).eval(); model.load_state_dict(file["model"])\n'
        f'print(file["class_names"][model({pixels}).argmax()])'
    )
