"""A run's validation result as figures, a CSV of every prediction, and one self-contained report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline import Index
from fastnet.analysis import figures
from fastnet.analysis.gradcam import grad_cam, heat, overlay
from fastnet.analysis.page import as_utf8, card, csv_text, document, is_ours, plot, table
from fastnet.analysis.predictions import Predictions, as_pictures, index_files, load_views, subset
from fastnet.analysis.scores import Scores, most_confused, precision_recall_curves, reliability, roc_curves
from fastnet.config import RECIPES, TrainConfig
from fastnet.errors import UserError
from fastnet.loading.checkpoint import notes_of, write_atomically
from fastnet.loading.trained import Trained
from fastnet.training.reporting.curves import CURVES, best_line, curve, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPLAINED = 4  # images that Grad-CAM explains of the surest right ones, and of the worst

FIGURES = ("confusion", "precision_recall", "reliability", "roc")
FILES = ("report.html", "scores.json", "predictions.csv", *(f"{name}.png" for name in FIGURES))


@dataclass(frozen=True)
class Section:
    """A heading, its HTML, and the figure under it, which is also written as a file; fixed: as in `plot`."""

    title: str
    html: str
    figure: Figure | None = None
    file: str = ""
    fixed: bool = False


def write_report(
    trained: Trained,
    index: Index,
    found: Predictions,
    scores: Scores,
    folder: Path,
    *,
    split: str = "val",
    tta: str = "off",
    worst: int = 20,
    stages: Sequence[int] = (4, 6, 9),
    explained: Sequence[str] = (),
) -> Path:
    """Write report.html (nothing outside it is needed), its figures as PNG, scores.json and predictions.csv.

    split: what the images of `index` are. explained: images for Grad-CAM; none: the surest right and the worst of the
    split. Returns report.html's path.
    Raises UserError where the folder cannot be written.
    """
    sections = [
        _overview(trained, index, scores, split, tta),
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
        *_settings(trained.config),
    ]
    parts = []
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>\n{section.html}")
        if section.figure is not None:
            path = folder / section.file
            figures.save(section.figure, path)
            width = round(section.figure.get_figwidth() * figures.CSS_DPI)
            parts.append(plot(section.title, path.read_bytes(), width, fixed=section.fixed))
    page = document(f"efficientnet_{trained.model.config.variant} on {index.root.name}", parts)
    write_atomically(folder / "scores.json", (json.dumps(scores.as_dict(), indent=2) + "\n").encode())
    write_atomically(folder / "predictions.csv", _csv(index, found))
    write_atomically(folder / "report.html", as_utf8(page))
    return folder / "report.html"


def check_folder(folder: Path) -> None:
    """UserError where a report into `folder` would replace a file that belongs to no report of ours."""
    held = [name for name in FILES if (folder / name).exists()]
    if held and not is_ours(folder / "report.html"):
        raise UserError(f"--out {folder} holds {held[0]}, which the report would replace: name another folder.")


def _overview(trained: Trained, index: Index, scores: Scores, split: str, tta: str) -> Section:
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
    kind = {"train": "training", "val": "validation"}.get(split, split)
    views = "" if tta == "off" else f", mean over views ({tta})"
    described = (
        f"{trained.path} at {trained.resolution} px{views}; {scores.images} {kind} images of {index.root}, "
        f"{len(index.classes)} classes"
    )
    files = "<p>Every image: <a href='predictions.csv'>predictions.csv</a>; <a href='scores.json'>scores.json</a></p>"
    return Section("Result", f"<div class='numbers'>{cells}</div><p class='note'>{escape(described)}</p>{files}")


def _learning(trained: Trained) -> list[Section]:
    if trained.run is None or not (trained.run / "metrics.jsonl").is_file():
        return []
    lines = read_metrics(trained.run / "metrics.jsonl")
    best = best_line(lines, notes_of(trained.path))
    noted = (
        f"<p class='note'>The best, which is kept: epoch {best['epoch']}, top-1 {best['top1']:.2f} %.</p>"
        if best and "epoch" in best
        else ""
    )
    plots = "".join(plot(name, curve(lines, key, best), 380) for key, name in CURVES.items())
    return [Section("Learning curves", f"{noted}<div class='plots'>{plots}</div>")]


def _confusion(scores: Scores) -> Section:
    names = tuple(one.name for one in scores.classes)
    rows = [
        (true, taken, str(images), f"{100 * share:.1f} %")
        for true, taken, images, share in most_confused(scores.confusion, names)
    ]
    listed = table(("true", "taken for", "images", "of the class"), rows, text=2)
    html = f"<p>Most often confused:</p>{listed}" if rows else "<p>No image is confused.</p>"
    # Scrolled on a narrow page, not shrunk: the names of 101 classes have to be read.
    fixed = len(names) > figures.NAMED
    return Section("Confusion", html, figures.confusion_matrix(scores.confusion, names), "confusion.png", fixed)


def _verdict(found: Predictions, index: Index, row: int) -> str:
    """The true class, the prediction, and how sure it is."""
    true, predicted = int(found.labels[row]), int(found.predicted[row])
    sure = 100 * found.log_probabilities[row, predicted].exp().item()
    return f"{index.classes[true]} → {index.classes[predicted]} {sure:.0f} %"


def name_in(index: Index, path: str) -> str:
    """A file as it is called below the data set's folder."""
    return os.path.relpath(path, index.root) if path.startswith(f"{index.root}{os.sep}") else path


