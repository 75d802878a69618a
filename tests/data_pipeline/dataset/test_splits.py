"""Which photos train and which validate, in the layouts that people have."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset.folds import Folds
from data_pipeline.dataset.index import build_index
from data_pipeline.errors import DataError


def save(path: Path, seed: int = 0) -> None:
    """A smooth picture, unlike those of other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(path)


def class_folders(root: Path, count: int = 10) -> Path:
    for label, name in enumerate(("pie", "soup", "tea")):
        for number in range(count):
            save(root / name / f"{number}.jpg", 100 * label + number)
    return root


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_is_what_is_called_so_and_not_the_test_set(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    for number, split in enumerate(("train", name, "test")):
        for label in range(2):
            save(root / split / f"{label}" / "1.jpg", 2 * number + label)
    index = build_index(root, cache_dir=tmp_path / "cache")
    assert {Path(path).parts[-3] for path in index.splits["val"].paths} == {name}
    shutil.rmtree(root / name)
    index = build_index(root, cache_dir=tmp_path / "cache")
    assert {Path(path).parts[-3] for path in index.splits["val"].paths} == {"test"}
    assert any("test/" in note and "--val-fraction" in note for note in index.notes)


def test_class_folders_alone_are_divided_by_class(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    index = build_index(root, cache_dir=tmp_path / "cache")
    train, val = index.splits["train"], index.splits["val"]
    assert index.classes == ("pie", "soup", "tea")
    assert Counter(val.labels.tolist()) == {0: 2, 1: 2, 2: 2}
    assert not {*train.paths} & {*val.paths}
    assert len(train) + len(val) == 30
    assert any("20%" in note for note in index.notes)
    # Another place, another order on disk, without a cache: the same draw.
    shutil.copytree(root, tmp_path / "elsewhere")
    again = build_index(tmp_path / "elsewhere", cache_dir=tmp_path / "other cache")
    assert [Path(path).parts[-2:] for path in again.splits["val"].paths] == [Path(p).parts[-2:] for p in val.paths]
    half = build_index(root, cache_dir=tmp_path / "cache", val_fraction=0.5)
    assert Counter(half.splits["val"].labels.tolist()) == {0: 5, 1: 5, 2: 5}


def test_a_run_goes_on_with_the_split_that_it_began_with(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    index = build_index(root, cache_dir=tmp_path / "cache")
    Path(index.splits["val"].paths[0]).unlink()  # the hash alone would draw another
    again = build_index(root, cache_dir=tmp_path / "cache", known=index.known())
    assert again.splits["val"].paths == index.splits["val"].paths
    assert list(again.quarantined["val"]) == [0]
    assert again.fingerprint == index.fingerprint


def test_copies_of_a_photo_stay_on_one_side(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    for number in range(10):
        with Image.open(root / "pie" / f"{number}.jpg") as image:
            image.resize((80, 60)).save(root / "pie" / f"copy of {number}.jpg", quality=60)
    index = build_index(root, cache_dir=tmp_path / "cache")
    val = {Path(path).stem.removeprefix("copy of ") for path in index.splits["val"].paths if "/pie/" in path}
    train = {Path(path).stem.removeprefix("copy of ") for path in index.splits["train"].paths if "/pie/" in path}
    assert len(val) == 2
    assert not val & train


def test_a_single_photo_of_a_class_trains(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    save(root / "rare" / "only.jpg", 999)
    index = build_index(root, cache_dir=tmp_path / "cache")
    assert any(path.endswith("only.jpg") for path in index.splits["train"].paths)


def test_one_photo_a_class_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one photo a class"):
        build_index(class_folders(tmp_path / "data", 1), cache_dir=tmp_path / "cache")


def test_photos_beside_a_table(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "flat")
    rows = [(path.relative_to(root), path.parent.name.title()) for path in sorted(root.rglob("*.jpg"))]
    with open(root / "labels.csv", "w", newline="") as out:
        csv.writer(out, delimiter=";").writerows([("Filename", "Label"), *rows[1:]])
    index = build_index(root, cache_dir=tmp_path / "cache")
    assert index.classes == ("Pie", "Soup", "Tea")
    assert len(index.splits["train"]) + len(index.splits["val"]) == 29
    assert [path for path, _ in index.excluded] == [f"{root}/{rows[0][0]}"]
    assert build_index(root / "labels.csv", cache_dir=tmp_path / "cache").fingerprint == index.fingerprint
    with open(root / "labels.csv", "w", newline="") as out:
        splits = ["train", "valid", "test"] * 10
        named = [(*row, split) for row, split in zip(rows, splits, strict=True)]
        csv.writer(out).writerows([("path", "label", "split"), *named])
    index = build_index(root, cache_dir=tmp_path / "cache")
    assert [len(index.splits[split]) for split in ("train", "val")] == [10, 10]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["path,label", "pie/0.jpg,"], "line 2"),
        (["path,label", "../x.jpg,a"], "does not lie below"),
        (["path,label", "pie/0.jpg,a", "./pie/0.jpg,b"], "a second time"),
        (["path,label,split", "pie/0.jpg,a,holdout"], "holdout"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path: Path, rows: list[str], words: str) -> None:
    root = class_folders(tmp_path / "data", 1)
    (root / "labels.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=words):
        build_index(root, cache_dir=tmp_path / "cache")


def test_a_table_that_python_chokes_on(tmp_path: Path) -> None:
    """A lone carriage return in the header; labels of more digits than Python makes a number of."""
    root = class_folders(tmp_path / "data", 2)
    table = root / "labels.csv"
    table.write_bytes(b"path,la\rbel\npie/0.jpg,a\n")
    with pytest.raises(DataError, match="no columns path and label"):
        build_index(table, cache_dir=tmp_path / "cache")
    labels = {name: str(at) * 5000 for at, name in enumerate(("pie", "soup", "tea"), 1)}
    rows = [f"{name}/{number}.jpg,{label}" for name, label in labels.items() for number in (0, 1)]
    table.write_text("\n".join(["path,label", *rows]))
    assert build_index(table, cache_dir=tmp_path / "cache").classes == tuple(sorted(labels.values()))


def test_a_meta_layout_without_a_test_list_is_divided(tmp_path: Path) -> None:
    class_folders(tmp_path / "data" / "images")
    listed = [f"{name}/{number}" for name in ("pie", "soup", "tea") for number in range(10)]
    (tmp_path / "data" / "meta").mkdir()
    (tmp_path / "data" / "meta" / "train.txt").write_text("\n".join(listed))
    index = build_index(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert Counter(index.splits["val"].labels.tolist()) == {0: 2, 1: 2, 2: 2}


def test_splits_without_training_are_refused(tmp_path: Path) -> None:
    for split in ("valid", "test"):
        save(tmp_path / "data" / split / "a" / "1.jpg")
    with pytest.raises(DataError, match="no train/"):
        build_index(tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_fraction_without_effect_is_named(tmp_path: Path) -> None:
    for number, place in enumerate(("train/a", "train/b", "val/a", "val/b")):
        save(tmp_path / "data" / place / "1.jpg", number)
    index = build_index(tmp_path / "data", cache_dir=tmp_path / "cache", val_fraction=0.3)
    assert any("no effect" in note for note in index.notes)
    assert index.splits["val"].labels.tolist() == [0, 1]


def test_each_photo_validates_in_one_fold_and_copies_in_the_same(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", 9)
    for number in range(3):  # re-encoded and smaller
        with Image.open(root / "pie" / f"{number}.jpg") as photo:
            photo.resize((80, 60)).save(root / "pie" / f"copy of {number}.jpg", quality=60)
    found = []
    for fold in range(4):
        index = build_index(root, folds=Folds(4, fold), cache_dir=tmp_path / "cache")
        val, train = (set(index.splits[name].paths) for name in ("val", "train"))
        assert not val & train
        assert len(val | train) == 30
        assert all(2 <= count <= 4 for count in Counter(index.splits["val"].labels.tolist()).values())
        assert "fold " in index.notes[-1]
        for number in range(3):
            pair = {f"{root}/pie/{number}.jpg", f"{root}/pie/copy of {number}.jpg"}
            assert pair <= val or pair <= train
        found += sorted(val)
    assert sorted(found) == sorted(map(str, root.rglob("*.jpg")))
    (root / "train").mkdir()
    for name in ("pie", "soup", "tea"):
        (root / name).rename(root / "train" / name)
    shutil.copytree(root / "train", root / "val")
    with pytest.raises(DataError, match=r"--folds, and .* has images for validation"):
        build_index(root, folds=Folds(4, 0), cache_dir=tmp_path / "cache")


def test_the_test_split_by_name(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    for number, split in enumerate(("train", "val", "test")):
        for label in range(2):
            save(root / split / f"{label}" / "1.jpg", 2 * number + label)
    index = build_index(root, test=True, cache_dir=cache)
    assert {Path(path).parts[-3] for path in index.splits["val"].paths} == {"test"}
    assert not index.notes
    shutil.rmtree(root / "val")  # then test/ chooses the best epoch too, which is said, unless a share does
    (note,) = build_index(root, test=True, cache_dir=cache).notes
    assert "its best epoch was chosen on them" in note
    assert not build_index(root, 0.5, test=True, cache_dir=cache).notes
    for file in (root / "test").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(DataError, match="No test image"):
        build_index(root, test=True, cache_dir=cache)
    shutil.rmtree(root / "test")
    for data in (root, class_folders(tmp_path / "classes", 2)):
        with pytest.raises(DataError, match="has no test/: leave --split test out"):
            build_index(data, test=True, cache_dir=cache)


def test_the_test_split_of_a_table_and_of_meta(tmp_path: Path) -> None:
    root, cache = class_folders(tmp_path / "data", 4), tmp_path / "cache"
    names = [path.relative_to(root) for path in sorted(root.rglob("*.jpg"))]

    def write(*splits: str) -> None:
        rows = [f"{name},{name.parent},{splits[i % len(splits)]}" for i, name in enumerate(names)]
        (root / "labels.csv").write_text("path,label,split\n" + "\n".join(rows))

    write("train", "train", "val", "test")
    index = build_index(root, test=True, cache_dir=cache)
    assert {Path(path).name for path in index.splits["val"].paths} == {"3.jpg"}
    write("train", "train", "train", "test")  # a share of training, where one is asked for
    index = build_index(root, 0.3, cache_dir=cache)
    assert "3.jpg" not in {Path(path).name for split in index.splits.values() for path in split.paths}
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 6, "val": 3}
    write("train")
    with pytest.raises(DataError, match="has no split called test: leave --split test out"):
        build_index(root, test=True, cache_dir=cache)
    meta = tmp_path / "food"
    class_folders(meta / "images", 4)
    (meta / "meta").mkdir()
    for name, places in (("train", range(3)), ("test", range(3, 4))):
        listed = [f"{food}/{place}" for food in ("pie", "soup", "tea") for place in places]
        (meta / "meta" / f"{name}.txt").write_text("\n".join(listed))
    index = build_index(meta, test=True, cache_dir=cache)
    assert {Path(path).name for path in index.splits["val"].paths} == {"3.jpg"}
    (meta / "meta" / "test.txt").unlink()
    with pytest.raises(DataError, match=r"has no meta/test\.json or meta/test\.txt: leave --split test out"):
        build_index(meta, test=True, cache_dir=cache)


def test_folds_leave_the_test_split_alone(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    class_folders(root / "train", 4)
    class_folders(root / "test", 2)
    index = build_index(root, folds=Folds(2, 0), cache_dir=cache)
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 6, "val": 6}
    assert len(build_index(root, folds=Folds(2, 0), test=True, cache_dir=cache).splits["val"]) == 6


@pytest.mark.parametrize("folds", [None, Folds(3, 1)])
def test_photos_that_come_later_do_not_change_what_a_run_validated_on(tmp_path: Path, folds: Folds | None) -> None:
    root, cache = class_folders(tmp_path / "data"), tmp_path / "cache"
    began = build_index(root, folds=folds, cache_dir=cache)
    for number in range(12):
        save(root / "pie" / f"new {number}.jpg", 500 + number)
    assert build_index(root, folds=folds, cache_dir=cache).splits["val"].paths != began.splits["val"].paths
    index = build_index(root, folds=folds, divided_as=began.known(), cache_dir=cache)
    assert index.splits["val"].paths == began.splits["val"].paths
    assert len(index.splits["train"]) == len(began.splits["train"]) + 12
