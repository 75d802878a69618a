"""A training run from top to bottom: data, model, steps, evaluation, checkpoints, and how it is continued."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_pipeline.loaders.prefetch import sent
from fastnet.config import TrainConfig
from fastnet.device import pick_device
from fastnet.errors import UserError, out_of_memory
from fastnet.loading.checkpoint import Progress, write_atomically
from fastnet.model import ModelConfig
from fastnet.training import feature_views
from fastnet.training.build import (
    build_cache,
    build_loaders,
    build_model,
    build_step,
    check_classes,
    index_of,
    share_quarantine,
    view_of,
)
from fastnet.training.cuda_graph import CudaRecorder, pick_cuda_graph
from fastnet.training.distributed import ALONE, Ranks, divide
from fastnet.training.epoch import finish_epoch, log_step
from fastnet.training.fit_batch import fitted
from fastnet.training.mixup import draw_mix
from fastnet.training.optim import set_learning_rate
from fastnet.training.peers import check_same_data
from fastnet.training.reporting.console import Display, Lines, Preparation, Report
from fastnet.training.reporting.messages import (
    best_so_far,
    log_start,
    log_summary,
    out_of_memory_words,
    resume_command,
    what_is_kept,
)
from fastnet.training.reporting.metrics import Clock, MetricsFile, RunningMetrics
from fastnet.training.reporting.profile import StepProfiler
from fastnet.training.reporting.trackers import make_trackers
from fastnet.training.resize import DynamicResize
from fastnet.training.run_folder import locked, stamp_of
from fastnet.training.saved import excluded_text, pack_known, read_run, restore_run, save_run
from fastnet.training.schedule import learning_rate, progressive_resolution, step_seed
from fastnet.training.selection import out_of_patience
from fastnet.training.step import StepHealth
from fastnet.training.stop import WISH_TO_SAVE, StopRequest
from fastnet.training.tuning import make_tuner, pick_precision, words_for
from fastnet.training.validate import Interrupted
from kernels.launch import KernelError

LEAST_LOSS_SCALE = 1.0  # fp16 gradients that overflow at this scale are not finite for another reason


class Trainer:
    """One run. `run()` trains to the end, or until a stop is asked for, and returns an exit status.

    Raises UserError or DataError, with one sentence, for whatever the user can fix.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        console: Console,
        ranks: Ranks = ALONE,
        doing: Callable[[str], None] = lambda words: None,
    ) -> None:
        """doing: is told what begins, until the first step is done ("")."""
        config.validate()
        self.doing = doing
        feature_views.check(config, ranks.size)
        self.config, self.folder, self.console, self.ranks = config, folder, console, ranks
        self.device = ranks.device(pick_device(config.run.device, self.log))
        with ranks.local_main_first():  # the others of a machine find what it measured
            model = config.model
            amp = pick_precision(config.run.amp, self.device, model.kernels, model.variant, self.log, config.run.tune)
        self.amp = ranks.broadcast(amp) if self.device.type == "cpu" else amp
        self.graphed = pick_cuda_graph(config.run.cuda_graph, self.device, recordable=ranks.recordable)
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not config.run.deterministic

        self._loaded = stamp_of(self.last)
        self.saved = ranks.broadcast(read_run(self.last) if ranks.is_main and self.last.exists() else None)
        saved = self.saved[2] if self.saved else {}
        doing("reading the data set")
        with ranks.local_main_first():
            self.view = view_of(config, saved or None)
            self.index = index_of(config, self.saved)
        assert self.view.resolution is not None
        self.resolution = self.view.resolution
        self.resize = DynamicResize(self.resolution)
        check_same_data(ranks, self.index)
        check_classes(config, self.index)
        if not saved:
            config = self.config = fitted(config, self.index, self.resolution, self.device, self.amp, ranks, self.log)
        self.batch_layout = divide(
            saved.get("images_per_step", config.images_per_step * (1 if saved else ranks.size)),
            ranks,
            config.optimizer.batch_size,
            config.optimizer.grad_accum_steps,
        )
        self.peak_lr = config.peak_lr(self.batch_layout.images)
        saved_model = ModelConfig(**saved["model"] | {"kernels": config.model.kernels}) if saved else None
        # The first process of a machine fills what the others on it read.
        doing("filling the cache" if config.data.cache != "none" else "building the model")
        cache = build_cache(config, self.index, self.view, self.device, ranks)
        with ranks.local_main_first():
            self.train_loader, self.val_loader = build_loaders(
                config, self.index, cache, self.view, self.device, self.batch_layout
            )
            self.model = build_model(config, self.index.classes, self.device, saved_model, self.log)
        self.stop = StopRequest(kept=lambda: what_is_kept(self))
        if config.data.feature_views:
            loaders = self.train_loader, self.val_loader
            self.train_loader, self.val_loader = feature_views.on_features(
                config, loaders, self.index, self.model, self.amp, self._log_beside, self.stop
            )
        self.step = build_step(config, self.model, self.device, self.amp, self.batch_layout, self.index)
        self.tuner = make_tuner(
            config.run, self.model.config.kernels, self.device, self.amp, self.log, ranks, self.folder / "kernels.txt"
        )
        self.known = pack_known(self.index)
        # An earlier version's is its folder's name.
        self.run_id: str = saved.get("run_id") or (folder.resolve().name if saved else secrets.token_hex(8))
        self.excluded = self._excluded_with(self.train_loader.quarantined + self.val_loader.quarantined)
        self.progress = Progress()
        self.sums = RunningMetrics(self.device, ranks.all_reduce_sum_)
        self.clock = Clock()
        profiled = config.run.profile and ranks.is_main
        self.profiler = StepProfiler(folder, self.device, console, self.log) if profiled else None
        self.metrics_lines: int | None = None  # of metrics.jsonl, as the checkpoint knows it
        self.stopped_by = 0  # the signal that all ranks agreed to stop for

    @property
    def last(self) -> Path:
        return self.folder / "last.safetensors"

    def log(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _log_beside(self, text: str) -> None:
        """Where progress is displayed."""
        self.display.log(text)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.safetensors`: everything that `restore` needs to go on exactly here. UserError where a step was
        not finite, with the file as it was."""
        self.check_health()
        self.progress.train_seconds = self._train_seconds()
        bad = dict(chain(*self.ranks.all_gather_object(self.train_loader.quarantined + self.val_loader.quarantined)))
        if not self.ranks.is_main:
            return
        save_run(self, bad)
        excluded = self._excluded_with(bad.items())
        if excluded != self.excluded:
            self.excluded = excluded
            self._write_excluded()

    def _train_seconds(self) -> float:
        seconds, self.clock.train_seconds = self.clock.train_seconds, 0.0
        return self.progress.train_seconds + seconds

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train until the end or a stop; 0, or 128 + the signal that asked to stop (130 for Ctrl-C)."""
        try:
            with self.stop.installed(), self._folder_to_itself():
                status = self._run()
            self.step.release_graph()  # not after an error: a replay may still wait for another rank
            return status
        except KernelError as error:
            raise UserError(
                f"{words_for(error)}: find out what works with --tune again, or use --kernels torch."
            ) from error
        except (RuntimeError, MemoryError) as error:
            if self.stop.signal:  # which ends the compilers that this process has started
                self.log(f"stopped: {what_is_kept(self)}")
                return 128 + self.stop.signal
            if not out_of_memory(error):
                raise
            raise UserError(out_of_memory_words(self)) from error
        finally:
            self.train_loader.close()
            self.val_loader.close()

    def _run(self) -> int:
        config = self.config
        resumed = self.saved is not None
        if resumed:
            restore_run(self)
            self.saved = None  # the memory of a second model
        progress = self.progress
        if self.ranks.is_main:
            self._open_files()
        if not resumed:
            self.save()
        log_start(self, resumed)
        self.doing("measuring kernels")
        with Preparation(self.console) as report:
            self._tune(report)
        self._prepare_step()

        self.doing("the first step, which compiles what it needs")
        total = config.optimizer.epochs * self.train_loader.steps_per_epoch
        try:
            with Display(self.console, total, progress.step) as self.display:
                while progress.epoch < config.optimizer.epochs and not out_of_patience(
                    progress.evaluations, config.run.best_by, config.run.patience
                ):
                    with suppress(Interrupted):
                        self._train_epoch(total)
                        if not self._agree_to_stop():
                            self._finish_epoch()
                    self.save()
                    if self._agree_to_stop():
                        break
        finally:
            if self.ranks.is_main:
                self.metrics.close()
        if self.stopped_by:
            self.log(f"stopped at step {progress.step}; {best_so_far(self)}continue with: {resume_command(self)}")
            return 128 + self.stopped_by
        if self.ranks.is_main:
            log_summary(self)
        return 0

    @contextmanager
    def _folder_to_itself(self) -> Iterator[None]:
        if not self.ranks.is_main:
            yield
            return
        with locked(self.folder, new=self.saved is None):
            if stamp_of(self.last) != self._loaded:
                raise UserError(f"another run has written {self.last} meanwhile: start again to go on from there.")
            yield

    def _open_files(self) -> None:
        """config.json, excluded.txt and metrics.jsonl of the run, the last without what came after the checkpoint."""
        trackers = make_trackers(self.config, self.folder, self.progress.step, self.run_id)
        write_atomically(self.folder / "config.json", self.config.to_json().encode())
        self._write_excluded()
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.progress.step, trackers, self.metrics_lines)

    def _excluded_with(self, bad: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(path, reason) of what is left out, from the beginning and since."""
        return [*self.index.excluded, *bad]

    def _write_excluded(self) -> None:
        if self.excluded:
            write_atomically(self.folder / "excluded.txt", excluded_text(self.excluded))

    def _finish_epoch(self) -> None:
        finish_epoch(self)

    def _agree_to_stop(self) -> bool:
        self.stopped_by = self.ranks.all_reduce_max(self.stop.signal or 0)
        return bool(self.stopped_by)

    def _prepare_step(self) -> None:
        """Compile, and record from then on, as asked for."""
        # Progressive training has a few sizes, each worth a program of its own.
        options: dict[str, Any] = {"dynamic": False} if self.config.progressive.progressive > 1 else {}
        if self.config.run.compile == "regional":
            self.model.compile_regions(**options)
        elif self.config.run.compile == "whole":
            self.model.compile(**options)
        if self.graphed:
            self.step.use_graph(
                CudaRecorder(self.device), on_failure=self._go_on_ungraphed, agree=self.ranks.first_failure
            )

    def _go_on_ungraphed(self, error: RuntimeError) -> None:
        reason = str(error).strip().partition("\n")[0]
        if self.config.run.cuda_graph == "on":
            raise UserError(f"--cuda-graph on is impossible here ({reason}): leave it out.") from error
        self.display.log(f"this step can't be recorded as a CUDA graph ({reason}); training goes on without")

    def _train_epoch(self, total: int) -> None:
        """The steps that are left of the epoch; leaves early, between two steps, when a stop was asked for."""
        config, progress = self.config, self.progress
        per_epoch = self.train_loader.steps_per_epoch
        if progress.step_in_epoch >= per_epoch:
            return
        share_quarantine(self.ranks, self.train_loader, self.val_loader)
        self.model.train()
        with self.ranks.peers.patient():
            self._tune(Lines(self.display.log))
        self.resize.resolution = self._resolution_now()
        batches = self.train_loader.batches(progress.epoch, progress.step_in_epoch)
        if self.profiler is not None:
            self.profiler.begin(per_epoch - progress.step_in_epoch)
        for (images, labels), asked, waited in self.clock.batches(batches, lambda: self.train_loader.seconds_held):
            self.ranks.peers.passed()
            set_learning_rate(
                self.step.optimizer, learning_rate(progress.step, per_epoch, self.peak_lr, config.optimizer)
            )
            if self.step.ema is not None:
                self.step.ema.set_update(progress.step + 1)
            inputs = images if config.data.feature_views else self.resize(images)
            loss, correct = self.step(inputs, labels, self._drop_scales(), self._mix())
            self.sums.add(loss, correct, len(labels))
            progress.step += 1
            progress.step_in_epoch += 1
            progress.images_seen += self.batch_layout.images
            if progress.step % config.run.log_every == 0 or progress.step == total:
                log_step(self, total)  # waits for the device, so that the clock below is true on average
            self.doing("")
            self.ranks.peers.start()  # a first step may take any time
            self.clock.step(time.perf_counter() - asked, waited, self.batch_layout.images)
            self.display.advance()
            if self.profiler is not None:
                self.profiler.step(waited)
            wish = self.ranks.previous_max(self.stop.wish)
            if wish > WISH_TO_SAVE:
                return
            # The end of an epoch is saved when it has been evaluated.
            at_end = progress.step_in_epoch == per_epoch
            due = config.run.save_every and progress.step % config.run.save_every == 0
            if (due or wish == WISH_TO_SAVE) and not at_end:
                self.save()
                self.stop.save = False

    def _resolution_now(self) -> int:
        """Of the training images of this epoch."""
        epochs, grown = self.config.optimizer.epochs, self.config.progressive
        return progressive_resolution(
            self.progress.epoch, epochs, self.resolution, grown.progressive, grown.progressive_start
        )

    def _tune(self, report: Report) -> None:
        """Find out how each block is computed best at this epoch's resolution, and in evaluation; before anything is
        traced or recorded."""
        if self.tuner is None:
            return
        self.model.train()
        share = -(-self.batch_layout.images // (self.ranks.size * self.batch_layout.micro_batches))
        if not self.config.data.feature_views:
            self.tuner.prepare(self.model, self._resolution_now(), share, training=True, report=report)
        batch = self.config.optimizer.batch_size
        self.tuner.prepare(self.model, self.resolution, batch, training=False, report=report)

    def _drop_scales(self) -> torch.Tensor:
        """This rank's part of the next step's drop-connect draw; seeds what the model itself draws, a rank its own."""
        seed, ranks = self.config.run.seed, self.ranks
        torch.manual_seed(step_seed(seed, self.progress.step))
        scales = self.model.draw_drop_scales(self.batch_layout.images, self.device)
        if ranks.size == 1:
            return scales
        torch.manual_seed(step_seed(seed, self.progress.step, ranks.rank))
        (rows,) = sent([torch.from_numpy(self.batch_layout.shard.rows(self.batch_layout.images))], self.device)
        return scales[:, rows]

    def _mix(self) -> torch.Tensor | None:
        """The mixing's numbers for the next step, on the device."""
        if not self.config.mix.enabled:
            return None
        drawn = draw_mix(self.config.mix, self.resize.resolution, self.config.run.seed, self.progress.step)
        return sent([torch.tensor(drawn)], self.device)[0]

    def check_health(self) -> StepHealth:
        """Waits for the device. UserError where the loss or a gradient was not finite and that is not fp16's range."""
        health = self.step.health()
        beyond_scaling = self.amp != "fp16" or health.loss_scale < LEAST_LOSS_SCALE
        if health.skipped and beyond_scaling:
            raise UserError(
                f"the loss or a gradient is not finite at step {health.first_bad}: lower --lr or use --amp off; "
                f"{self.last} is from before and can be continued with --resume {self.folder}."
            )
        return health
