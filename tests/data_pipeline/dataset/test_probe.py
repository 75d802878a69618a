"""Headers and ends: what a full decode says, from a few bytes; and what only a full decode can say."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.dataset import probe
from data_pipeline.dataset.probe import BASELINE, CMYK, OTHER, PROGRESSIVE, decode_fully, scan, scan_files


def jpeg(mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    out = io.BytesIO()
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([5 * x % 256, 7 * y % 256, (3 * x + 2 * y) % 256], 2).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


JPEG = jpeg()
LARGE_HEADER = jpeg(icc_profile=bytes(200_000), exif=turned(6))


def _decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "decode_fully", lambda path: pytest.fail(f"decoded {path}"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (JPEG, BASELINE),
        (jpeg("L"), BASELINE),
        (jpeg(progressive=True), PROGRESSIVE),
        (jpeg("CMYK"), CMYK),
        (jpeg("CMYK", progressive=True), CMYK),
        (jpeg(size=(1, 1)), BASELINE),
        (jpeg(exif=turned(6)), BASELINE),
        (jpeg(exif=turned(3)), BASELINE),
        (jpeg(restart_marker_rows=1), BASELINE),
        (LARGE_HEADER, BASELINE),
        (JPEG[:2] + b"\xff" * 7 + JPEG[2:], BASELINE),
        (JPEG + bytes(100_000), BASELINE),
    ],
)
def test_a_whole_jpeg_is_not_decoded(
    tmp_path: Path, content: bytes, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    expected = decode_fully(str(tmp_path / "x.jpg"))
    _decodes_nothing(monkeypatch)
    found = scan(str(tmp_path / "x.jpg"))
    assert found.reason is None
    assert found.kind == kind
    assert found == expected


def test_sizes_are_those_of_the_upright_photo(tmp_path: Path) -> None:
    for orientation, size in ((3, (40, 30)), (6, (30, 40))):
        (tmp_path / "x.jpg").write_bytes(jpeg(exif=turned(orientation)))
        assert scan(str(tmp_path / "x.jpg")) == (*size, orientation, BASELINE, None)


def test_real_photos_are_what_a_full_decode_says(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted(map(str, photos.glob("images/*/*.jpg")))
    some = paths[::16]
    expected = [decode_fully(path) for path in some]
    _decodes_nothing(monkeypatch)
    assert [scan(path) for path in some] == expected
    assert all(found.reason is None for found in scan_files(paths))


@given(cut=st.integers(0, len(LARGE_HEADER) - 1))
def test_wherever_a_jpeg_is_cut_it_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.jpg"
    path.write_bytes(LARGE_HEADER[:cut])
    found = scan(str(path))
    assert found.reason
    assert "\n" not in found.reason


def test_wherever_a_short_jpeg_is_cut_it_is_left_out(tmp_path: Path) -> None:
    for cut in range(len(JPEG)):
        (tmp_path / "x.jpg").write_bytes(JPEG[:cut])
        assert scan(str(tmp_path / "x.jpg")).reason, cut


@given(at=st.integers(0, len(JPEG) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_never_raises(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("bit") / "x.jpg"
    content = bytearray(JPEG)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    for found in (scan(str(path)), decode_fully(str(path), every_pixel=True)):
        assert found.reason is None or "\n" not in found.reason


@given(content=st.binary(max_size=200))
def test_garbage_never_raises(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "x.jpg"
    for start in (b"", b"\xff\xd8", JPEG[:20]):
        path.write_bytes(start + content)
        scan(str(path))


def test_rare_kinds_are_left_to_the_decoder(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (5, 4)).save(out, "PNG")
    (tmp_path / "x.jpg").write_bytes(out.getvalue())
    assert scan(str(tmp_path / "x.jpg")) == (5, 4, 1, OTHER, None)
    extended = JPEG.replace(b"\xff\xc0", b"\xff\xc1")  # the same pixels, as an extended sequential JPEG
    (tmp_path / "x.jpg").write_bytes(extended)
    assert scan(str(tmp_path / "x.jpg")).reason is None
    at = JPEG.index(b"\xff\xc0") + 4
    (tmp_path / "x.jpg").write_bytes(JPEG[:at] + b"\x0c" + JPEG[at + 1 :])
    assert scan(str(tmp_path / "x.jpg")).reason == "JPEG with 12 bits a channel is not supported"
    (tmp_path / "x.jpg").write_bytes(JPEG[: at + 1] + b"\xff\xff\xff\xff" + JPEG[at + 5 :])
    assert scan(str(tmp_path / "x.jpg")).reason == "too many pixels"


def test_many_files_go_to_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_MANY", 3)
    names = ["a ü.jpg", "b\n写真.jpg", os.fsdecode(b"\xff.jpg"), "gone.jpg", "half.jpg"]
    for name in names[:3]:
        (tmp_path / name).write_bytes(jpeg(size=(10 + len(name), 9)))
    (tmp_path / "half.jpg").write_bytes(JPEG[:-40])
    paths = [str(tmp_path / name) for name in names]
    expected = [scan(path) for path in paths]
    monkeypatch.setattr(probe, "scan", lambda path: pytest.fail("in this process"))
    assert scan_files(paths, cores=2) == expected
    assert [found.reason for found in expected] == [
        None,
        None,
        None,
        "no such file or directory",
        "truncated: its end is missing",
    ]
