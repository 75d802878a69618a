"""What a model says of images: log-probabilities, also as the mean over several views (test-time augmentation)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline import Batch, Index, Loader, Split, make_loader
from data_pipeline.dataset.probe import Probe, decode_fully
from data_pipeline.loaders.augment import IMAGENET, Normalization
from fastnet.device import Amp
from fastnet.errors import UserError
from fastnet.loading.trained import Trained
from fastnet.model import EfficientNet
from fastnet.training.step import autocast
from fastnet.training.tuning import prepare_inference

Tta = Literal["off", "hflip", "five", "ten"]


@dataclass(frozen=True)
class Predictions:
    """Row i is one image. log_probabilities [N, K] float32 and labels [N] int64 on the CPU; positions [N] in the split,
    in its order: files that became unreadable since they were indexed are missing."""

    log_probabilities: Tensor
    labels: Tensor
    positions: Tensor

    @property
    def probabilities(self) -> Tensor:
        """[N, K]; rows sum to 1."""
        return self.log_probabilities.exp()

    @property
    def predicted(self) -> Tensor:
        """[N] int64: the most probable class."""
        return self.log_probabilities.argmax(1)

    @property
    def losses(self) -> Tensor:
        """[N]: cross-entropy in nats."""
        return -self.log_probabilities.gather(1, self.labels[:, None])[:, 0]


def log_probabilities(model: EfficientNet, images: Tensor, resolution: int, *, tta: Tta = "off", amp: Amp) -> Tensor:
    """images [B, 3, S, S] -> log of the mean probability over the views [B, K], float32; S is `loaded_side`."""
    views = crops(images, resolution) if tta in ("five", "ten") else [images]
    if tta in ("hflip", "ten"):
        views += [view.flip(-1) for view in views]
    with torch.inference_mode(), autocast(images.device, amp):
        each = [model(view.contiguous(memory_format=torch.channels_last)).float().log_softmax(1) for view in views]
    return torch.stack(each).logsumexp(0) - math.log(len(each))


def crops(images: Tensor, side: int) -> list[Tensor]:
    """Centre and four corners of images [B, 3, S, S], each [B, 3, side, side]."""
    end = images.shape[-1] - side
    corners = [(end // 2, end // 2), (0, 0), (0, end), (end, 0), (end, end)]
    return [images[:, :, y : y + side, x : x + side] for y, x in corners]


def loaded_side(resolution: int, crop_fraction: float, tta: Tta) -> tuple[int, float]:
    """(side in pixels, share of the short side) to load for these views.

    Crops are cut from the whole central square, at the scale of the usual single view (Krizhevsky et al. 2012).
    """
    if tta not in ("five", "ten"):
        return resolution, crop_fraction
    side = round(resolution / crop_fraction)
    if side <= resolution:
        raise UserError(
            f"--tta {tta} cuts its views from more than the usual one, which is the whole picture here: "
            "use --tta hflip or a --crop-fraction below 1.",
            exit_status=2,
        )
    return side, 1.0


def view_loader(trained: Trained, index: Index, *, tta: Tta = "off", **options: Any) -> Loader:
    """`make_loader` over the validation split, with the size and crop that the model and `tta` want."""
    side, crop_fraction = loaded_side(trained.resolution, trained.crop_fraction, tta)
    return make_loader(
        index,
        "val",
        resolution=side,
        crop_fraction=crop_fraction,
        interpolation=trained.interpolation,
        normalization=trained.normalization,
        seed=0,
        train=False,
        augmentation=None,
        device=trained.device.type,
        **options,
    )


def collect(trained: Trained, loader: Loader, *, tta: Tta = "off", amp: Amp = "off") -> Predictions:
    """Predict every image of the loader once. Images stream through; only K numbers of each stay."""
    count = loader.num_images
    prepare_inference(trained.model, trained.resolution, min(loader.plan.batch_size, max(count, 1)), amp)
    batches = _advancing(loader)
    found = torch.empty(count, trained.model.config.num_classes)
    labels = torch.empty(count, dtype=torch.int64)
    row = 0
    for images, truth in batches:
        rows = slice(row, row + len(truth))
        found[rows] = log_probabilities(trained.model, images, trained.resolution, tta=tta, amp=amp).cpu()
        labels[rows] = truth.cpu()
        row += len(truth)
    if not row:
        raise UserError("there is no image to evaluate: add some to the validation split.")
    kept = [i for i in range(count) if i not in loader.plan.quarantined]
    return Predictions(found[:row], labels[:row], torch.tensor(kept))


def _advancing(loader: Loader) -> Iterable[Batch]:
    """The loader's batches; on a terminal with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    batches = loader.batches(0)
    if not console.is_terminal:
        return batches
    return track(batches, "predicting", loader.steps_per_epoch, console=console, transient=True)


# --- files and pictures ----------------------------------------------------------------------------------------


def index_files(files: Sequence[str | Path]) -> tuple[Index, list[tuple[str, str]]]:
    """(an index of these images alone, all of label 0, as its validation split; (path, reason) of what is none)."""
    good: list[tuple[str, Probe]] = []
    bad: list[tuple[str, str]] = []
    for path in map(str, files):
        probe = decode_fully(path)
        if probe.reason is None:
            good.append((path, probe))
        else:
            bad.append((path, probe.reason))
    split = Split(
        paths=tuple(path for path, _ in good),
        labels=np.zeros(len(good), np.int64),
        sizes=np.array([probe[:2] for _, probe in good], np.int32).reshape(-1, 2),
        orientations=np.array([probe.orientation for _, probe in good], np.uint8),
        kinds=np.array([probe.kind for _, probe in good], np.uint8),
    )
    return Index(Path(), (), {"val": split}, excluded=(), fingerprint="", content=""), bad


def subset(index: Index, positions: Sequence[int]) -> Index:
    """`index` with these images of the validation split alone, in this order."""
    split, rows = index.splits["val"], list(positions)
    part = Split(
        paths=tuple(split.paths[i] for i in rows),
        labels=split.labels[rows],
        sizes=split.sizes[rows],
        orientations=split.orientations[rows],
        kinds=split.kinds[rows],
    )
    return replace(index, splits={"val": part})


def load_views(trained: Trained, index: Index, batch_size: int = 32) -> Tensor:
    """The model's single view of every validation image of `index`: [N, 3, R, R]; meant for a handful."""
    loader = view_loader(trained, index, backend="torch", batch_size=batch_size, workers=0)
    return torch.cat([images for images, _ in loader.batches(0)])


def as_pictures(images: Tensor, normalization: Normalization = IMAGENET) -> np.ndarray:
    """Normalised images [N, 3, R, R] -> what they look like, [N, R, R, 3] uint8."""
    mean, std = map(torch.tensor, normalization)
    pixels = (images.detach().cpu().permute(0, 2, 3, 1) * std + mean) * 255
    return pixels.round().clamp(0, 255).byte().numpy()
