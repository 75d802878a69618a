"""Learning curves of a run as pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.files import read_text
from fastnet.loading.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
CURVES = {"loss": "loss", "top1": "top-1 (%)", "lr": "learning rate"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without what a crash cut short."""
    found = []
    for line in read_text(path, errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and "step" in values:
                found.append(values)
    return found


def best_line(lines: Sequence[Line], kept: Mapping[str, Any] | None = None) -> Line | None:
    """The evaluation whose weights are kept: that of the epoch and the weights which `kept`, of their file, names, else
    that of the highest top-1; None without any."""
    rated = [line for line in lines if line.get("kind") == "eval" and "top1" in line]
    named = [line for line in rated if kept and all(line.get(key) == kept.get(key) for key in ("epoch", "weights"))]
    return named[-1] if named else max(rated, key=lambda line: line["top1"], default=None)


def draw_curves(folder: Path, kept: Mapping[str, Any] | None = None) -> Path:
    """Write loss, top-1 and learning rate over the steps of the run's `metrics.jsonl` to its `curves.png`; return its
    path. kept: as in `best_line`, which is marked.

    Raises UserError where it can't be written.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        _draw(axes, lines, key, best_line(lines, kept))
    path = folder / "curves.png"
    write_atomically(path, _png(figure, 120))
    return path


def curve(lines: Sequence[Line], key: str, best: Line | None) -> bytes:
    """A PNG of one of `CURVES` over the steps, with the step of `best` marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3.2), layout="constrained")
    _draw(figure.subplots(), lines, key, best)
    return _png(figure, 180)


def _draw(axes: Axes, lines: Sequence[Line], key: str, best: Line | None) -> None:
    kinds: dict[str, list[Line]] = {"training": [line for line in lines if line.get("kind") == "train"]}
    for line in lines:
        if line.get("kind") == "eval":
            name = "validation" if line.get("weights") == "model" else "validation, averaged weights"
            kinds.setdefault(name, []).append(line)
    for name, rows in kinds.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
    if best is not None:
        axes.axvline(best["step"], color="0.5", linestyle=":", linewidth=1.2, label="best")
    axes.set_xlabel("step")
    axes.set_ylabel(CURVES[key])
    axes.grid(alpha=0.3)
    if key == "loss":
        axes.legend(fontsize="small")


def _png(figure: Figure, dpi: int) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
