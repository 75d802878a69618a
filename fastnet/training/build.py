"""From a configuration to what a run is made of: loaders, model, optimizer, average, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from data_pipeline import Index, Loader, PixelCache, build_index, choose_cache, make_loader
from fastnet.config import TrainConfig
from fastnet.create import create_model
from fastnet.device import Amp, check_kernels, pick_workers
from fastnet.errors import UserError, out_of_memory
from fastnet.loading.pretrained import read_pretrained
from fastnet.loading.view import View
from fastnet.model import EfficientNet, ModelConfig
from fastnet.scaling import architecture
from fastnet.training.distributed import BatchLayout, Ranks, sync_batch_norm
from fastnet.training.ema import ModelEma
from fastnet.training.gradients import GradientAllReduce
from fastnet.training.optim import freeze_stages, make_optimizer
from fastnet.training.saved import Saved, known_in
from fastnet.training.step import TrainStep


def view_of(config: TrainConfig, saved: dict[str, Any] | None) -> View:
    """How the run's images are cut and normalised: as its flags say, else as its weights want.

    Fine-tuning takes the whole view of its weights, resolution and crop included; other recipes mean and deviation.
    saved: a continued run's metadata.
    """
    options = config.model
    if saved is not None:
        return View(saved["resolution"]).changed(saved.get("view") or {})
    view = View(options.resolution or architecture(options.variant, options.scaling).resolution)
    if options.pretrained:
        try:
            own = read_pretrained(options.pretrained, options.variant, options.weights_style).view
        except (ValueError, OSError) as error:
            raise UserError(f"--pretrained {options.pretrained}: {error}") from error
        whole = own.to_dict() | ({"resolution": options.resolution} if options.resolution else {})
        view = view.changed(whole if config.recipe == "finetune" else {"mean": own.mean, "std": own.std})
    try:
        return view.changed(dataclasses.asdict(config.data))
    except ValueError as error:
        raise UserError(f"--{error}", exit_status=2) from error


def index_of(config: TrainConfig, saved: Saved | None) -> Index:
    """The run's data set; of a continued run as its checkpoint knows it."""
    # Who replaces a file that became unreadable depends on all that did, and on the places of all others.
    bad, known = (saved[2].get("quarantined", []), known_in(saved[1])) if saved else ([], None)
    data = config.data
    return build_index(data.source, data.val_fraction, folds=data.division, quarantined=bad, known=known)


def build_cache(config: TrainConfig, index: Index, view: View, device: torch.device, ranks: Ranks) -> PixelCache:
    """Where the run keeps decoded images; all ranks call it together."""
    with cache_memory(config):
        return choose_cache(
            config.data.cache,
            index,
            view.resolution or 0,
            augmentation=config.augment,
            side=config.data.cache_side,
            crop_fraction=view.crop_fraction,
            interpolation=view.interpolation,
            device=device,
            memory=ranks.shared_memory if ranks.size > 1 else None,
            agree=ranks.broadcast_from_main,
        )


@contextmanager
def cache_memory(config: TrainConfig) -> Iterator[None]:
    """UserError that names --cache where memory ends in the body and there is a cache in memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if config.data.cache in ("none", "disk") or not out_of_memory(error):
            raise
        raise UserError(f"out of memory for --cache {config.data.cache}: use --cache disk or --cache none.") from error


def build_loaders(
    config: TrainConfig, index: Index, cache: PixelCache, view: View, device: torch.device, batch_layout: BatchLayout
) -> tuple[Loader, Loader]:
    """(training, validation). A training batch is this rank's share of a whole step's, however many parts it goes
    through the model in."""
    images, ranks = len(index.splits["train"].paths), batch_layout.ranks
    if images < batch_layout.images:
        flags = f"--batch-size {config.optimizer.batch_size}"
        if config.optimizer.grad_accum_steps > 1:
            flags += f" x --grad-accum-steps {config.optimizer.grad_accum_steps}"
        if ranks.size > 1:
            flags += f" x {ranks.size} processes"
        raise UserError(
            f"{flags} is more than the {images} training images of {index.root}: choose a smaller one.", exit_status=2
        )
    common: dict[str, Any] = dict(
        backend=config.data.loader,
        cache=cache,
        resolution=view.resolution,
        crop_fraction=view.crop_fraction,
        interpolation=view.interpolation,
        normalization=view.normalization,
        seed=config.run.seed,
        device=device,
        workers=pick_workers(config.data.workers, device, ranks.local_size),
        dali=config.dali,
    )
    with cache_memory(config):
        train = make_loader(
            index,
            "train",
            train=True,
            augmentation=config.augment,
            batch_size=batch_layout.images,
            balanced=config.optimizer.balance == "sampler" and not config.data.feature_views,
            filled=config.optimizer.min_steps > 0 or config.data.feature_views > 0,
            shard=batch_layout.shard,
            **common,
        )
        val = make_loader(
            index,
            "val",
            train=False,
            augmentation=None,
            batch_size=config.optimizer.batch_size * ranks.size,
            shard=batch_layout.shard._replace(micro_batches=1),
            **common,
        )
        return train, val


def lower_batch(config: TrainConfig, images: int, processes: int) -> TrainConfig:
    """With a batch that gives an epoch of `images` --min-steps, or as many of them as batches of four do."""
    options = config.optimizer
    times, batch = options.grad_accum_steps * processes, options.batch_size
    while batch > 4 and -(-images // (batch * times)) < options.min_steps:
        batch -= 1
    return dataclasses.replace(config, optimizer=dataclasses.replace(options, batch_size=batch))


def check_classes(config: TrainConfig, index: Index) -> None:
    """UserError where --num-classes is not the data set's."""
    asked, there = config.data.num_classes, len(index.classes)
    if asked not in (None, there):
        raise UserError(
            f"--num-classes {asked}, and {index.root} has {there} classes: leave the flag out, or give the other data.",
            exit_status=2,
        )


