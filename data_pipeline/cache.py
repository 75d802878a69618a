"""Where decoded images are kept: in RAM, in a file, or on the GPU; which of them fits; and the files.

In RAM an image is decoded when it is first asked for, once for all processes of a machine. On disk the whole split is
decoded first, into a scratch folder that is renamed when it is complete: `pixels.bin`, images [H, W, 3] one after
another, and `index.json` with a CRC of each. One process builds at a time, the others wait for it; a folder of another
version or of other data is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.food101 import Index
from data_pipeline.memory import available_memory
from data_pipeline.pixel_store import PixelStore, for_each, short_side, stored_bytes
from data_pipeline.sample import user_cache_folder

if TYPE_CHECKING:
    from data_pipeline.device_augment import DeviceStore

Kind = Literal["none", "disk", "ram", "gpu"]
VERSION = 1  # of the files: raise it when a change alters a stored pixel or its place
RAM_SHARE = 0.8  # of the memory that is available: the run needs some itself
GPU_SHARE = 0.6  # of the GPU's that is free: activations and gradients need more
_INDEX, _PIXELS = "index.json", "pixels.bin"

_log = logging.getLogger("data_pipeline")


# --- the choice -----------------------------------------------------------------------------------------------------


class PixelCache:
    """Where the decoded images of a data set are kept: what `make_loader` takes. It makes one store a split, when it is
    first asked for, which loaders of any resolution up to `resolution` share.

    memory: gives zeroed bytes that the processes of this machine share, asked for by all of them in turn, split by
    split; None: this process keeps RAM of its own.
    """

    def __init__(
        self,
        kind: Kind,
        reason: str,
        index: Index,
        resolution: int,
        cache_dir: str | Path | None = None,
        memory: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.kind = kind
        self.reason = reason
        """Why, with the sizes, in one sentence without its full stop."""
        self.index, self.resolution, self.cache_dir = index, resolution, cache_dir
        self._memory: dict[str, Tensor] = {}
        if kind == "ram" and memory is not None:
            self._memory = {
                name: memory(stored_bytes(split, resolution) + len(split)) for name, split in index.splits.items()
            }
        self._stores: dict[str, tuple[PixelStore, dict[int, str]]] = {}
        self._device_stores: dict[str, DeviceStore] = {}

    def store(self, split: str, threads: int) -> tuple[PixelStore, dict[int, str]]:
        """The store of a split, and the images that could not be decoded: position in the split -> why.

        Raises:
            DataError: it cannot be written.
        """
        if split not in self._stores:
            if self.kind == "disk":
                self._stores[split] = disk_store(self.index, split, self.resolution, threads, self.cache_dir)
            else:
                photos, side, shared = self.index.splits[split], short_side(self.resolution), self._memory.get(split)
                if shared is None:
                    store = PixelStore(photos, side)
                else:
                    pixels, ready = shared.split([len(shared) - len(photos), len(photos)])
                    store = PixelStore(photos, side, pixels, ready=ready.numpy().view(np.bool_))
                self._stores[split] = store, {}
        return self._stores[split]

    def device_store(self, split: str, device: torch.device) -> DeviceStore:
        """The store of a split on `device`, which fills itself from the cache on disk where there is one."""
        from data_pipeline.device_augment import DeviceStore

        if split not in self._device_stores:
            found = _open(
                cache_folder(self.index, split, self.resolution, self.cache_dir), self.index, split, self.resolution
            )
            side, none = short_side(self.resolution), torch.empty(0, dtype=torch.uint8)
            host, bad = found or (PixelStore(self.index.splits[split], side, none), {})
            self._device_stores[split] = DeviceStore(host, bad, device)
        return self._device_stores[split]


def choose_cache(
    requested: Literal["none", "disk", "ram", "gpu", "auto"],
    index: Index,
    resolution: int,
    *,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    memory: Callable[[int], Tensor] | None = None,
    agree: Callable[[Callable[[], tuple[Kind, str]]], tuple[Kind, str]] = lambda choose: choose(),
) -> PixelCache:
    """The cache for both splits of `index`, at resolutions up to `resolution`; "auto" is the first of gpu (where
    `device` is one), ram and disk that fits, else none.

    cache_dir: where "disk" keeps its files; default: the user's cache folder.
    memory: as in `PixelCache`, where several processes of this machine train together. Files are shared as they are;
        each GPU keeps the whole set, as every rank's images of an epoch come from all of it.
    agree: gives all of those processes what the function that it gets returns in one of them.

    Raises:
        DataError: what was asked for does not fit.
    """
    if requested not in ("none", "disk", "ram", "gpu", "auto"):
        raise ValueError(f'cache must be "none", "disk", "ram", "gpu" or "auto", got "{requested}"')
    kind, reason = agree(lambda: _choose(requested, index, resolution, torch.device(device), cache_dir))
    return PixelCache(kind, reason, index, resolution, cache_dir, memory)


def _choose(
    requested: Literal["none", "disk", "ram", "gpu", "auto"],
    index: Index,
    resolution: int,
    device: torch.device,
    cache_dir: str | Path | None,
) -> tuple[Kind, str]:
    """Which, and why."""
    if requested == "gpu" and device.type != "cuda":
        raise DataError("--cache gpu needs a GPU to train on, and this run has none: use --cache ram.")

    if requested == "none":
        return "none", "images are decoded every time"
    need = sum(stored_bytes(split, resolution) for split in index.splits.values())
    what = f"{sum(map(len, index.splits.values()))} images at short side {short_side(resolution)} are {_size(need)}"
    memory = available_memory()
    fits = {"ram": need <= RAM_SHARE * memory}
    said = {"ram": f"{_size(memory)} of memory are available"}
    if device.type == "cuda":
        free = gpu_memory(device)
        fits["gpu"] = need <= GPU_SHARE * free
        said["gpu"] = f"{_size(free)} are free on the GPU, of which the cache may take {GPU_SHARE:.0%}"
    if requested == "disk" or (requested == "auto" and not any(fits.values())):
        folder = _existing(Path(cache_dir) if cache_dir is not None else user_cache_folder())
        there = all(
            _open(cache_folder(index, split, resolution, cache_dir), index, split, resolution) for split in index.splits
        )
        free = shutil.disk_usage(folder).free
        fits["disk"] = there or (need <= free and os.access(folder, os.W_OK))
        writable = "" if os.access(folder, os.W_OK) else ", which cannot be written to"
        said["disk"] = "the cache is there" if there else f"{_size(free)} are free in {folder}{writable}"
    if requested == "auto":
        kinds: tuple[Kind, ...] = ("gpu", "ram", "disk")
        for kind in kinds:
            if fits.get(kind):
                return kind, f"{what}, and {said[kind]}"
        return "none", f"{what}; {said['ram']} and {said['disk']}"
    if not fits[requested]:
        other = {"gpu": "--cache ram", "ram": "--cache disk", "disk": "--cache ram, or another XDG_CACHE_HOME"}[
            requested
        ]
        raise DataError(
            f"--cache {requested} does not fit: {what}, and {said[requested]}: use {other} or --cache none."
        )
    return requested, f"{what}, and {said[requested]}"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def gpu_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with those that torch keeps in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


# --- on disk --------------------------------------------------------------------------------------------------------


def cache_folder(index: Index, split: str, resolution: int, cache_dir: str | Path | None = None) -> Path:
    """Where the pixels of a split lie: one place for each data folder, split and size, whatever its content."""
    base = Path(cache_dir) if cache_dir is not None else user_cache_folder()
    key = hashlib.sha256(os.fsencode(index.root)).hexdigest()[:24]
    return base / "pixels" / f"{key}-{split}-{short_side(resolution)}"


def _signature(index: Index, split: str, resolution: int) -> dict[str, Any]:
    return {"version": VERSION, "content": index.content, "split": split, "short_side": short_side(resolution)}


def _open(folder: Path, index: Index, split: str, resolution: int) -> tuple[PixelStore, dict[int, str]] | None:
    """The store in `folder` and its bad images; None where there is none, or a damaged one, or one of other data."""
    photos = index.splits[split]
    try:
        stored = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        body = stored["body"]
        if stored["checksum"] != _checksum(body) or body["signature"] != _signature(index, split, resolution):
            return None
        if (folder / _PIXELS).stat().st_size != body["bytes"]:
            return None
        # A private mapping: nothing that is written to it reaches the file.
        buffer = torch.from_file(str(folder / _PIXELS), shared=False, size=body["bytes"], dtype=torch.uint8)
        store = PixelStore(photos, short_side(resolution), buffer)
        store.checksums = np.array(body["crc"], np.uint32)
        return store, {int(index): reason for index, reason in body["bad"].items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def disk_store(
    index: Index, split: str, resolution: int, threads: int, cache_dir: str | Path | None = None
) -> tuple[PixelStore, dict[int, str]]:
    """The store of a split in the cache folder, built there first if need be; and the images that could not be decoded.

    Raises:
        DataError: the folder cannot be written to, or the disk is full.
    """
    folder = cache_folder(index, split, resolution, cache_dir)
    if found := _open(folder, index, split, resolution):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if found := _open(folder, index, split, resolution):
                return found  # another process built it meanwhile
            _build(folder, index, split, resolution, threads)
    except OSError as error:
        need = _size(stored_bytes(index.splits[split], resolution))
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise DataError(
            f"The cache {folder} cannot be written, which takes {need} ({reason}): free some space, set XDG_CACHE_HOME "
            "to another folder, or use --cache ram or --cache none."
        ) from error
    found = _open(folder, index, split, resolution)
    if found is None:
        raise DataError(f"The cache {folder} changed while it was written: remove it and start again.")
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; a process that dies gives it back."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another run that is building the cache %s.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, index: Index, split: str, resolution: int, threads: int) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that died
    try:
        scratch.mkdir()
        photos = index.splits[split]
        # One image's pixels at a time, never all of them: the buffer is the file.
        layout = PixelStore(photos, short_side(resolution), torch.empty(0, dtype=torch.uint8))
        crc, bad = [0] * len(photos), {}
        with open(scratch / _PIXELS, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, layout.total)  # finds a full disk now

            def write(at: int) -> int:
                data = layout.decoded(at).numpy().data
                if os.pwrite(file.fileno(), data, int(layout.offsets[at])) != data.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return zlib.crc32(data)

            for at, found in _shown(for_each(write, range(len(photos)), threads), len(photos), split):
                if isinstance(found, str):
                    bad[at] = found
                else:
                    crc[at] = found
            file.flush()
            os.fsync(file.fileno())
        body = {
            "signature": _signature(index, split, resolution),
            "bytes": layout.total,
            "crc": crc,
            "bad": {str(at): reason for at, reason in bad.items()},
        }
        with open(scratch / _INDEX, "w", encoding="utf-8") as listing:
            json.dump({"checksum": _checksum(body), "body": body}, listing)
            listing.flush()
            os.fsync(listing.fileno())
        if folder.exists():
            shutil.rmtree(folder)  # of other data; who has it open keeps it
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shown(items: Iterator[tuple[int, Any]], count: int, split: str) -> Iterator[tuple[int, Any]]:
    """`items`, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        items, f"decoding {split} images", total=count, console=console, disable=not sys.stderr.isatty(), transient=True
    )
