"""Weights from and for torchvision and timm, and fastnet's own safetensors files.

The parameters of the three libraries differ in names, and squeeze-and-excitation's 1×1 convolutions are matrices
here. What the numbers mean differs too, so it travels with them:

| style | models | padding | BN eps, momentum |
|---|---|---|---|
| torchvision | efficientnet_b0–b4 | symmetric | 1e-5, 0.1 |
| torchvision | efficientnet_b5–b7 | symmetric | 1e-3, 0.01 |
| timm | efficientnet_b* | symmetric | 1e-5, 0.1 |
| timm_tf | tf_efficientnet_b* (also AdvProp, Noisy Student) | same | 1e-3, 0.1 |

These are the values of the modules that each library builds.
"""

import dataclasses
import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastnet.checkpoint import load_checkpoint, save_checkpoint
from fastnet.model import STAGES, EfficientNet, ModelConfig, Padding, block_shapes, stage_repeats
from fastnet.scaling import PUBLISHED, Architecture, Scaling, architecture

Style = Literal["fastnet", "torchvision", "timm", "timm_tf"]


@dataclass(frozen=True)
class LoadedWeights:
    """``EfficientNet(config).load_state_dict(state_dict)`` is the model that the file holds.

    state_dict: fastnet's names, on the CPU. style: whose file it was. classes, resolution (pixels): what it was
    trained to tell apart and at which size, where the file says so.
    """

    state_dict: dict[str, Tensor]
    config: ModelConfig
    style: Style
    classes: tuple[str, ...] | None = None
    resolution: int | None = None


def load_weights(path: str | Path, *, style: Style | None = None) -> LoadedWeights:
    """Read a .safetensors or .pth file of fastnet, torchvision or timm.

    ``style`` is needed where names do not tell: timm's efficientnet_* and tf_efficientnet_* have the same keys. The
    safetensors header decides, then the file's name, then its folders' names. A .pth file is read without unpickling
    anything but tensors. Raises ValueError (UserError for a damaged fastnet checkpoint) with one sentence that names
    the file and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}: check the path.")
    state, header = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickled(path), {})
    try:
        found = _detect_style(state, header, path, style)
        if found != "fastnet":
            return from_torchvision(state) if found == "torchvision" else from_timm(state, found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # A whole checkpoint will do as well: its optimizer and the like stay behind.
    weights, _, metadata = load_checkpoint(path)
    # How to run is the caller's choice and no property of the weights.
    config = ModelConfig(**metadata["model"] | {"kernels": "auto"})
    classes = tuple(metadata["classes"]) if metadata.get("classes") else None
    return LoadedWeights(weights, config, "fastnet", classes, metadata.get("resolution"))


def save_weights(
    path: str | Path,
    model: EfficientNet,
    *,
    classes: Sequence[str] | None = None,
    resolution: int | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's tensors and ModelConfig to ``path`` (.safetensors), atomically; the config also as .json.

    With the class names and the resolution in pixels the file needs no run beside it to predict. notes: further
    JSON-serialisable facts for its header.
    Raises ValueError for another suffix, UserError where the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are saved as .safetensors, not as {path.name}: change the file's suffix.")
    metadata: dict[str, Any] = {"model": dataclasses.asdict(model.config), **(notes or {})}
    if classes is not None:
        metadata["classes"] = list(classes)
    if resolution is not None:
        metadata["resolution"] = resolution
    save_checkpoint(path, model.state_dict(), {}, metadata)


def from_torchvision(state_dict: Mapping[str, Tensor]) -> LoadedWeights:
    """torchvision's efficientnet_b* in fastnet's names. Raises ValueError where keys or shapes are no such model's."""
    stage_of_block = re.compile(r"features\.([1-7])\.(\d+)\.block\.")
    return _from_foreign(state_dict, "torchvision", stage_of_block, first_stage=1)


def from_timm(state_dict: Mapping[str, Tensor], style: Style) -> LoadedWeights:
    """timm's efficientnet_b* (style "timm") or tf_efficientnet_b* ("timm_tf") in fastnet's names.

    Raises ValueError where keys or shapes are no such model's.
    """
    if style not in ("timm", "timm_tf"):
        raise ValueError(f"style must be 'timm' or 'timm_tf' for timm's weights, not {style!r}.")
    return _from_foreign(state_dict, style, re.compile(r"blocks\.([0-6])\.(\d+)\."), first_stage=0)


