"""Doubtful labels: planted ones come first, in the table and on the page."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import build_index
from fastnet.analysis.predictions import Predictions
from fastnet.analysis.suspects import find_suspects, write_suspects
from fastnet.errors import UserError
from fastnet.evaluate import evaluate
from fastnet.loading.options import InferenceOptions
from fastnet.loading.trained import data_of, load_trained
from fastnet.predict import _write_csv, predict_files
from tests.runs import CLASSES, make_pictures, make_run

pytest.importorskip("cleanlab", reason="cleanlab is not installed: pip install '.[suspects]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suspected")
    return make_run(root / "run", make_pictures(root / "data"))


def predictions(wrong: dict[int, int], count: int = 12) -> Predictions:
    """Of so many images in three classes: 80 % sure of the label, of `wrong` {row: class} 85 and 90 % of another."""
    labels = torch.arange(count) * 3 // count
    probabilities = torch.full((count, 3), 0.1)
    probabilities[torch.arange(count), labels] = 0.8
    for place, (row, other) in enumerate(wrong.items()):
        probabilities[row] = 0.05 + 0.025 * place
        probabilities[row, other] = 0.9 - 0.05 * place
    return Predictions((probabilities / probabilities.sum(1, keepdim=True)).log(), labels, torch.arange(count))


def test_planted_labels_come_first_and_are_shown(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run)
    index = data_of(trained, None)
    page, count = write_suspects(trained, index, predictions({7: 0, 2: 2}), tmp_path)
    assert count == 2
    with open(tmp_path / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = index.splits["val"].paths
    assert [row["path"] for row in rows[:2]] == [paths[7], paths[2]]
    assert [row["suspected"] for row in rows] == ["yes"] * 2 + ["no"] * 10
    assert (rows[0]["label"], rows[0]["predicted"]) == (CLASSES[1], CLASSES[0])
    quality = [float(row["quality"]) for row in rows]
    assert quality == sorted(quality)
    shown = page.read_text()
    assert shown.count("<figure>") == 2
    assert "bread → apple &lt;pie&gt; 90 %" in shown
    page, count = write_suspects(trained, index, predictions({}), tmp_path, split="train")
    shown = page.read_text()
    assert (count, shown.count("<figure>")) == (0, 8)
    assert f"0 of 12 labels of {index.root} (train) are suspected" in shown
    assert "shown are the least certain ones" in shown


def test_a_name_that_is_no_text_leaves_pages_and_tables_readable(run: Path, tmp_path: Path) -> None:
    data, trained = make_pictures(tmp_path / "data"), load_trained(run)
    os.rename(data / "val" / "bread" / "0.jpg", os.fsencode(data / "val" / "bread" / "caf") + b"\xe9.jpg")
    index = build_index(data)
    rows = [row for row, path in enumerate(index.splits["val"].paths) if "caf" in path]
    page, _ = write_suspects(trained, index, predictions({rows[0]: 0}), tmp_path / "out")
    assert "bread/caf\\udce9.jpg" in page.read_text(encoding="utf-8")
    with open(tmp_path / "out" / "suspects.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["path"].endswith("bread/caf\\udce9.jpg")
    found = predict_files(trained, [index.splits["val"].paths[rows[0]], tmp_path / "absent.jpg"], top=2)
    _write_csv(found, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[1][0].endswith("caf\\udce9.jpg")
    assert [len(row) for row in table] == [6, 6, 6]


def test_nothing_is_suspected_where_the_model_agrees() -> None:
    assert find_suspects(predictions({})).flagged == 0
    one = Predictions(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    with pytest.raises(UserError, match="of one alone"):
        find_suspects(one)


def test_the_command_ranks_the_training_split(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(str(run), split="train", suspects=True, report=False, inference=InferenceOptions(workers=0)) == 0
    assert "of 12 labels are suspected" in capsys.readouterr().out
    with open(run / "report-train" / "suspects.csv", newline="") as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert sorted(listed) == sorted(data_of(load_trained(run), None).splits["train"].paths)
    assert not np.array_equal(listed, sorted(listed))
    assert not (run / "report").exists()
