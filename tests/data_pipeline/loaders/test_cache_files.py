"""The files of a cache on disk: found again, replaced, damaged, killed while written; full and read-only disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline import DataError, Index, build_index
from data_pipeline.loaders import cache
from data_pipeline.loaders.cache import disk_store
from data_pipeline.loaders.pixel_store import Photos, PixelStore, Views
from tests.batches import everything, make, one_sentence, picture, same, write_photos

PHOTOS = Photos(170)  # what training at 24 pixels needs


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_photos(tmp_path_factory.mktemp("photos")), cache_dir=tmp_path_factory.mktemp("index"))


def test_the_second_run_decodes_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = everything(make(index, "disk", tmp_path))
    monkeypatch.setattr(PixelStore, "decode", lambda *_: pytest.fail("decoded"))
    assert same(everything(make(index, "disk", tmp_path)), first)
    (folder,) = (path for path in (tmp_path / "pixels").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"pixels.bin", "index.json"}


def test_each_content_and_split_has_its_own(index: Index, tmp_path: Path) -> None:
    for split, contents in (("train", (PHOTOS, Photos(32))), ("val", (Views(24), Views(32), Views(24, 1.0)))):
        for content in contents:
            disk_store(index, split, content, 1, tmp_path)
    assert len([path for path in (tmp_path / "pixels").iterdir() if path.is_dir()]) == 5


def test_files_of_the_first_version_are_not_read(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold too few pixels. Its signature, at its own place and at the present one."""
    first = {"version": 1, "content": index.content, "split": "train", "short_side": 28}
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_signature", lambda *_: first)
        disk_store(index, "train", PHOTOS, 1, tmp_path)
    folder = cache.cache_folder(index, "train", PHOTOS, tmp_path)
    shutil.copytree(folder, folder.with_name(folder.name.replace("photos-170", "28")))
    assert _rebuilt(index, tmp_path, monkeypatch) == 12


