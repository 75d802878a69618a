"""Folders as people have them: read as torchvision and PIL read them, and what is not read is named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from rich.console import Console
from torchvision.datasets import ImageFolder

from data_pipeline import Index, build_index, choose_cache, make_loader
from data_pipeline.dataset.verify import show, verify
from data_pipeline.loaders.decode import decode_photo
from data_pipeline.loaders.torch_loader import upright
from fastnet.training.reporting.console import log_excluded


def picture(seed: int, size: tuple[int, int] = (40, 30), channels: int = 3) -> Image.Image:
    """Smooth, and unlike those of other seeds."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, channels), dtype=np.uint8)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return Image.fromarray(small.squeeze()).convert(mode).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, seed: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def sixteen_bit_png() -> bytes:
    """RGB, 16 bits a channel, which PIL cannot write."""
    pixels = np.asarray(picture(3), np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def unmarked_cmyk() -> bytes:
    """A JPEG of four channels without Adobe's segment."""
    out = io.BytesIO()
    picture(5).convert("CMYK").save(out, "JPEG", quality=95)
    data = out.getvalue()
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def tagged(*segments: bytes) -> bytes:
    """A JPEG with these TIFF headers, each in an EXIF segment of its own."""
    out = io.BytesIO()
    picture(12).save(out, "JPEG", quality=95)
    data = out.getvalue()
    for tiff in reversed(segments):
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + data[2:]
    return data


def tiff(order: str, orientation: int, kind: str = "H") -> bytes:
    """One directory with the tag of orientation alone, of 16 bits ("H") or, as some write it, 32 ("I")."""
    number = 3 if kind == "H" else 4
    value = struct.pack(f"{order}HH", orientation, 0) if kind == "H" else struct.pack(f"{order}I", orientation)
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + struct.pack(f"{order}HHHI", 1, 0x0112, number, 1) + value + bytes(4)


def icc() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


ODD: dict[str, Callable[[Path], object]] = {
    "a.bmp": lambda path: save(path, 1),
    "b.tif": lambda path: save(path, 2, compression="tiff_lzw"),
    "turned.tiff": lambda path: save(path, 11, exif=exif(6)),
    "c.gif": lambda path: picture(3).save(path, save_all=True, append_images=[picture(4)]),
    "d.ppm": lambda path: save(path, 4),
    "e.avif": lambda path: save(path, 5),
    "f.jpe": lambda path: picture(6).save(path, "JPEG"),
    "16 bits.png": lambda path: path.write_bytes(sixteen_bit_png()),
    "alpha.webp": lambda path: picture(7, channels=4).save(path, lossless=True),
    "turned.webp": lambda path: save(path, 8, exif=exif(8)),
    "profile.webp": lambda path: picture(9).save(path, icc_profile=icc()),
    "cmyk.jpg": lambda path: picture(10).convert("CMYK").save(path),
    "unmarked.jpg": lambda path: path.write_bytes(unmarked_cmyk()),
    "little endian.jpg": lambda path: path.write_bytes(tagged(tiff("<", 6))),
    "big endian.jpg": lambda path: path.write_bytes(tagged(tiff(">", 5))),
    "long.jpg": lambda path: path.write_bytes(tagged(tiff(">", 3, "I"))),
    "two segments.jpg": lambda path: path.write_bytes(tagged(tiff("<", 8), tiff("<", 3))),
    os.fsdecode(b"not UTF-8 \xff.jpg"): lambda path: save(path, 13),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for file, write in ODD.items():
                write(root / split / name / file)
    return build_index(root, cache_dir=tmp_path_factory.mktemp("cache"))


def test_odd_kinds_are_the_pixels_of_pil(odd: Index) -> None:
    split = odd.splits["train"]
    assert odd.excluded == ()
    assert len(split) == 2 * len(ODD)
    for path, size, orientation in zip(split.paths, split.sizes, split.orientations, strict=True):
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert (size == expected.shape[1::-1]).all(), path
        found = upright(decode_photo(path), int(orientation)).permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - expected).max() <= (1 if "cmyk" in path or "unmarked" in path else 0), path


@pytest.mark.parametrize("way", ["dali", "ram", "disk"])
def test_every_loader_and_cache_sees_the_same_pixels(way: Any, odd: Index, tmp_path: Path) -> None:
    if way == "dali":
        pytest.importorskip("nvidia.dali")
    count = len(odd.splits["val"])
    options: dict[str, Any] = dict(resolution=24, batch_size=count, seed=0, train=False, augmentation=None, workers=0)
    cache = None if way == "dali" else choose_cache(way, odd, 24, cache_dir=tmp_path)
    other = make_loader(odd, "val", backend="dali" if way == "dali" else "torch", cache=cache, **options)
    batches = [next(loader.batches(0)) for loader in (make_loader(odd, "val", backend="torch", **options), other)]
    assert len(batches[0].images) == len(batches[1].images) == count
    # Resizers differ by a level or two of 255; a negative or a turned picture by a hundred.
    assert (batches[0].images - batches[1].images).abs().max() < 4 / 255 / 0.22


def test_folders_below_a_class_are_walked_as_torchvision_walks_them(tmp_path: Path) -> None:
    root, seed = tmp_path / "data", 0
    for split in ("train", "val"):
        for name in "ab":
            for place in ("1.jpg", "deep/2.jpg", "deep/deeper/3.PNG", "other/4.bmp"):
                save(root / split / name / place, seed := seed + 1)
    (root / "train" / "a" / "deep" / "up").symlink_to("..")  # a loop, which torchvision would walk 40 times
    index = build_index(root, cache_dir=tmp_path / "cache")
    (root / "train" / "a" / "deep" / "up").unlink()
    for split in ("train", "val"):
        expected = ImageFolder(str(root / split))
        found = zip(index.splits[split].paths, index.splits[split].labels.tolist(), strict=True)
        assert sorted(found) == sorted(expected.samples)
    assert index.excluded == ()


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    for number, place in enumerate(("train/a", "train/b", "val/a", "val/b")):
        save(root / place / "1.jpg", number)
    for number in range(8):
        (root / "train" / "a" / f"{number}.HEIC").write_bytes(b"heic")
    (root / "val" / "b" / "old.jp2").write_bytes(b"jp2")
    (root / "train" / "a" / "notes.txt").write_text("notes")
    save(root / "train" / "stray.jpg")
    gray16 = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    gray16.save(root / "train" / "a" / "deep.tif")
    index = build_index(root, cache_dir=tmp_path / "cache")
    reasons = {Path(path).name: reason for path, reason in index.excluded}
    assert len(reasons) == 12
    assert reasons["0.HEIC"] == "HEIC is not read: convert it to JPEG or PNG"
    assert "JPEG 2000" in reasons["old.jp2"]
    assert ".txt" in reasons["notes.txt"]
    assert "class" in reasons["stray.jpg"]
    assert "8 bits" in reasons["deep.tif"]
    log_excluded(Console(width=200), index.excluded, Path("excluded.txt"))
    said = capsys.readouterr().out
    assert "left out 8 files like" in said
    assert "excluded.txt" in said
    report = verify(root)
    assert not report.sound
    assert report.left_out == {".heic": 8, ".jp2": 1, ".txt": 1, ".jpg": 1}
    show(report, Console(width=200))
    assert "8 .heic" in capsys.readouterr().out
