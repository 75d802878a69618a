"""Learning curves from a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fastnet.training.reporting.curves import best_line, curve, draw_curves


def test_every_curve_is_drawn(tmp_path: Path) -> None:
    lines = [dict(kind="train", step=step, loss=3 / step, top1=10.0 * step, lr=0.1 / step) for step in range(1, 6)]

    def drawn(extra: list[dict[str, object]]) -> np.ndarray:
        text = "".join(json.dumps(line) + "\n" for line in [*lines, *extra])
        (tmp_path / "metrics.jsonl").write_text(text)
        path = draw_curves(tmp_path)
        assert path == tmp_path / "curves.png"
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    def colors(pixels: np.ndarray) -> int:
        """Saturated hues: each curve has its own."""
        flat = pixels.reshape(-1, 3).astype(int)
        vivid = flat[np.ptp(flat, axis=1) > 100]
        return len({tuple(c) for c, n in zip(*np.unique(vivid, axis=0, return_counts=True), strict=True) if n > 100})

    common = dict(kind="eval", loss=1.0, top1=20.0)
    evaluations = [
        dict(common, step=step, weights=weights, top1=20.0 + step) for step in (2, 5) for weights in ("model", "ema")
    ]
    assert colors(drawn([])) == 1
    assert colors(drawn(evaluations)) == 3


def test_the_run_marks_the_epoch_that_it_kept(tmp_path: Path) -> None:
    """--best-by may have chosen another one than the highest top-1."""
    rows = [dict(kind="eval", loss=1.0, step=n, epoch=n, weights="model", top1=50.0 - n) for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = [draw_curves(tmp_path, kept).read_bytes() for kept in (None, rows[0], rows[1])]
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_best_is_what_the_weights_say_else_the_highest_top1() -> None:
    common: dict[str, object] = dict(kind="eval", loss=1.0)
    lines = [
        dict(common, step=step, epoch=step, weights=weights, top1=10.0 * step + len(weights))
        for step in (1, 2)
        for weights in ("model", "ema")
    ]
    assert best_line(lines) == lines[2]
    assert best_line(lines, {"epoch": 1, "weights": "ema", "top1": 1.0}) == lines[1]
    assert best_line(lines, {"epoch": 7, "weights": "ema"}) == lines[2]
    assert best_line([dict(kind="train", step=1)]) is None

    def image(best: dict[str, object] | None) -> bytes:
        return curve(lines, "top1", best)

    assert image(lines[1]) != image(lines[3]) != image(None)
