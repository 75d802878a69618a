"""The page on which a photo is dropped: what it answers over its API, as `predict` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastnet
from fastnet.errors import UserError
from fastnet.export import export_model, generated_photos
from fastnet.exports import formats
from fastnet.exports.facts import facts_of
from fastnet.loading.trained import load_trained
from fastnet.serve import answers_of_export, answers_of_run, make_page, serve
from tests.runs import CLASSES, make_pictures, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    return make_run(root / "run", make_pictures(root / "data"))


def test_a_run_answers_with_its_classes_and_the_evidence(run: Path) -> None:
    photo = generated_photos(48)[3].numpy()
    classes, picture = answers_of_run(str(run))(photo)
    said = fastnet.load(run).predict(photo)
    assert list(classes) == list(CLASSES)
    assert {one["class"]: pytest.approx(one["probability"], abs=1e-5) for one in said} == classes
    assert picture is not None
    assert (picture.shape, picture.dtype) == ((48, 48, 3), np.uint8)
    other = answers_of_run(str(run), 4)(photo)[1]
    assert other is not None
    assert not np.array_equal(other, picture)


@pytest.mark.slow
def test_an_export_answers_as_its_run_does(run: Path, tmp_path: Path) -> None:
    photos = generated_photos(48)
    export_model(load_trained(run), "pt2", tmp_path / "m.pt2", photos[:2], preprocessing=True)
    classes, picture = answers_of_export(tmp_path / "m.pt2")(photos[2].numpy())
    expected, _ = answers_of_run(str(run))(photos[2].numpy())
    assert classes == pytest.approx(expected, abs=0.01)  # a level of some pixels
    assert picture is None


@pytest.mark.slow
def test_the_page_over_its_api(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[serve]'")
    from gradio_client import Client, handle_file

    photo = generated_photos(48)[3]
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(photo.numpy()).save(tmp_path / "photo.png", exif=tags)
    page = make_page(answers_of_run(str(run)), "pictures", explained=True)
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        said, evidence = Client(url, verbose=False).predict(handle_file(tmp_path / "photo.png"), api_name="/classify")
    finally:
        page.close()
    expected = fastnet.load(run).predict(tmp_path / "photo.png")
    assert said["label"] == expected[0]["class"]
    found = {one["label"]: one["confidence"] for one in said["confidences"]}
    assert found == {one["class"]: pytest.approx(one["probability"], abs=0.01) for one in expected}
    assert Image.open(evidence).size == (48, 48)


def test_one_sentence_each(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"w\.onnx is no export of fastnet, or damaged"):
        answers_of_export(tmp_path / "w.onnx")
    facts = facts_of(load_trained(run))
    monkeypatch.setattr(formats, "read_program", lambda path: (None, facts))
    with pytest.raises(UserError, match="does not take the pixels of a photo: export it with --with-preprocessing"):
        answers_of_export(tmp_path / "plain.pt2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"absent\.pt2 does not exist"):
        serve(str(tmp_path / "absent.pt2"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fastnet-efficientnet\[serve\]'"):
        serve(str(run))