def to_torchvision(model: EfficientNet) -> dict[str, Tensor]:
    """The model's tensors under torchvision's names, for ``load_state_dict`` of its efficientnet_b*.

    Build that with ``norm_layer=partial(BatchNorm2d, eps=…, momentum=…)`` where the config's values are not its own;
    only padding "symmetric" means the same there.
    """
    return _to_foreign(model, "torchvision")


def to_timm(model: EfficientNet) -> dict[str, Tensor]:
    """The model's tensors under timm's names: tf_efficientnet_b* for padding "same", efficientnet_b* otherwise.

    Build that with ``bn_eps=…, bn_momentum=…`` where the config's values are not its own.
    """
    return _to_foreign(model, "timm")


# --- names -----------------------------------------------------------------------------------------------------


def _module_names(style: Style, repeats: tuple[int, ...]) -> dict[str, str]:
    """fastnet's module names → the other library's, for a model with so many blocks in each stage."""
    torchvision = style == "torchvision"
    names = (
        {"stem.conv": "features.0.0", "stem.bn": "features.0.1", "head.conv": "features.8.0"}
        | {"head.bn": "features.8.1", "classifier": "classifier.1"}
        if torchvision
        else {"stem.conv": "conv_stem", "stem.bn": "bn1", "head.conv": "conv_head", "head.bn": "bn2"}
        | {"classifier": "classifier"}
    )
    block = 0
    for stage, (row, repeat) in enumerate(zip(STAGES, repeats, strict=True)):
        inside = (_torchvision_block if torchvision else _timm_block)(row.expand_ratio != 1)
        for i in range(repeat):
            prefix = f"features.{stage + 1}.{i}.block" if torchvision else f"blocks.{stage}.{i}"
            names |= {f"blocks.{block}.{ours}": f"{prefix}.{theirs}" for ours, theirs in inside.items()}
            block += 1
    return names


def _torchvision_block(expands: bool) -> dict[str, str]:
    parts = (["expand"] if expands else []) + ["depthwise", "se", "project"]
    names: dict[str, str] = {}
    for i, part in enumerate(parts):
        leaves = (("reduce", "fc1"), ("expand", "fc2")) if part == "se" else (("conv", "0"), ("bn", "1"))
        names |= {f"{part}.{ours}": f"{i}.{theirs}" for ours, theirs in leaves}
    return names


def _timm_block(expands: bool) -> dict[str, str]:
    convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    if not expands:
        convs = {"depthwise": "conv_dw", "project": "conv_pw"}
    names = {"se.reduce": "se.conv_reduce", "se.expand": "se.conv_expand"}
    for i, (part, conv) in enumerate(convs.items(), start=1):
        names |= {f"{part}.conv": conv, f"{part}.bn": f"bn{i}"}
    return names


def _is_se_matrix(name: str) -> bool:
    return ".se." in name and name.endswith(".weight")


# --- conversion ------------------------------------------------------------------------------------------------


def _to_foreign(model: EfficientNet, style: Style) -> dict[str, Tensor]:
    names = _module_names(style, stage_repeats(model.config.depth))
    state = {}
    for name, value in model.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        state[f"{names[module]}.{leaf}"] = value[:, :, None, None] if _is_se_matrix(name) else value
    return state


def _from_foreign(
    state_dict: Mapping[str, Tensor], style: Style, stage_of_block: re.Pattern[str], *, first_stage: int
) -> LoadedWeights:
    blocks = {match.groups() for key in state_dict if (match := stage_of_block.match(key))}
    counts = Counter(int(stage) - first_stage for stage, _ in blocks)
    repeats = tuple(counts[stage] for stage in range(len(STAGES)))
    ours_of = {theirs: ours for ours, theirs in _module_names(style, repeats).items()}
    renamed = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".")
        if module not in ours_of:
            raise ValueError(f"{key} belongs to no {style} EfficientNet B0–B7: check the file or --weights-style.")
        name = f"{ours_of[module]}.{leaf}"
        renamed[name] = value.flatten(1) if _is_se_matrix(name) else value
    if "classifier.weight" not in renamed:
        raise ValueError("it holds no classifier.weight: a headless or truncated file cannot be loaded.")
    arch = _recognise(renamed, repeats)
    padding, bn_eps, bn_momentum = _semantics(style, arch.name)
    config = ModelConfig(
        variant=arch.name,
        scaling=arch.scaling,
        width=arch.width,
        depth=arch.depth,
        num_classes=renamed["classifier.weight"].shape[0],
        dropout=arch.dropout,
        drop_connect_rate=arch.drop_connect_rate,
        bn_eps=bn_eps,
        bn_momentum=bn_momentum,
        padding=padding,
    )
    return LoadedWeights(_checked(renamed, config), config, style)


