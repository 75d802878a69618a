"""Food-101 from the network to a folder: downloaded with resumption, checked, extracted safely; resized if so asked.

Nothing is at its final place before it is complete: the archive grows as `.part`, folders are built beside their place
and renamed. So whatever was interrupted, the same command again goes on.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from data_pipeline.dataset.formats import FORMATS
from data_pipeline.dataset.huggingface import HUB
from data_pipeline.dataset.index import NAME
from data_pipeline.dataset.synthetic import SAMPLE, user_cache_folder
from data_pipeline.errors import DataError
from data_pipeline.files import expanded, read_regular, refuse_special

_TRIES, _TIMEOUT, _BLOCK = 5, 30, 1 << 20
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, twice as many before each further one
_EXTRACTED = 1.05  # bytes of the folder for each byte of the archive: photos do not compress
_RESIZED_QUALITY = 92
_PREPARED = "food-101.path"


@dataclass(frozen=True)
class Source:
    """Where the archive is, and what it must be."""

    url: str = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
    md5: str = "85eeb15f3717b99a5da872d97d918f87"


Advance = Callable[[float], None]


def prepare(root: Path, short_side: int | None = None, source: Source | None = None) -> Path:
    """Food-101 in `root`/food-101; with `short_side` also a resized copy in `root`/food-101-<short_side>.

    Returns the folder to train on. What is there already is left as it is.

    Raises:
        DataError: no network, too little space, a damaged or unsafe archive, a folder that cannot be written to.
    """
    if short_side is not None and not 32 <= short_side <= 4096:
        raise DataError(f"--short-side {short_side} must lie between 32 and 4096.")
    source = source or Source()
    root = Path(os.path.abspath(expanded(root)))
    folder = root / NAME
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            archive = _download(root, source)
            _extract(archive, folder)
            archive.unlink()
        if short_side is None:
            remember(folder)
            return folder
        resized = root / f"{NAME}-{short_side}"
        if not resized.is_dir():
            _resize(folder, resized, short_side)
        remember(resized)
        return resized
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be written ({error.strerror or error}): free some space or name another "
            "--root; the same command goes on where this one stopped."
        ) from error


def remember(folder: Path) -> None:
    """`prepared` finds it from now on; silent where the user's cache folder cannot be written to."""
    with suppress(OSError):
        note = user_cache_folder() / _PREPARED
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(os.fsencode(folder))


def prepared() -> Path | None:
    """Where `python -m data_pipeline prepare` last put Food-101, if it is still there."""
    with suppress(OSError, ValueError):
        folder = Path(os.fsdecode(bytes(read_regular(str(user_cache_folder() / _PREPARED)))))
        if (folder / "meta").is_dir():
            return folder
    return None


def offer(data: str | None) -> Path | None:
    """Where `data` is a folder that does not exist, or is not named, and somebody is there to answer: ask whether to
    download Food-101, and return where it is then.

    Raises:
        DataError: as `prepare`.
    """
    folder = expanded(Path(data or "data"))
    known = data is not None and (data == SAMPLE or data.startswith(HUB) or folder.exists())
    if known or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    root = folder.parent if folder.name == NAME else folder
    why = f"There is no folder {folder}" if data else "--data names no photos"
    print(f"{why}. Download Food-101 (5 GB) into {root} now? [y/N] ", end="", file=sys.stderr)
    return prepare(root) if sys.stdin.readline().strip().lower() in ("y", "yes") else None


@contextmanager
def _progress(what: str, total: float | None, *, in_bytes: bool) -> Iterator[Advance]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _need(root: Path, count: float, what: str) -> None:
    free = shutil.disk_usage(root).free
    if count > free:
        raise DataError(
            f"{what} needs {count / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {root}: free some space or name "
            "another --root."
        )


# --- download -------------------------------------------------------------------------------------------------------


def _download(root: Path, source: Source) -> Path:
    """The archive, complete and with the right checksum."""
    archive = root / source.url.rsplit("/", 1)[1]
    part = archive.with_name(f"{archive.name}.part")
    if not archive.exists():
        _fetch(source.url, part)
        _check(part, source)
        part.rename(archive)
    else:  # brought here by other means, or left by an extraction that was interrupted
        _check(archive, source)
    return archive


