"""Images whose label the model contradicts, the most doubtful first: confident learning (Northcutt et al. 2021), by
cleanlab.

An image is suspected where the model finds another class likelier than that class usually is for its own images, as
many of each pair of classes as the estimate of wrong labels counts. Predictions of images that the model was trained on
are too sure of their labels: those of a validation split, or of another fold's model, find more.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import Index
from fastnet import DISTRIBUTION
from fastnet.analysis.page import as_utf8, csv_text, document, is_ours
from fastnet.analysis.predictions import Predictions
from fastnet.analysis.report import cards
from fastnet.errors import UserError
from fastnet.loading.checkpoint import write_atomically
from fastnet.loading.trained import Trained

SHOWN = 60
SHOWN_CERTAIN = 8
"""Where none is suspected."""
FILES = ("suspects.html", "suspects.csv")


@dataclass(frozen=True)
class Suspects:
    """rows: of the predictions, the most doubtful label first, all of them. quality [N]: of each row's label, 0 to 1.
    flagged: how many of the first rows are suspected."""

    rows: NDArray[np.int64]
    quality: NDArray[np.float64]
    flagged: int


def require_cleanlab() -> None:
    if importlib.util.find_spec("cleanlab") is None:
        raise UserError(f"--suspects ranks labels with cleanlab: pip install '{DISTRIBUTION}[suspects]'.")


def find_suspects(found: Predictions) -> Suspects:
    """Raises UserError where there is nothing to compare: one class alone, or cleanlab missing."""
    require_cleanlab()
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    labels, probabilities = found.labels.numpy(), found.probabilities.double().numpy()
    if len(np.unique(labels)) < 2:
        raise UserError("--suspects compares classes and the split holds images of one alone: name other --data.")
    probabilities = probabilities / probabilities.sum(1, keepdims=True)
    flagged = find_label_issues(labels, probabilities, n_jobs=1)
    quality = get_label_quality_scores(labels, probabilities, method="normalized_margin")
    order = np.lexsort((quality, ~flagged))
    return Suspects(order, quality, int(flagged.sum()))


def write_suspects(
    trained: Trained, index: Index, found: Predictions, folder: Path, *, split: str = "val"
) -> tuple[Path, int]:
    """Write suspects.csv, every image of the split with the most doubtful label first, and suspects.html with the
    pictures of the first; return the page and how many images are suspected.

    Raises UserError as `find_suspects` does, and where the folder cannot be written or holds others' files.
    """
    suspects = find_suspects(found)
    paths, names = index.splits["val"].paths, index.classes
    rows = suspects.rows.tolist()
    lines = [
        (
            paths[int(found.positions[row])],
            names[int(found.labels[row])],
            names[int(found.predicted[row])],
            f"{suspects.quality[row]:.6f}",
            "yes" if place < suspects.flagged else "no",
        )
        for place, row in enumerate(rows)
    ]
    shown = rows[: min(SHOWN, suspects.flagged or SHOWN_CERTAIN)]
    which = f"{len(shown)} shown, the most doubtful first" if suspects.flagged else "shown are the least certain ones"
    described = (
        f"{suspects.flagged} of {len(rows)} labels of {index.root} ({split}) are suspected by {trained.path}; "
        f"{which}: label → what the model says."
    )
    parts = [
        f"<p>{escape(described)}</p><p>All of them: <a href='suspects.csv'>suspects.csv</a></p>",
        cards(trained, index, found, shown),
    ]
    write_atomically(folder / "suspects.csv", csv_text(("path", "label", "predicted", "quality", "suspected"), lines))
    page = document(f"Doubtful labels of {index.root.name}", parts)
    write_atomically(folder / "suspects.html", as_utf8(page))
    return folder / "suspects.html", suspects.flagged


def check_free(folder: Path) -> None:
    """UserError where `write_suspects` would replace a file that is not its own."""
    held = [name for name in FILES if (folder / name).exists()]
    if held and not is_ours(folder / "suspects.html"):
        raise UserError(f"--out {folder} holds {held[0]}, which the list would replace: name another folder.")
