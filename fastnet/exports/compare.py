"""What each form of a model costs and gives on this machine: size, top-1, agreement and images a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastnet.exports.program import Compute
from kernels.cpu.build import cpu_name

ROUNDS = 40


@dataclass(frozen=True)
class Form:
    """bytes: of its file. top1 and agreement (with the original's answers) in percent; rate: images a second, one at a
    time."""

    name: str
    bytes: int
    top1: float
    agreement: float
    rate: float


def rates(programs: Sequence[Compute], image: Tensor, rounds: int = ROUNDS) -> list[float]:
    """Images a second of each, one image [1, 3, R, R] at a time: the medians of rounds in which each has its turn."""
    taken: list[list[float]] = [[] for _ in programs]
    with torch.inference_mode():
        for compute in programs:
            compute(image)
        for _ in range(rounds):
            for times, compute in zip(taken, programs, strict=True):
                start = time.perf_counter()
                compute(image)
                times.append(time.perf_counter() - start)
    return [1 / statistics.median(times) for times in taken]


def recommended(forms: Sequence[Form], max_loss: float) -> Form:
    """The fastest whose top-1 is at most `max_loss` points below that of the first."""
    return max((form for form in forms if forms[0].top1 - form.top1 <= max_loss), key=lambda form: form.rate)


def table_of(forms: Sequence[Form]) -> list[str]:
    """Lines of text."""
    width = max(len(form.name) for form in forms)
    lines = [f"{'':{width}}      size    top-1   same answers   images/s"]
    for form in forms:
        lines.append(
            f"{form.name:{width}}  {form.bytes / 1e6:5.1f} MB  {form.top1:5.2f} %        {form.agreement:5.1f} %  "
            f"{form.rate:9.0f}"
        )
    return lines


def machine() -> str:
    """The CPU's name and the threads that torch uses."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def size_of(path: Path) -> int:
    """Bytes of a file and, of OpenVINO's two, of the other; of a folder, of its files."""
    files = [path]
    if path.is_dir():
        files = list(path.iterdir())
    elif path.suffix == ".xml":
        files.append(path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in files)
