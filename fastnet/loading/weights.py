"""Weights from and for torchvision and timm, and fastnet's own safetensors files.

The parameters of the three libraries differ in names, and squeeze-and-excitation's 1×1 convolutions are matrices
here. What the numbers mean differs too, so it travels with them:

| style | models | padding | BN eps, momentum |
|---|---|---|---|
| torchvision | efficientnet_b0–b4 | symmetric | 1e-5, 0.1 |
| torchvision | efficientnet_b5–b7 | symmetric | 1e-3, 0.01 |
| timm | efficientnet_b*, efficientnet_lite* | symmetric | 1e-5, 0.1 |
| timm_tf | tf_efficientnet_b* (also AdvProp, Noisy Student), tf_efficientnet_lite* | same | 1e-3, 0.1 |

| efficientnet_pytorch | that package's efficientnet-b*, and efficientnet-lite* | same | 1e-3, 0.01 |

These are the values of the modules that each library builds.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.files import refuse_special
from fastnet.arch import VARIANTS, Block, Network, Padding, Scaling, Style
from fastnet.loading.checkpoint import load_checkpoint, one_line, read_metadata, save_checkpoint
from fastnet.loading.foreign import Foreign, beside, read_pickled, weights_in
from fastnet.loading.view import View, foreign_view
from fastnet.model import EfficientNet, ModelConfig
from fastnet.scaling import SCALED, Architecture, architecture
from fastnet.typed import checked_fields, fits


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
    view: View = field(default_factory=View)
    """How it saw photos; of weights that were saved without it, fastnet's own."""


