"""What a run says on the screen: its beginning, a progress bar or lines, and what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

Report = Callable[[str, int, int], None]  # what is being done, how much of it is, out of how much

NAMED_EACH = 5  # files left out for one reason that are named one by one
EXCLUDED_SHOWN = 20  # unreadable files named on screen; the run's folder names all


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
            self.log(f"step {step}/{self._total}  epoch {epoch}  {text}  eta {format_seconds(eta_seconds)}")

    def log(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Preparation:
    """What is done before the first step, reported as `(words, done, total)`: a bar for each words on a terminal, lines
    elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines = Lines(lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Report:
        if not self.console.is_terminal:
            return self._lines
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, words: str, done: int, total: int) -> None:
        assert self._bar is not None
        if self._task is None:
            self._task = self._bar.add_task(words)
        self._bar.update(self._task, description=words, completed=done, total=total)


class Heartbeat:
    """Until the first step: a line every ten seconds that says what a run is at. A context; it is called with what
    begins, and with "" where there is nothing to wait for any more."""

    def __init__(self, log: Callable[[str], None], seconds: float = 10.0) -> None:
        self._log, self._seconds, self._words = log, seconds, ""
        self._ended = Event()
        self._begun = time.monotonic()
        self._thread = Thread(target=self._beat, daemon=True)

    def __call__(self, words: str) -> None:
        if words != self._words:
            self._words, self._begun = words, time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            if words := self._words:
                self._log(f"{words}: {format_seconds(time.monotonic() - self._begun)} so far")


class Lines:
    """The same in lines, where something begins and where it ends: also beside a bar that is shown already."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._words = log, ""

    def __call__(self, words: str, done: int, total: int) -> None:
        if words != self._words or done == total:
            self._log(f"{words}: {done} of {total}")
        self._words = "" if done == total else words


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def log_excluded(console: Console, excluded: Sequence[tuple[str, str]], listed_in: Path) -> None:
    """Name (path, reason) of files that were left out; of many for one reason one, and their number."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in excluded:
        by_reason.setdefault(reason, []).append(path)
    lines: list[str] = []
    for reason, paths in by_reason.items():
        if len(paths) <= NAMED_EACH:
            lines += [f"left out {path}: {reason}" for path in paths]
        else:
            lines.append(f"left out {len(paths)} files like {paths[0]}: {reason}")
    if len(lines) > EXCLUDED_SHOWN:
        lines = [*lines[:EXCLUDED_SHOWN], f"left out {len(excluded)} files in all"]
    if lines:
        lines.append(f"all that were left out are listed in {listed_in}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_table(console: Console, title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
