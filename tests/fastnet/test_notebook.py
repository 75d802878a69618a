"""The notebook runs from top to bottom as it stands, and still shows what its text claims."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "efficientnet.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/jpeg" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
    NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    said = printed(notebook)
    assert "alpha * beta**2 * gamma**2 = 1.92" in said
    assert re.search(r"b7 .* 66\.35 M .* 37\.75 .* 289\.9 M", said)
    drawn = re.search(r"share dropped ([\d.]+), expected ([\d.]+)", said)
    assert drawn is not None
    assert float(drawn[1]) == pytest.approx(float(drawn[2]), abs=0.01)
    top1 = re.search(r"top-1 ([\d.]+) %", said)
    assert top1 is not None
    assert float(top1[1]) > 50  # chance is 25
    assert pictures(notebook) == 6


def test_it_is_stored_executed_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    assert pictures(notebook) == 6
    assert NOTEBOOK.stat().st_size < 500_000
    assert "Traceback" not in NOTEBOOK.read_text()
