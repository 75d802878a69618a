"""RUN_OR_FILE: from a run's folder, a file of weights or the word "imagenet" to a model that is ready to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline import Index, build_index
from data_pipeline.loaders.augment import IMAGENET as IMAGENET_PIXELS
from data_pipeline.loaders.augment import Interpolation, Normalization
from fastnet.arch import Kernels
from fastnet.config import DataOptions, TrainConfig
from fastnet.config_file import read_config
from fastnet.device import check_kernels
from fastnet.errors import UserError
from fastnet.loading.checkpoint import files_of
from fastnet.loading.foreign import HUB_FILES
from fastnet.loading.hub import hub_file, hub_name
from fastnet.loading.options import RunFile, WeightsOptions
from fastnet.loading.pretrained import IMAGENET, imagenet_file, normalised_as_imagenet, published
from fastnet.loading.view import View
from fastnet.loading.weights import LoadedWeights, load_weights
from fastnet.model import EfficientNet
from fastnet.scaling import architecture


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, channels_last, on its device, and how its images are cut.

    path: the weights file. run: the folder of the run that it belongs to, if any. resolution: pixels.
    crop_fraction: share of the short side. classes: names, where the file or the run tells.
    """

    path: Path
    run: Path | None
    config: TrainConfig | None
    model: EfficientNet
    resolution: int
    crop_fraction: float
    classes: tuple[str, ...] | None
    interpolation: Interpolation = "bilinear"
    normalization: Normalization = IMAGENET_PIXELS

    @property
    def view(self) -> View:
        return View(self.resolution, self.crop_fraction, self.interpolation, *self.normalization)

    @property
    def device(self) -> torch.device:
        return self.model.classifier.weight.device

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes else f"class {label}"


def resolve_weights_file(target: Path, which: RunFile = "best") -> Path:
    """The weights that RUN_OR_FILE means: a file itself, or a run's best (else last) or last checkpoint."""
    if target.is_dir():
        wanted = ("best.safetensors", "last.safetensors") if which == "best" else ("last.safetensors",)
        for name in wanted:
            if (target / name).is_file():
                return target / name
        if which == "best" and (found := [target / name for name in HUB_FILES if (target / name).is_file()]):
            return found[0]
        raise UserError(f"{target} holds no {' or '.join(wanted)}: name a run's folder or a file.")
    if not target.is_file():
        raise UserError(f"{target} does not exist: name a run's folder or a weights file.")
    return target


def load_trained(
    target: str | Path,
    options: WeightsOptions = WeightsOptions(),
    *,
    device: torch.device | str = "cpu",
    kernels: Kernels = "auto",
) -> Trained:
    """The model of a run, of a .safetensors or .pth file, or ("imagenet" and a variant) of torchvision.

    Resolution, crop, interpolation, mean and standard deviation are the run's or the file's own, otherwise those that
    timm or torchvision publish for it, unless they are given.
    Raises UserError where the target cannot be read, is another variant, or kernels do not work on the device.
    """
    variant = options.variant
    if str(target) == IMAGENET:
        if variant is None:
            raise UserError("imagenet needs --variant, such as b0.", exit_status=2)
        path = imagenet_file(variant)
    elif name := hub_name(target):
        path = hub_file(name)
    else:
        path = resolve_weights_file(Path(target), options.checkpoint)
    try:
        loaded = load_weights(path, style=options.weights_style)
    except ValueError as error:
        raise UserError(str(error)) from error
    if str(target) == IMAGENET:
        loaded = normalised_as_imagenet(loaded)
    if variant is not None and variant != loaded.config.variant:
        raise UserError(
            f"{path} holds a {loaded.config.variant}: leave out --variant {variant} or name another file.",
            exit_status=2,
        )
    run = path.parent if path.name not in HUB_FILES and (path.parent / "config.json").is_file() else None
    config = read_config(path.parent / "config.json") if run else None
    given = {name: getattr(options, name) for name in ("crop_fraction", "interpolation", "mean", "std")}
    try:
        view = loaded.view.changed(given)
    except ValueError as error:
        raise UserError(f"--{error}", exit_status=2) from error
    arch = architecture(loaded.config.variant, loaded.config.scaling)
    trained_at = config.model.resolution if config else None
    resolution = options.resolution or loaded.resolution or trained_at or arch.resolution
    if not 32 <= resolution <= 4096:
        raise UserError(f"--resolution {resolution} must lie between 32 and 4096.", exit_status=2)
    return Trained(
        path,
        run,
        config,
        _build(loaded, torch.device(device), kernels),
        resolution,
        view.crop_fraction,
        _class_names(loaded, path),
        view.interpolation,
        view.normalization,
    )


def _build(loaded: LoadedWeights, device: torch.device, kernels: Kernels) -> EfficientNet:
    check_kernels(kernels, device, variant=loaded.config.variant)
    model = EfficientNet(replace(loaded.config, kernels=kernels))
    model.load_state_dict(loaded.state_dict)
    return model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _class_names(loaded: LoadedWeights, path: Path) -> tuple[str, ...] | None:
    if loaded.classes is not None:
        return loaded.classes
    if loaded.style != "fastnet" and loaded.config.num_classes == 1000:
        return tuple(published("b0").meta["categories"])  # ImageNet's, of every model
    # Weights that were written without names, beside the checkpoint of their run.
    last = path.with_name("last.safetensors")
    beside = load_weights(last).classes if last.is_file() and last != path else None
    return beside if beside and len(beside) == loaded.config.num_classes else None


def data_of(trained: Trained, data: str | None, test: bool = False) -> Index:
    """The data set to evaluate on: `data`, else the run's own; its classes have to be the model's. test: its "val" is
    its test split.

    Raises UserError where none is named or the classes differ, DataError where it cannot be read.
    """
    folds = began = None
    if data is None:
        if trained.config is None:
            raise UserError(f"{trained.path} belongs to no run: say with --data what to evaluate it on.", exit_status=2)
        data, folds = trained.config.data.source, trained.config.data.division
        began = files_of(trained.run) if trained.run else None
    options = trained.config.data if trained.config else DataOptions()
    index = build_index(data, options.val_fraction, folds=folds, test=test, divided_as=began)
    known = trained.model.config.num_classes
    if len(index.classes) != known:
        raise UserError(
            f"{trained.path} knows {known} classes and {index.root} has {len(index.classes)}: "
            "evaluate it on the data set that it was trained on."
        )
    if trained.run and trained.classes and trained.classes != index.classes:
        name = next(a for a, b in zip(trained.classes, index.classes, strict=True) if a != b)
        raise UserError(
            f'{trained.path} knows the class "{name}", which {index.root} has not at that place: '
            "evaluate it on the data set that it was trained on."
        )
    return index