def _semantics(style: Style, variant: str) -> tuple[Padding, float, float]:
    """(padding, BN eps, BN momentum): the table at the top."""
    if style == "timm_tf":
        return "same", 1e-3, 0.1
    if style == "torchvision" and variant in ("b5", "b6", "b7"):
        return "symmetric", 1e-3, 0.01
    return "symmetric", 1e-5, 0.1


def _recognise(state: Mapping[str, Tensor], repeats: tuple[int, ...]) -> Architecture:
    """The variant whose blocks have these output channels; within one scaling no two agree in all of them."""
    channels = [
        state[name].shape[0] if (name := f"blocks.{i}.project.conv.weight") in state else 0 for i in range(sum(repeats))
    ]
    for scaling in get_args(Scaling):
        for variant in PUBLISHED:
            arch = architecture(variant, scaling)
            expected = [shape.out_channels for shape in block_shapes(arch.width, arch.depth)]
            if stage_repeats(arch.depth) == repeats and expected == channels:
                return arch
    raise ValueError(
        f"its {sum(repeats)} blocks in stages of {list(repeats)} are no EfficientNet B0–B7: check that the file is "
        "whole and of that family."
    )


def _checked(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state in the model's own order, absent batch counters as 0. Raises ValueError naming what does not fit."""
    with torch.device("meta"):
        expected = EfficientNet(config).state_dict()
    if unknown := [name for name in state if name not in expected]:
        raise ValueError(f"it holds {unknown[0]}, which {config.variant} has not: check that the file is unmodified.")
    checked = {}
    for name, like in expected.items():
        value = state.get(name)
        if value is None and name.endswith("num_batches_tracked"):
            value = torch.tensor(0)
        if value is None:
            raise ValueError(f"{name} of {config.variant} is missing: the file is incomplete, fetch it again.")
        if value.shape != like.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)} and {config.variant} needs {list(like.shape)}: "
                "check that the file is unmodified."
            )
        checked[name] = value.to(like.dtype)
    return checked


# --- files -----------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        return load_file(path), header
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): fetch or save it again.") from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a file of plain tensors ({reason}): convert it to .safetensors or fetch it "
            "again."
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not (isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise ValueError(f"{path} holds no state dict: save model.state_dict() and load that.")
    return content


def _detect_style(state: Mapping[str, Tensor], header: Mapping[str, str], path: Path, asked: Style | None) -> Style:
    if "fastnet" in header and "model" in json.loads(header["fastnet"]):
        possible: tuple[Style, ...] = ("fastnet",)
    elif "features.0.0.weight" in state:
        possible = ("torchvision",)
    elif "conv_stem.weight" in state:
        possible = ("timm", "timm_tf")
    elif "stem.conv.weight" in state:
        raise ValueError(
            "it has fastnet's names but no model configuration: save it with fastnet.weights.save_weights."
        )
    else:
        first = next(iter(state), "nothing")
        raise ValueError(
            f"its keys ({first}, …) are not those of a fastnet, torchvision or timm EfficientNet: choose another file."
        )
    if asked is not None:
        if asked not in possible:
            raise ValueError(
                f"its keys are those of {' or '.join(possible)}, not of {asked}: change or drop --weights-style."
            )
        return asked
    if len(possible) == 1:
        return possible[0]
    # The header of a timm export may name the architecture; then the nearest name on the path, as in timm's own cache.
    for text in (*header.values(), *reversed(path.absolute().parts)):
        if match := re.search(r"(tf_)?efficientnet_b[0-7]", text):
            return "timm_tf" if match[1] else "timm"
    raise ValueError(
        "timm's efficientnet_* and tf_efficientnet_* have the same keys and nothing here tells which these are: "
        "say --weights-style timm or --weights-style timm_tf."
    )
