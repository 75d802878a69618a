"""Numbers of a run: sums that stay on the device, a clock for throughput, and where both are shown."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastnet.checkpoint import write_atomically


class Sums:
    """Loss and hits summed on the device; `read` is the only place that waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """loss [] is a mean over `images`; correct [] counts right answers."""
        self.total += torch.stack([loss.double() * images, correct.double(), torch.full_like(loss, images).double()])

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

    def batches(self, iterator: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """Yield (batch, seconds waited for it)."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch, time.perf_counter() - start

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

    def __init__(self, path: Path, resume_step: int) -> None:
        """Lines of steps after `resume_step` were written by a process whose work was lost: they are dropped."""
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, **values: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # a line cut short by a crash


class Display:
    """A progress bar on a terminal, plain lines elsewhere; messages go above the bar."""

    def __init__(self, console: Console, total_steps: int, done: int) -> None:
        self.console = console
        self._total = total_steps
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} {task.fields[status]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=done, status="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def status(self, step: int, epoch: int, text: str, eta_seconds: float) -> None:
        """Show the latest numbers: in the bar, or as a line with the time to go."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"epoch {epoch}", status=text)
        else:
            self.say(f"step {step}/{self._total}  epoch {epoch}  {text}  eta {format_seconds(eta_seconds)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
