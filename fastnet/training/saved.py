"""The state of a run as its checkpoint holds it, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline import Index
from data_pipeline.dataset.known import Known
from fastnet.config import TrainConfig
from fastnet.errors import UserError, out_of_memory
from fastnet.loading.checkpoint import Progress, load_checkpoint, one_line, save_checkpoint, write_readable
from fastnet.loading.view import View
from fastnet.loading.weights import refuse_nan, save_weights
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.distributed import BatchLayout, Ranks
from fastnet.training.optim import load_optimizer_tensors, optimizer_tensors
from fastnet.training.reporting.metrics import MetricsFile, RunningMetrics
from fastnet.training.selection import best_of, merit
from fastnet.training.step import TrainStep
from fastnet.typed import checked_fields, fits

Saved = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
Records = tuple[tuple[str, str, int, int, int, int, int, str], ...]  # of Index.quarantine_records
REQUIRED: dict[str, Any] = {"classes": tuple[str, ...], "resolution": int, "data_fingerprint": str}
OPTIONAL: dict[str, Any] = {  # of later versions
    "images_per_step": int,
    "metrics_lines": int | None,
    "quarantined": Records,
    "run_id": str,
}


class Run(Protocol):
    """What of a trainer is kept."""

    config: TrainConfig
    folder: Path
    index: Index
    model: EfficientNet
    step: TrainStep
    sums: RunningMetrics
    metrics: MetricsFile
    ranks: Ranks
    batch_layout: BatchLayout
    progress: Progress
    resolution: int
    view: View
    known: Tensor
    run_id: str
    metrics_lines: int | None
    saved: Saved | None

    @property
    def last(self) -> Path: ...


def save_run(trainer: Run, quarantined: dict[str, str]) -> None:
    """Write `last.safetensors`. quarantined: path -> why, of all ranks."""
    step, index = trainer.step, trainer.index
    training = {f"optimizer/{name}": value for name, value in optimizer_tensors(trainer.model, step.optimizer).items()}
    training |= {f"step/{name}": value for name, value in step.state_dict().items()}
    if step.ema is not None:
        training |= {f"ema/{name}": value for name, value in step.ema.state_dict().items()}
    training["sums"] = trainer.sums.total
    training["index"] = trainer.known
    metadata = {
        "progress": dataclasses.asdict(trainer.progress),
        "model": trainer.model.config.to_dict(),
        "classes": list(index.classes),
        "resolution": trainer.resolution,
        "view": trainer.view.to_dict(),
        "data_fingerprint": index.fingerprint,
        "quarantined": index.quarantine_records(quarantined.items()),
        "images_per_step": trainer.batch_layout.images,
        "metrics_lines": trainer.metrics.lines,
        "run_id": trainer.run_id,
    }
    save_checkpoint(trainer.last, trainer.model.state_dict(), training, metadata)


def read_run(path: Path) -> Saved:
    """(weights, training state, metadata) of a run's checkpoint; UserError where it is none, or damaged."""
    weights, training, metadata = load_checkpoint(path)
    try:
        checked_fields(Progress, metadata["progress"])
        ModelConfig(**checked_fields(ModelConfig, metadata["model"]))
        for name, hint in REQUIRED.items():
            if not fits(metadata[name], hint):
                raise ValueError(f"{name} cannot be {metadata[name]!r:.60}")
        for name, hint in OPTIONAL.items():
            if name in metadata and not fits(metadata[name], hint):
                raise ValueError(f"{name} cannot be {metadata[name]!r:.60}")
    except (ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}): restore it from a backup, or start a new run."
        ) from None
    return weights, training, metadata


def restore_run(trainer: Run) -> None:
    """The inverse. UserError where the checkpoint is of other data."""
    assert trainer.saved is not None
    weights, training, metadata = trainer.saved
    index, last = trainer.index, trainer.last
    if metadata["classes"] != list(index.classes):
        raise UserError(
            f"{last} was trained on {len(metadata['classes'])} classes and {index.root} has "
            f"{len(index.classes)} or other ones: give the run its own data back, or start a new run with "
            f"--pretrained {last}."
        )
    if metadata["data_fingerprint"] != index.fingerprint:
        raise UserError(
            f"{index.root} has changed since {last} was written: restore the data, or start a new run "
            f"with --pretrained {last}."
        )
    try:
        refuse_nan(weights)
        _load(trainer, weights, training)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"checkpoint {last} does not fit this run ({one_line(error)}): restore it from a backup, or begin anew."
        ) from error
    if trainer.ranks.is_main:
        write_readable(last, metadata)
    trainer.progress = Progress(**metadata["progress"])
    trainer.metrics_lines = metadata.get("metrics_lines")


def _load(trainer: Run, weights: dict[str, Tensor], training: dict[str, Tensor]) -> None:
    trainer.model.load_state_dict(weights)
    trainer.sums.total.copy_(training["sums"])
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "step": {}, "ema": {}}
    for name, value in training.items():
        part, _, rest = name.partition("/")
        if rest:
            parts[part][rest] = value
    load_optimizer_tensors(trainer.model, trainer.step.optimizer, parts["optimizer"])
    trainer.step.load_state_dict(parts["step"])
    if trainer.step.ema is not None:
        trainer.step.ema.load_state_dict(parts["ema"])


def excluded_text(excluded: Sequence[tuple[str, str]]) -> bytes:
    """excluded.txt: a line for each (path, reason)."""
    text = "".join(f"{path}: {reason}\n" for path, reason in excluded)
    try:
        return text.encode("utf-8", "surrogateescape")  # a file's name, whatever its bytes
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def pack_known(index: Index) -> Tensor:
    """What a run's index knows of its files, as the tensor "index" of its training state: uint8 [N]."""
    return torch.frombuffer(bytearray(index.known().pack()), dtype=torch.uint8)


def known_in(training: dict[str, Tensor]) -> Known | None:
    """The inverse; None for a checkpoint of a version that did not keep it. UserError where it is damaged."""
    if "index" not in training:
        return None
    try:
        return Known.unpack(training["index"].numpy().tobytes())
    except ValueError as error:
        raise UserError(f"the checkpoint cannot be continued ({error}): restore it from a backup.") from None


def keep_best(trainer: Run, model: EfficientNet, values: dict[str, Any]) -> None:
    """Write what belongs to the best: best.safetensors, and of several checkpoint-<epoch>.safetensors, and remove those
    of this run's that are not among the best any more. values: of the evaluation of this model, the
    last of the run's."""
    progress, hist, folder = trainer.progress, trainer.config.run.checkpoint_hist, trainer.folder
    notes = {key: values[key] for key in ("weights", "epoch", "top1", "loss")} | {"run_id": trainer.run_id}
    common: dict[str, Any] = dict(classes=trainer.index.classes, view=trainer.view, notes=notes)
    by = trainer.config.run.best_by
    if best_of(progress.evaluations, by) is values:
        progress.best_top1, progress.best_epoch = values["top1"], values["epoch"]
        save_weights(folder / "best.safetensors", model, **common)
    if hist < 2:
        return
    ranked = sorted(progress.evaluations, key=lambda one: (-merit(one, by), one["epoch"]))
    kept = {f"checkpoint-{one['epoch']}" for one in ranked[:hist]}
    if f"checkpoint-{values['epoch']}" in kept:
        save_weights(folder / f"checkpoint-{values['epoch']}.safetensors", model, **common)
    for one in ranked[hist:]:
        for suffix in (".safetensors", ".json"):
            (folder / f"checkpoint-{one['epoch']}{suffix}").unlink(missing_ok=True)
