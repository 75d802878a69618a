"""A data set as a whole: what is counted, what is wrong, and the exit status."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.dataset.probe import scan
from data_pipeline.dataset.verify import verify


def jpeg(number: int, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def write(root: Path) -> Path:
    """Food-101's layout: three training photos and one for validation in each of two classes."""
    listed: dict[str, list[str]] = {"train": [], "test": []}
    for label, name in enumerate(("pie", "soup")):
        (root / "images" / name).mkdir(parents=True)
        for n in range(4):
            kinds: list[dict] = [{}, {"progressive": True}, {"mode": "CMYK"}, {}]
            (root / "images" / name / f"{n}.jpg").write_bytes(jpeg(10 * label + n, **kinds[n]))
            listed["test" if n == 3 else "train"].append(f"{name}/{n}")
    (root / "meta").mkdir()
    for split, entries in listed.items():
        (root / "meta" / f"{split}.txt").write_text("\n".join(entries))
    return root


def test_a_sound_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    report = verify(root)
    assert report.sound
    assert report.counts == {"pie": {"train": 3, "val": 1}, "soup": {"train": 3, "val": 1}}
    assert report.kinds == {"baseline": 4, "progressive": 2, "cmyk": 2}
    assert main(["verify", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "train: 6 images, 3 to 3 a class" in out
    assert "4 baseline" in out
    assert out.endswith("\nsound\n")


def test_everything_that_can_be_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    images = root / "images"
    (images / "pie" / "0.jpg").unlink()
    (images / "pie" / "notes.txt").write_text("extra")
    # Whole segments and a whole end, and no quantization table: only decoding tells.
    content = jpeg(7)
    tables, frame = content.index(b"\xff\xdb"), content.index(b"\xff\xc0")
    (images / "pie" / "1.jpg").write_bytes(content[:tables] + content[frame:])
    assert scan(str(images / "pie" / "1.jpg")).reason is None
    (images / "soup" / "1.jpg").write_bytes((images / "soup" / "0.jpg").read_bytes())
    (images / "soup" / "3.jpg").write_bytes((images / "pie" / "2.jpg").read_bytes())
    report = verify(root)
    assert not report.sound
    assert report.missing == ["images/pie/0.jpg"]
    assert report.extra == ["images/pie/notes.txt"]
    assert [name for name, _ in report.damaged] == ["images/pie/1.jpg"]
    assert report.duplicates == [
        ["images/pie/2.jpg", "images/soup/3.jpg"],
        ["images/soup/0.jpg", "images/soup/1.jpg"],
    ]
    assert report.leaks == [["images/pie/2.jpg", "images/soup/3.jpg"]]
    assert report.counts == {"pie": {"train": 1, "val": 1}, "soup": {"train": 3, "val": 1}}
    assert main(["verify", "--root", str(root)]) == 1
    out = capsys.readouterr().out
    for words in ("missing: 1", "images/pie/0.jpg", "extra (no split names them): 1", "damaged: 1", "not sound"):
        assert words in out


def test_the_same_photo_twice_in_one_class_and_split_is_only_mentioned(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    (root / "images" / "soup" / "1.jpg").write_bytes((root / "images" / "soup" / "0.jpg").read_bytes())
    report = verify(root)
    assert report.sound
    assert len(report.duplicates) == 1


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    (root / "images" / "soup" / "3.jpg").write_bytes(b"")
    assert verify(root).empty == ["soup"]


def test_folders_of_classes_are_verified_too(tmp_path: Path) -> None:
    for number, place in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "ü 1.jpg").write_bytes(jpeg(number))
    report = verify(tmp_path)
    assert report.sound
    assert report.counts == {"a": {"train": 1, "val": 1}, "b": {"train": 1, "val": 1}}


def test_no_data_set_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--root", str(tmp_path / "food-101")]) == 1
    said = capsys.readouterr().err
    assert f"python -m data_pipeline prepare --root {tmp_path}`" in said
    assert said.count("\n") == 1


def test_real_photos_are_sound(photos: Path) -> None:
    report = verify(photos)
    assert report.sound
    assert report.kinds == {"baseline": 800}
    assert report.duplicates == []
