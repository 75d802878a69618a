"""Which loader gives a split's images."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from data_pipeline.dataset.index import Index
from data_pipeline.errors import DataError
from data_pipeline.loaders import loader
from data_pipeline.loaders.augment import CROP_FRACTION, IMAGENET, Augmentation, Interpolation, Normalization
from data_pipeline.loaders.cache import PixelCache
from data_pipeline.loaders.dali_options import Backend, DaliOptions
from data_pipeline.loaders.loader import WHOLE, Loader, Plan, Shard


def make_loader(
    index: Index,
    split: Literal["train", "val"],
    *,
    backend: Backend = "auto",
    resolution: int,
    batch_size: int,
    seed: int,
    train: bool,
    augmentation: Augmentation | None,
    device: str | torch.device = "cpu",
    workers: int,
    crop_fraction: float = CROP_FRACTION,
    interpolation: Interpolation = "bilinear",
    normalization: Normalization = IMAGENET,
    cache: PixelCache | None = None,
    dali: DaliOptions | None = None,
    balanced: bool = False,
    filled: bool = False,
    shard: Shard = WHOLE,
) -> Loader:
    """A loader of `index.splits[split]` that gives square images of `resolution` pixels on `device`.

    "auto" is DALI on a GPU where it is installed, and torch elsewhere: bench/bench_loader.py measures which is the
    faster on a CPU. augmentation: None is `Augmentation()`; evaluation (train=False) uses none.
    workers: threads of DALI, or processes of the torch loader (0: none, in this process).
    crop_fraction: share of the short side that evaluation looks at, in its centre.
    interpolation: how evaluation resizes that; training's crops are always bilinear.
    cache: of `choose_cache`; images come from there whatever the backend, unless its kind is "none". Where that is
    "disk" and the files are not there, they are written now.
    dali: how that backend decodes; None is `DaliOptions()`.
    balanced, filled: as in `Plan`, for training.
    shard: the part of each batch that this loader gives; `batch_size` counts those of all processes.

    Raises:
        DataError: "dali" where DALI is not installed or cannot start; a cache that cannot be written.
        ValueError: a resolution, batch size or number of workers that makes no sense.
    """
    if resolution < 1 or batch_size < 1 or workers < 0:
        raise ValueError(
            "resolution and batch_size must be positive and workers not negative, "
            f"got {resolution}, {batch_size} and {workers}"
        )
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction must be more than 0 and at most 1, got {crop_fraction}")
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be "auto", "dali" or "torch", got "{backend}"')
    device = torch.device(device)
    if backend == "auto":
        usable = loader.dali_installed() and loader.old_dali() is None
        backend = "dali" if device.type == "cuda" and usable else "torch"
    plan = Plan(
        index.splits[split],
        resolution,
        batch_size,
        seed,
        train,
        augmentation or Augmentation(),
        crop_fraction=crop_fraction,
        interpolation="bilinear" if train else interpolation,
        normalization=normalization,
        balanced=balanced,
        filled=filled,
        shard=shard,
    )
    made = _make(backend, plan, device, workers, split, cache, dali)
    made.quarantine(index.quarantined.get(split, {}))
    if cache is not None:
        made.cache_note = f"{cache.kind}: {cache.reason}"
    return made


def _make(
    backend: str,
    plan: Plan,
    device: torch.device,
    workers: int,
    split: Literal["train", "val"],
    cache: PixelCache | None,
    dali: DaliOptions | None,
) -> Loader:
    if cache is not None and cache.kind == "gpu":
        from data_pipeline.loaders.device_loader import DeviceLoader

        cache.check(split, plan)
        return DeviceLoader(plan, device, workers, cache.device_store(split, device))
    if cache is not None and cache.kind != "none":
        from data_pipeline.loaders.cached_loader import CachedLoader

        return CachedLoader(plan, device, workers, cache, split)
    if backend == "torch":
        from data_pipeline.loaders.torch_loader import TorchLoader

        return TorchLoader(plan, device, workers)
    if not loader.dali_installed():
        raise DataError("--loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use --loader torch.")
    if old := loader.old_dali():
        raise DataError(
            f"--loader dali needs DALI 2.2 or newer, as {old} ignores how a photo was held (EXIF): pip install -U "
            "nvidia-dali-cuda130, or use --loader torch."
        )
    from data_pipeline.loaders.dali_loader import DaliLoader

    return DaliLoader(plan, device, workers, dali)