def _rebuilt(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    decoded: list[int] = []
    decode = PixelStore.decode

    def watched(self: PixelStore, at: int, out: Tensor) -> None:
        decoded.append(at)
        decode(self, at, out)

    monkeypatch.setattr(PixelStore, "decode", watched)
    store, bad = disk_store(index, "train", PHOTOS, 2, folder)
    assert bad == {}
    assert store.complete(1) == {}
    return len(decoded)


def test_another_version_is_replaced(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_store(index, "train", PHOTOS, 1, tmp_path)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert _rebuilt(index, tmp_path, monkeypatch) == 12
    assert _rebuilt(index, tmp_path, monkeypatch) == 0


def test_changed_photos_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_photos(tmp_path / "photos")
    index = build_index(root, cache_dir=tmp_path)
    disk_store(index, "train", PHOTOS, 1, tmp_path)
    again = build_index(root, cache_dir=tmp_path)
    assert again.content == index.content
    changed = root / "train" / "a" / "0.jpg"
    size = Image.open(changed).size
    changed.write_bytes(picture(77, *size))  # the same size in pixels
    index = build_index(root, cache_dir=tmp_path)
    assert index.content != again.content
    assert _rebuilt(index, tmp_path, monkeypatch) == 12


@pytest.mark.parametrize("damage", ["index garbage", "index edited", "pixels short", "pixels gone"])
def test_a_damaged_cache_is_built_anew(
    index: Index, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = everything(make(index, "disk", tmp_path))
    folder = cache.cache_folder(index, "train", PHOTOS, tmp_path)
    if damage == "index garbage":
        (folder / "index.json").write_bytes(b"\xff{")
    elif damage == "index edited":
        stored = json.loads((folder / "index.json").read_text())
        stored["body"]["crc"][3] ^= 1
        (folder / "index.json").write_text(json.dumps(stored))
    elif damage == "pixels short":
        os.truncate(folder / "pixels.bin", 100)
    else:
        (folder / "pixels.bin").unlink()
    assert _rebuilt(index, tmp_path, monkeypatch) == 12
    assert same(everything(make(index, "disk", tmp_path)), first)


def test_flipped_bits_are_found_and_repaired(index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made: Any = make(index, "disk", tmp_path)
    at = int(made.plan.order(0)[3])
    first = everything(made)
    folder = cache.cache_folder(index, "train", PHOTOS, tmp_path)
    content = bytearray((folder / "pixels.bin").read_bytes())
    content[int(made.store.offsets[at]) + 5] ^= 0x10
    (folder / "pixels.bin").write_bytes(content)
    assert same(everything(make(index, "disk", tmp_path)), first)
    (said,) = (record.getMessage() for record in caplog.records)
    assert index.splits["train"].paths[at] in said
    assert (folder / "pixels.bin").read_bytes() == content  # others may be reading it


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_file_that_cannot_be_decoded_is_quarantined(tmp_path: Path, kind: str) -> None:
    index = build_index(write_photos(tmp_path / "photos"), cache_dir=tmp_path)
    path = index.splits["train"].paths[4]
    Path(path).write_bytes(b"garbage")
    for _ in range(2):  # on disk: also when the cache is read again
        made = make(index, kind, tmp_path)
        for epoch in range(2):
            assert len(list(made.batches(epoch))) == 2
            assert 4 not in made.plan.order(epoch)
        assert [name for name, _ in made.quarantined] == [path]
        made.close()


def test_ram_after_the_photos_are_gone_goes_on(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos")
    index = build_index(root, cache_dir=tmp_path)
    made: Any = make(index, "ram", tmp_path)
    made.store.complete(1)
    expected = list(made.batches(0))
    (root / "train").rename(tmp_path / "elsewhere")
    assert same(list(made.batches(0)), expected)
    made.close()


def test_a_full_disk_is_said_and_leaves_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for act in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, act, full)
            with pytest.raises(DataError) as caught:
                disk_store(index, "train", PHOTOS, 1, tmp_path)
        one_sentence(caught.value, "disk is full", "MB", "--cache ram", str(tmp_path))
        assert [path.name for path in (tmp_path / "pixels").iterdir() if path.is_dir()] == []
    assert disk_store(index, "train", PHOTOS, 1, tmp_path)


def test_a_folder_that_cannot_be_written_is_said_and_a_finished_cache_there_is_read(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_store(index, "train", PHOTOS, 1, tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)  # the superuser may write anywhere
    assert disk_store(index, "train", PHOTOS, 1, tmp_path)[0].total > 0
    with pytest.raises(DataError) as caught:
        disk_store(index, "val", Views(24), 1, tmp_path)
    one_sentence(caught.value, "Permission denied", "XDG_CACHE_HOME", str(tmp_path))


def test_files_without_write_permission_are_enough(index: Index, tmp_path: Path) -> None:
    first = everything(make(index, "disk", tmp_path))
    folder = cache.cache_folder(index, "train", PHOTOS, tmp_path)
    for path in (*folder.iterdir(), folder, folder.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert same(everything(make(index, "disk", tmp_path)), first)
    finally:
        for path in (folder.parent, folder):
            path.chmod(0o755)


BUILD = """
import sys, time
from data_pipeline import build_index
from data_pipeline.loaders import cache
index = build_index(sys.argv[1], cache_dir=sys.argv[2])
def endlessly(self, at, out):
    print("decoding", flush=True)
    time.sleep(600)
cache.PixelStore.decode = endlessly
cache.disk_store(index, "train", cache.Photos(170), 1, sys.argv[2])
"""


@pytest.mark.slow
def test_killed_while_it_is_written(index: Index, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(index.root), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "decoding\n"
        builder.send_signal(signal.SIGKILL)
    folder = cache.cache_folder(index, "train", PHOTOS, tmp_path)
    assert not folder.exists()
    assert folder.with_name(f".{folder.name}.tmp").exists()
    store, _ = disk_store(index, "train", PHOTOS, 1, tmp_path)
    assert store.complete(1) == {}
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} == {folder.name}


def test_two_runs_building_one_cache_at_once(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock belongs to an open file, so that two threads exclude each other as two processes do."""
    decode, decoded = PixelStore.decode, []

    def slowly(self: PixelStore, at: int, out: Tensor) -> None:
        decoded.append(at)
        while not caplog.records:  # until the other one waits
            time.sleep(0.01)
        decode(self, at, out)

    monkeypatch.setattr(PixelStore, "decode", slowly)
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda _: disk_store(index, "train", PHOTOS, 1, tmp_path)[0], range(2)))
    assert sorted(decoded) == list(range(12))
    assert all(store.complete(1) == {} for store in stores)
    assert torch.equal(stores[0].buffer, stores[1].buffer)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "waiting for another run" in said
