"""Evaluating a model between epochs: sums on the device, and nothing that waits for it at each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline import Batch
from fastnet.device import Amp
from fastnet.errors import UserError
from fastnet.model import EfficientNet
from fastnet.training.step import autocast


@dataclass(frozen=True)
class Evaluation:
    """Means over a split: top-1 and top-5 in percent, cross-entropy without smoothing in nats; over its classes: F1
    (of those that occur or were answered) and recall (of those that occur), in percent."""

    top1: float
    top5: float
    loss: float
    images: int
    macro_f1: float = 0.0
    balanced_accuracy: float = 0.0


class Interrupted(Exception):
    """Evaluation was asked to stop before its end."""


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    amp: Amp,
    stop: Callable[[], bool] = lambda: False,
    add: Callable[[torch.Tensor], None] = lambda sums: None,
) -> Evaluation:
    """Evaluate each image of `batches` once, in evaluation mode and without compiled code.

    The last batch is shorter than the others and the mode differs from training: compiling for both would cost more
    than it brings. The model's mode is restored. `add` adds up what several processes found, in place. Raises
    Interrupted when `stop()` turns true, in all of them if it does in one.
    """
    # The fifth: were we asked to stop? Behind it, of each class: right answers, answers, images.
    sums = torch.zeros(5 + 3 * classes, dtype=torch.float64, device=device)
    by_class = sums[5:].view(3, classes)
    one = torch.ones((), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"), autocast(device, amp):
            for images, labels in batches:
                if stop():
                    sums[4] = 1
                    break
                logits = model(images).float()
                answers = logits.topk(min(5, logits.shape[1]), 1).indices
                hits = answers == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                count = torch.full_like(loss, len(labels))
                sums[:4] += torch.stack([hits[:, 0].sum(), hits.sum(), loss, count]).double()
                by_class[0].index_add_(0, labels, hits[:, 0].double())
                by_class[1].index_add_(0, answers[:, 0], one.expand(len(labels)))
                by_class[2].index_add_(0, labels, one.expand(len(labels)))
    finally:
        model.train(training)
    add(sums)
    top1, top5, loss_sum, images_seen, stopped = sums[:5].tolist()
    if stopped:
        raise Interrupted
    if not images_seen:
        raise UserError("there is no image to evaluate: add some to the validation split.")
    right, answered, there = by_class.cpu()
    f1 = (2 * right / (answered + there))[answered + there > 0].mean()
    recall = (right / there)[there > 0].mean()
    return Evaluation(
        100 * top1 / images_seen,
        100 * top5 / images_seen,
        loss_sum / images_seen,
        int(images_seen),
        100 * float(f1),
        100 * float(recall),
    )


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
    counts = [norm.num_batches_tracked.clone() for norm in norms]  # of training steps, which these are not
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
        for norm, momentum, count_before in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count_before)
        model.train(training)
    return used