def _check(file: Path, source: Source) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    refuse_special(file)
    with open(file, "rb") as data, _progress("checking", file.stat().st_size, in_bytes=True) as advance:
        while block := data.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != source.md5:
        file.unlink()
        raise DataError(
            f"{file} has the checksum {digest.hexdigest()} instead of {source.md5} and was removed: run the same "
            f"command again to download it anew from {source.url}."
        )


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what is missing of it. Between tries it waits, as long as the server asks for, within reason."""
    reason = ""
    for attempt in range(1, _TRIES + 1):
        have = part.stat().st_size if part.exists() else 0
        pause = _PAUSE * 2 ** (attempt - 1)
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                _refuse_page(url, answer)
                if answer.status != 206:
                    have = 0  # the server sends everything, whatever was asked for
                length = answer.headers.get("Content-Length", "")
                expected = have + int(length) if length.isdigit() else None  # a server need not say
                if expected is not None:
                    _need(part.parent, (expected - have) + _EXTRACTED * expected, "Food-101 with its archive")
                _store(answer, part, have, expected)
            if expected is None or part.stat().st_size == expected:
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is nothing behind what we have: the checksum will tell
                return
            reason = f"{error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
            asked = error.headers.get("Retry-After", "")
            pause = max(pause, min(float(asked), _LONGEST_PAUSE)) if asked.isdigit() else pause
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt == 1 and not part.exists():
                break  # nothing ever came: no network
        if attempt < _TRIES:
            time.sleep(pause)
    raise DataError(
        f"{url} cannot be downloaded ({reason}): run the same command again when the network is back, which goes on "
        f"where this one stopped, or put the file into {part.parent} by other means."
    )


def _refuse_page(url: str, answer: http.client.HTTPResponse) -> None:
    """A hotel's or an airport's network answers every question with its own page.

    Raises:
        DataError: a page came where an archive should.
    """
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind.startswith("text/") or kind == "application/xhtml+xml":
        raise DataError(
            f"{url} answers with a page ({kind}) instead of the archive, as a network does that wants you to sign in: "
            "open it in a browser, sign in, and run the same command again."
        )


def _store(answer: http.client.HTTPResponse, part: Path, have: int, expected: int | None) -> None:
    with open(part, "ab" if have else "wb") as out, _progress("downloading", expected, in_bytes=True) as advance:
        advance(have)
        while block := answer.read(_BLOCK):
            out.write(block)
            advance(len(block))


# --- folders --------------------------------------------------------------------------------------------------------


@contextmanager
def _built_beside(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends well."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    size = archive.stat().st_size
    _need(folder.parent, _EXTRACTED * size, "Food-101")
    with _built_beside(folder) as scratch:
        try:
            _unpack(archive, scratch)
        except (_Unsafe, tarfile.FilterError) as error:
            raise DataError(
                f"{archive} is not safe to extract ({error}): remove it and run the command again."
            ) from error
        except (tarfile.TarError, EOFError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{archive} is damaged ({reason}): remove it and run the command again.") from error
        inner = scratch / NAME
        if not (inner / "images").is_dir() or not (inner / "meta").is_dir():
            raise DataError(f"{archive} holds no {NAME}/images and {NAME}/meta: remove it and run the command again.")
        for path in inner.iterdir():
            path.rename(scratch / path.name)
        inner.rmdir()


def _unpack(archive: Path, into: Path) -> None:
    with (
        open(archive, "rb") as data,
        _progress("extracting", archive.stat().st_size, in_bytes=True) as advance,
        tarfile.open(fileobj=data, mode="r:*") as tar,
    ):
        before = 0
        for member in tar:
            _check_member(member)
            tar.extract(member, into, filter="data")
            advance(data.tell() - before)
            before = data.tell()


class _Unsafe(Exception):
    pass


def _check_member(member: tarfile.TarInfo) -> None:
    """Refuses all but files and folders under plain names: tarfile's own filter let links lead out of the folder in
    some versions, and Food-101 has none."""
    plain = not member.name.startswith("/") and ".." not in member.name.split("/") and len(member.name) <= 1024
    if not plain or not (member.isreg() or member.isdir()):
        raise _Unsafe(f"{member.name[:100]!r} is no plain file in its folder")


def _resize(folder: Path, resized: Path, short_side: int) -> None:
    """A copy with photos upright and their short side `short_side`; smaller and unreadable ones stay as they are."""
    files = sorted(path for path in (folder / "images").glob("*/*") if path.is_file())
    _need(resized.parent, sum(path.stat().st_size for path in files), f"{resized.name}, at most as large as {folder},")
    with _built_beside(resized) as scratch:
        shutil.copytree(folder / "meta", scratch / "meta")
        for path in (folder / "images").iterdir():
            (scratch / "images" / path.name).mkdir(parents=True)

        def one(path: Path) -> None:
            _resize_one(path, scratch / path.relative_to(folder), short_side)

        with (
            ThreadPoolExecutor(os.cpu_count() or 1) as pool,
            _progress(f"resizing to {short_side} pixels", len(files), in_bytes=False) as advance,
        ):
            for _ in pool.map(one, files):
                advance(1)


def _resize_one(path: Path, to: Path, short_side: int) -> None:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if min(image.size) > short_side and image.format == "JPEG":
                image.draft("RGB", (2 * short_side, 2 * short_side))  # decode at a half or less, where that is enough
                upright = ImageOps.exif_transpose(image).convert("RGB")
                scale = short_side / min(upright.size)
                size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
                upright.resize(size, Image.Resampling.BICUBIC).save(to, "JPEG", quality=_RESIZED_QUALITY)
                return
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the photo
    shutil.copyfile(path, to)
