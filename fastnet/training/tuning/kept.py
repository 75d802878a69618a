"""What was measured here, kept in the user's cache: one JSON file for each GPU or CPU and set of versions."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

import kernels
from data_pipeline.dataset.synthetic import user_cache_folder
from data_pipeline.files import open_lock, read_text
from kernels.cpu.build import cpu_level, cpu_name
from kernels.device import gpu

Entries = dict[str, Any]
Tune = Literal["off", "kept", "on", "again"]
"""What `--tune` may say, and "kept": believe what is kept, and else predictions."""


def environment(device: torch.device) -> dict[str, str]:
    """All that the measurements on a device depend on, beside shapes: GPU, driver, libraries and our kernels."""
    if device.type == "cpu":  # whatever the number of threads, so that a run goes on to the same bits with another
        found = {"gpu": cpu_name(), "level": cpu_level(), "memory": "0"}
        return found | {"torch": torch.__version__, "kernels": _sources()}
    card = gpu(device)
    return {
        "gpu": card.name,
        "capability": ".".join(map(str, card.capability)),
        "multiprocessors": str(card.multiprocessors),
        "memory": str(torch.cuda.get_device_properties(device).total_memory),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "torch": torch.__version__,
        "triton": getattr(kernels.launch.triton, "__version__", "none"),
        "kernels": _sources(),
    }


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


@functools.cache
def _sources() -> str:
    """A hash of everything that computes a block: a version number would miss a change."""
    own = Path(__file__).parents[2]
    computing = Path(kernels.__file__).parent
    files = sorted(path for path in computing.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    files += [own / "layers.py", *sorted(own.glob("training/tuning/*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


class KeptResults:
    """Entries by name for one environment. Whatever is wrong with the file costs a sentence and no more."""

    def __init__(self, where: dict[str, str], log: Callable[[str], None], folder: Path | None = None) -> None:
        self.environment, self._log = where, log
        digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-")
        self.path = (user_cache_folder() / "tuning" if folder is None else folder) / f"{name}-{digest}.json"

    def writable(self) -> bool:
        """Whether what is added will be there in the next run."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                return True
        except OSError:
            return False

    def read(self, *, quietly: bool = False) -> Entries:
        """What is kept; nothing where there is no file, or one that is damaged or foreign, which is said."""
        try:
            content = json.loads(read_text(self.path))
            if content["environment"] != self.environment or not isinstance(content["entries"], dict):
                raise ValueError("it is of another machine or version")
            return content["entries"]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else f"{error}" or type(error).__name__
            if not quietly:
                self._log(f"{self.path} can't be used ({reason}): it is measured again.")
            return {}

    def add(self, entries: Entries, *, replace: bool = False) -> Entries:
        """Keep `entries`, and return what is kept now. Of two processes that measured at once the first one counts, so
        that both go on alike; fields that it left empty are filled. `replace` lets these count."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                before = {} if replace else self.read(quietly=True)
                merged = (self.read(quietly=True) if replace else {}) | entries
                for name, first in before.items():
                    merged[name] = {key: value or merged.get(name, first).get(key) for key, value in first.items()}
                with tempfile.NamedTemporaryFile("w", dir=self.path.parent, encoding="utf-8", delete=False) as file:
                    try:
                        json.dump({"environment": self.environment, "entries": merged}, file, indent=1)
                        file.flush()
                        os.fsync(file.fileno())
                        os.replace(file.name, self.path)
                    except BaseException:
                        with suppress(OSError):
                            os.unlink(file.name)
                        raise
            return merged
        except OSError as error:
            self._log(
                f"what was measured can't be kept in {self.path.parent} ({error.strerror}), so the next run measures "
                "again: make room there, or name another folder in XDG_CACHE_HOME."
            )
            return entries

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(open_lock(self.path.with_suffix(".lock")), "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
