"""Damaged photos through every way in which a file is read, in a child process, which a decoder may end.

    python -m tests.fuzz_decoders --files 2000 --seed 1

A file is named in a log before each way is tried, so that the parent knows which of them ended the child or made it
hang, and a new child goes on behind it. File i of a seed is the same in every process.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import signal
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 40  # files that a loader is given at once
PATIENCE = 60  # seconds that one way may take on one file, or on a batch of them
Random = np.random.Generator


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    y, x = np.mgrid[:37, :50]
    pixels = np.stack([5 * x % 256, 7 * y % 256, (3 * x + 2 * y) % 256], 2).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
    elif mode == "RGBA":
        image.putalpha(image.getchannel(0))
    else:
        image = image.convert(mode)
    image.save(out, form, **options)
    return out.getvalue()


def turned() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a maker"
    return tags


def kinds() -> dict[str, bytes]:
    """Whole files of every kind."""
    second = Image.new("RGB", (20, 20), "red")
    return {
        "jpeg": encoded("JPEG"),
        "progressive": encoded("JPEG", progressive=True),
        "restarts": encoded("JPEG", restart_marker_rows=1, exif=turned()),
        "cmyk": encoded("JPEG", "CMYK"),
        "gray": encoded("JPEG", "L"),
        "mpo": encoded("MPO", save_all=True, append_images=[second]),
        "png": encoded("PNG"),
        "png rgba": encoded("PNG", "RGBA"),
        "png palette": encoded("PNG", "P"),
        "png bits": encoded("PNG", "1"),
        "png 16": encoded("PNG", "I;16"),
        "webp": encoded("WEBP"),
        "webp lossless": encoded("WEBP", lossless=True),
        "webp alpha": encoded("WEBP", "RGBA", exif=turned()),
        "webp moving": encoded("WEBP", save_all=True, append_images=[second.resize((50, 37))], duration=50),
    }


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """(type, body) of a PNG."""
    found, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def joined(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG whose checksums are right."""
    framed = (struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def with_right_checksums(random: Random, content: bytes) -> bytes:
    """A PNG that is wrong in what its chunks say, not in their checksums."""
    parts = chunks(content)
    at = int(random.integers(len(parts)))
    kind, body = parts[at]
    what = int(random.integers(6))
    if what == 0:
        at, (kind, body) = 0, parts[0]
        width, height, *rest = struct.unpack(">IIBBBBB", body)
        body = struct.pack(">IIBBBBB", width, height + int(random.integers(1, 3)), *rest)
    elif what == 1:
        body = b"".join(p[1] for p in parts if p[0] == b"IDAT")
        lines = bytearray(zlib.decompress(body))
        lines[int(random.integers(len(lines)))] = int(random.integers(256))  # also a filter that there is not
        at = next(i for i, p in enumerate(parts) if p[0] == b"IDAT")
        kind, body = b"IDAT", zlib.compress(bytes(lines[: int(random.integers(1, len(lines) + 1))]))
    elif what == 2:
        at, (kind, body) = 0, parts[0]
        flipped = bytearray(body)
        flipped[int(random.integers(8, 13))] = int(random.integers(17))
        body = bytes(flipped)
    elif what == 3 and body:
        flipped = bytearray(body)
        flipped[int(random.integers(len(flipped)))] ^= 1 << int(random.integers(8))
        body = bytes(flipped)
    elif what == 4:
        kind = bytes(random.choice([b"PLTE", b"tRNS", b"IDAT", b"IHDR", b"zTXt", b"iCCP"]))
        parts.insert(at, (kind, random.bytes(9)))
        return joined(parts)
    else:
        parts.pop(at)
        return joined(parts)
    parts[at] = kind, body
    return joined(parts)


def damaged(seed: int, number: int) -> tuple[str, bytes]:
    """(what was done, file `number` of a seed)."""
    random = np.random.default_rng([seed, number])
    whole = kinds()
    name = list(whole)[number % len(whole)]
    content = bytearray(whole[name])
    how = int(random.integers(7))
    if whole[name].startswith(b"\x89PNG") and how < 3:
        return f"{name}, chunks", with_right_checksums(random, whole[name])
    if how in (0, 1):
        for at in random.integers(0, len(content), int(random.integers(1, 8))):
            content[at] ^= 1 << int(random.integers(8))
    elif how == 2:  # among the headers
        for at in random.integers(0, min(len(content), 200), int(random.integers(1, 4))):
            content[at] = int(random.integers(256))
    elif how == 3:
        del content[int(random.integers(len(content))) :]
    elif how == 4:
        at, length = int(random.integers(len(content))), int(random.integers(1, 64))
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif how == 5:
        at = int(random.integers(len(content)))
        content[at:at] = random.bytes(int(random.integers(1, 64)))
    else:
        at = int(random.integers(len(content)))
        del content[at : at + int(random.integers(1, 64))]
    return f"{name}, {('bits', 'bits', 'header', 'cut', 'zeros', 'more', 'less')[how]}", bytes(content)


# --- the child ------------------------------------------------------------------------------------------------------


def index_of(probes: list[tuple[str, Any]]) -> Any:
    """An index of these (path, probe) alone, as a validation split."""
    from data_pipeline.dataset.index import Index, Split

    split = Split(
        tuple(path for path, _ in probes),
        np.zeros(len(probes), np.int64),
        np.array([probe[:2] for _, probe in probes], np.int32),
        np.array([probe.orientation for _, probe in probes], np.uint8),
        np.array([probe.kind for _, probe in probes], np.uint8),
    )
    return Index(Path(), ("x",), {"val": split}, (), "", "")


def child(folder: Path, seed: int, first: int, end: int, log: Path) -> int:
    """Tries files first to end - 1; writes to `log` what it is about to do, and what came out."""
    import torch

    from data_pipeline import make_loader
    from data_pipeline.dataset.probe import scan
    from data_pipeline.dataset.verify import _look
    from data_pipeline.loaders import loader as loaders
    from data_pipeline.loaders.cache import PixelCache

    torch.set_num_threads(1)
    logging.getLogger("data_pipeline").setLevel(logging.ERROR)
    loaders.QUARANTINE_SHARE = 1e9
    out = open(log, "a", buffering=1)  # noqa: SIM115

    def about(number: int, way: str) -> None:
        signal.alarm(PATIENCE)
        out.write(json.dumps({"file": number, "way": way}) + "\n")

    good = folder / "good.jpg"
    good.write_bytes(encoded("JPEG"))
    for start in range(first, end, BATCH):
        numbers, seemed_whole = range(start, min(start + BATCH, end)), [(str(good), scan(str(good)))]
        for number in numbers:
            path = folder / f"{number}.jpg"
            what, content = damaged(seed, number)
            path.write_bytes(content)
            about(number, "index")
            probe = scan(str(path))
            about(number, "verify")
            looked, _ = _look(str(path))
            assert looked is not None
            out.write(json.dumps({"what": what, "index": probe.reason, "verify": looked.reason}) + "\n")
            if probe.reason is None:
                seemed_whole.append((str(path), probe))
        # Good ones beside them: a split that is bad by more than half is another matter.
        index = index_of(seemed_whole + seemed_whole[:1] * len(seemed_whole))
        for way in ("torch", "ram", "dali"):
            if way == "dali" and not loaders.dali_installed():
                continue
            about(start, way)
            cache = PixelCache("ram", "", index, 16) if way == "ram" else None
            made = make_loader(
                index, "val", backend="torch" if cache else way, resolution=16, batch_size=2, seed=0, train=False,  # type: ignore[arg-type]
                augmentation=None, workers=0, cache=cache,
            )  # fmt: skip
            seen = sum(len(labels) for _, labels in made.batches(0))
            refused = {Path(name).stem: reason for name, reason in made.quarantined}
            assert seen + len(refused) == len(index.splits["val"]), (way, start, seen, refused)
            assert all(refused.values()), (way, start, refused)
            out.write(json.dumps({"way": way, "refused": refused, "seen": seen}) + "\n")
            made.close()
        for number in numbers:
            (folder / f"{number}.jpg").unlink()
    out.write(json.dumps({"done": end}) + "\n")
    out.close()
    return 0


# --- the parent -----------------------------------------------------------------------------------------------------


def fuzz(files: int, seed: int) -> tuple[list[str], list[dict[str, Any]]]:
    """(deaths, hangs and errors of children; the log)."""
    from tests.forked import fork, wait

    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, log, output = Path(scratch, "photos"), Path(scratch, "log"), Path(scratch, "said")
        folder.mkdir()
        first = 0
        while first < files:
            start = first
            body = lambda: child(folder, seed, start, files, log)  # noqa: B023, E731
            status = wait(fork(body, output))
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            if status == 0:
                break
            last = next(line for line in reversed(lines) if "file" in line)
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            what, _ = damaged(seed, last["file"])
            failures.append(f"{name} in {last['way']} of file {last['file']} of seed {seed}: {what}")
            if status > 0:
                failures[-1] += f"\n{output.read_text()[-1500:]}"
            first = last["file"] + (1 if last["way"] in ("index", "verify") else BATCH)
        return failures, [json.loads(line) for line in log.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    failures, log = fuzz(arguments.files, arguments.seed)
    for failure in failures:
        print(failure)
    tried = [line for line in log if "what" in line]
    refused = {way: sum(line[way] is not None for line in tried) for way in ("index", "verify")}
    for way in ("torch", "ram", "dali"):
        refused[way] = sum(len(line["refused"]) for line in log if line.get("way") == way and "refused" in line)
    print(f"{len(tried)} files, left out by {refused}; {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
