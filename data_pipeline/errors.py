"""The one exception that a user of the pipeline sees, the one that loaders raise among themselves, and how a command
says what the operating system refused."""

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO


class DataError(RuntimeError):
    """Something about the data stops the run; the message is one sentence that names it and the remedy."""


class BadFiles(Exception):
    """Raised by a loader's `_produce`: images that could be decoded when they were indexed, and can't now; or none,
    where what failed may have passed.

    `Loader.batches` quarantines them and calls it again; it goes no further.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons
        """Position in the split -> why, in a few words."""


def refused(error: OSError) -> str:
    """The sentence for what the operating system refused."""
    reason = error.strerror or str(error) or type(error).__name__
    remedy = {
        errno.EACCES: "check its permissions, or name another",
        errno.EPERM: "check its permissions, or name another",
        errno.EROFS: "name a place that can be written to",
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "check the path",
        errno.ELOOP: "check its links",
        errno.EINVAL: "name another",
        errno.EISDIR: "name a file",
        errno.EMFILE: "raise the limit of open files (ulimit -n), or lower --workers",
    }.get(error.errno or 0, "check the disk and the network")
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the output"
    return f"{where[:200]}: {reason[0].lower()}{reason[1:]}; {remedy}."


def write_any_name() -> None:
    """Names that a terminal cannot show, or that are no text at all, are shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def silence(stream: TextIO) -> None:
    """What is still written to a stream that failed goes nowhere, at the end of the process too."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
