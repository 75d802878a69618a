"""Damaged photos: no decoder ends the process, none hangs, and every one that is left out is named."""

from __future__ import annotations

import datetime
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import files
from data_pipeline.dataset import probe
from data_pipeline.dataset.probe import decode_fully, scan
from data_pipeline.dataset.tar import TarMember
from data_pipeline.dataset.verify import _look
from data_pipeline.loaders.decode import decode_photo
from tests.fuzz_decoders import chunks, encoded, fuzz, joined

TODAY = int(datetime.date.today().strftime("%Y%m%d"))


@pytest.mark.slow
@pytest.mark.parametrize(("files_", "seed"), [(500, TODAY), pytest.param(1500, 1, marks=pytest.mark.full)])
def test_no_decoder_ends_the_process(files_: int, seed: int) -> None:
    """2,000 files in child processes, a quarter of them others every day; `python -m tests.fuzz_decoders`."""
    failures, log = fuzz(files_, seed)
    assert failures == []
    tried = [line for line in log if "what" in line]
    assert len(tried) == files_
    assert 0.3 < np.mean([line["index"] is not None for line in tried]) < 0.95  # whole ones and damaged ones
    assert all(line[way] != "" for line in tried for way in ("index", "verify"))


def one_row_too_many() -> bytes:
    """The PNG on which libpng calls an error while all checksums are right."""
    (kind, header), *rest = chunks(encoded("PNG"))
    height = int.from_bytes(header[4:8], "big")
    return joined([(kind, header[:4] + (height + 1).to_bytes(4, "big") + header[8:]), *rest])


def test_a_png_with_a_row_too_many_is_what_pil_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(one_row_too_many())
    if scan(str(path)).reason is None:
        assert torch.equal(decode_photo(str(path)), pixels_of(path))
    else:
        with pytest.raises(RuntimeError, match="damaged PNG"):
            decode_photo(str(path))


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_png_pixels_are_those_of_pil(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded("PNG", mode))
    assert torch.equal(decode_photo(str(path)), pixels_of(path))


def test_other_formats_are_shown_to_no_parser(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded("JPEG2000"))
    assert decode_fully(str(path)).reason == "not a JPEG, PNG, WebP, BMP, TIFF, PPM, GIF or AVIF image"
    with pytest.raises(RuntimeError, match="not a JPEG, PNG, WebP"):
        decode_photo(str(path))


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder", "a link to a device"])
def test_what_blocks_or_never_ends_is_named_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.write(encoded("JPEG")[:-2])
            file.truncate(40 << 30)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    for found in (scan(str(path)), decode_fully(str(path)), _look(str(path))[0]):
        assert found is not None
        assert found.reason in ("not a regular file", "a folder", "42.9 GB, more than is read")
    with pytest.raises(OSError, match=r"regular file|folder|more than is read"):
        decode_photo(str(path))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("times", [2, 3])
def test_a_read_error_that_passes_costs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    """Two failed tries of three are survived by every way to read a file; of a file that is gone there is one try."""
    path, shard = tmp_path / "photo.jpg", tmp_path / "train.tar"
    path.write_bytes(encoded("JPEG"))
    shard.write_bytes(encoded("JPEG"))
    member = TarMember(str(shard), "photo.jpg", 0, shard.stat().st_size)
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
    tries: list[str] = []
    inner_open, inner = os.open, open

    def failing(name: Any, *rest: Any, real: Any = inner_open, **options: Any) -> Any:
        if str(name) in (str(path), str(shard)):
            tries.append(str(name))
            if len(tries) <= times:
                raise OSError(number, os.strerror(number), str(name))
        return real(name, *rest, **options)

    from data_pipeline.dataset import tar

    monkeypatch.setattr(files.os, "open", failing)
    monkeypatch.setattr(tar, "open", lambda *a, **o: failing(*a, real=inner, **o), raising=False)
    for way in (scan, decode_fully, lambda name: _look(name)[0]):
        tries.clear()
        found: Any = way(str(path))
        assert (found.reason is None) == (times == 2), found
    for name in (str(path), member):
        tries.clear()
        if times == 2:
            assert decode_photo(name).shape == (3, 37, 50)
        else:
            with pytest.raises(OSError, match=os.strerror(number)):
                decode_photo(name)
        assert len(tries) == 3
    monkeypatch.undo()
    tries.clear()
    times = 0
    monkeypatch.setattr(files.os, "open", lambda *a: failing(path, real=lambda _: inner_open(*a)))
    assert probe.scan(str(tmp_path / "none.jpg")).reason == "no such file or directory"
    assert len(tries) == 1
