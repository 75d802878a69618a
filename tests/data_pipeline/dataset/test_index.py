"""The index: three layouts, damaged files left out and named, one sentence for what cannot work, a safe cache."""

import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import DataError, Index, build_index, make_loader
from data_pipeline.dataset import index as food101
from data_pipeline.dataset import layouts
from data_pipeline.dataset.probe import Probe

RNG = np.random.default_rng(0)


def encoded(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    out = io.BytesIO()
    # Smooth, so that no damage below hides in noise; coloured, so that channels differ.
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([5 * x % 256, 7 * y % 256, (3 * x + 2 * y) % 256], 2).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


Files = dict[str, bytes | Callable[[Path], object]]


def folders(root: Path, files: Files, val: str = "val", classes: tuple[str, ...] = ("a", "b")) -> Path:
    """A train/ + val/ folder with two good photos a class, and `files` beside those of the first class."""
    for split in ("train", val):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                (root / split / name / f"good{number}.jpg").write_bytes(encoded())
    for name, content in files.items():
        path = root / "train" / classes[0] / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
    return root


def indexed(root: Path) -> Index:
    return build_index(root, cache_dir=root.parent / "cache")


JPEG, PNG = encoded(), encoded("PNG")
SIXTEEN_BIT = io.BytesIO()
Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(SIXTEEN_BIT, "PNG")

BAD: Files = {
    "empty.jpg": b"",
    "garbage.jpg": RNG.bytes(3000),
    "page.jpg": b"<html>404 not found</html>",
    "header only.jpg": JPEG[:30],
    "half.jpg": JPEG[: len(JPEG) // 2],
    "no end.jpg": JPEG[:-40],
    "dirt between segments.jpg": JPEG[:20] + b"dirt" + JPEG[20:],
    "half.png": PNG[: len(PNG) // 2],
    "no end.png": PNG[:-4],
    "flipped bit.png": PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:],
    "sixteen bits.png": SIXTEEN_BIT.getvalue(),
    "jpeg 2000.jpg": encoded("JPEG2000"),
    "animation.webp": encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]),
    "folder.jpg": lambda path: path.mkdir(),
    "dangling.jpg": lambda path: path.symlink_to("nowhere"),
    "pipe.jpg": lambda path: os.mkfifo(path),
}
GOOD: Files = {
    "png named.jpg": PNG,
    "cmyk.jpg": encoded(mode="CMYK"),
    "gray.jpg": encoded(mode="L"),
    "progressive.JPG": encoded(progressive=True),
    "palette.png": encoded("PNG", "P"),
    "alpha.png": encoded("PNG", "RGBA"),
    "plain.webp": encoded("WEBP"),
    "junk after the end.jpg": JPEG + b"junk",
    "ünïcode 写真 and spaces.jpeg": JPEG,
    "link.jpg": lambda path: path.symlink_to("good0.jpg"),
}


def test_damaged_files_are_left_out_and_named(tmp_path: Path) -> None:
    index = indexed(folders(tmp_path / "data", BAD))
    reasons = {Path(path).name: reason for path, reason in index.excluded}
    assert set(reasons) == set(BAD)
    assert all(reasons.values())
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["no end.jpg"] == "truncated: its end is missing"
    assert reasons["jpeg 2000.jpg"].startswith("not a JPEG, PNG, WebP, BMP")
    assert len(index.splits["train"]) == 4
    assert len(index.splits["val"]) == 4


def test_unusual_files_are_kept(tmp_path: Path) -> None:
    index = indexed(folders(tmp_path / "data", GOOD))
    assert index.excluded == ()
    assert {Path(path).name for path in index.splits["train"].paths} == {*GOOD, "good0.jpg", "good1.jpg"}
    assert (index.splits["train"].sizes == (40, 30)).all()


@pytest.mark.parametrize("orientation", range(10))
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    index = indexed(folders(tmp_path / "data", {"x.jpg": encoded(exif=exif(orientation))}))
    at = [Path(path).name for path in index.splits["train"].paths].index("x.jpg")
    assert index.splits["train"].orientations[at] == (orientation if 1 <= orientation <= 8 else 1)
    assert tuple(index.splits["train"].sizes[at]) == ((30, 40) if 5 <= orientation <= 8 else (40, 30))


def test_real_photos(photos: Path, tmp_path: Path) -> None:
    index = build_index(photos, cache_dir=tmp_path)
    assert len(index.classes) == 10
    assert index.classes == tuple(sorted(index.classes))
    assert {split: len(found) for split, found in index.splits.items()} == {"train": 600, "val": 200}
    assert index.excluded == ()
    for split, stem in (("train", "train"), ("val", "test")):
        listed = (photos / "meta" / f"{stem}.txt").read_text().split()
        found = index.splits[split]
        assert sorted(found.paths) == sorted(f"{photos.resolve()}/images/{entry}.jpg" for entry in listed)
        for path, label in zip(found.paths, found.labels, strict=True):
            assert Path(path).parent.name == index.classes[label]
    for path, size in list(zip(index.splits["val"].paths, index.splits["val"].sizes, strict=True))[::20]:
        assert Image.open(path).size == tuple(size)


