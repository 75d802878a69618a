"""Data sets of the Hugging Face hub, as its library writes them: the same images and labels, byte for byte."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import DataError, build_index

datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
CLASSES = ["tea", "apple/pie"]


def encoded(seed: int, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def rows(count: int, first: int, label: int | None = None) -> Any:
    images = [{"bytes": encoded(first + at, ("JPEG", "PNG")[at % 2]), "path": None} for at in range(count)]
    labels = [at % 2 if label is None else label for at in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.mark.slow
def test_parquet_as_a_snapshot_of_the_hub_has_it(tmp_path: Path) -> None:
    data = tmp_path / "food"
    (data / "data").mkdir(parents=True)
    train = rows(8, 0)
    train.select(range(4)).to_parquet(data / "data" / "train-00000-of-00002.parquet")
    train.select(range(4, 8)).to_parquet(data / "data" / "train-00001-of-00002.parquet")
    rows(4, 100).to_parquet(data / "data" / "validation-00000-of-00001.parquet")
    rows(2, 200, label=-1).to_parquet(data / "data" / "test-00000-of-00001.parquet")
    index = build_index(data, cache_dir=tmp_path / "cache")
    assert index.classes == ("apple_pie", "tea")
    assert [len(index.splits[name]) for name in ("train", "val")] == [8, 4]
    for split, first in (("train", 0), ("val", 100)):
        for path, label in zip(index.splits[split].paths, index.splits[split].labels, strict=True):
            at = int(Path(path).stem)
            assert Path(path).read_bytes() == encoded(first + at, ("JPEG", "PNG")[at % 2])
            assert index.classes[label] == ("tea", "apple_pie")[at % 2]
    with pytest.raises(DataError, match=r"has no test/"):  # none of its images has a label
        build_index(data, test=True, cache_dir=tmp_path / "cache")
    kept = Path(index.splits["train"].paths[0]).stat().st_mtime_ns
    again = build_index(data, cache_dir=tmp_path / "cache")
    assert (again.fingerprint, Path(again.splits["train"].paths[0]).stat().st_mtime_ns) == (index.fingerprint, kept)


@pytest.mark.slow
def test_what_save_to_disk_wrote_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.DatasetDict({"train": rows(4, 0), "validation": rows(2, 20), "test": rows(2, 30)}).save_to_disk(
        tmp_path / "three"
    )
    tested = build_index(tmp_path / "three", test=True, cache_dir=tmp_path / "cache").splits["val"]
    assert [Path(path).read_bytes() for path in tested.paths] == [encoded(31, "PNG"), encoded(30, "JPEG")]
    datasets.DatasetDict({"train": rows(12, 0)}).save_to_disk(tmp_path / "saved")
    index = build_index(tmp_path / "saved", cache_dir=tmp_path / "cache")
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 10, "val": 2}  # drawn
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return datasets.DatasetDict({"train": rows(6, 0), "validation": rows(2, 50)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    named = build_index("hf://ethz/food101", cache_dir=tmp_path / "cache")
    assert asked == ["ethz/food101"]
    assert {name: len(split) for name, split in named.splits.items()} == {"train": 6, "val": 2}


def test_one_sentence_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad cannot be read by datasets") as caught:
        build_index(tmp_path / "bad", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "bad" / "train-0.parquet")
    with pytest.raises(DataError, match="has the columns text: needed are image and label"):
        build_index(tmp_path / "bad", cache_dir=tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        build_index(tmp_path / "bad", cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_a_class_name_does_not_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.data_pipeline.dataset.test_huggingface.CLASSES", ["..", "a/../../b"])
    rows(12, 0).to_parquet(tmp_path / "train-0.parquet")
    index = build_index(tmp_path, cache_dir=tmp_path / "cache")
    assert index.classes == ("_.", "a_.._.._b")
    monkeypatch.setattr("tests.data_pipeline.dataset.test_huggingface.CLASSES", ["a/b", "a_b"])
    rows(12, 50).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="would share a folder"):
        build_index(tmp_path, cache_dir=tmp_path / "cache")
