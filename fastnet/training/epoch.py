"""What an epoch's steps log, and its end: the weights and their average are evaluated, and the better are kept."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch

from data_pipeline import Loader
from fastnet.device import Amp
from fastnet.model import EfficientNet
from fastnet.training.reporting.console import Display
from fastnet.training.reporting.metrics import Clock, peak_memory_gb
from fastnet.training.resize import DynamicResize
from fastnet.training.saved import Run, keep_best
from fastnet.training.schedule import learning_rate
from fastnet.training.selection import best_of
from fastnet.training.step import StepHealth
from fastnet.training.stop import StopRequest
from fastnet.training.validate import evaluate_model, reestimate_batch_norm


class Training(Run, Protocol):
    """What of a trainer is needed."""

    device: torch.device
    amp: Amp
    display: Display
    stop: StopRequest
    train_loader: Loader
    val_loader: Loader
    peak_lr: float
    resize: DynamicResize
    clock: Clock

    def check_health(self) -> StepHealth: ...


def log_step(trainer: Training, total: int) -> None:
    """Loss, accuracy and speed since the last time, of `total` steps of the run. Waits for the device."""
    progress, config = trainer.progress, trainer.config
    health = trainer.check_health()
    loss, top1 = trainer.sums.read()
    if not trainer.ranks.is_main:
        return
    rate, waiting = trainer.clock.rates()
    memory = peak_memory_gb(trainer.device)
    values: dict[str, Any] = dict(
        step=progress.step,
        epoch=progress.epoch,
        loss=round(loss, 6),
        top1=round(top1, 4),
        lr=learning_rate(progress.step - 1, trainer.train_loader.steps_per_epoch, trainer.peak_lr, config.optimizer),
        resolution=trainer.resize.resolution,
    )
    text = f"loss {loss:.3f}  top-1 {top1:.1f} %  {rate:.0f} images/s  waiting {waiting:.0f} %  {memory:.1f} GB"
    if trainer.amp == "fp16":
        values |= dict(skipped=health.skipped, loss_scale=health.loss_scale)
        text += f"  skipped {health.skipped}"
    trainer.metrics.write("train", **values, images_per_s=round(rate, 2), data_wait=round(waiting, 2), memory_gb=memory)
    left = (total - progress.step) * trainer.batch_layout.images / rate if rate else 0.0
    trainer.display.status(progress.step, progress.epoch, text, left)


def finish_epoch(trainer: Training) -> None:
    """Evaluate the weights and their average, keep the better, and move on to the next epoch. Raises Interrupted where
    a stop was asked for."""
    config, progress, ranks = trainer.config, trainer.progress, trainer.ranks
    trainer.check_health()
    candidates: dict[str, EfficientNet] = {"model": trainer.model}
    if trainer.step.ema is not None:
        candidates["ema"] = trainer.step.ema.module
    common: dict[str, Any] = dict(device=trainer.device, amp=trainer.amp)
    results = []
    for name, model in candidates.items():
        note = ""
        if config.run.reestimate_bn:
            batches = trainer.train_loader.batches(progress.epoch)
            # Ranks that normalise together must not part.
            stop = trainer.stop if ranks.size == 1 else lambda: False
            used = reestimate_batch_norm(model, batches, config.run.reestimate_bn, stop=stop, **common)
            ranks.average_statistics(model)
            note = f"  (batch norm re-estimated on {used} training batches)"
        ranks.broadcast_tensors(model.buffers())
        result = evaluate_model(
            model,
            trainer.val_loader.batches(0),
            classes=len(trainer.index.classes),
            stop=trainer.stop,
            add=ranks.all_reduce_sum_,
            **common,
        )
        trainer.display.log(
            f"epoch {progress.epoch}{' averaged weights' if name == 'ema' else ''}: top-1 {result.top1:.2f} %  "
            f"top-5 {result.top5:.2f} %  loss {result.loss:.4f}  macro-F1 {result.macro_f1:.2f} %  "
            f"balanced accuracy {result.balanced_accuracy:.2f} %{note}"
        )
        results.append(dict(epoch=progress.epoch, step=progress.step, weights=name, **dataclasses.asdict(result)))
    best = best_of(results, config.run.best_by)
    progress.evaluations.append(best)
    if ranks.is_main:
        for values in results:  # all or none, should a stop come in between
            trainer.metrics.write("eval", **values)
        keep_best(trainer, candidates[best["weights"]], best)
    progress.epoch += 1
    progress.step_in_epoch = 0