def official(root: Path, listed: dict[str, list[str]], form: str, present: set[str] | None = None) -> Path:
    """Food-101's layout with the entries that `listed` gives for train and test."""
    (root / "meta").mkdir(parents=True)
    for stem, entries in listed.items():
        for entry in entries:
            path = root / "images" / f"{entry}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if present is None or entry in present:
                path.write_bytes(JPEG)
        groups: dict[str, list[str]] = {}
        for entry in entries:
            groups.setdefault(entry.split("/")[0], []).append(entry)
        text = json.dumps(groups) if form == "json" else "\n".join(entries) + "\n"
        (root / "meta" / f"{stem}.{form}").write_text(text)
    return root


LISTED = {"train": ["pie/2", "pie/1", "apple cake/7"], "test": ["pie/3", "apple cake/8"]}


@pytest.mark.parametrize("form", ["json", "txt"])
def test_official_layout_with_any_number_of_classes(tmp_path: Path, form: str) -> None:
    index = indexed(official(tmp_path / "data", LISTED, form))
    assert index.classes == ("apple cake", "pie")
    assert index.splits["train"].labels.tolist() == [1, 1, 0]
    assert index.splits["val"].labels.tolist() == [1, 0]


def test_photos_that_metadata_names_but_are_missing_are_counted(tmp_path: Path) -> None:
    index = indexed(official(tmp_path / "data", LISTED, "txt", {"pie/1", "pie/3", "apple cake/7"}))
    assert sorted((Path(path).name, reason) for path, reason in index.excluded) == [
        ("2.jpg", "no such file or directory"),
        ("8.jpg", "no such file or directory"),
    ]
    with pytest.raises(DataError, match="No train image"):
        indexed(official(tmp_path / "none", LISTED, "txt", {"pie/3"}))


def test_test_folder_is_the_validation_split(tmp_path: Path) -> None:
    assert len(indexed(folders(tmp_path / "data", {}, val="test")).splits["val"]) == 4


def test_other_files_beside_the_photos_are_named_and_hidden_ones_are_not(tmp_path: Path) -> None:
    index = indexed(folders(tmp_path / "data", {"notes.txt": b"hello", ".hidden.jpg": b"", "Thumbs.db": b""}))
    assert {Path(path).name for path, _ in index.excluded} == {"notes.txt", "Thumbs.db"}
    assert len(index.splits["train"]) == 4


def _remove(*parts: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for file in (root.joinpath(*parts)).iterdir():
            file.unlink()

    return act


def _rewrite(name: str, text: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        (official(root, LISTED, "json") / "meta" / name).write_text(text)

    return act


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, ["no folder", "train/<class>", "meta/train.json", "--data sample"]),
        (lambda root: root.write_text("x"), ["is a file", "--data sample"]),
        (lambda root: root.mkdir(), ["is empty", "train/<class>", "--data sample"]),
        (lambda root: (root / "pictures").mkdir(parents=True), ["no data set", "train/<class>"]),
        (lambda root: (root / "train" / "a").mkdir(parents=True), ["1 class"]),
        (lambda root: folders(root, {}, classes=("a",)), ["1 class"]),
        (lambda root: _remove("train", "b")(folders(root, {})), ['"b"', "no readable training image"]),
        (lambda root: (folders(root, {}) / "val" / "c").mkdir(), ['"c"', "same class folders"]),
        (_rewrite("train.json", "{"), ["train.json", "not of the form"]),
        (_rewrite("train.json", '["a"]'), ["train.json", "not of the form"]),
        (_rewrite("test.json", '{"a": ["../../etc/passwd"]}'), ["../../etc/passwd", "class/id"]),
        (_rewrite("classes.txt", "pie\nsoup\napple cake\n"), ['"soup"', "no readable training image"]),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], object], said: list[str]
) -> None:
    root = tmp_path / "data"
    make(root)
    with pytest.raises(DataError) as caught:
        indexed(root)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for words in [*said, str(root)]:
        assert words in message, message


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission_is_said(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", {"locked.jpg": JPEG})
    (root / "train" / "a" / "locked.jpg").chmod(0)
    assert [reason for _, reason in indexed(root).excluded] == ["permission denied"]
    (root / "train").chmod(0)
    with pytest.raises(DataError, match="permissions"):
        indexed(root)
    (root / "train").chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path / "data", {})
    monkeypatch.setattr(
        layouts, "_names", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(path)))
    )
    with pytest.raises(DataError, match="check it and its permissions") as caught:
        indexed(root)
    assert str(root / "train") in str(caught.value)


