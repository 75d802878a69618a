"""A run's validation result as figures, a CSV of every prediction, and one self-contained report.html."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_pipeline import Index
from fastnet.analysis import figures
from fastnet.analysis.gradcam import grad_cam
from fastnet.analysis.predictions import Predictions, as_pictures, index_files, load_views, subset
from fastnet.analysis.scores import Scores, most_confused, precision_recall_curves, reliability, roc_curves
from fastnet.errors import UserError
from fastnet.loading.checkpoint import write_atomically
from fastnet.loading.trained import Trained
from fastnet.training.curves import curves_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPLAINED = 4  # images that Grad-CAM explains of the surest right ones, and of the worst

MARK = "<meta name='generator' content='fastnet'>"
FILES = ("report.html", "scores.json", "predictions.csv", *(f"{name}.png" for name in (
    "confusion", "gradcam", "precision_recall", "reliability", "roc", "worst"
)))  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d8dee6; padding-bottom: .2rem; }
img { max-width: 100%; height: auto; } .wide { overflow: auto; } .wide img { max-width: none; }
p.note { color: #5b6675; }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem; text-align: right; }
th { border-bottom: 1px solid #9aa5b1; } td { border-bottom: 1px solid #eceff3; }
th:first-child, td:first-child { text-align: left; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; } .numbers div { background: #f3f5f8; border-radius: 8px;
padding: .6rem 1.1rem; } .numbers b { display: block; font-size: 1.4rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, its HTML, and the figure under it."""

    title: str
    html: str
    figure: Figure | None = None
    file: str = ""


def write_report(
    trained: Trained,
    index: Index,
    found: Predictions,
    scores: Scores,
    folder: Path,
    *,
    tta: str = "off",
    worst: int = 20,
    stages: Sequence[int] = (4, 6, 9),
    explained: Sequence[str] = (),
) -> Path:
    """Write report.html (nothing outside it is needed), its figures as PNG, scores.json and predictions.csv.

    explained: images for Grad-CAM; none: the surest right and the worst of the split. Returns report.html's path.
    Raises UserError where the folder cannot be written.
    """
    sections = [
        _overview(trained, index, scores, tta),
        *_learning(trained),
        _confusion(scores),
        Section(
            "ROC",
            "<p class='note'>Each class against the rest; AUC 1 separates it from all others, 0.5 is chance.</p>",
            figures.roc(roc_curves(found), [one.auc for one in scores.classes], index.classes),
            "roc.png",
        ),
        Section(
            "Precision and recall",
            "<p class='note'>The best precision at each recall or a higher one; AP is the area under the steps.</p>",
            figures.precision_recall(
                precision_recall_curves(found), [one.average_precision for one in scores.classes], index.classes
            ),
            "precision_recall.png",
        ),
        Section(
            "Calibration",
            "<p class='note'>How often the model is right when it is so sure. Where bars end below the dotted line it "
            "is too sure of itself.</p>",
            figures.reliability_diagram(reliability(found), scores.ece),
            "reliability.png",
        ),
        *_worst(trained, index, found, worst),
        _explained(trained, index, found, stages, explained),
        _per_class(scores),
    ]
    parts = []
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>\n{section.html}")
        if section.figure is not None:
            path = folder / section.file
            figures.save(section.figure, path)
            # Scrolled, not shrunk to the page: the names of 101 classes have to be read.
            parts.append(f"<div class='wide'>{_inline(section.title, path.read_bytes())}</div>")
    title = f"efficientnet_{trained.model.config.variant} on {index.root.name}"
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>{MARK}<title>{escape(title)}</title>\n"
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_atomically(folder / "scores.json", (json.dumps(scores.as_dict(), indent=2) + "\n").encode())
    write_atomically(folder / "predictions.csv", _csv(index, found).encode("utf-8", "surrogateescape"))
    write_atomically(folder / "report.html", page.encode("utf-8", "surrogateescape"))
    return folder / "report.html"


def check_folder(folder: Path) -> None:
    """UserError where a report into `folder` would replace a file that belongs to no report of ours."""
    held = [name for name in FILES if (folder / name).exists()]
    page = folder / "report.html"
    if held and not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise UserError(f"--out {folder} holds {held[0]}, which the report would replace: name another folder.")


def _overview(trained: Trained, index: Index, scores: Scores, tta: str) -> Section:
    numbers = [
        (f"{scores.top1:.2f} %", "top-1"),
        (f"{scores.top5:.2f} %", "top-5"),
        (f"{scores.macro_f1:.4f}", "macro F1"),
        (f"{scores.macro_auc:.4f}", "mean AUC"),
        (f"{scores.mean_average_precision:.4f}", "mean AP"),
        (f"{scores.ece:.4f}", "calibration error"),
        (f"{scores.loss:.4f}", "loss"),
    ]
    cells = "".join(f"<div><b>{value}</b>{escape(name)}</div>" for value, name in numbers)
    views = "" if tta == "off" else f", mean over views ({tta})"
    described = (
        f"{trained.path} at {trained.resolution} px{views}; {scores.images} validation images of {index.root}, "
        f"{len(index.classes)} classes"
    )
    return Section("Result", f"<div class='numbers'>{cells}</div><p class='note'>{escape(described)}</p>")


def _learning(trained: Trained) -> list[Section]:
    if trained.run is None or not (trained.run / "metrics.jsonl").is_file():
        return []
    return [Section("Learning curves", _inline("Learning curves", curves_of(trained.run / "metrics.jsonl")))]


