"""Learning curves of a run as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from fastnet.checkpoint import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_curves(folder: Path) -> Path:
    """Draw loss, top-1 and learning rate over steps from the run's `metrics.jsonl` into `curves.png`; return its path.

    Raises UserError where it can't be written.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(folder / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train"]
    kinds = {"training": training}
    for line in lines:
        if line["kind"] == "eval":
            name = "validation" if line["weights"] == "model" else "validation, averaged weights"
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
    path = folder / "curves.png"
    write_atomically(path, content.getvalue())
    return path
