"""The formats: each writes its file, reads it back with the library that it is for, and returns what that computes."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.files import refuse_special
from fastnet import DISTRIBUTION
from fastnet.arch import EFFICIENTNET
from fastnet.errors import UserError
from fastnet.exports.facts import as_text, from_text
from fastnet.exports.program import Compute, exported, free_sizes, names_of
from fastnet.loading.checkpoint import one_line
from fastnet.model import EfficientNet, ModelConfig

Target = Literal["onnx", "pt2", "openvino", "torchvision", "timm"]
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "torchvision": "-torchvision.pth", "timm": "-timm"}
NEEDED: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": (), "openvino": ("openvino",), "torchvision": (),
    "timm": ("timm",),
}  # fmt: skip
FACTS_FILE = "facts.json"
"""The extra file of a .pt2."""

Writer = Callable[[nn.Module, Path, Tensor, Mapping[str, Any]], Compute]
"""(module, file to write, an example of its input, facts) -> what the file computes, read back."""


def write_onnx(module: nn.Module, path: Path, example: Tensor, facts: Mapping[str, Any]) -> Compute:
    # The exporter tells its steps and its deprecations; none is the user's to act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    given, made = names_of(module)
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=[given],
        output_names=[made],
        dynamic_shapes=free_sizes(module, example),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(as_text(facts))
    program.save(path, external_data=False)
    return run_onnx(path)


def run_onnx(path: Path, threads: int = 0) -> Compute:
    """threads: 0 for as many as ONNX Runtime takes."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def write_pt2(module: nn.Module, path: Path, example: Tensor, facts: Mapping[str, Any]) -> Compute:
    program = exported(module, example)
    with warnings.catch_warnings():
        # About weights on a GPU; these are on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, path, extra_files={FACTS_FILE: json.dumps(facts)})
    return torch.export.load(path).module()


def write_openvino(module: nn.Module, path: Path, example: Tensor, facts: Mapping[str, Any]) -> Compute:
    from fastnet.exports.openvino import converted, run_openvino, save

    save(converted(module, example), path, facts)
    return run_openvino(path)


def read_program(path: Path) -> tuple[Compute, dict[str, Any]]:
    """(what an .onnx, .pt2 or .xml file computes, its facts). Raises UserError where it cannot be read, is not of
    `fastnet.export`, or the library that it is for is not installed."""
    to = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}[path.suffix]
    require(to)
    try:
        refuse_special(path)
        if to == "onnx":
            import onnxruntime

            texts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
            return run_onnx(path), from_text(texts)
        if to == "pt2":
            logging.getLogger("torch.export").setLevel(logging.ERROR)  # it tells of a damaged file at length
            extra = {FACTS_FILE: ""}
            module = torch.export.load(path, extra_files=extra).module()
            return module, json.loads(extra[FACTS_FILE])
        from fastnet.exports.openvino import facts_in, run_openvino

        return run_openvino(path), facts_in(path)
    except Exception as error:  # each library has its own, and all of Python's
        raise UserError(f"{path} is no export of fastnet, or damaged ({one_line(error)}): export it again.") from error


def require(to: str) -> None:
    """UserError where a library that `to` needs is not installed."""
    if missing := [name for name in NEEDED[to] if importlib.util.find_spec(name) is None]:
        extra = f"'{DISTRIBUTION}[{to}]'" if to in ("onnx", "openvino") else " ".join(missing)
        raise UserError(f"--to {to} writes and verifies with {', '.join(missing)}: pip install {extra}.")


def write_torchvision(module: nn.Module, path: Path, example: Tensor, facts: Mapping[str, Any]) -> Compute:
    import torchvision

    from fastnet.loading.weights import to_torchvision

    assert isinstance(module, EfficientNet)
    torch.save({"model": to_torchvision(module), **facts}, path)
    config = module.config
    build = getattr(torchvision.models, f"efficientnet_{config.variant}")
    norm = partial(nn.BatchNorm2d, eps=config.bn_eps, momentum=config.bn_momentum)
    theirs = build(num_classes=config.num_classes, norm_layer=norm)
    theirs.load_state_dict(torch.load(path, weights_only=True)["model"])
    return theirs.eval()


def write_timm(module: nn.Module, path: Path, example: Tensor, facts: Mapping[str, Any]) -> Compute:
    """A folder as timm pushes it to the Hugging Face hub, with timm's names for what it has names for."""
    import timm
    from safetensors.torch import save_file

    from fastnet.loading.weights import to_timm

    assert isinstance(module, EfficientNet)
    config, name, side = module.config, timm_name(module.config), facts["resolution"]
    path.mkdir()
    # The name tells timm's two families apart, whose keys are the same.
    tensors = {key: value.contiguous() for key, value in to_timm(module).items()}
    save_file(tensors, path / "model.safetensors", {"architecture": name})
    described = {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": module.get_classifier().in_features,
        "label_names": facts["class_names"],
        "model_args": {"bn_eps": config.bn_eps, "bn_momentum": config.bn_momentum},
        "pretrained_cfg": {
            "num_classes": config.num_classes,
            "input_size": [3, side, side],
            "pool_size": [-(-side // 32)] * 2,
            "crop_pct": facts["crop_fraction"],
            "crop_mode": "center",
            "interpolation": facts["interpolation"],
            "mean": facts["mean"],
            "std": facts["std"],
            "fixed_input_size": False,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        },
        "fastnet": {key: facts[key] for key in ("color_order", "run_id", "weights", "made_by")},
    }
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def timm_name(config: ModelConfig) -> str:
    return f"{'tf_' if config.padding == 'same' else ''}efficientnet_{config.variant}"


WRITERS: dict[Target, Writer] = {
    "onnx": write_onnx, "pt2": write_pt2, "openvino": write_openvino, "torchvision": write_torchvision,
    "timm": write_timm,
}  # fmt: skip


def check_expressible(config: ModelConfig, to: Target, preprocessing: bool) -> None:
    """UserError where `to` cannot hold this."""
    if to not in ("torchvision", "timm"):
        return
    if preprocessing:
        raise UserError(f"{to}'s file holds weights alone: use --with-preprocessing with --to onnx, pt2 or openvino.")
    if config.scaling != "published":
        raise UserError(f"{to} has no model with {config.scaling} scaling: use --to onnx, pt2 or openvino.")
    if to == "torchvision" and config.network.family is not EFFICIENTNET:
        raise UserError(f"torchvision has no {config.variant}: use --to timm, onnx, pt2 or openvino.")
    if to == "torchvision" and config.padding == "same":
        raise UserError('torchvision has no "same" padding: use --to timm, onnx, pt2 or openvino.')
