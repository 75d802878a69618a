"""A run's folder: one run at a time writes into it, and replaces nothing that no run of ours wrote."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.files import open_lock
from fastnet.errors import UserError

LOCK = ".fastnet.lock"
"""Held while a run writes. It stays, as the sign that the folder is a run's, be it one that never saved anything."""

_OURS = re.compile(
    r"(last|best|checkpoint-\d+)\.(safetensors|json)|config\.json|metrics\.jsonl|excluded\.txt|kernels\.txt|curves\.png"
)
_LEFT = re.compile(rf"\.({_OURS.pattern})\.\d+-[0-9a-f]{{8}}\.tmp")


def check_new(folder: Path) -> None:
    """UserError where a new run into `folder` would replace another run, or files that no run of ours wrote."""
    if (folder / "last.safetensors").exists():
        raise UserError(f"--out {folder} already holds a run: continue it with --resume {folder}, or name another.")
    try:
        held = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out {folder} cannot be read ({error.strerror}): name another folder.") from error
    foreign = [name for name in held if _OURS.fullmatch(name)]
    if foreign and LOCK not in held:
        raise UserError(
            f"--out {folder} holds {foreign[0]}, which the new run would replace: move it away, or name another folder."
        )


@contextmanager
def locked(folder: Path, *, new: bool) -> Iterator[None]:
    """Nobody else writes a run into `folder`, which is made if need be; a process that ends gives it back.

    What a process of the run that was killed left half written is removed. UserError where another run writes there;
    for a new one also where `check_new` says so.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if new:
            check_new(folder)
        handle = open_lock(folder / LOCK)
    except OSError as error:
        raise UserError(
            f"no run can be written to {folder} ({error.strerror or error}): name another folder with --out."
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            raise UserError(
                f"another run ({holder or 'it has just started'}) writes into {folder}: wait for its end, or name "
                "another folder with --out."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):  # a file system without locks
                raise
        if new:
            check_new(folder)  # another run may have come and gone meanwhile
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        for name in os.listdir(folder):
            if _LEFT.fullmatch(name):
                with suppress(OSError):
                    os.unlink(folder / name)
        yield
    finally:
        os.close(handle)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What tells whether a file was replaced; None where there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None
