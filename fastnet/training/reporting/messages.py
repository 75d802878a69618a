"""What a run says about itself: its beginning, how it is continued, and what came out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.console import Console

from data_pipeline import Index, Loader
from fastnet.allocator import kept_memory
from fastnet.config import TrainConfig
from fastnet.device import Amp
from fastnet.loading.checkpoint import Progress
from fastnet.model import EfficientNet
from fastnet.training import feature_views
from fastnet.training.continuation import fresh_run_command
from fastnet.training.distributed import BatchLayout, Ranks
from fastnet.training.reporting.console import format_seconds, log_excluded, show_table
from fastnet.training.reporting.curves import draw_curves
from fastnet.training.reporting.metrics import Clock, peak_memory_gb
from fastnet.training.selection import best_of
from fastnet.typed import read_object

CLASSES_SHOWN = 10
LOPSIDED = 3.0  # the largest class over the smallest


class Run(Protocol):
    """What a trainer has to tell."""

    config: TrainConfig
    folder: Path
    console: Console
    device: torch.device
    amp: Amp
    resolution: int
    index: Index
    ranks: Ranks
    batch_layout: BatchLayout
    model: EfficientNet
    train_loader: Loader
    val_loader: Loader
    progress: Progress
    clock: Clock
    excluded: list[tuple[str, str]]

    def log(self, text: str) -> None: ...


def log_start(trainer: Run, resumed: bool) -> None:
    """What is trained, on what, where."""
    config, index = trainer.config, trainer.index
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trainer.log(
        f"{'continuing' if resumed else 'training'} efficientnet_{config.model.variant} "
        f"({parameters / 1e6:.1f} M parameters) at {trainer.resolution} px on {trainer.device}, amp {trainer.amp}, "
        f"compile {config.run.compile}, kernels {trainer.model.config.kernels}, "
        f"loader {trainer.train_loader.description}"
    )
    trainer.log(
        f"data {index.root}: {len(index.classes)} classes, {trainer.train_loader.num_images} training and "
        f"{trainer.val_loader.num_images} validation images"
    )
    trainer.log(f"images a class: {class_counts(index)}")
    batch = config.optimizer.batch_size
    trainer.log(f"batch {batch}, {trainer.train_loader.steps_per_epoch} steps an epoch")
    for note in index.notes:
        trainer.log(f"data: {note}")
    if trainer.ranks.size > 1:
        norm = "over all" if config.run.sync_bn else "over its own"
        trainer.log(
            f"{trainer.ranks.size} processes, {trainer.batch_layout.images} images a step; "
            f"batch norm in each {norm} images"
        )
    if words := feature_views.hint(config, trainer.ranks.size):
        trainer.log(words)
    if config.data.cache != "none":
        trainer.log(f"cache {trainer.train_loader.cache_note}")
    if kept := kept_memory():
        trainer.log(f"memory: {kept}")
    trainer.log(f"run {trainer.folder}")
    log_excluded(trainer.console, index.excluded, trainer.folder / "excluded.txt")


def class_counts(index: Index) -> str:
    """How many training images the classes have, the fewest and the most of many, and how they compare."""
    counts = np.bincount(index.splits["train"].labels, minlength=len(index.classes))
    few, many = int(counts.argmin()), int(counts.argmax())
    shown = range(len(counts)) if len(counts) <= CLASSES_SHOWN else (few, many)
    text = ", ".join(f"{index.classes[label]} {counts[label]}" for label in shown)
    ratio = counts[many] / max(1, counts[few])
    if len(counts) > CLASSES_SHOWN:
        text = f"from {text.replace(', ', ' to ', 1)}"
    hint = "; --balance sampler or loss makes up for it" if ratio >= LOPSIDED else ""
    return f"{text} (1 : {ratio:.1f}){hint}"


def resume_command(trainer: Run, *flags: str) -> str:
    ranks = trainer.ranks
    program = f"torchrun --nproc-per-node {ranks.local_size}" if ranks.size > 1 else "python"
    if ranks.nodes > 1:
        program = f"torchrun --nnodes {ranks.nodes} --nproc-per-node {ranks.local_size} <its --rdzv flags>"
    shared = f"   (on each node; {trainer.folder} must be a folder that all of them share)" if ranks.nodes > 1 else ""
    words = [program, "-m fastnet.train --resume", shlex.quote(str(trainer.folder)), *flags]
    return " ".join(words) + shared


def best_so_far(trainer: Run) -> str:
    """ "best so far: epoch 3, top-1 50.00 %; ", or nothing before the first evaluation."""
    if not trainer.progress.evaluations:
        return ""
    best = best_of(trainer.progress.evaluations, trainer.config.run.best_by)
    return f"best so far: epoch {best['epoch']}, top-1 {best['top1']:.2f} %; "


def what_is_kept(trainer: Run) -> str:
    """What a run leaves that ends now."""
    last = trainer.folder / "last.safetensors"
    try:
        step = read_object(last.with_suffix(".json"))["progress"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return "nothing was saved yet."
    return f"{last} of step {step} is kept; continue with: {resume_command(trainer)}"


def out_of_memory_words(trainer: Run) -> str:
    """The sentence that names a batch to try."""
    batch, micro_batches = trainer.config.optimizer.batch_size, trainer.config.optimizer.grad_accum_steps
    if batch < 4:
        return f"out of memory on {trainer.device}: lower --resolution or choose a smaller --variant."
    return (
        f"out of memory on {trainer.device} with --batch-size {batch}: try --batch-size {batch // 2} "
        f"--grad-accum-steps {2 * micro_batches}, which updates the weights as often."
    )


def log_summary(trainer: Run) -> None:
    """What came out, and what can be done with it."""
    progress = trainer.progress
    best = best_of(progress.evaluations, trainer.config.run.best_by)
    rate, waiting = trainer.clock.rates()
    averaged = " (averaged weights)" if best.get("weights") == "ema" else ""
    rows = {
        "top-1": f"{best['top1']:.2f} %{averaged}",
        "top-5": f"{best['top5']:.2f} %",
        "loss": f"{best['loss']:.4f}",
        "best epoch": f"{best['epoch']} of 0-{trainer.config.optimizer.epochs - 1}",
        "training time": format_seconds(progress.train_seconds),
        "throughput": f"{rate:.0f} images/s" if rate else "not measured",
        "waiting for data": f"{waiting:.0f} %",
        "peak memory": f"{peak_memory_gb(trainer.device):.1f} GB",
        "excluded files": str(len(trainer.excluded)),
    }
    show_table(trainer.console, f"efficientnet_{trainer.config.model.variant} at {trainer.resolution} px", rows)
    trainer.log(f"learning curves: {draw_curves(trainer.folder, best)}")
    trainer.log(f"evaluate: python -m fastnet.evaluate {trainer.folder}")
    if trainer.config.optimizer.sched == "cosine":  # which has ended: more epochs would begin with a jump
        trainer.log(f"train on: {fresh_run_command(trainer.config, trainer.folder)}")
    else:
        epochs = f"--epochs {2 * trainer.config.optimizer.epochs}"
        trainer.log(f"train on: {resume_command(trainer, epochs)}")
