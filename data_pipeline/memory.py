"""How much memory this process may still take: the machine's, and the limits of the control groups that it is in.

A group's limit holds for all groups below it, so every level from the process's own group (/proc/self/cgroup) up to the
mount point counts, in version 2 of control groups and in version 1 (man 7 cgroups); a machine may have both mounted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Names of a group's files, and of the counter of file pages that the kernel gives up first."""

    limits: tuple[str, ...]
    used: str
    inactive: str


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")  # above high the kernel stalls a process


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping, within the limits of the process's control groups.

    root: where /proc and the mount points lie.
    """
    try:
        lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min([free, *(left for folder, files in _groups(root) for left in _left(folder, files))]))


def _left(folder: Path, files: _Files) -> Iterator[int]:
    """Bytes below each limit of a group, pages of files that are not in use counted as free."""
    with suppress(OSError, ValueError):  # version 2's topmost group has neither counters nor limits
        used = int((folder / files.used).read_text())
        with suppress(OSError, ValueError, KeyError):
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used -= int(stat[files.inactive])
        for name in files.limits:
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / name).read_text()) - used


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of the groups that account for this process's memory, each mount's innermost first."""
    try:
        own = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    paths: dict[_Files, str] = {}
    for line in own:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[_V2] = path
        elif "memory" in controllers.split(","):
            paths[_V1] = path
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        files = {"cgroup2": _V2, "cgroup": _V1}.get(kind[0])
        if files is None or files not in paths or (files is _V1 and "memory" not in kind[2].split(",")):
            continue
        mounted, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
        top = root / point.lstrip("/")
        for folder in _upwards(top, mounted, paths[files]):
            yield folder, files


def _upwards(top: Path, mounted: str, path: str) -> Iterator[Path]:
    """From the folder of group `path` up to `top`, the mount point, where group `mounted` lies."""
    below = os.path.relpath(path, mounted)
    # In a container that sees its own group as the whole tree, the path may be the host's: what is mounted counts.
    folder = top if below.startswith("..") or not (top / below).is_dir() else top / below
    while True:
        yield folder
        if folder == top:
            return
        folder = folder.parent
