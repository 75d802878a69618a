"""`fastnet.load`: a run or a file of weights as an object that predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data_pipeline.dataset.probe import decode_fully
from data_pipeline.loaders.augment import IMAGENET, Interpolation, Normalization, eval_margin, eval_params
from data_pipeline.loaders.postprocess import finish
from data_pipeline.loaders.torch_loader import cut, decoded, reason_of
from fastnet.analysis.predictions import log_probabilities
from fastnet.arch import Kernels, Style, variant_name
from fastnet.device import pick_device
from fastnet.errors import UserError
from fastnet.loading.options import RunFile, WeightsOptions
from fastnet.loading.trained import Trained, load_trained
from fastnet.model import EfficientNet
from fastnet.predict import predict_files, ranked

Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8] | Tensor"
"""A file, a PIL image, an array [H, W, 3] or a tensor [3, H, W] of 8-bit pixels."""


class Transform:
    """A picture as the model wants it: `picture -> [3, R, R]` float32, cut, resized and normalised as in validation."""

    def __init__(
        self,
        resolution: int,
        crop_fraction: float,
        interpolation: Interpolation = "bilinear",
        normalization: Normalization = IMAGENET,
    ) -> None:
        self.resolution, self.crop_fraction = resolution, crop_fraction
        self.interpolation, self.normalization = interpolation, normalization

    def __call__(self, picture: Picture) -> Tensor:
        pixels = _pixels(picture)
        _, height, width = pixels.shape
        margin = eval_margin(self.interpolation)
        params = eval_params([(width, height)], self.resolution, self.crop_fraction, margin)
        seen = cut(pixels, params.windows[0], self.resolution, margin, self.interpolation)
        return finish(seen[None], params, torch.device("cpu"), self.normalization)[0]


class LoadedModel:
    """A trained model. model: in evaluation mode, channels_last, on its device. transform: from a picture to its input.
    classes: their names, in the order of the logits."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.model: EfficientNet = trained.model
        self.transform = Transform(
            trained.resolution, trained.crop_fraction, trained.interpolation, trained.normalization
        )
        self.classes = tuple(map(trained.class_name, range(trained.model.config.num_classes)))

    def predict(self, images: Picture | Sequence[Picture], top: int = 5) -> Any:
        """The most probable classes of a picture, best first: [{"class": name, "label": number, "probability": p}, …];
        of a list of pictures a list of those.

        Raises UserError, with the file's name, where one cannot be read, ValueError for what is no picture.
        """
        if not isinstance(images, Sequence) or isinstance(images, str):
            return self.predict([images], top)[0]
        files = [image for image in images if isinstance(image, str | Path)]
        found = iter(predict_files(self.trained, files, top=top) if files else [])
        return [self._read(next(found)) if isinstance(i, str | Path) else self._seen(i, top) for i in images]

    def _read(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        if "error" in found:
            raise unreadable(found["file"], found["error"])
        return found["top"]

    def _seen(self, image: Image.Image | NDArray[np.uint8] | Tensor, top: int) -> list[dict[str, Any]]:
        view = self.transform(image)[None].to(self.trained.device)
        said = log_probabilities(self.model, view, self.trained.resolution, amp="off")[0].exp().cpu()
        return ranked(self.trained, *said.topk(min(top, len(self.classes))))


def load(
    run_or_file: str | Path,
    *,
    variant: str | None = None,
    device: str = "auto",
    checkpoint: RunFile = "best",
    weights_style: Style | None = None,
    resolution: int | None = None,
    crop_fraction: float | None = None,
    interpolation: Interpolation | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    kernels: Kernels = "auto",
) -> LoadedModel:
    """The model of a run's folder, of a file of fastnet, torchvision or timm, or ("imagenet" and a variant) a published
    one.

    Resolution, crop, interpolation, mean and deviation are the run's or the file's own unless given; `weights_style`
    says whose a file is where it does not tell. Raises UserError, with one sentence, where it cannot be read or the
    device is not there.
    """
    named = None if variant is None else variant_name(variant)
    weights = WeightsOptions(checkpoint, named, weights_style, resolution, crop_fraction, interpolation, mean, std)
    return LoadedModel(load_trained(run_or_file, weights, device=pick_device(device), kernels=kernels))


def _read(path: str) -> Tensor:
    """`_pixels` of a file, as loaders read it. UserError where it cannot be read."""
    probe = decode_fully(path)
    reason = probe.reason
    if reason is None:
        try:
            return decoded(path, probe.orientation, np.array(probe[:2], np.int32))
        except (RuntimeError, OSError) as error:
            reason = reason_of(error)
    raise unreadable(path, reason)


def unreadable(path: str, reason: str) -> UserError:
    return UserError(f"{path} cannot be read ({reason}): leave it out.")


def _pixels(picture: Picture) -> Tensor:
    """[3, H, W] uint8, upright."""
    if isinstance(picture, str | Path):
        return _read(str(picture))
    if isinstance(picture, Image.Image):
        return F.pil_to_tensor(ImageOps.exif_transpose(picture).convert("RGB"))
    pixels = picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"a picture is an array [H, W, 3] or a tensor [3, H, W] of 8-bit pixels, not {list(picture.shape)} of "
            f"{picture.dtype}."
        )
    return pixels
