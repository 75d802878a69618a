"""What a file is, without decoding it: kind, size and orientation from a JPEG's header, and whether its end is there.

A JPEG costs two short reads and a walk over its segments (bench/bench_loader.py measures files a second). Other files,
and JPEGs of rare kinds, are decoded by PIL. Damage between a whole header and a whole end is found when the pixels are
decoded, as far as decoders notice it: by `decode_fully`, or in training, which quarantines the file.

`python -m data_pipeline.dataset.probe` reads pickled paths and prints what they are: how `scan_files` uses more than
one core.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from data_pipeline.dataset.formats import FORMATS, WORDS
from data_pipeline.dataset.tar import TarMember, file_of, opened
from data_pipeline.errors import DataError
from data_pipeline.files import MAX_BYTES, open_regular, patiently, words_of

KINDS = ("baseline", "progressive", "cmyk", "other", "pillow")
"""JPEG kinds by number: what a GPU's JPEG engine decodes; what its hybrid decoder does; four-channel JPEGs; what every
decoder reads (rarer JPEGs, PNG, plain WebP); what PIL decodes for all of them."""
BASELINE, PROGRESSIVE, CMYK, OTHER, PILLOW = range(5)

_EXIF_ORIENTATION = 0x0112
_SHORT_ORIENTATION = [struct.pack(f"{order}HHI", _EXIF_ORIENTATION, 3, 1) for order in "<>"]
"""The tag as one 16-bit number, which it should be; some write 32 bits."""
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}  # 8 bits a channel
_PNG_END = b"IEND\xaeB`\x82"
_HEAD, _TAIL = 4096, 256  # bytes read at once: most headers fit, and most files end with their end
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
_BARE = frozenset(range(0xD0, 0xD9)) | {0x01}  # markers without a length
PARSE_ERRORS = (
    ValueError, SyntaxError, IndexError, KeyError, TypeError, EOFError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
"""What PIL's parsers raise on damaged files, beside OSError and Image.DecompressionBombError."""
_MANY = 10_000  # files from which on processes are worth their start (0.2 s each)


class Probe(NamedTuple):
    """What a file told: width and height after rotation; `reason` is None where it seems whole."""

    width: int
    height: int
    orientation: int
    kind: int
    reason: str | None


def _failed(reason: str) -> Probe:
    return Probe(0, 0, 1, OTHER, reason)