def load_weights(path: str | Path, *, style: Style | None = None) -> LoadedWeights:
    """Read a .safetensors or .pth file of fastnet, torchvision or timm.

    ``style`` is needed where names do not tell: timm's efficientnet_* and tf_efficientnet_* have the same keys. What
    the file or the config.json beside it says decides, then the file's name, then its folders' names. ``path`` may be
    a run's folder, or one of the Hugging Face hub. Of a .pth file nothing is unpickled but tensors and a script's
    arguments. Raises ValueError (UserError for a damaged fastnet checkpoint) with one sentence that names
    the file and the remedy.
    """
    path = weights_in(Path(path))
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}: check the path.")
    foreign = beside(path, _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path))
    names = (*foreign.names, *foreign.notes.values(), *reversed(path.absolute().parts))
    try:
        found = _detect_style(foreign, names, path, style)
        if found == "fastnet":
            loaded = _own(path)
        else:
            loaded = _from_foreign(foreign.state, found)
            view = foreign_view(found, loaded.config.variant, path.name, names, foreign.configs)
            known = foreign.classes if foreign.classes and len(foreign.classes) == loaded.config.num_classes else None
            loaded = dataclasses.replace(loaded, view=view, resolution=view.resolution, classes=known)
        refuse_nan(loaded.state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return loaded


def _own(path: Path) -> LoadedWeights:
    """A whole checkpoint will do as well: its optimizer and the like stay behind."""
    weights, _, metadata = load_checkpoint(path)
    # How to run is the caller's choice and no property of the weights.
    config = ModelConfig(**checked_fields(ModelConfig, (metadata.get("model") or {}) | {"kernels": "auto"}))
    classes, resolution = metadata.get("classes"), metadata.get("resolution")
    if not fits(classes, tuple[str, ...] | None) or not fits(resolution, int | None):
        raise ValueError("its classes or its resolution are damaged: restore it from a backup.")
    if classes and len(classes) != config.num_classes:
        raise ValueError(f"it names {len(classes)} classes and tells {config.num_classes} apart: it is damaged.")
    try:
        view = View().changed(metadata.get("view") or {}).changed({"resolution": resolution})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its view is damaged ({error}): restore it from a backup.") from None
    known = tuple(classes) if classes else None
    return LoadedWeights(_checked(weights, config), config, "fastnet", known, resolution, view)


def refuse_nan(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the first tensor with a value that is not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite: the training that wrote it had failed.")


def save_weights(
    path: str | Path,
    model: EfficientNet,
    *,
    classes: Sequence[str] | None = None,
    resolution: int | None = None,
    view: View | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's tensors and ModelConfig to ``path`` (.safetensors), atomically; the config also as .json.

    With the class names and the view, or the resolution in pixels alone, the file needs no run beside it to predict.
    notes: further JSON-serialisable facts for its header.
    Raises ValueError for another suffix, UserError where the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are saved as .safetensors, not as {path.name}: change the file's suffix.")
    metadata: dict[str, Any] = {"model": model.config.to_dict(), **(notes or {})}
    if classes is not None:
        metadata["classes"] = list(classes)
    if view is not None:
        metadata["view"] = view.to_dict()
        resolution = resolution or view.resolution
    if resolution is not None:
        metadata["resolution"] = resolution
    save_checkpoint(path, model.state_dict(), {}, metadata)


def from_torchvision(state_dict: Mapping[str, Tensor]) -> LoadedWeights:
    """torchvision's efficientnet_b* in fastnet's names. Raises ValueError where keys or shapes are no such model's."""
    return _from_foreign(state_dict, "torchvision")


def from_timm(state_dict: Mapping[str, Tensor], style: Style) -> LoadedWeights:
    """timm's efficientnet_* (style "timm") or tf_efficientnet_* ("timm_tf") in fastnet's names.

    Raises ValueError where keys or shapes are no such model's.
    """
    if style not in ("timm", "timm_tf"):
        raise ValueError(f"style must be 'timm' or 'timm_tf' for timm's weights, not {style!r}.")
    return _from_foreign(state_dict, style)


def to_torchvision(model: EfficientNet) -> dict[str, Tensor]:
    """The model's tensors under torchvision's names, for ``load_state_dict`` of its efficientnet_b*.

    Build that with ``norm_layer=partial(BatchNorm2d, eps=…, momentum=…)`` where the config's values are not its own;
    only padding "symmetric" means the same there.
    """
    return _to_foreign(model, "torchvision")


def to_timm(model: EfficientNet) -> dict[str, Tensor]:
    """The model's tensors under timm's names: tf_efficientnet_* for padding "same", efficientnet_* otherwise.

    Build that with ``bn_eps=…, bn_momentum=…`` where the config's values are not its own.
    """
    return _to_foreign(model, "timm")


# --- names -----------------------------------------------------------------------------------------------------


def _torchvision_block(block: Block) -> dict[str, str]:
    parts = ["expand"] * (block.shape.expand_ratio != 1) + ["depthwise", "se", "project"]
    names: dict[str, str] = {}
    for i, part in enumerate(parts):
        leaves = (("reduce", "fc1"), ("expand", "fc2")) if part == "se" else (("conv", "0"), ("bn", "1"))
        names |= {f"{part}.{ours}": f"{i}.{theirs}" for ours, theirs in leaves}
    return names


def _timm_block(block: Block) -> dict[str, str]:
    convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    if block.shape.expand_ratio == 1:
        convs = {"depthwise": "conv_dw", "project": "conv_pw"}
    names = {"se.reduce": "se.conv_reduce", "se.expand": "se.conv_expand"} if block.shape.squeeze_excite else {}
    for i, (part, conv) in enumerate(convs.items(), start=1):
        names |= {f"{part}.conv": conv, f"{part}.bn": f"bn{i}"}
    return names


def _efficientnet_pytorch_block(block: Block) -> dict[str, str]:
    names = {"se.reduce": "_se_reduce", "se.expand": "_se_expand"} if block.shape.squeeze_excite else {}
    for i, part in enumerate(("expand", "depthwise", "project")):
        if part != "expand" or block.shape.expand_ratio != 1:
            names |= {f"{part}.conv": f"_{part}_conv", f"{part}.bn": f"_bn{i}"}
    return names


class _Names(NamedTuple):
    """A library's modules: stem and head with their norms and the classifier, a block's name, and what is in it."""

    ends: str
    block: str
    inside: Callable[[Block], dict[str, str]]


_TIMM = _Names("conv_stem bn1 conv_head bn2 classifier", "blocks.{from_0}.{i}", _timm_block)
_NAMES: dict[Style, _Names] = {
    "torchvision": _Names(
        "features.0.0 features.0.1 features.{last}.0 features.{last}.1 classifier.1",
        "features.{from_1}.{i}.block",
        _torchvision_block,
    ),
    "timm": _TIMM,
    "timm_tf": _TIMM,
    "efficientnet_pytorch": _Names(
        "_conv_stem _bn0 _conv_head _bn1 _fc", "_blocks.{index}", _efficientnet_pytorch_block
    ),
}


def _module_names(style: Style, network: Network) -> dict[str, str]:
    """fastnet's module names → the other library's."""
    ends, name, inside = _NAMES[style]
    theirs = ends.format(last=network.last_stage - 1).split()
    names = dict(zip(("stem.conv", "stem.bn", "head.conv", "head.bn", "classifier"), theirs, strict=True))
    for stage, blocks in network.by_stage.items():
        for i, block in enumerate(blocks):
            outer = name.format(from_1=stage - 1, from_0=stage - 2, i=i, index=block.index)
            names |= {f"blocks.{block.index}.{ours}": f"{outer}.{inner}" for ours, inner in inside(block).items()}
    return names


def _is_se_matrix(name: str) -> bool:
    return ".se." in name and name.endswith(".weight")


# --- conversion ------------------------------------------------------------------------------------------------


def _to_foreign(model: EfficientNet, style: Style) -> dict[str, Tensor]:
    names = _module_names(style, model.network)
    state = {}
    for name, value in model.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        state[f"{names[module]}.{leaf}"] = value[:, :, None, None] if _is_se_matrix(name) else value
    return state


def _from_foreign(state_dict: Mapping[str, Tensor], style: Style) -> LoadedWeights:
    arch = _recognise(state_dict, style)
    ours_of = {theirs: ours for ours, theirs in _module_names(style, arch.network).items()}
    renamed = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".")
        if module not in ours_of:
            raise ValueError(
                f"{key} belongs to no {style} EfficientNet {arch.name}: check the file or --weights-style."
            )
        name = f"{ours_of[module]}.{leaf}"
        renamed[name] = value.flatten(1) if _is_se_matrix(name) else value
    if "classifier.weight" not in renamed:
        raise ValueError("it holds no classifier.weight: a headless or truncated file cannot be loaded.")
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
    if style == "efficientnet_pytorch":
        return "same", 1e-3, 0.01
    if style == "torchvision" and variant in ("b5", "b6", "b7"):
        return "symmetric", 1e-3, 0.01
    return "symmetric", 1e-5, 0.1


def _recognise(state: Mapping[str, Tensor], style: Style) -> Architecture:
    """The variant whose stages and blocks' output channels these are; within one scaling no two agree in all."""
    block = re.compile(r"features\.\d+\.\d+\.block\.|_?blocks\.(\d+\.(?=\d))?\d+\.")
    count = len({match[0] for key in state if (match := block.match(key))})
    for scaling in get_args(Scaling):
        for variant in VARIANTS if scaling == "published" else SCALED:
            arch = architecture(variant, scaling)
            if count == len(arch.network.blocks) and _fits(state, style, arch.network):
                return arch
    raise ValueError(
        f"its {count} blocks are no EfficientNet B0–B7 or Lite0–Lite4: check that the file is whole and of that family."
    )


def _fits(state: Mapping[str, Tensor], style: Style, network: Network) -> bool:
    names = _module_names(style, network)
    projections = [state.get(f"{names[f'blocks.{block.index}.project.conv']}.weight") for block in network.blocks]
    channels = [0 if weight is None else weight.shape[0] for weight in projections]
    squeezes = f"{names.get('blocks.0.se.reduce')}.weight" in state
    return (
        channels == [block.shape.out_channels for block in network.blocks] and squeezes == network.family.squeeze_excite
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
        if like.is_floating_point() != value.is_floating_point():
            raise ValueError(f"{name} holds {value.dtype}, not {like.dtype}: load weights that are not quantised.")
        checked[name] = value.to(like.dtype)
    return checked


# --- files -----------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Foreign:
    try:
        refuse_special(path)
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        return Foreign(load_file(path), notes=header)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({one_line(error)}): fetch or save it again.") from None


def _detect_style(foreign: Foreign, names: Sequence[str], path: Path, asked: Style | None) -> Style:
    """names: where timm's name of the model may stand, the surest first."""
    state, header = foreign.state, foreign.notes
    if "fastnet" in header and "model" in read_metadata(header["fastnet"], path):
        possible: tuple[Style, ...] = ("fastnet",)
    elif "features.0.0.weight" in state:
        possible = ("torchvision",)
    elif "conv_stem.weight" in state:
        possible = ("timm", "timm_tf")
    elif "_conv_stem.weight" in state:
        possible = ("efficientnet_pytorch",)
    elif "stem.conv.weight" in state:
        raise ValueError(
            "it has fastnet's names but no model configuration: save it with fastnet.loading.weights.save_weights."
        )
    else:
        first = next(iter(state), "nothing")
        raise ValueError(
            f"its keys ({first}, …) are not those of an EfficientNet of fastnet, torchvision, timm or "
            "efficientnet_pytorch: choose another file."
        )
    if asked is not None:
        if asked not in possible:
            raise ValueError(
                f"its keys are those of {' or '.join(possible)}, not of {asked}: change or drop --weights-style."
            )
        return asked
    if len(possible) == 1:
        return possible[0]
    # What the file says, and then the nearest name on the path, as in timm's own cache.
    for text in names:
        if match := re.search(r"(tf_)?efficientnet_(b[0-7]|lite[0-4])", text):
            return "timm_tf" if match[1] else "timm"
    raise ValueError(
        "timm's efficientnet_* and tf_efficientnet_* have the same keys and nothing here tells which these are: "
        "say --weights-style timm or --weights-style timm_tf."
    )
