"""Evaluating a model: the functions that the trainer and `python -m fastnet.evaluate` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline import Batch, build_index, make_loader
from fastnet.config import read_config
from fastnet.device import pick_amp, pick_device, pick_workers
from fastnet.errors import UserError
from fastnet.model import EfficientNet
from fastnet.scaling import architecture
from fastnet.step import Amp, autocast
from fastnet.weights import load_weights


@dataclass(frozen=True)
class Evaluation:
    """Means over a split: top-1 and top-5 in percent, cross-entropy without smoothing in nats."""

    top1: float
    top5: float
    loss: float
    images: int


class Interrupted(Exception):
    """Evaluation was asked to stop before its end."""


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    amp: Amp,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate each image of `batches` once, in evaluation mode and without compiled code.

    The last batch is shorter than the others and the mode differs from training: compiling for both would cost more
    than it brings. The model's mode is restored. Raises Interrupted when `stop()` turns true.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"), autocast(device, amp):
            for images, labels in batches:
                if stop():
                    raise Interrupted
                logits = model(images).float()
                hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                count = torch.full_like(loss, len(labels))
                sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, count]).double()
    finally:
        model.train(training)
    top1, top5, loss_sum, images_seen = sums.tolist()
    if not images_seen:
        raise UserError("there is no image to evaluate: add some to the validation split.")
    return Evaluation(100 * top1 / images_seen, 100 * top5 / images_seen, loss_sum / images_seen, int(images_seen))


def reestimate_batch_norm(
    model: EfficientNet,
    batches: Iterable[Batch],
    count: int,
    *,
    amp: Amp,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Replace batch norm's running statistics by plain means over `count` training batches; return how many were used.

    Nothing is dropped meanwhile (drop-connect scales of one), as in evaluation. The result depends on the weights and
    the batches alone. Raises Interrupted when `stop()` turns true.
    """
    norms = list(model.batch_norms())
    momenta = [norm.momentum for norm in norms]
    used, training = 0, model.training
    model.train()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(device, amp):
            for images, _ in islice(batches, count):
                if stop():
                    raise Interrupted
                used += 1
                for norm in norms:
                    norm.momentum = 1.0 / used
                model(images, torch.ones(len(model.blocks), len(images), device=device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)
    return used


def resolve_weights_file(target: Path) -> Path:
    """The weights that RUN_OR_FILE means: a file itself, or a run's best, else its last, checkpoint."""
    if target.is_dir():
        for name in ("best.safetensors", "last.safetensors"):
            if (target / name).is_file():
                return target / name
        raise UserError(f"{target} holds no best.safetensors or last.safetensors: name a run's folder or a file.")
    if not target.is_file():
        raise UserError(f"{target} does not exist: name a run's folder or a weights file.")
    return target


def evaluate_run(
    target: Path,
    data: str | None,
    resolution: int | None,
    batch_size: int,
    loader: str,
    workers: int | None,
    device_name: str,
    amp: str,
) -> Evaluation:
    """`python -m fastnet.evaluate`: the validation split, with the settings of the run that `target` belongs to."""
    path = resolve_weights_file(target)
    config_path = path.parent / "config.json"
    config = read_config(config_path) if config_path.is_file() else None
    if data is None:
        if config is None:
            raise UserError(f"{path} belongs to no run: say with --data what to evaluate it on.", exit_status=2)
        data = config.data.data
    device = pick_device(device_name)
    try:
        loaded = load_weights(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    model = EfficientNet(loaded.config)
    model.load_state_dict(loaded.state_dict)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if resolution is None:
        trained_at = config.model.resolution if config else None
        resolution = trained_at or architecture(loaded.config.variant, loaded.config.scaling).resolution
    index = build_index(data)
    if len(index.classes) != loaded.config.num_classes:
        raise UserError(
            f"{path} knows {loaded.config.num_classes} classes and {index.root} has {len(index.classes)}: "
            "evaluate it on the data set that it was trained on."
        )
    batches = make_loader(
        index,
        "val",
        backend=loader,  # type: ignore[arg-type]
        resolution=resolution,
        batch_size=batch_size,
        seed=0,
        train=False,
        augmentation=None,
        device=device.type,
        workers=pick_workers(workers, device),
    )
    try:
        return evaluate_model(model, batches.batches(0), device=device, amp=pick_amp(amp, device))
    finally:
        batches.close()