def _worst(trained: Trained, index: Index, found: Predictions, count: int) -> list[Section]:
    wrong = (found.predicted != found.labels).nonzero()[:, 0]
    rows = wrong[found.losses[wrong].argsort(descending=True, stable=True)][:count].tolist()
    if not rows:
        return []
    note = "<p class='note'>The wrong ones of largest loss: true class → prediction and its probability.</p>"
    return [Section("Worst predictions", note + cards(trained, index, found, rows))]


def cards(trained: Trained, index: Index, found: Predictions, rows: Sequence[int]) -> str:
    """What the model saw of these rows, what it said, and their files."""
    positions = found.positions[list(rows)].tolist()
    pictures = as_pictures(load_views(trained, subset(index, positions)), trained.normalization)
    paths = index.splits["val"].paths
    shown = [
        card([picture], _verdict(found, index, row), name_in(index, paths[position]))
        for picture, row, position in zip(pictures, rows, positions, strict=True)
    ]
    return f"<div class='cards'>{''.join(shown)}</div>"


def _explained(
    trained: Trained, index: Index, found: Predictions, stages: Sequence[int], files: Sequence[str]
) -> Section:
    if files:
        images = load_views(trained, index_files(files)[0])
        with torch.inference_mode():
            probabilities = trained.model(images).float().softmax(1)
        of = probabilities.argmax(1)
        names = list(files)
        said = [
            f"{index.classes[label]} {100 * row[label].item():.0f} %"
            for label, row in zip(of.tolist(), probabilities, strict=True)
        ]
    else:
        right = (found.predicted == found.labels).nonzero()[:, 0]
        wrong = (found.predicted != found.labels).nonzero()[:, 0]
        rows = [
            *right[found.losses[right].argsort(stable=True)][:EXPLAINED].tolist(),
            *wrong[found.losses[wrong].argsort(descending=True, stable=True)][:EXPLAINED].tolist(),
        ]
        positions = found.positions[rows].tolist()
        images = load_views(trained, subset(index, positions))
        of, said = found.predicted[rows], [_verdict(found, index, row) for row in rows]
        names = [name_in(index, index.splits["val"].paths[position]) for position in positions]
    stages = sorted(set(stages))
    shown = []
    for image, label, heading, name in zip(images.split(1), of.to(trained.device).split(1), said, names, strict=True):
        _, maps = grad_cam(trained.model, image, label, stages=stages)
        picture = as_pictures(image, trained.normalization)[0]
        hot = [heat(maps[stage].cpu(), picture.shape[0])[0].numpy() for stage in stages]
        shown.append(card([picture, *(overlay(picture, one) for one in hot)], heading, name))
    listed = ", ".join(f"{stage}{' (head)' if stage == 9 else ''}" for stage in stages)
    note = f"<p class='note'>What the model saw, and where stages {listed} highlight evidence for the predicted class: "
    note += "the images that were asked for.</p>" if files else "the surest right predictions, then the worst.</p>"
    return Section("Grad-CAM", f"{note}<div class='cards explained'>{''.join(shown)}</div>")


def _per_class(scores: Scores) -> Section:
    def cell(value: float) -> str:
        return "–" if value != value else f"{value:.3f}"

    ranked = sorted(scores.classes, key=lambda one: (one.f1, one.name))
    rows = [
        (one.name, str(one.images), *map(cell, (one.precision, one.recall, one.f1, one.auc, one.average_precision)))
        for one in ranked
    ]
    heads = ("class", "images", "precision", "recall", "F1", "AUC", "AP")
    return Section("Classes, the weakest first", table(heads, rows))


def _settings(config: TrainConfig | None) -> list[Section]:
    """What the run was told, what differs from its recipe first."""
    if config is None:
        return []
    values, usual = _flat(asdict(config)), _flat(asdict(RECIPES.get(config.recipe, TrainConfig())))
    own = {name: value for name, value in values.items() if value != usual.get(name)}
    heads = ("setting", "value")
    changed = table(heads, own.items(), text=2) if own else "<p>All as the recipe has them.</p>"
    folded = f"<details><summary>All settings</summary>{table(heads, values.items(), text=2)}</details>"
    return [Section("Settings", f"<p>Recipe {escape(config.recipe)}, and what differs:</p>{changed}{folded}")]


def _flat(values: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value)
        else:
            found[f"--{name.replace('_', '-')}"] = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return found


def _csv(index: Index, found: Predictions) -> bytes:
    """path, true class, predicted class, its probability, the true class's probability, loss; one line an image."""
    rows = zip(
        found.positions.tolist(),
        found.labels.tolist(),
        found.predicted.tolist(),
        found.probabilities.max(1).values.tolist(),
        found.losses.tolist(),
        strict=True,
    )
    paths, names = index.splits["val"].paths, index.classes
    return csv_text(
        ("path", "true", "predicted", "probability", "probability_of_true", "loss"),
        (
            (
                paths[position],
                names[true],
                names[predicted],
                f"{probability:.6f}",
                f"{torch.tensor(-loss).exp().item():.6f}",
                f"{loss:.6f}",
            )
            for position, true, predicted, probability, loss in rows
        ),
    )
