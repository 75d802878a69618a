"""Numbers of a run: sums that stay on the device, a clock for throughput, and the file that keeps them."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.files import read_text
from fastnet.errors import UserError
from fastnet.loading.checkpoint import one_line, write_atomically, write_failure
from fastnet.training.reporting.trackers import Tracker

_log = logging.getLogger("fastnet")


class RunningMetrics:
    """Loss and hits summed on the device; `read` is the only place that waits for it."""

    def __init__(self, device: torch.device, over_ranks: Callable[[Tensor], None] = lambda sums: None) -> None:
        """over_ranks: adds up what several processes found in one step, in place."""
        self.total = torch.zeros(3, dtype=torch.float64, device=device)
        self._over_ranks = over_ranks

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """loss [] is a mean over `images`; correct [] counts right answers. A loss that is not finite counts 0."""
        sums = torch.stack([loss.double() * images, correct.double(), torch.full_like(loss, images).double()])
        sums.masked_fill_(~loss.isfinite(), 0.0)
        self._over_ranks(sums)
        self.total += sums

    def read(self) -> tuple[float, float]:
        """(mean loss, top-1 in percent) since the last read."""
        loss, correct, images = self.total.tolist()
        self.total.zero_()
        return loss / max(images, 1), 100 * correct / max(images, 1)


class Clock:
    """Time spent training, without compilation, evaluation and saving, and the share of it spent waiting for data.

    The first `warmup` steps of a process (compilation, autotuning, allocation) are left out of the throughput.
    """

    def __init__(self, warmup: int = 2) -> None:
        self._skip = warmup
        self.seconds = self.waited = 0.0
        self.images = 0
        self.train_seconds = 0.0

    def batches(
        self, iterator: Iterator[Any], held: Callable[[], float] = lambda: 0.0
    ) -> Iterator[tuple[Any, float, float]]:
        """Yield (batch, when it was asked for, seconds waited for it). held: how long the iterator has waited for the
        device so far, which is not waiting for data."""
        while True:
            asked, before = time.perf_counter(), held()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch, asked, time.perf_counter() - asked - (held() - before)

    def step(self, seconds: float, waited: float, images: int) -> None:
        self.train_seconds += seconds
        if self._skip > 0:
            self._skip -= 1
            return
        self.seconds += seconds
        self.waited += waited
        self.images += images

    def rates(self) -> tuple[float, float]:
        """(images/s, share of time waiting for data in percent) over the measured steps so far."""
        if not self.seconds:
            return 0.0, 0.0
        return self.images / self.seconds, 100 * self.waited / self.seconds


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: the device's, or on a CPU the process's, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


class MetricsFile:
    """`metrics.jsonl` of a run: one JSON object a line, in the order of steps."""

    def __init__(
        self, path: Path, resume_step: int, trackers: Sequence[Tracker] = (), lines: int | None = None
    ) -> None:
        """What a process wrote whose work was lost is dropped: all after the first `lines`, where the checkpoint knows
        how many there were, and after `resume_step`."""
        self.path, self._trackers = path, list(trackers)
        self.lines = 0
        if path.exists():
            try:
                text = read_text(path, errors="replace")
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror or error}): move it away, and the run begins another."
                ) from error
            kept = [line for line in text.splitlines() if _step_of(line) <= resume_step][:lines]
            self.lines = len(kept)
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, kind: str, **values: Any) -> None:
        """Append one line, and give its numbers to the trackers as <kind>/<name> (averaged weights: <kind>_ema/)."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(kind=kind) | values) + "\n")
        except OSError as error:
            raise UserError(write_failure(self.path, error)) from error
        self.lines += 1
        group = f"{kind}_ema" if values.get("weights") == "ema" else kind
        numbers = {f"{group}/{k}": v for k, v in values.items() if k != "step" and isinstance(v, int | float)}
        self._track(lambda tracker: tracker.log(values["step"], numbers))

    def close(self) -> None:
        self._track(lambda tracker: tracker.close())

    def _track(self, act: Callable[[Tracker], None]) -> None:
        """A full disk or a lost service is not worth a run: the tracker is named and left."""
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                _log.warning("%s failed (%s): the run goes on without.", type(tracker).__name__, one_line(error))
                self._trackers.remove(tracker)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # a line cut short by a crash
