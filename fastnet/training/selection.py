"""Which epoch of a run is its best, and whether waiting for a better one has been long enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastnet.config import BestBy

VALUE = {"top1": "top1", "macro-f1": "macro_f1", "loss": "loss"}


def merit(values: dict[str, Any], by: BestBy) -> float:
    """The larger the better. values: of an evaluation."""
    value = float(values[VALUE[by]])
    return -value if by == "loss" else value


def best_of(evaluations: Sequence[dict[str, Any]], by: BestBy) -> dict[str, Any]:
    """The first of the best."""
    return max(evaluations, key=lambda values: merit(values, by))


def out_of_patience(evaluations: Sequence[dict[str, Any]], by: BestBy, patience: int) -> bool:
    """Whether the last `patience` epochs brought nothing better; never where that is 0."""
    if not patience or not evaluations:
        return False
    return len(evaluations) - 1 - evaluations.index(best_of(evaluations, by)) >= patience
