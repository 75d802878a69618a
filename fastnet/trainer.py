"""A training run from top to bottom: data, model, steps, evaluation, checkpoints, and how it is continued."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_pipeline import Loader, build_index, make_loader
from fastnet.checkpoint import Progress, load_checkpoint, save_checkpoint, write_atomically
from fastnet.config import TrainConfig
from fastnet.device import pick_amp, pick_device, pick_workers
from fastnet.errors import UserError
from fastnet.evaluation import Interrupted, evaluate_model, reestimate_batch_norm
from fastnet.layers import operation_impl
from fastnet.metrics import Clock, Display, MetricsFile, Sums, format_seconds, peak_memory_gb
from fastnet.model import EfficientNet, efficientnet
from fastnet.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from fastnet.pretrained import pretrained_file
from fastnet.scaling import architecture
from fastnet.step import TrainStep
from fastnet.weights import load_weights, save_weights
from kernels.launch import resolve

EXCLUDED_SHOWN = 20  # unreadable files named on screen; the run's folder names all


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that is looked at between steps. A second signal acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        def note(number: int, _: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one step. Randomness inside a step is a function of (seed, step), so that a resumed run draws
    what the uninterrupted one draws, whatever else used the generator in between."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class Trainer:
    """One run. `run()` trains to the end, or until a stop is asked for, and returns an exit status.

    Raises UserError or DataError, with one sentence, for whatever the user can mend.
    """

    def __init__(self, config: TrainConfig, folder: Path, console: Console) -> None:
        config.validate()
        self.config, self.folder, self.console = config, folder, console
        self.device = pick_device(config.run.device)
        self.amp = pick_amp(config.run.amp, self.device)
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not config.run.deterministic

        arch = architecture(config.model.variant, config.model.scaling)
        self.resolution = config.model.resolution or arch.resolution
        self.index = build_index(config.data.data)
        self.train_loader, self.val_loader = self._loaders()
        self.model = self._model()
        self.step = TrainStep(
            self.model,
            make_optimizer(self.model, config.optimizer, config.peak_lr),
            device=self.device,
            amp=self.amp,
            label_smoothing=config.optimizer.label_smoothing,
            clip_grad_norm=config.optimizer.clip_grad_norm,
        )
        self.progress = Progress()
        self.sums = Sums(self.device)
        self.clock = Clock()
        self.stop = StopRequest()

    # --- construction ---------------------------------------------------------------------------------------------

    def _loaders(self) -> tuple[Loader, Loader]:
        config = self.config
        images = len(self.index.splits["train"].paths)
        if images < config.optimizer.batch_size:
            raise UserError(
                f"--batch-size {config.optimizer.batch_size} is more than the {images} training images of "
                f"{self.index.root}: choose a smaller one.",
                exit_status=2,
            )
        common: dict[str, Any] = dict(
            backend=config.data.loader,
            resolution=self.resolution,
            batch_size=config.optimizer.batch_size,
            seed=config.run.seed,
            device=self.device.type,
            workers=pick_workers(config.data.workers, self.device),
        )
        train = make_loader(self.index, "train", train=True, augmentation=config.augment, **common)
        val = make_loader(self.index, "val", train=False, augmentation=None, **common)
        return train, val

    def _model(self) -> EfficientNet:
        options = self.config.model
        try:
            resolve(operation_impl(options.kernels), torch.empty(0, device=self.device))
        except RuntimeError as error:
            raise UserError(f"--kernels {options.kernels} does not work here: {error}.", exit_status=2) from error
        torch.manual_seed(self.config.run.seed)
        extra: dict[str, Any] = {}
        loaded = None
        if options.pretrained:
            try:
                file = pretrained_file(options.pretrained, options.variant)
                loaded = load_weights(file, style=options.weights_style)
            except (ValueError, OSError) as error:
                raise UserError(f"--pretrained {options.pretrained}: {error}") from error
            source = loaded.config
            if (source.variant, source.scaling) != (options.variant, options.scaling):
                raise UserError(
                    f"--pretrained {options.pretrained} holds a {source.variant} ({source.scaling} scaling): "
                    f"train it with --variant {source.variant} --scaling {source.scaling}."
                )
            extra = dict(padding=source.padding, bn_eps=source.bn_eps, bn_momentum=source.bn_momentum)
        model = efficientnet(
            options.variant,
            num_classes=len(self.index.classes),
            scaling=options.scaling,
            dropout=options.dropout,
            drop_connect_rate=options.drop_connect_rate,
            kernels=options.kernels,
            **({"padding": options.padding} | extra),
        )
        if loaded is not None:
            state = dict(loaded.state_dict)
            if loaded.config.num_classes != len(self.index.classes):
                self.console.print(
                    f"new classifier: {options.pretrained} knows {loaded.config.num_classes} classes, "
                    f"the data has {len(self.index.classes)}"
                )
                state |= {k: v for k, v in model.state_dict().items() if k.startswith("classifier.")}
            model.load_state_dict(state)
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _compile(self) -> None:
        if self.config.run.compile == "regional":
            self.model.compile_regions()
        elif self.config.run.compile == "whole":
            self.model.compile()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.safetensors`: everything that `restore` needs to go on exactly here."""
        self.progress.train_seconds = self._train_seconds()
        training = {
            f"optimizer/{name}": value for name, value in optimizer_tensors(self.model, self.step.optimizer).items()
        }
        training["sums"] = self.sums.total
        metadata = {
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.step.scaler.state_dict(),
            "model": dataclasses.asdict(self.model.config),
            "classes": list(self.index.classes),
            "resolution": self.resolution,
            "data_fingerprint": self.index.fingerprint,
        }
        save_checkpoint(self.folder / "last.safetensors", self.model.state_dict(), training, metadata)

    def restore(self) -> None:
        path = self.folder / "last.safetensors"
        weights, training, metadata = load_checkpoint(path)
        if metadata["classes"] != list(self.index.classes):
            raise UserError(
                f"{path} was trained on {len(metadata['classes'])} classes and {self.index.root} has "
                f"{len(self.index.classes)} or other ones: give the run its own data back, or start a new run with "
                f"--pretrained {path}."
            )
        if metadata["data_fingerprint"] != self.index.fingerprint:
            raise UserError(
                f"{self.index.root} has changed since {path} was written: restore the data, or start a new run with "
                f"--pretrained {path}."
            )
        self.model.load_state_dict(weights)
        self.sums.total.copy_(training.pop("sums"))
        load_optimizer_tensors(
            self.model,
            self.step.optimizer,
            {name.removeprefix("optimizer/"): value for name, value in training.items()},
        )
        if metadata["scaler"]:
            self.step.scaler.load_state_dict(metadata["scaler"])
        self.progress = Progress(**metadata["progress"])

    def _train_seconds(self) -> float:
        seconds, self.clock.train_seconds = self.clock.train_seconds, 0.0
        return self.progress.train_seconds + seconds

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train until the end or a stop; 0, or 128 + the signal that asked to stop (130 for Ctrl-C)."""
        try:
            with self.stop.installed():
                return self._run()
        finally:
            self.train_loader.close()
            self.val_loader.close()

    def _run(self) -> int:
        config, progress = self.config, self.progress
        resumed = (self.folder / "last.safetensors").exists()
        if resumed:
            self.restore()
            progress = self.progress
        write_atomically(self.folder / "config.json", config.to_json().encode())
        if self.index.excluded:
            listed = "".join(f"{path}: {reason}\n" for path, reason in self.index.excluded)
            write_atomically(self.folder / "excluded.txt", listed.encode("utf-8", "surrogateescape"))
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", progress.step)
        if not resumed:
            self.save()
        self._announce(resumed)
        self._compile()

        total = config.optimizer.epochs * self.train_loader.steps_per_epoch
        with Display(self.console, total, progress.step) as self.display:
            while progress.epoch < config.optimizer.epochs:
                try:
                    self._train_epoch(total)
                    if not self.stop():
                        self._finish_epoch()
                except Interrupted:
                    pass
                self.save()
                if self.stop():
                    break
        if self.stop():
            self.console.print(
                f"stopped at step {progress.step}; continue with: {self._resume_command()}", soft_wrap=True
            )
            return 128 + (self.stop.signal or 0)
        self._conclude()
        return 0

    def _train_epoch(self, total: int) -> None:
        """The steps that are left of the epoch; leaves early, between two steps, when a stop was asked for."""
        config, progress = self.config, self.progress
        per_epoch = self.train_loader.steps_per_epoch
        if progress.step_in_epoch >= per_epoch:
            return
        self.model.train()
        batches = self.train_loader.batches(progress.epoch, progress.step_in_epoch)
        for (images, labels), waited in self.clock.batches(batches):
            start = time.perf_counter()
            set_learning_rate(
                self.step.optimizer,
                learning_rate(progress.step, per_epoch, config.peak_lr, config.optimizer),
            )
            seed_step(config.run.seed, progress.step)
            loss, correct = self.step(images, labels)
            self.sums.add(loss, correct, len(labels))
            progress.step += 1
            progress.step_in_epoch += 1
            if progress.step % config.run.log_every == 0 or progress.step == total:
                self._log(total)  # waits for the device, so that the clock below is true on average
            self.clock.step(waited + time.perf_counter() - start, waited, len(labels))
            self.display.advance()
            if self.stop():
                return
            if config.run.save_every and progress.step % config.run.save_every == 0:
                self.save()

    def _log(self, total: int) -> None:
        progress = self.progress
        loss, top1 = self.sums.read()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not finite at step {progress.step}: lower --lr or use --amp off; the checkpoint "
                f"{self.folder / 'last.safetensors'} is from before."
            )
        rate, waiting = self.clock.rates()
        memory = peak_memory_gb(self.device)
        values = dict(step=progress.step, epoch=progress.epoch, loss=round(loss, 6), top1=round(top1, 4))
        lr = self.step.optimizer.param_groups[0]["lr"]
        self.metrics.write(
            kind="train",
            **values,
            lr=lr,
            images_per_s=round(rate, 2),
            data_wait=round(waiting, 2),
            memory_gb=memory,
        )
        left = (total - progress.step) * self.config.optimizer.batch_size / rate if rate else 0.0
        text = f"loss {loss:.3f}  top-1 {top1:.1f} %  {rate:.0f} images/s  waiting {waiting:.0f} %  {memory:.1f} GB"
        self.display.status(progress.step, progress.epoch, text, left)

    def _finish_epoch(self) -> None:
        """Evaluate, keep the best weights, and move on to the next epoch."""
        config, progress = self.config, self.progress
        common: dict[str, Any] = dict(device=self.device, amp=self.amp, stop=self.stop)
        note = ""
        if config.run.reestimate_bn:
            batches = self.train_loader.batches(progress.epoch)
            used = reestimate_batch_norm(self.model, batches, config.run.reestimate_bn, **common)
            note = f"  (batch norm re-estimated on {used} training batches)"
        result = evaluate_model(self.model, self.val_loader.batches(0), **common)
        self.display.say(
            f"epoch {progress.epoch}: top-1 {result.top1:.2f} %  top-5 {result.top5:.2f} %  "
            f"loss {result.loss:.4f}{note}"
        )
        values = dict(epoch=progress.epoch, step=progress.step, **dataclasses.asdict(result))
        progress.evaluations.append(values)
        self.metrics.write(kind="eval", **values)
        if result.top1 > progress.best_top1:
            progress.best_top1, progress.best_epoch = result.top1, progress.epoch
            save_weights(
                self.folder / "best.safetensors", self.model, classes=self.index.classes, resolution=self.resolution
            )
        progress.epoch += 1
        progress.step_in_epoch = 0

    # --- words ----------------------------------------------------------------------------------------------------

    def _announce(self, resumed: bool) -> None:
        config, index = self.config, self.index
        parameters = sum(p.numel() for p in self.model.parameters())
        lines = [
            f"{'continuing' if resumed else 'training'} efficientnet_{config.model.variant} "
            f"({parameters / 1e6:.1f} M parameters) at {self.resolution} px on {self.device}, amp {self.amp}, "
            f"compile {config.run.compile}, kernels {config.model.kernels}, loader {self.train_loader.backend}",
            f"data {index.root}: {len(index.classes)} classes, {self.train_loader.num_images} training and "
            f"{self.val_loader.num_images} validation images",
            f"run {self.folder}",
        ]
        lines += [f"left out {path}: {reason}" for path, reason in index.excluded[:EXCLUDED_SHOWN]]
        if len(index.excluded) > EXCLUDED_SHOWN:
            lines.append(f"left out {len(index.excluded) - EXCLUDED_SHOWN} more, all in {self.folder / 'excluded.txt'}")
        for line in lines:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _resume_command(self) -> str:
        return f"python -m fastnet.train --resume {self.folder}"

    def _conclude(self) -> None:
        progress = self.progress
        best = max(progress.evaluations, key=lambda values: values["top1"])
        rate, waiting = self.clock.rates()
        table = Table(title=f"efficientnet_{self.config.model.variant} at {self.resolution} px", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_row("top-1", f"{best['top1']:.2f} %")
        table.add_row("top-5", f"{best['top5']:.2f} %")
        table.add_row("best epoch", f"{best['epoch']} of 0-{self.config.optimizer.epochs - 1}")
        table.add_row("training time", format_seconds(progress.train_seconds))
        table.add_row("throughput", f"{rate:.0f} images/s" if rate else "not measured")
        table.add_row("waiting for data", f"{waiting:.0f} %")
        table.add_row("peak memory", f"{peak_memory_gb(self.device):.1f} GB")
        table.add_row("excluded files", str(len(self.index.excluded)))
        self.console.print(table)
        self.console.print(f"evaluate: python -m fastnet.evaluate {self.folder}", soft_wrap=True, highlight=False)
        self.console.print(
            f"train on: {self._resume_command()} --epochs {2 * self.config.optimizer.epochs}",
            soft_wrap=True,
            highlight=False,
        )