def test_second_start_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path / "data", GOOD)
    first = indexed(root)
    scanned: list[str] = []
    scan_files = food101.scan_files

    def watched(paths: list[str]) -> list[Probe]:
        scanned.extend(Path(path).name for path in paths)
        return scan_files(paths)

    monkeypatch.setattr(food101, "scan_files", watched)
    second = indexed(root)
    assert scanned == []
    assert second.fingerprint == first.fingerprint
    assert second.splits["train"].paths == first.splits["train"].paths
    assert (second.splits["train"].sizes == first.splits["train"].sizes).all()

    changed = root / "train" / "a" / "good0.jpg"
    changed.write_bytes(encoded(size=(50, 60)))
    third = indexed(root)
    assert set(scanned) == {"good0.jpg", "link.jpg"}
    assert (50, 60) in {tuple(size) for size in third.splits["train"].sizes.tolist()}
    assert third.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "files": null}',
        b'{"version": 2, "files": {"train/a/good0.jpg": [1]}}',
        b"\xff",
    ],
)
def test_a_damaged_cache_is_only_a_cache(tmp_path: Path, content: bytes) -> None:
    root = folders(tmp_path / "data", {})
    first = indexed(root)
    (stored,) = (tmp_path / "cache" / "index").iterdir()
    stored.write_bytes(content)
    assert indexed(root).fingerprint == first.fingerprint


def test_an_unwritable_cache_stops_nothing(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", {})
    (tmp_path / "file").write_text("")
    assert len(build_index(root, cache_dir=tmp_path / "file" / "cache").splits["train"]) == 4


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one, two = folders(tmp_path / "one", {}), folders(tmp_path / "two", {})
    assert indexed(one).fingerprint == indexed(two).fingerprint
    (two / "train" / "a" / "good0.jpg").rename(two / "train" / "b" / "moved.jpg")
    assert indexed(one).fingerprint != indexed(two).fingerprint


@pytest.mark.parametrize("layout", ["folders", "metadata"])
@pytest.mark.parametrize("damage", ["gone", "garbage", "repaired"])
def test_quarantined_files_keep_their_places(tmp_path: Path, layout: str, damage: str) -> None:
    """So that a run which met bad files can be continued: the same fingerprint, paths and labels."""
    root = tmp_path / "data"
    if layout == "folders":
        folders(root, {"x.jpg": encoded(exif=exif(6)), "z.jpg": JPEG})
    else:
        official(root, {"train": ["pie/2", "pie/1", "pie/4", "soup/7"], "test": ["pie/3", "soup/8"]}, "txt")
    before = indexed(root)
    bad = before.splits["train"].paths[2], before.splits["val"].paths[0]
    records = json.loads(json.dumps(before.quarantine_records([(path, f"bad {path}") for path in bad])))
    for path in bad:
        if damage != "repaired":
            os.unlink(path)
        if damage == "garbage":
            Path(path).write_bytes(b"garbage")
    if damage != "repaired":
        assert indexed(root).fingerprint != before.fingerprint
    after = build_index(root, cache_dir=tmp_path / "cache", quarantined=records)
    assert after.fingerprint == before.fingerprint
    assert after.excluded == ()
    for name, split in before.splits.items():
        assert after.splits[name].paths == split.paths
        for field in ("labels", "sizes", "orientations", "kinds"):
            assert (getattr(after.splits[name], field) == getattr(split, field)).all()
    assert after.quarantined == {"train": {2: f"bad {bad[0]}"}, "val": {0: f"bad {bad[1]}"}}
    common = dict(resolution=8, batch_size=2, seed=0, augmentation=None, workers=0)
    train = make_loader(after, "train", train=True, **common)  # type: ignore[arg-type]
    assert train.quarantined == [(bad[0], f"bad {bad[0]}")]
    assert 2 not in train.plan.order(0)
    val = make_loader(after, "val", train=False, **common)  # type: ignore[arg-type]
    assert sum(len(labels) for _, labels in val.batches(0)) == len(after.splits["val"]) - 1


def test_huge_and_odd_metadata_raise_no_warnings(tmp_path: Path) -> None:
    bomb = bytearray(encoded("PNG", size=(8, 8)))
    bomb[16:24] = (60000).to_bytes(4) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = indexed(folders(tmp_path / "data", {"bomb.png": bytes(bomb)}))
    assert [Path(path).name for path, _ in index.excluded] == ["bomb.png"]
