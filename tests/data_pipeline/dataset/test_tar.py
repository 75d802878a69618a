"""Shards: the same batches as from the folder that was packed, labels of every form, damage and bad input."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import DataError, Index, build_index, choose_cache, make_loader
from data_pipeline.dataset.probe import decode_fully, scan, scan_files
from data_pipeline.dataset.tar import TarMember
from data_pipeline.dataset.verify import verify
from data_pipeline.loaders.loader import Loader, dali_installed
from tests.batches import everything, picture, same, write_photos

Members = dict[str, bytes]


def pack(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def packed(root: Path, to: Path, labels: str) -> Path:
    """A train/ + val/ folder as shards: images dealt out in turn, so that no shard is in the folder's order."""
    for split in ("train", "val"):
        shards: list[Members] = [{}, {}, {}]
        for number, file in enumerate(sorted((root / split).glob("*/*"))[::-1]):
            name, shard = file.parent.name, shards[number % 3]
            key = f"{name}/{file.stem}"
            if labels == "cls":
                shard[f"{key}.cls"] = name.encode()
            elif labels == "json":
                shard[f"{key}.json"] = json.dumps({"label": name, "caption": "x"}).encode()
            shard[f"{key}.jpg"] = file.read_bytes()
        for number, shard in enumerate(shards):
            pack(to / f"{split}-{number:05}.tar", shard)
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    return packed(folder, tmp_path / "shards", "cls")


def indexed(data: Path) -> Index:
    return build_index(data, cache_dir=data.parent / "index")


def make(index: Index, split: Any = "train", kind: Any = "none", folder: Path | None = None, **changes: Any) -> Loader:
    cache = choose_cache(kind, index, 24, cache_dir=folder)
    settings: dict[str, Any] = dict(resolution=24, batch_size=5, seed=3, workers=0, augmentation=None, backend="torch")
    return make_loader(index, split, train=split == "train", cache=cache, **{**settings, **changes})


@pytest.mark.parametrize("labels", ["cls", "json", "folders"])
def test_the_index_is_that_of_the_folder(folder: Path, tmp_path: Path, labels: str) -> None:
    whole, found = indexed(folder), indexed(packed(folder, tmp_path / "shards", labels))
    assert found.classes == whole.classes == ("a", "b ü")
    assert found.excluded == ()
    for name, split in whole.splits.items():
        assert [path.partition("::")[2] for path in found.splits[name].paths] == [
            path.removeprefix(f"{whole.root}/{name}/") for path in split.paths
        ]
        for column in ("labels", "sizes", "orientations", "kinds"):
            assert (getattr(found.splits[name], column) == getattr(split, column)).all()


@pytest.mark.parametrize("kind", ["none", "ram", "disk"])
def test_batches_are_those_of_the_folder(folder: Path, shards: Path, tmp_path: Path, kind: str) -> None:
    expected, found = indexed(folder), indexed(shards)
    for split, epoch, start in (("train", 1, 0), ("train", 1, 1), ("val", 0, 0)):  # the second as after a resume
        pair = [everything(make(index, split, kind, tmp_path / "pixels"), epoch, start) for index in (expected, found)]
        assert same(*pair)
        assert len(pair[0]) == 2 - start


def test_worker_processes_read_shards(folder: Path, shards: Path) -> None:
    assert same(everything(make(indexed(shards), workers=1)), everything(make(indexed(folder))))


@pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
def test_dali_reads_shards(folder: Path, shards: Path) -> None:
    pair = []
    for index in (indexed(folder), indexed(shards)):
        made = make(index, backend="dali", workers=1)
        pair.append([batch._replace(images=batch.images.clone()) for batch in made.batches(1)])
        made.close()
    assert same(*pair)


def test_a_pattern_and_a_folder_are_the_same_data(shards: Path, tmp_path: Path) -> None:
    by_pattern = build_index(str(shards / "*.tar"), cache_dir=tmp_path / "other")
    assert by_pattern.root == shards
    assert by_pattern.fingerprint == indexed(shards).fingerprint
    deeper = build_index(f"{tmp_path}/**/*.tar", cache_dir=tmp_path / "other")
    assert deeper.splits["val"].paths == by_pattern.splits["val"].paths
    (tmp_path / "here [1]*").mkdir()
    moved = shards.rename(tmp_path / "here [1]*" / "shards")
    assert indexed(moved).fingerprint == by_pattern.fingerprint


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_labels_and_names(tmp_path: Path, form: int) -> None:
    image = picture(1, 20, 20)
    long = "n" * 90
    train = {
        "./0.jpg": image,
        "./0.cls": b"10\n",
        "1.PNG": image,
        "1.json": b'{"class": 2}',
        f"x/{long}.jpeg": image,
        f"x/{long}.cls": b"2",
        "x/m.jpg": image,
        "x/m.mask.png": b"no photo",  # another member of the sample
        "x/m.cls": b"10",
        "x/.hidden.jpg": b"",
    }
    pack(tmp_path / "set-train.tar", train, form)
    pack(tmp_path / "set-validation.tar", {"v.webp": image, "v.cls": b"10", "w.jpg": image, "w.cls": b"2"}, form)
    pack(tmp_path / "set-test.tar", {"t.jpg": image, "t.cls": b"2"}, form)  # not looked at beside validation
    index = indexed(tmp_path)
    assert index.classes == ("2", "10")  # as numbers
    names = [path.partition("::")[2] for path in index.splits["train"].paths]
    assert dict(zip(names, index.splits["train"].labels.tolist(), strict=True)) == {
        "./0.jpg": 1,
        "1.PNG": 0,
        f"x/{long}.jpeg": 0,
        "x/m.jpg": 1,
    }
    assert len(index.splits["val"]) == 2


