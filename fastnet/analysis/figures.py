"""The pictures of a report, as matplotlib figures that need no display; legible with 2 classes and with 101."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data_pipeline.loaders.augment import IMAGENET, Normalization
from fastnet.analysis.gradcam import heat, overlay
from fastnet.analysis.lettering import families, legible
from fastnet.analysis.predictions import as_pictures
from fastnet.loading.checkpoint import write_atomically

NAMED = 10  # curves of more classes are drawn in grey, and the weakest named
WEAKEST = 6
LABELLED = 150  # classes that fit along a confusion matrix's axes
COUNTED = 20  # classes up to which its cells hold numbers
CSS_DPI = 96
"""Pixels of a page in an inch of a figure: its points are the page's."""


def save(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write a PNG, atomically. Raises UserError where it cannot be written."""
    from io import BytesIO

    content = BytesIO()
    figure.savefig(content, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.15)
    write_atomically(path, content.getvalue())


def short(name: str, longest: int = 24) -> str:
    """For a figure, where a long name would leave no room for what it names; its end often tells it from others."""
    return name if len(name) <= longest else f"{name[: longest - 10]}…{name[-9:]}"


def confusion_matrix(confusion: Tensor, names: Sequence[str]) -> Figure:
    """Share of each true class (row) that was taken for each class (column)."""
    count = len(names)
    # A page of 1280 pixels shows 101 classes whole, their names in seven points.
    side = max(6.0, 2.2 + 0.36 * count) if count <= COUNTED else min(24.0, 1.9 + 0.107 * count)
    figure = Figure((side, side + 0.5), layout="constrained")
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    # The square root lifts the few per cent that matter out of the background.
    image = axes.imshow(share.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, pad=0.01, aspect=40)
    levels = np.array([0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_ticks(list(np.sqrt(levels)), labels=[f"{100 * level:.0f} %" for level in levels])
    size = 10 if count <= COUNTED else 7
    if count <= LABELLED:
        shown, fonts = legible([short(name) for name in names]), families(names)
        axes.set_xticks(range(count), shown, rotation=90, fontsize=size, fontfamily=fonts)
        axes.set_yticks(range(count), shown, fontsize=size, fontfamily=fonts)
    if count <= COUNTED:
        for row in range(count):
            for column in range(count):
                if value := int(confusion[row, column]):
                    color = "white" if share[row, column] > 0.4 else "black"
                    axes.text(column, row, str(value), ha="center", va="center", fontsize=9, color=color)
    else:
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.92", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("Confusion: share of each true class", fontsize=12)
    return figure


def roc(rates: tuple[Tensor, Tensor], areas: Sequence[float], names: Sequence[str]) -> Figure:
    """One-vs-rest ROC of every class; `rates` are `scores.roc_curves`, areas the AUCs."""
    figure = Figure((6.4, 7.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    _curves(axes, *rates, areas, names, "AUC")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, each class against the rest")
    return figure


def precision_recall(curves: tuple[Tensor, Tensor], precisions: Sequence[float], names: Sequence[str]) -> Figure:
    """Precision against recall of every class; `curves` are `scores.precision_recall_curves`."""
    figure = Figure((6.4, 7.4), layout="constrained")
    axes = figure.subplots()
    _curves(axes, *curves, precisions, names, "AP")
    axes.set(xlabel="recall", ylabel="precision", title="Precision and recall, each class against the rest")
    return figure


def _curves(axes: Axes, x: Tensor, curves: Tensor, areas: Sequence[float], names: Sequence[str], measure: str) -> None:
    known = [i for i, area in enumerate(areas) if area == area]
    order = sorted(known, key=lambda i: areas[i])
    many = len(names) > NAMED
    # Colours that keep apart: ten for ten classes, so that none repeats.
    named = order[:WEAKEST] if many else order
    for i in known:
        if i not in named:
            axes.plot(x, curves[i], color="0.8", linewidth=0.6, zorder=1)
    for i, name in zip(named, legible([short(names[i]) for i in named]), strict=True):
        axes.plot(x, curves[i], linewidth=1.3, label=f"{name}: {areas[i]:.3f}", zorder=2)
    if known:
        mean = sum(areas[i] for i in known) / len(known)
        axes.plot(x, curves[known].mean(0), color="black", linewidth=2.2, label=f"mean: {mean:.3f}", zorder=3)
        title = f"{measure}, weakest {len(named)} of {len(names)}" if many else measure
        prop = {"family": families(names), "size": 10}
        axes.legend(title=title, prop=prop, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)


def reliability_diagram(bins: tuple[Tensor, Tensor, Tensor], ece: float) -> Figure:
    """Accuracy against confidence, and how many images have which; `bins` are `scores.reliability`."""
    images, confidence, accuracy = (values.numpy() for values in bins)
    figure = Figure((6.5, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(images)
    centres = (np.arange(len(images)) + 0.5) * width
    filled = images > 0
    above.bar(centres[filled], accuracy[filled], width * 0.94, color="#4878b0", label="accuracy")
    gap = confidence[filled] - accuracy[filled]
    above.bar(
        centres[filled], gap, width * 0.94, accuracy[filled], color="none", edgecolor="#d1495b", hatch="///",
        linewidth=0.8, label="gap to the mean confidence",
    )  # fmt: skip
    above.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="perfectly calibrated")
    above.set(ylim=(0, 1), ylabel="accuracy", title=f"Reliability: expected calibration error {ece:.3f}")
    above.legend(fontsize=9, loc="upper left")
    below.bar(centres, images, width * 0.94, color="0.6")
    below.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    return figure


def grad_cam_grid(
    images: Tensor, maps: Mapping[int, Tensor], titles: Sequence[str], normalization: Normalization = IMAGENET
) -> Figure:
    """One row an image (normalised, [N, 3, R, R]): what the model saw, and the maps [N, h, w] of each stage over it."""
    pictures, side, stages = as_pictures(images, normalization), images.shape[-1], sorted(maps)
    hot = {stage: heat(maps[stage].cpu(), side).numpy() for stage in stages}
    figure = Figure((2.4 * (len(stages) + 1), 2.75 * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), len(stages) + 1, squeeze=False)
    for row, (cells, picture, title) in enumerate(zip(grid, pictures, legible(titles), strict=True)):
        cells[0].imshow(picture)
        cells[0].set_title(title, fontsize=8.5, fontfamily=families(titles))
        for axes, stage in zip(cells[1:], stages, strict=True):
            axes.imshow(overlay(picture, hot[stage][row]))
            axes.set_title(f"stage {stage}" if stage < 9 else "stage 9 (head)", fontsize=8.5)
        for axes in cells:
            axes.set_axis_off()
    return figure