def _inline(title: str, picture: bytes) -> str:
    encoded = base64.b64encode(picture).decode()
    return f"<img alt='{escape(title)}' src='data:image/png;base64,{encoded}'>"


def _confusion(scores: Scores) -> Section:
    names = tuple(one.name for one in scores.classes)
    rows = "".join(
        f"<tr><td>{escape(true)}</td><td style='text-align:left'>{escape(taken)}</td><td>{images}</td>"
        f"<td>{100 * share:.1f} %</td></tr>"
        for true, taken, images, share in most_confused(scores.confusion, names)
    )
    table = (
        "<p>Most often confused:</p><table><tr><th>true</th><th style='text-align:left'>taken for</th><th>images</th>"
        f"<th>of the class</th></tr>{rows}</table>"
        if rows
        else "<p>No image is confused.</p>"
    )
    return Section("Confusion", table, figures.confusion_matrix(scores.confusion, names), "confusion.png")


def _verdict(found: Predictions, index: Index, row: int) -> str:
    """Three short lines: the true class, the prediction, and how sure it is."""
    true, predicted = int(found.labels[row]), int(found.predicted[row])
    sure = 100 * found.log_probabilities[row, predicted].exp().item()
    return f"{_short(index.classes[true])}\n→ {_short(index.classes[predicted])} {sure:.0f} %"


def _short(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _worst(trained: Trained, index: Index, found: Predictions, count: int) -> list[Section]:
    wrong = (found.predicted != found.labels).nonzero()[:, 0]
    rows = wrong[found.losses[wrong].argsort(descending=True, stable=True)][:count].tolist()
    if not rows:
        return []
    images = load_views(trained, subset(index, found.positions[rows].tolist()))
    titles = [_verdict(found, index, row) for row in rows]
    note = "<p class='note'>The wrong ones of largest loss: true class → prediction and its probability.</p>"
    return [
        Section(
            "Worst predictions",
            note,
            figures.picture_grid(as_pictures(images, trained.normalization), titles),
            "worst.png",
        )
    ]


def _explained(
    trained: Trained, index: Index, found: Predictions, stages: Sequence[int], files: Sequence[str]
) -> Section:
    if files:
        images = load_views(trained, index_files(files)[0])
        with torch.inference_mode():
            probabilities = trained.model(images).float().softmax(1)
        of = probabilities.argmax(1)
        titles = [
            f"{Path(file).name}\n→ {_short(index.classes[label])} {100 * row[label].item():.0f} %"
            for file, label, row in zip(files, of.tolist(), probabilities, strict=True)
        ]
    else:
        right = (found.predicted == found.labels).nonzero()[:, 0]
        wrong = (found.predicted != found.labels).nonzero()[:, 0]
        rows = [
            *right[found.losses[right].argsort(stable=True)][:EXPLAINED].tolist(),
            *wrong[found.losses[wrong].argsort(descending=True, stable=True)][:EXPLAINED].tolist(),
        ]
        images = load_views(trained, subset(index, found.positions[rows].tolist()))
        of, titles = found.predicted[rows], [_verdict(found, index, row) for row in rows]
    maps: dict[int, list[torch.Tensor]] = {stage: [] for stage in stages}
    for image, label in zip(images.split(1), of.to(trained.device).split(1), strict=True):
        _, one = grad_cam(trained.model, image, label, stages=stages)
        for stage, found_map in one.items():
            maps[stage].append(found_map.cpu())
    note = "<p class='note'>Where each stage saw evidence for the predicted class: " + (
        "the images that were asked for.</p>" if files else "the surest right predictions, then the worst ones.</p>"
    )
    figure = figures.grad_cam_grid(
        images, {stage: torch.cat(each) for stage, each in maps.items()}, titles, trained.normalization
    )
    return Section("Grad-CAM", note, figure, "gradcam.png")


def _per_class(scores: Scores) -> Section:
    def cell(value: float) -> str:
        return "<td>–</td>" if value != value else f"<td>{value:.3f}</td>"

    ranked = sorted(scores.classes, key=lambda one: (one.f1, one.name))
    rows = "".join(
        f"<tr><td>{escape(one.name)}</td><td>{one.images}</td>"
        + "".join(cell(v) for v in (one.precision, one.recall, one.f1, one.auc, one.average_precision))
        + "</tr>"
        for one in ranked
    )
    heads = "".join(f"<th>{name}</th>" for name in ("class", "images", "precision", "recall", "F1", "AUC", "AP"))
    return Section("Classes, the weakest first", f"<table><tr>{heads}</tr>{rows}</table>")


def _csv(index: Index, found: Predictions) -> str:
    """path, true class, predicted class, its probability, the true class's probability, loss; one line an image."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "true", "predicted", "probability", "probability_of_true", "loss"])
    rows = zip(
        found.positions.tolist(),
        found.labels.tolist(),
        found.predicted.tolist(),
        found.probabilities.max(1).values.tolist(),
        found.losses.tolist(),
        strict=True,
    )
    paths, names = index.splits["val"].paths, index.classes
    for position, true, predicted, probability, loss in rows:
        values = (f"{probability:.6f}", f"{torch.tensor(-loss).exp().item():.6f}", f"{loss:.6f}")
        writer.writerow([paths[position], names[true], names[predicted], *values])
    return text.getvalue()