def test_damaged_members_are_named_and_left_out(shards: Path, tmp_path: Path) -> None:
    image = picture(1, 20, 20)
    path = pack(
        shards / "train-9.tar",
        {
            "a/empty.jpg": b"",
            "a/half.jpg": image[:-40],
            "a/text.png": b"not a photo",
            "a/two.dots.jpg": image,
            "none.jpg": image,
            "c/bad.jpg": image,
            "c/bad.json": b"{",
            "c/list.jpg": image,
            "c/list.json": b'{"label": [1]}',
            "c/minus.jpg": image,
            "c/minus.cls": b"-1",
            "c/deep.jpg": image,
            "c/deep.json": b'{"label": ' + b"[" * 50_000,
        },
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("a/link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a/half.jpg"
        tar.addfile(link)
    index = indexed(shards)
    assert {name.removeprefix(f"{path}::"): reason for name, reason in index.excluded} == {
        "a/empty.jpg": "empty file",
        "a/half.jpg": "truncated: its end is missing",
        "a/text.png": "not a JPEG, PNG, WebP, BMP, TIFF, PPM, GIF or AVIF image",
        "a/two.dots.jpg": "a dot in its key: only the name up to the first dot is the key",
        "none.jpg": "no label: it has neither a .cls nor a .json with a label, nor a folder",
        "c/bad.jpg": "its label c/bad.json is not JSON text",
        "c/list.jpg": "its label in c/list.json is neither a number nor a name",
        "c/minus.jpg": "its label in c/minus.cls is negative",
        "c/deep.jpg": "its label c/deep.json is not JSON text",
        "a/link.jpg": "a link or special file in its shard",
    }
    report = verify(shards)
    assert {name for name, _ in report.damaged} == {name.removeprefix(f"{shards}/") for name, _ in index.excluded}
    assert report.counts == {"a": {"train": 6, "val": 3}, "b ü": {"train": 6, "val": 3}}


@pytest.mark.parametrize(
    "backend",
    [
        "torch",
        "cache",
        pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")),
    ],
)
@pytest.mark.parametrize("damage", ["overwritten", "cut off"])
def test_a_member_that_goes_bad_is_quarantined(shards: Path, tmp_path: Path, backend: str, damage: str) -> None:
    index = indexed(shards)
    split = index.splits["train"]
    if backend == "cache":
        made = make(index, kind="ram")
    else:
        made = make(index, backend=backend, workers=int(backend == "dali"))
    members = [path for path in split.paths if isinstance(path, TarMember)]
    last = {member.archive: member for member in sorted(members, key=lambda member: member.offset)}
    member = next(members[at] for at in made.plan.order(0) if members[at] in last.values())
    bad = members.index(member)
    archive = Path(member.archive)
    with open(archive, "r+b") as file:
        if damage == "cut off":
            file.truncate(member.offset + 10)
        else:
            file.seek(member.offset)
            file.write(bytes(member.size))
    assert [len(batch.labels) for batch in made.batches(0)] == [5, 5]
    made.close()
    assert [path for path, _ in made.quarantined] == [f"{archive}::{split.paths[bad].partition('::')[2]}"]
    if damage == "cut off":  # repaired without it
        pack(archive, {m.partition("::")[2]: m.read() for m in members if m.archive == str(archive) and m != member})
    # A continued run: every image keeps its place, the bad one is not asked for.
    records = json.loads(json.dumps(index.quarantine_records(made.quarantined)))
    after = build_index(shards, cache_dir=tmp_path / "index", quarantined=records)
    assert after.fingerprint == index.fingerprint
    assert after.splits["train"].paths == split.paths
    assert list(after.quarantined["train"]) == [bad]
    assert indexed(shards).fingerprint != index.fingerprint


def test_shards_are_read_once_and_again_when_they_change(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.dataset import index as food101

    read: list[str] = []
    read_shard, scan_files = food101.read_shard, food101.scan_files

    def noted_shard(name: str) -> Any:
        read.append(name)
        return read_shard(name)

    def noted_files(paths: list[str]) -> Any:
        read.extend(paths)
        return scan_files(paths)

    monkeypatch.setattr(food101, "read_shard", noted_shard)
    monkeypatch.setattr(food101, "scan_files", noted_files)
    before = indexed(shards)
    assert len(read) == 6 + 18
    read.clear()
    again = indexed(shards)
    assert (again.fingerprint, again.content) == (before.fingerprint, before.content)
    assert read == []
    path = shards / "train-00001.tar"
    os.utime(path, ns=(0, 12345))
    touched = indexed(shards)
    assert read[0] == str(path)
    assert all(name.startswith(f"{path}") for name in read)
    assert touched.fingerprint == before.fingerprint
    assert touched.content != before.content
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a/new.jpg")
        info.size = len(picture(5, 20, 20))
        tar.addfile(info, io.BytesIO(picture(5, 20, 20)))
    assert len(indexed(shards).splits["train"]) == 13


def test_a_member_is_read_as_the_file_it_was(folder: Path, tmp_path: Path) -> None:
    """Also where the next member follows at once, and in another process."""
    files = sorted(folder.glob("train/*/*"))
    damaged = {f"cut {n}.jpg": files[0].read_bytes()[:n] for n in (1, 3, 30, 400, 511, 512)}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    members = {str(file): file.read_bytes() for file in files} | {f"{tmp_path}/{n}": c for n, c in damaged.items()}
    path = str(pack(tmp_path / "x.tar", members))
    with tarfile.open(path) as tar:
        found = [TarMember(path, info.name, info.offset_data, info.size) for info in tar]
    paths = [f"/{member.partition('::')[2].lstrip('/')}" for member in found]
    for member, file in zip(found, paths, strict=True):
        assert member.read() == Path(file).read_bytes()
        copy = pickle.loads(pickle.dumps(member))
        assert (copy, copy.archive, copy.offset, copy.size) == (member, path, member.offset, member.size)
        assert decode_fully(member, every_pixel=True) == decode_fully(file, every_pixel=True)
    assert [scan(member) for member in found] == scan_files(paths)


def test_bad_input_gets_one_sentence(shards: Path, tmp_path: Path) -> None:
    image = picture(1, 20, 20)
    good = (shards / "train-00000.tar").read_bytes()

    def said(data: Path | str) -> str:
        with pytest.raises(DataError) as error:
            build_index(data, cache_dir=tmp_path / "index")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "No file matches" in said(f"{shards}/*.nothing")
    assert "none of them is called val*.tar or test*.tar: add or rename" in said(f"{shards}/train-*.tar")
    assert "none of them is called train*.tar" in said(shards / "val-00000.tar")
    odd = pack(shards / "extra.tar", {"a/x.jpg": image})
    assert f"{odd} belongs to no split" in said(f"{shards}/*.tar")
    odd.unlink()
    bad = shards / "train-9.tar"
    with tarfile.open(shards / "train-00000.tar") as tar:
        middle = tar.getmembers()[-1].offset  # of a header
    cases = {
        f"{bad} is compressed": gzip.compress(good),
        f"{bad} is not a whole tar file": good[: len(good) // 2],
        f"{bad} is not a whole tar file (": b"<html>404</html>" * 100,
        f"{bad} is not a whole tar file (empty": b"",
        f"{bad} is not whole, its end is missing after": without_end(good),
        f"{bad} goes on after its end at byte": good + good,
        f"{bad} is damaged at byte": good[:middle] + b"\xff" * 100 + good[middle + 100 :],
    }
    for sentence, content in cases.items():
        bad.write_bytes(content)
        assert sentence in said(shards)
    bad.rename(shards / "train-9.tar.gz")
    (shards / "train-9.tar.gz").write_bytes(gzip.compress(good))
    assert "train-9.tar.gz is compressed" in said(shards)
    (shards / "train-9.tar.gz").unlink()
    pack(shards / "val-9.tar", {"z/x.jpg": image})
    assert 'val-9.tar::z/x.jpg has the class "z", which no train shard has' in said(shards)
    nameless = tmp_path / "nameless"
    pack(nameless / "train.tar", {"x.jpg": image})
    pack(nameless / "val.tar", {"x.jpg": image})
    assert "No train shard of" in said(nameless)
    assert "no label" in said(nameless)


def without_end(archive: bytes) -> bytes:
    """Cut between two members, which reads like a shorter archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return archive[: tar.getmembers()[-2].offset]