def class_weights(config: TrainConfig, index: Index) -> torch.Tensor | None:
    """[classes] weights of the loss, of mean 1 over the images, or None for equal ones."""
    if config.optimizer.balance != "loss":
        return None
    counts = torch.bincount(torch.from_numpy(index.splits["train"].labels), minlength=len(index.classes))
    return counts.sum() / (len(counts) * counts.clamp(min=1)).float()


def share_quarantine(ranks: Ranks, *loaders: Loader) -> None:
    """Every rank leaves out the files that became unreadable for any of them."""
    if ranks.size == 1:
        return
    for loader in loaders:
        bad = dict(chain(*ranks.all_gather_object(loader.quarantined)))
        paths = loader.plan.split.paths
        loader.quarantine({at: bad[path] for at, path in enumerate(paths) if path in bad} if bad else {})


def build_model(
    config: TrainConfig,
    classes: int | Sequence[str],
    device: torch.device,
    saved: ModelConfig | None,
    log: Callable[[str], None],
) -> EfficientNet:
    """The model to train, on `device`, with its first stages frozen if so asked.

    classes: their number, or their names, by which those of a run at --pretrained are found again. saved: what a
    continued run's checkpoint holds, which will fill the weights; --pretrained is then not read again.
    """
    options = config.model
    check_kernels(options.kernels, device, log, variant=options.variant)
    torch.manual_seed(config.run.seed)
    model = EfficientNet(saved) if saved is not None else _created(config, classes, log)
    freeze_stages(model, config.optimizer.freeze_stages)
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _created(config: TrainConfig, classes: int | Sequence[str], log: Callable[[str], None]) -> EfficientNet:
    options, names = config.model, () if isinstance(classes, int) else classes
    try:
        return create_model(
            options.variant,
            options.pretrained,
            num_classes=classes if isinstance(classes, int) else len(classes),
            classes=names,
            weights_style=options.weights_style,
            log=log,
            scaling=options.scaling,
            dropout=options.dropout,
            drop_connect_rate=options.drop_connect_rate,
            padding=options.padding,
            kernels=options.kernels,
        )
    except (ValueError, OSError) as error:
        raise UserError(f"--pretrained {options.pretrained}: {error}") from error


def build_step(
    config: TrainConfig,
    model: EfficientNet,
    device: torch.device,
    amp: Amp,
    batch_layout: BatchLayout,
    index: Index | None = None,
) -> TrainStep:
    """The training step of a model that is not yet compiled, with its optimizer and average; all ranks' models become
    rank 0's. index: of the data set, for --balance."""
    ranks = batch_layout.ranks
    ranks.broadcast_tensors(chain(model.parameters(), model.buffers()))
    if config.run.sync_bn and ranks.size > 1:
        sync_batch_norm(model)
    ema, capturable = None, device.type == "cuda"
    if config.ema.model_ema:
        ema = ModelEma(model, config.ema.model_ema_decay, warmup=config.ema.model_ema_warmup, capturable=capturable)
    together: dict[str, Any] = {}
    if ranks.size > 1:
        together["all_reduce"] = GradientAllReduce(
            model.parameters(), in_order=config.run.deterministic, before_wait=ranks.peers.passed
        )
        together["reduce_found_inf"] = ranks.all_reduce_max_
    return TrainStep(
        model,
        make_optimizer(model, config.optimizer, config.peak_lr(batch_layout.images), capturable=capturable),
        device=device,
        amp=amp,
        label_smoothing=config.optimizer.label_smoothing,
        class_weights=class_weights(config, index) if index else None,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        ema=ema,
        grad_accum_steps=batch_layout.micro_batches,
        capturable=capturable,
        images=batch_layout.images,
        **together,
    )
