"""`python -m fastnet.predict`: the evaluator's numbers for single files, bad files named, Grad-CAM pictures."""

from __future__ import annotations

import csv
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image

from data_pipeline.dataset.formats import WORDS
from fastnet.errors import UserError
from fastnet.evaluate import evaluate_run
from fastnet.loading.options import InferenceOptions
from fastnet.loading.trained import Trained, data_of, load_trained
from fastnet.predict import expand, predict, predict_files
from tests.runs import CLASSES, make_pictures, make_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("predicted")
    return load_trained(make_run(root / "run", make_pictures(root / "data")))


def test_equal_to_the_evaluator(trained: Trained) -> None:
    index = data_of(trained, None)
    found, _ = evaluate_run(trained, index, batch_size=5)
    files = index.splits["val"].paths
    results = predict_files(trained, files[::-1], batch_size=3)
    assert [result["file"] for result in results] == list(files[::-1])
    for row, result in enumerate(reversed(results)):
        assert len(result["top"]) == 3
        assert result["top"][0]["probability"] >= result["top"][1]["probability"] >= result["top"][2]["probability"]
        for entry in result["top"]:
            assert entry["class"] == CLASSES[entry["label"]]
            expected = found.probabilities[row, entry["label"]].item()
            assert entry["probability"] == pytest.approx(expected, abs=1e-5)


def test_rotated_by_exif_is_predicted_upright(trained: Trained, tmp_path: Path) -> None:
    source = Image.open(data_of(trained, None).splits["val"].paths[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # seen after a quarter turn clockwise
    source.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    source.save(tmp_path / "plain.png")
    turned, plain = predict_files(trained, [tmp_path / "turned.png", tmp_path / "plain.png"])
    assert turned["top"][0]["probability"] == pytest.approx(plain["top"][0]["probability"], abs=1e-4)


def test_lines_for_people_and_bad_files_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = data_of(trained, None).splits["val"].paths[0]
    (tmp_path / "text.jpg").write_text("not a photo")
    status = predict(str(trained.run), (str(tmp_path / "text.jpg"), good, str(tmp_path / "absent.jpg")), top=2)
    said = capsys.readouterr()
    assert status == 1
    assert said.err.splitlines() == [
        f"error: {tmp_path / 'text.jpg'} cannot be read (not a {WORDS} image): it is left out.",
        f"error: {tmp_path / 'absent.jpg'} cannot be read (no such file or directory): it is left out.",
    ]
    lines = said.out.splitlines()
    assert lines[0] == good
    assert len(lines) == 3
    assert lines[1].endswith(" %")


def test_a_folder_as_json_with_grad_cam(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for i, place in enumerate(("a/1.jpg", "b/1.jpg", "b/2.PNG")):
        Image.open(data_of(trained, None).splits["val"].paths[i]).save(folder / place)
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "pictures"
    status = predict(
        str(trained.run), (str(folder),), json=True, gradcam=True, gradcam_stages=(7, 9), out=str(out), top=1
    )
    said = capsys.readouterr()
    results = json.loads(said.out)
    assert status == 0
    assert [Path(result["file"]).relative_to(folder).as_posix() for result in results] == [
        "a/1.jpg", "b/1.jpg", "b/2.PNG",
    ]  # fmt: skip
    assert [len(result["top"]) for result in results] == [1, 1, 1]
    assert "3 Grad-CAM pictures" in said.err
    assert sorted(path.name for path in out.iterdir()) == ["1-2.png", "1.png", "2.png"]
    width, height = Image.open(out / "1.png").size
    assert width > 2.5 * height  # the view and two stages beside each other


def test_addresses_and_a_table_for_a_spreadsheet(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    photo = Path(data_of(trained, None).splits["val"].paths[0])
    (folder / "a b.jpg").write_bytes(photo.read_bytes())
    (folder / "=1+1.jpg").write_bytes(photo.read_bytes())
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        asked = (f"{web}/a%20b.jpg?size=1", "=1+1.jpg", f"{web}/absent.jpg")
        assert predict(str(trained.run), asked, json=True, top=2, csv=str(tmp_path / "said.csv")) == 1
        server.shutdown()
    found, local, absent = json.loads(capsys.readouterr().out)
    assert (found["file"], local["file"]) == asked[:2]
    expected = predict_files(trained, [photo], top=2)[0]["top"]
    for entry, other, one in zip(found["top"], local["top"], expected, strict=True):
        assert entry["class"] == other["class"] == one["class"]
        assert entry["probability"] == pytest.approx(one["probability"], abs=1e-5)
    assert absent == {"file": asked[2], "error": "HTTP 404 File not found"}
    with open(tmp_path / "said.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [asked[0], "'=1+1.jpg", asked[2]]  # no formula
    assert rows[0]["class_1"] == found["top"][0]["class"]
    assert float(rows[0]["probability_2"]) == pytest.approx(found["top"][1]["probability"], abs=1e-6)
    assert rows[2]["error"] == absent["error"]


def test_refused_before_any_work(trained: Trained, tmp_path: Path) -> None:
    run = str(trained.run)
    for message, options in (
        ("name at least one image", {}),
        ("--top 0 must be 1 or more", {"top": 0}),
        ("--batch-size 0 must be 1 or more", {"inference": InferenceOptions(batch_size=0)}),
        ("--gradcam-stages must be numbers from 1", {"gradcam_stages": (12,)}),
    ):
        with pytest.raises(UserError, match=message) as caught:
            predict(run, (), **options)
        assert caught.value.exit_status == 2
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda is impossible because"):
            predict(run, ("a.jpg",), inference=InferenceOptions(device="cuda"))
    with pytest.raises(UserError, match="holds no image"):
        expand([str(tmp_path)])
