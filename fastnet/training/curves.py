"""Learning curves of a run as a picture."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastnet.loading.checkpoint import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without what a crash cut short."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and "step" in values:
                found.append(values)
    return found


def draw_curves(folder: Path) -> Path:
    """Write `curves_of` the run's `metrics.jsonl` to its `curves.png`; return its path.

    Raises UserError where it can't be written.
    """
    path = folder / "curves.png"
    write_atomically(path, curves_of(folder / "metrics.jsonl"))
    return path


def curves_of(metrics: Path) -> bytes:
    """A PNG of loss, top-1 and learning rate over steps."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    kinds = {"training": [line for line in lines if line.get("kind") == "train"]}
    for line in lines:
        if line.get("kind") == "eval":
            name = "validation" if line.get("weights") == "model" else "validation, averaged weights"
            kinds.setdefault(name, []).append(line)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key, label in zip(axes, ("loss", "top1", "lr"), ("loss", "top-1 (%)", "learning rate"), strict=True):
        for name, rows in kinds.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
