"""What is remembered of a data set's files in the user's cache folder, by path, size and modification time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from data_pipeline.dataset.tar import file_of
from data_pipeline.files import read_text

_CACHE_VERSION = 4


def key_of(root: Path) -> str:
    """What stands for a data folder in the names of what is remembered of it."""
    return hashlib.sha256(os.fsencode(root)).hexdigest()[:24]


def cache_file(root: Path, cache: Path, of: str = "") -> Path:
    return cache / "index" / f"{key_of(root)}{of}.json"


def read_cache(file: Path) -> dict[str, list]:
    try:
        stored = json.loads(read_text(file))
        return dict(stored["files"]) if stored["version"] == _CACHE_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # absent or damaged: it is only a cache


def write_cache(file: Path, files: dict[str, list]) -> None:
    """Atomic, and silent where the cache folder cannot be written to: the run goes on without it."""
    scratch = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".index-", dir=file.parent)
        with open(handle, "w", encoding="utf-8") as out:
            json.dump({"version": _CACHE_VERSION, "files": files}, out)
        os.replace(scratch, file)
    except OSError:
        if scratch is not None and os.path.exists(scratch):
            os.unlink(scratch)


def stamp_of(path: str) -> list[int]:
    """Size and modification time: what tells a changed file; zeros where it cannot be read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name that no file can have
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]


def stamps_of(paths: dict[str, str]) -> dict[str, list[int]]:
    """Those of the files that hold these paths; each file is asked once."""
    files = {name: file_of(path) for name, path in paths.items()}
    stamps = {file: stamp_of(file) for file in dict.fromkeys(files.values())}
    return {name: stamps[file] for name, file in files.items()}