class _Reader:
    """`size` bytes of an open file from `start` on, at any position, most of them from one read."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self.handle, self.start, self.size = handle, start, size
        self.base, self.data = 0, self._read(0, _HEAD)

    def _read(self, position: int, count: int) -> bytes:
        return os.pread(self.handle, max(0, min(count, self.size - position)), self.start + position)

    def at(self, position: int, count: int) -> bytes:
        """Fewer at the end of the file."""
        start = position - self.base
        if start < 0 or start + count > len(self.data):
            self.base, self.data = position, self._read(position, max(count, _HEAD))
            start = 0
        return self.data[start : start + count]


def scan(path: str) -> Probe:
    """Header and end of a JPEG; other files are decoded."""
    try:
        probe = patiently(lambda: _scan(path))
    except OSError as error:
        return _failed(words_of(error))
    return probe or decode_fully(path)


def _scan(path: str) -> Probe | None:
    """None where PIL should look at it."""
    member = path if isinstance(path, TarMember) else None
    handle, whole = open_regular(file_of(path), MAX_BYTES if member is None else math.inf)
    try:
        start, size = (0, whole) if member is None else (member.offset, member.size)
        if size == 0:
            return _failed("empty file")
        reader = _Reader(handle, start, size)
        return _scan_jpeg(reader, size) if reader.at(0, 2) == b"\xff\xd8" else None
    finally:
        os.close(handle)


def _scan_jpeg(reader: _Reader, size: int) -> Probe | None:
    """None where PIL should look at it."""
    position, orientation, tags, by_pil = 2, 1, 0, False
    frame: tuple[int, int, int, int] | None = None  # kind, width, height
    while True:
        # libjpeg looks for the next marker in the dirt between segments; DALI stops there.
        head = reader.at(position, 4)
        if len(head) < 4:
            return _failed("truncated in its header")
        if head[0] != 0xFF:
            return _failed("damaged JPEG header")
        marker = head[1]
        if marker == 0xFF or marker in _BARE:  # padding
            position += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            return _failed("no pixels before its end")
        length = head[2] << 8 | head[3]
        if length < 2:
            return _failed("damaged JPEG header")
        if marker == 0xDA:
            break
        if marker in _SIZES:
            body = reader.at(position + 4, 6)
            if len(body) < 6:
                return _failed("truncated in its header")
            bits, height, width, channels = struct.unpack(">BHHB", body)
            frame = marker, width, height, channels
            if bits != 8:
                return _failed(f"JPEG with {bits} bits a channel is not supported")
        elif marker == 0xE1 and reader.at(position + 4, 6) == b"Exif\0\0":
            if not tags:  # the first counts
                segment = reader.at(position + 4, length - 2)
                orientation = _orientation(segment)
                by_pil = orientation > 1 and not any(entry in segment for entry in _SHORT_ORIENTATION)
            tags += 1
        position += 2 + length
    if frame is None:
        return _failed("damaged JPEG header")
    marker, width, height, channels = frame
    if marker not in (0xC0, 0xC2) or channels not in (1, 3, 4) or not width or not height:
        return None
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return _failed("too many pixels")
    # In the pixels themselves every 0xFF is followed by 0 or a restart marker.
    start = max(position, size - _TAIL)
    if b"\xff\xd9" not in reader.at(start, size - start) and b"\xff\xd9" not in reader.at(position, size - position):
        return _failed("truncated: its end is missing")
    kind = CMYK if channels == 4 else BASELINE if marker == 0xC0 else PROGRESSIVE
    if tags > 1 or by_pil:  # DALI refuses the ones, and takes the others as they lie
        kind = PILLOW
    if orientation >= 5:
        width, height = height, width
    return Probe(width, height, orientation, kind, None)


def _orientation(segment: bytes) -> int:
    """1 to 8 from an EXIF segment; 1 where it says nothing sensible."""
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags.load(segment)
            found = tags.get(_EXIF_ORIENTATION, 1)
    except (OSError, *PARSE_ERRORS):
        return 1
    return found if found in range(1, 9) else 1


def decode_fully(path: str, *, every_pixel: bool = False) -> Probe:
    """What PIL makes of a file, reading all of its bytes: a JPEG at an eighth of its size unless `every_pixel`."""
    try:
        return patiently(lambda: _decode_fully(path, every_pixel))
    except Image.DecompressionBombError:
        return _failed("too many pixels")
    except Image.UnidentifiedImageError:
        return _failed(f"not a {WORDS} image")
    except OSError as error:
        return _failed(words_of(error))
    except PARSE_ERRORS as error:
        return _failed(f"damaged: {error}" if str(error) else "damaged")


def _decode_fully(path: str, every_pixel: bool) -> Probe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on metadata and size
        with opened(path) as file:
            if not file.read(1):
                return _failed("empty file")
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                kind, unsupported = _look_closer(path, image)
                if unsupported:
                    return _failed(unsupported)
                if kind >= OTHER:
                    image.load()  # which turns a TIFF upright
                orientation, (width, height) = image.getexif().get(_EXIF_ORIENTATION, 1), image.size
                if not every_pixel:
                    # Skips most of a JPEG's arithmetic and still reads every byte.
                    image.draft(None, (max(1, width // 8), max(1, height // 8)))
                image.load()
    orientation = orientation if orientation in range(1, 9) else 1
    if orientation >= 5:
        width, height = height, width
    return Probe(width, height, orientation, kind, None)


def _kind(image: Image.Image) -> int:
    if image.format in ("JPEG", "MPO"):
        if image.mode == "CMYK":
            return CMYK
        return PROGRESSIVE if "progressive" in image.info else BASELINE
    return OTHER if image.format in ("PNG", "WEBP") else PILLOW


def _look_closer(path: str, image: Image.Image) -> tuple[int, str]:
    """(kind, why a decoder refuses or misreads a file whose pixels PIL would read; "" where none does)."""
    kind = _kind(image)
    if image.mode not in _MODES:
        return kind, f"{image.format} of mode {image.mode}, which has more than 8 bits a channel, is not read"
    if kind < OTHER:
        with opened(path) as file:
            return kind, "" if _whole_jpeg_header(file) else "damaged JPEG header"
    if kind == PILLOW:
        return kind, ""
    with opened(path) as file:
        data = file.read()
    if image.format == "WEBP":
        if getattr(image, "is_animated", False):
            return kind, "an animated WebP is not read"
        return PILLOW if is_extended_webp(data) else kind, ""
    if _PNG_END not in data:
        return kind, "truncated PNG"
    with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
        again.verify()  # every checksum: loading passes over some
    return PILLOW if data[24:25] == b"\x10" else kind, ""


def is_extended_webp(data: bytes | bytearray) -> bool:
    """Whether it has alpha, EXIF or ICC, which decoders treat differently."""
    return data[12:16] == b"VP8X"


def _whole_jpeg_header(file: BinaryIO) -> bool:
    """Whether segment follows segment up to the pixels. libjpeg looks for the next marker in the dirt; DALI stops."""
    file.seek(2)
    while True:
        if file.read(1) != b"\xff":
            return False
        while (marker := file.read(1)) == b"\xff":  # padding
            pass
        if marker == b"\xda":
            return True
        length = file.read(2)
        if len(length) < 2 or (skip := int.from_bytes(length) - 2) < 0:
            return False
        file.seek(skip, os.SEEK_CUR)


def probe_image(path: str) -> tuple[int, int, int]:
    """Width, height (both after rotation) and EXIF orientation of an image, after decoding it.

    Raises:
        DataError: the file cannot be decoded; the message is the reason alone.
    """
    found = decode_fully(path)
    if found.reason is not None:
        raise DataError(found.reason)
    return found.width, found.height, found.orientation


# --- many files -----------------------------------------------------------------------------------------------------


def scan_files(paths: Sequence[str], cores: int | None = None) -> list[Probe]:
    """`scan` of each file, on all cores."""
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if len(paths) < _MANY or cores == 1:
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(scan, paths))
    share = -(-len(paths) // cores)
    with ThreadPoolExecutor(cores) as pool:
        parts = pool.map(_scan_elsewhere, [paths[at : at + share] for at in range(0, len(paths), share)])
        return [probe for part in parts for probe in part]


def _scan_elsewhere(paths: Sequence[str]) -> list[Probe]:
    """`scan` in a process of its own: most of the time of one goes into Python."""
    here = str(Path(__file__).resolve().parents[2])
    paths_before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{paths_before}" if paths_before else here}
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.dataset.probe"],
        input=pickle.dumps(paths),
        stdout=subprocess.PIPE,
        env=environment,
        check=False,
    )
    if done.returncode != 0:  # little memory, or a folder that only this process may read
        return [scan(path) for path in paths]
    return [Probe(*fields) for fields in json.loads(done.stdout)]


def main() -> None:
    json.dump([scan(path) for path in pickle.load(sys.stdin.buffer)], sys.stdout)


if __name__ == "__main__":
    main()
