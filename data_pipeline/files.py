"""Reading photos: regular files of a photo's size only; a read that failed in passing is tried again. Lock
files, and the names of folders."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import DataError

MAX_BYTES = 1 << 30
"""A larger file is no photo: more pixels than PIL decodes take less."""

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


def open_photo(path: str, most: float = MAX_BYTES) -> tuple[int, int]:
    """(descriptor, size in bytes) of a regular file; anything else might block, or never end.

    Raises:
        OSError: it cannot be opened, is no regular file, or holds more than `most` bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would block
    except ValueError:  # a null byte, half a character
        raise OSError("a name that no file can have") from None
    try:
        found = os.fstat(handle)
        check_photo(found, most)
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


def check_photo(found: os.stat_result, most: float = MAX_BYTES) -> None:
    """
    Raises:
        OSError: no regular file, or more than `most` bytes. The message is the reason in a few words.
    """
    if not stat.S_ISREG(found.st_mode):
        raise OSError("a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file")
    if found.st_size > most:
        raise OSError(f"{found.st_size / 1e9:.1f} GB, which is no photo")


def read_photo(path: str) -> bytearray:
    """The bytes of a regular file.

    Raises:
        OSError: as `open_photo`, or it cannot be read.
    """

    def once() -> bytearray:
        handle, size = open_photo(path)
        with open(handle, "rb", buffering=0) as file:
            data = bytearray(size)
            view, done = memoryview(data), 0
            while done < size and (count := file.readinto(view[done:])):
                done += count
        view.release()
        del data[done:]
        return data

    return patiently(once)
