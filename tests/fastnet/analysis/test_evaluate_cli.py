"""`python -m fastnet.evaluate`: numbers, JSON, the report's files; and every command's --help without torch."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from html import escape
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from data_pipeline import DataError, build_index
from fastnet.errors import UserError
from fastnet.evaluate import evaluate, evaluate_run
from fastnet.loading import checkpoint
from fastnet.loading.options import InferenceOptions, WeightsOptions
from fastnet.loading.trained import data_of, load_trained
from fastnet.train import parse_arguments
from fastnet.training.trainer import Trainer
from tests.runs import CLASSES, make_pictures, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reported")
    return make_run(root / "run", make_pictures(root / "data"))


def test_bare_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(str(run), report=False, inference=InferenceOptions(batch_size=5, workers=0)) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"top-1 [\d.]+ %  top-5 100.00 %  loss [\d.]+  \(12 images\)\n"
        r"macro F1 [\d.]+  AUC [\d.]+  average precision [\d.]+  calibration error [\d.]+\n",
        said,
    )
    assert not (run / "report").exists()


def test_a_report_needs_nothing_beside_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"kind": "train", "step": 1, "loss": 2.0, "top1": 9.0, "lr": 0.1}]
    lines += [{"kind": "eval", "step": 1, "epoch": 3, "weights": "model", "loss": 1.9, "top1": 10.0, "top5": 20.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert evaluate(str(run), json=True, worst=3, gradcam_stages=(9,), inference=InferenceOptions(workers=0)) == 0
    said = capsys.readouterr()
    scores = json.loads(said.out)  # nothing else on stdout
    _, expected = evaluate_run(load_trained(run), data_of(load_trained(run), None))
    assert scores["macro_f1"] == pytest.approx(expected.macro_f1)
    assert [one["name"] for one in scores["classes"]] == list(CLASSES)
    folder = run / "report"
    assert f"report: {folder / 'report.html'}" in said.err
    pictures = ["confusion", "precision_recall", "reliability", "roc"]
    assert {path.name for path in folder.iterdir()} == {
        "report.html", "scores.json", "predictions.csv", *(f"{name}.png" for name in pictures),
    }  # fmt: skip
    for name in pictures:
        assert min(Image.open(folder / f"{name}.png").size) > 200
    page = (folder / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == len(pictures) + 3  # and the learning curves
    assert set(re.findall(r"(?:src|href)='(?!data:)([^']*)", page)) == {"predictions.csv", "scores.json"}
    index = data_of(load_trained(run), None)
    shown = re.findall(r"<small>([^<]*)</small>", page)
    assert len(shown) == 3 + min(round(12 * scores["top1"] / 100), 4) + min(12 - round(12 * scores["top1"] / 100), 4)
    assert set(shown) <= {escape(str(Path(path).relative_to(index.root))) for path in index.splits["val"].paths}
    assert "The best, which is kept: epoch 3, top-1 10.00 %" in page
    assert re.search(r"<td class='text'>--resolution</td><td class='text'>48</td>.*<details>", page)
    assert "--label-smoothing</td>" in page[page.index("<details>") :]
    assert "apple &lt;pie&gt;" in page
    assert "apple <pie>" not in page
    assert json.loads((folder / "scores.json").read_text()) == scores
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert sum(row["true"] == row["predicted"] for row in rows) == round(12 * scores["top1"] / 100)
    assert sum(float(row["loss"]) for row in rows) / 12 == pytest.approx(scores["loss"], abs=1e-4)


def test_the_test_split_is_judged_beside_the_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pictures(tmp_path / "data")
    run = make_run(tmp_path / "run", data)
    with pytest.raises(DataError, match="has no test/: leave --split test out"):
        evaluate(str(run), split="test", inference=InferenceOptions(workers=0))
    assert not (run / "report-test").exists()
    (data / "val").rename(data / "test")
    shutil.copytree(data / "train", data / "val")
    for name in CLASSES:
        (data / "test" / name / "0.jpg").unlink()
    assert evaluate(str(run), split="test", report=False, loader="torch", inference=InferenceOptions(workers=0)) == 0
    said = capsys.readouterr().out
    assert "(9 images)" in said
    _, expected = evaluate_run(load_trained(run), build_index(data, test=True), loader="torch")
    assert f"loss {expected.loss:.4f}" in said
    with pytest.raises(UserError, match="--expect-reported is about the validation split"):
        evaluate(str(run), split="test", expect_reported=True, inference=InferenceOptions(workers=0))


@pytest.mark.slow
def test_weights_of_no_run_are_reported_where_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = tmp_path / "w.safetensors", str(data_of(load_trained(run), None).root)
    file.write_bytes((run / "best.safetensors").read_bytes())
    assert evaluate(str(file), data=data, inference=InferenceOptions(workers=0)) == 0
    assert "for a report, name a folder with --out" in capsys.readouterr().out
    asked = data_of(load_trained(run), None).splits["train"].paths[0]
    out = tmp_path / "report"
    assert (
        evaluate(
            str(file),
            data=data,
            out=str(out),
            gradcam_images=(asked,),
            inference=InferenceOptions(workers=0, tta="hflip"),
        )
        == 0
    )
    page = (out / "report.html").read_text()
    assert "the images that were asked for" in page
    assert "mean over views (hflip)" in page


def test_one_sentence_each(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for message, status, options in (
        ("--worst -1 must be 0 or more", 2, {"worst": -1}),
        ("--workers -1 must be 0 or more", 2, {"inference": InferenceOptions(workers=-1)}),
        (r"no report can be written to .*file/r", 1, {"out": str(tmp_path / "file" / "r")}),
        (r"--gradcam-images .*file cannot be read \(empty file\)", 2, {"gradcam_images": (str(tmp_path / "file"),)}),
        (
            "--tta five cuts its views",
            2,
            {"inference": InferenceOptions(tta="five"), "weights": WeightsOptions(crop_fraction=1.0)},
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            evaluate(str(run), **options)
        assert caught.value.exit_status == status
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        evaluate(str(tmp_path / "absent"))


@pytest.mark.slow
def test_a_run_reports_what_evaluate_says_of_it_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validated from a cache, and started with a --data that only its own folder knows."""
    make_pictures(tmp_path / "photos", 16)
    monkeypatch.chdir(tmp_path)
    flags = "--recipe quick --data photos --resolution 32 --epochs 1 --batch-size 8 --cache ram --workers 1 --out run"
    config = parse_arguments([*flags.split(), "--reestimate-bn", "0", "--device", "cpu"])
    assert Trainer(config, tmp_path / "run", Console(quiet=True)).run() == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "run"
    assert (
        evaluate(str(run), report=False, expect_reported=True, inference=InferenceOptions(workers=0, device="cpu")) == 0
    )
    assert "(48 images)" in capsys.readouterr().out
    for given in ([], ["--data", str(tmp_path / "photos")]):
        assert parse_arguments(["--resume", str(run), *given]).data.data == str(tmp_path / "photos")
    monkeypatch.setattr(checkpoint, "notes_of", lambda path: {"top1": 90.0, "loss": 0.3})
    with pytest.raises(UserError, match=r"the run reported top-1 90.00 % and loss 0.3000 of .*, not"):
        evaluate(str(run), report=False, expect_reported=True, inference=InferenceOptions(workers=0, device="cpu"))


def test_weights_that_tell_no_result_cannot_be_compared(run: Path) -> None:
    with pytest.raises(UserError, match="does not tell what its run reported"):
        evaluate(str(run), report=False, expect_reported=True, inference=InferenceOptions(workers=0))


@pytest.mark.parametrize("command", ["evaluate", "export", "predict", "serve", "summary"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['{command}', '--help']; from fastnet.{command} import main\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"python -m fastnet.{command}" in done.stdout
    if command != "summary":  # which model, in the same words everywhere
        shared = ["--" + field.name.replace("_", "-") for field in fields(WeightsOptions)]
        assert [flag for flag in shared if flag not in done.stdout] == []
