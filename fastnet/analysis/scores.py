"""Predictions as numbers: torchmetrics' accuracy, F1, one-vs-rest ROC and precision-recall, calibration, confusion."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import classification

from fastnet.analysis.predictions import Predictions

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """One class against the rest, all between 0 and 1; auc and average_precision are NaN where there is no image of it
    (or nothing else)."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float
    auc: float
    average_precision: float


@dataclass(frozen=True)
class Scores:
    """top1, top5 in percent and loss in nats as while training; the others between 0 and 1, means over the classes.

    ece: expected calibration error in 15 equal bins of confidence (Guo et al. 2017). confusion [K, K]: images by true
    class (rows) and prediction.
    """

    images: int
    top1: float
    top5: float
    loss: float
    macro_f1: float
    macro_auc: float
    mean_average_precision: float
    ece: float
    classes: tuple[ClassScores, ...]
    confusion: Tensor

    def as_dict(self) -> dict[str, Any]:
        """All but the confusion matrix, for JSON: what is not a number is None."""
        values = {name: value for name, value in asdict(self).items() if name != "confusion"}
        values["classes"] = [
            {name: None if value != value else value for name, value in one.items()} for one in values["classes"]
        ]
        return {name: None if value != value else value for name, value in values.items()}


def score(found: Predictions, names: tuple[str, ...]) -> Scores:
    """Every score of predictions of K classes with these names, all rows at once and without binned curves."""
    count, labels, probabilities = len(names), found.labels, found.probabilities
    common: dict[str, Any] = dict(num_classes=count, average="none")
    hits = found.log_probabilities.topk(min(5, count), 1).indices == labels[:, None]
    with _quiet():
        precision = classification.multiclass_precision(probabilities, labels, **common)
        recall = classification.multiclass_recall(probabilities, labels, **common)
        f1 = classification.multiclass_f1_score(probabilities, labels, **common)
        macro_f1 = classification.multiclass_f1_score(probabilities, labels, num_classes=count, average="macro")
        auc = classification.multiclass_auroc(probabilities, labels, **common)
        average_precision = classification.multiclass_average_precision(probabilities, labels, **common)
        ece = classification.multiclass_calibration_error(
            probabilities, labels, num_classes=count, n_bins=CALIBRATION_BINS, norm="l1"
        )
        confusion = classification.multiclass_confusion_matrix(probabilities, labels, num_classes=count)
    images = confusion.sum(1)
    # Where one of the two sides is empty torchmetrics says 0, which would be the worst score.
    undefined = (images == 0) | (images == len(labels))
    auc = torch.where(undefined, torch.nan, auc)
    average_precision = torch.where(images == 0, torch.nan, average_precision)
    columns = (images, precision, recall, f1, auc, average_precision)
    return Scores(
        images=len(labels),
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(1).double().mean().item(),
        loss=found.losses.double().mean().item(),
        macro_f1=macro_f1.item(),
        macro_auc=auc.nanmean().item(),
        mean_average_precision=average_precision.nanmean().item(),
        ece=ece.item(),
        classes=tuple(ClassScores(*row) for row in zip(names, *(c.tolist() for c in columns), strict=True)),
        confusion=confusion,
    )


def roc_curves(found: Predictions, points: int = 201) -> tuple[Tensor, Tensor]:
    """(false positive rates [points], true positive rates [K, points]) of each class against the rest, interpolated."""
    count = found.log_probabilities.shape[1]
    with _quiet():
        fpr, tpr, _ = classification.multiclass_roc(found.probabilities, found.labels, num_classes=count)
    grid = torch.linspace(0, 1, points)
    return grid, torch.stack([_interpolate(grid, x, y) for x, y in zip(fpr, tpr, strict=True)])


def precision_recall_curves(found: Predictions, points: int = 201) -> tuple[Tensor, Tensor]:
    """(recalls [points], precisions [K, points]) of each class against the rest: the best precision at that recall or a
    higher one, which removes the saw-teeth."""
    count = found.log_probabilities.shape[1]
    with _quiet():
        precision, recall, _ = classification.multiclass_precision_recall_curve(
            found.probabilities, found.labels, num_classes=count
        )
    grid = torch.linspace(0, 1, points)
    curves = []
    for p, r in zip(precision, recall, strict=True):
        # Recall falls from 1; the last point, precision 1 at recall 0, is a convention and no threshold's.
        envelope, recalls = p[:-1].cummax(0).values.flip(0), r[:-1].flip(0).contiguous()
        curves.append(envelope[torch.searchsorted(recalls, grid).clamp_max(len(recalls) - 1)])
    return grid, torch.stack(curves)


def reliability(found: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """(images, mean confidence, accuracy), each [bins], of 15 equal bins of confidence; NaN where a bin is empty."""
    confidence, predicted = found.probabilities.max(1)
    right = (predicted == found.labels).double()
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = torch.bucketize(confidence, edges[1:-1])  # (low, high]
    sums = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
    for row, values in zip(sums, (torch.ones_like(right), confidence.double(), right), strict=True):
        row.index_add_(0, bins, values)
    return sums[0].long(), sums[1] / sums[0], sums[2] / sums[0]


def most_confused(confusion: Tensor, names: tuple[str, ...], count: int = 15) -> list[tuple[str, str, int, float]]:
    """(true class, taken for, images, share of the true class) of the largest errors, the largest first."""
    wrong = confusion.clone().fill_diagonal_(0)
    values, positions = wrong.flatten().topk(min(count, wrong.numel()))
    totals, width = confusion.sum(1), len(names)
    return [
        (names[at // width], names[at % width], value, value / int(totals[at // width]))
        for value, at in zip(values.tolist(), positions.tolist(), strict=True)
        if value
    ]


def _interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Piecewise linear through (xp, fp), xp not falling; at a jump the upper end."""
    right = torch.searchsorted(xp.contiguous(), x, right=True).clamp(1, len(xp) - 1)
    x0, x1, y0, y1 = xp[right - 1], xp[right], fp[right - 1], fp[right]
    return torch.where(x1 > x0, y0 + (y1 - y0) * ((x - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1), y1)


@contextmanager
def _quiet() -> Iterator[None]:
    """torchmetrics warns for every class without images; the report says so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
