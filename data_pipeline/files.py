"""Reading what users name: regular files of a sensible size only, as others might block, or never end; a read that
failed in passing is tried again. Lock files, and the names of folders."""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import DataError

MAX_BYTES = 1 << 30
"""More than any photo takes whose pixels PIL decodes, and any list of files or file of settings."""

# What a network file system or a disk says once and not again.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
_PAUSES = (0.05, 0.25)  # seconds before the second and the third try

T = TypeVar("T")


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, which is called up to three times where it fails with an error that may pass.

    Raises:
        OSError: the last try's.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(pause)
    return read()


def words_of(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    said = error.strerror or str(error) or "cannot be read"
    return said[0].lower() + said[1:]


def open_regular(path: str, most: float = MAX_BYTES) -> tuple[int, int]:
    """(descriptor, size in bytes) of a regular file.

    Raises:
        OSError: it cannot be opened, is no regular file, or holds more than `most` bytes; with its name and the reason.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would block
    except ValueError:  # a null byte, half a character
        raise OSError("a name that no file can have") from None
    try:
        found = os.fstat(handle)
        check_regular(found, path, most)
    except BaseException:
        os.close(handle)
        raise
    return handle, found.st_size


def expanded(path: Path) -> Path:
    """`path` with ~ and ~user replaced.

    Raises:
        DataError: there is no such user, or no home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{path} cannot be found, as there is no such user or no home folder here: name a folder without ~, or set "
            "HOME and XDG_CACHE_HOME."
        ) from error


def open_lock(path: str | Path) -> int:
    """Descriptor of a lock file, made where it is not there. Not through a link, which would make or change what it
    points to."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def check_regular(found: os.stat_result, path: str | Path, most: float = MAX_BYTES) -> None:
    """
    Raises:
        OSError: no regular file, or more than `most` bytes.
    """
    reason = ""
    if not stat.S_ISREG(found.st_mode):
        reason = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
    elif found.st_size > most:
        reason = f"{found.st_size / 1e9:.1f} GB, more than is read"
    if reason:
        raise OSError(errno.EINVAL, reason, str(path))


def refuse_special(path: str | Path) -> None:
    """For a file, of any size, that a library opens.

    Raises:
        OSError: there is none, no regular file, or it may not be read.
    """
    os.close(open_regular(str(path), math.inf)[0])


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A regular file in UTF-8.

    Raises:
        OSError: as `read_regular`.
        UnicodeDecodeError: it is another encoding's, unless `errors` lets that pass.
    """
    return read_regular(str(path)).decode("utf-8", errors)


def read_regular(path: str) -> bytearray:
    """The bytes of a regular file.

    Raises:
        OSError: as `open_regular`, or it cannot be read.
    """

    def once() -> bytearray:
        handle, size = open_regular(path)
        with open(handle, "rb", buffering=0) as file:
            data = bytearray(size)
            view, done = memoryview(data), 0
            while done < size and (count := file.readinto(view[done:])):
                done += count
        view.release()
        del data[done:]
        return data

    return patiently(once)
