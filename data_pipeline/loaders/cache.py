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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.dataset.index import Index
from data_pipeline.dataset.index_cache import key_of
from data_pipeline.dataset.synthetic import user_cache_folder
from data_pipeline.errors import DataError
from data_pipeline.files import open_lock, read_text, refuse_special
from data_pipeline.loaders.augment import CROP_FRACTION, Augmentation, Interpolation
from data_pipeline.loaders.pixel_store import (
    Content,
    Photos,
    PixelStore,
    Views,
    contents_of,
    for_each,
    stored_bytes,
    training_side,
)
from data_pipeline.memory import available_memory

if TYPE_CHECKING:
    from data_pipeline.loaders.device_loader import DeviceStore
    from data_pipeline.loaders.loader import Plan

Kind = Literal["none", "disk", "ram", "gpu"]
Requested = Literal["none", "disk", "ram", "gpu", "auto"]
VERSION = 2  # of the files: raise it when a change alters a stored pixel or its place
RAM_SHARE = 0.8  # of the memory that is available: the run needs some itself
GPU_SHARE = 0.6  # of the GPU's that is free: activations and gradients need more
LEAST_KEPT = 0.1  # of the training images, below which keeping some in RAM gains nothing
_INDEX, _PIXELS = "index.json", "pixels.bin"

_log = logging.getLogger("data_pipeline")


# --- the choice -----------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    kind: Kind
    reason: str
    """Why, with the sizes, in one sentence without its full stop."""
    limit: int | None = None
    """Bytes of training images, where RAM holds some of them only; the others are decoded each time."""


class PixelCache:
    """Where the decoded images of a data set are kept: what `make_loader` takes. It makes one store a split, when it is
    first asked for: of "train" photos, which loaders of any resolution up to `resolution` share, of the others the
    views of one resolution and crop.

    augmentation: what is drawn for training, which decides how large photos are stored; default: `Augmentation()`.
    side: pixels of a stored photo's short side; default: enough for every crop that is drawn.
    crop_fraction, interpolation: share of the short side that evaluation looks at, and how that is resized.
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
        *,
        augmentation: Augmentation | None = None,
        side: int | None = None,
        crop_fraction: float = CROP_FRACTION,
        interpolation: Interpolation = "bilinear",
        limit: int | None = None,
    ) -> None:
        self.kind, self.reason, self.index, self.cache_dir, self.limit = kind, reason, index, cache_dir, limit
        self.contents = contents_of(index.splits, resolution, augmentation, side, crop_fraction, interpolation)
        self._side_given = side is not None
        self._memory: dict[str, Tensor] = {}
        if kind == "ram" and memory is not None:
            self._memory = {name: memory(self._layout(name).total + len(split)) for name, split in index.splits.items()}
        self._stores: dict[str, tuple[PixelStore, dict[int, str]]] = {}
        self._device_stores: dict[str, DeviceStore] = {}

    def _layout(self, split: str) -> PixelStore:
        """A store without a buffer."""
        limit = self.limit if isinstance(self.contents[split], Photos) else None
        none = torch.empty(0, dtype=torch.uint8)
        return PixelStore(self.index.splits[split], self.contents[split], none, limit=limit)

    def check(self, split: str, plan: Plan) -> None:
        """Raises ValueError where what is stored of `split` is not what `plan` asks for."""
        content = self.contents[split]
        if isinstance(content, Views):
            if plan.train or content != Views(plan.resolution, plan.crop_fraction, plan.interpolation):
                how = f"crop {content.crop_fraction}, {content.interpolation}"
                raise ValueError(f"the cache holds {content} ({how}): make one for this loader")
        elif not plan.train or (
            not self._side_given and training_side(plan.resolution, plan.augmentation) > content.side
        ):
            raise ValueError(f"the cache holds {content}, too few for this loader: make one with its augmentation")

    def store(self, split: str, threads: int) -> tuple[PixelStore, dict[int, str]]:
        """The store of a split, and the images that could not be decoded: position in the split -> why.

        Raises:
            DataError: it cannot be written.
        """
        if split not in self._stores:
            content = self.contents[split]
            if self.kind == "disk":
                self._stores[split] = disk_store(self.index, split, content, threads, self.cache_dir)
            else:
                store, shared = self._layout(split), self._memory.get(split)
                if shared is None:
                    store.buffer = torch.empty(store.total, dtype=torch.uint8)
                else:
                    store.buffer, ready = shared.split([store.total, len(store.split)])
                    store.ready = ready.numpy().view(np.bool_)
                self._stores[split] = store, {}
        return self._stores[split]

    def device_store(self, split: str, device: torch.device) -> DeviceStore:
        """The store of a split on `device`, which fills itself from the cache on disk where there is one."""
        from data_pipeline.loaders.device_loader import DeviceStore

        if split not in self._device_stores:
            content = self.contents[split]
            found = _open(cache_folder(self.index, split, content, self.cache_dir), self.index, split, content)
            host, bad = found or (self._layout(split), {})
            self._device_stores[split] = DeviceStore(host, bad, device)
        return self._device_stores[split]


def choose_cache(
    requested: Requested,
    index: Index,
    resolution: int,
    *,
    augmentation: Augmentation | None = None,
    side: int | None = None,
    crop_fraction: float = CROP_FRACTION,
    interpolation: Interpolation = "bilinear",
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    memory: Callable[[int], Tensor] | None = None,
    agree: Callable[[Callable[[], Choice]], Choice] = lambda choose: choose(),
) -> PixelCache:
    """The cache for all splits of `index`, at resolutions up to `resolution`; "auto" is the first of gpu (where
    `device` is one), ram and disk that fits. What was asked for and does not fit is replaced: "gpu" and "disk" by
    "ram", and where RAM is too small, by as many training images as fit there or by "none"; `reason` says so.

    augmentation, side, crop_fraction, interpolation: as in `PixelCache`.
    cache_dir: where "disk" keeps its files; default: the user's cache folder.
    memory: as in `PixelCache`, where several processes of this machine train together. Files are shared as they are;
        each GPU keeps the whole set, as every rank's images of an epoch come from all of it.
    agree: gives all of those processes what the function that it gets returns in one of them.

    Raises:
        DataError: "gpu" was asked for where there is none.
    """
    if requested not in ("none", "disk", "ram", "gpu", "auto"):
        raise ValueError(f'cache must be "none", "disk", "ram", "gpu" or "auto", got "{requested}"')
    contents = contents_of(index.splits, resolution, augmentation, side, crop_fraction, interpolation)
    kind, reason, limit = agree(lambda: _choose(requested, index, contents, torch.device(device), cache_dir))
    return PixelCache(
        kind, reason, index, resolution, cache_dir, memory,
        augmentation=augmentation, side=side, crop_fraction=crop_fraction, interpolation=interpolation, limit=limit,
    )  # fmt: skip


def _choose(
    requested: Requested, index: Index, contents: dict[str, Content], device: torch.device, cache_dir: str | Path | None
) -> Choice:
    """Which, and why."""
    if requested == "gpu" and device.type != "cuda":
        raise DataError("--cache gpu needs a GPU to train on, and this run has none: use --cache ram.")
    if requested == "none":
        return Choice("none", "images are decoded every time")
    wanted: dict[str, tuple[Kind, ...]] = {
        "auto": ("gpu", "ram", "disk") if device.type == "cuda" else ("ram", "disk"),
        "gpu": ("gpu", "ram"),
        "ram": ("ram",),
        "disk": ("disk", "ram"),
    }
    bytes_of = {name: stored_bytes(split, contents[name]) for name, split in index.splits.items()}
    need = sum(bytes_of.values())
    listed = " and ".join(f"{len(split)} {contents[name]}" for name, split in index.splits.items())
    said = f"{listed} are {_size(need)}"
    for kind in wanted[requested]:
        fits, why = _fits(kind, need, index, contents, device, cache_dir)
        if fits:
            return Choice(kind, f"{said}, and {why}")
        said += f", but {why}"
    photos = PixelStore(index.splits["train"], contents["train"], torch.empty(0, dtype=torch.uint8))
    limit = int(RAM_SHARE * available_memory()) - (need - bytes_of["train"])
    kept = photos.places(limit)
    if kept >= LEAST_KEPT * len(photos.split):
        return Choice("ram", f"{said}: {kept} training images are kept and the others decoded each time", limit)
    return Choice("none", f"{said}: images are decoded every time")


def _fits(
    kind: Kind,
    need: int,
    index: Index,
    contents: dict[str, Content],
    device: torch.device,
    cache_dir: str | Path | None,
) -> tuple[bool, str]:
    """Whether a whole cache does, and what there is for it."""
    if kind == "ram":
        memory = available_memory()
        return need <= RAM_SHARE * memory, f"{_size(memory)} of memory are available"
    if kind == "gpu":
        free = gpu_memory(device)
        said = f"{_size(free)} are free on the GPU, of which the cache may take {GPU_SHARE:.0%}"
        return need <= GPU_SHARE * free, said
    folders = {name: cache_folder(index, name, content, cache_dir) for name, content in contents.items()}
    if all(_open(folders[name], index, name, contents[name]) for name in folders):
        return True, "the cache is on disk already"
    folder = _existing(Path(cache_dir) if cache_dir is not None else user_cache_folder())
    if not os.access(folder, os.W_OK):
        return False, f"{folder} cannot be written to (XDG_CACHE_HOME names another place)"
    free = shutil.disk_usage(folder).free
    return need <= free, f"{_size(free)} are free in {folder}"


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


def cache_folder(index: Index, split: str, content: Content, cache_dir: str | Path | None = None) -> Path:
    """Where the pixels of a split lie: one place for each data folder, split and kind of content, whatever photos."""
    base = Path(cache_dir) if cache_dir is not None else user_cache_folder()
    return base / "pixels" / f"{key_of(index.root)}-{split}-{content.name}"


def _signature(index: Index, split: str, content: Content) -> dict[str, Any]:
    return {"version": VERSION, "content": index.content, "split": split, "stored": content.name}


def _open(folder: Path, index: Index, split: str, content: Content) -> tuple[PixelStore, dict[int, str]] | None:
    """The store in `folder` and its bad images; None where there is none, or a damaged one, or one of other data."""
    photos = index.splits[split]
    try:
        stored = json.loads(read_text(folder / _INDEX))
        body = stored["body"]
        if stored["checksum"] != _checksum(body) or body["signature"] != _signature(index, split, content):
            return None
        refuse_special(folder / _PIXELS)
        if (folder / _PIXELS).stat().st_size != body["bytes"]:
            return None
        if body["bytes"] != PixelStore(photos, content, torch.empty(0, dtype=torch.uint8)).total:
            return None
        # A private mapping: nothing that is written to it reaches the file.
        buffer = torch.from_file(str(folder / _PIXELS), shared=False, size=body["bytes"], dtype=torch.uint8)
        store = PixelStore(photos, content, buffer)
        store.checksums = np.array(body["crc"], np.uint32)
        return store, {int(index): reason for index, reason in body["bad"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # also what is nested too deeply
        return None


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def disk_store(
    index: Index, split: str, content: Content, threads: int, cache_dir: str | Path | None = None
) -> tuple[PixelStore, dict[int, str]]:
    """The store of a split in the cache folder, built there first if need be; and the images that could not be decoded.

    Raises:
        DataError: the folder cannot be written to, or the disk is full.
    """
    folder = cache_folder(index, split, content, cache_dir)
    if found := _open(folder, index, split, content):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if found := _open(folder, index, split, content):
                return found  # another process built it meanwhile
            _build(folder, index, split, content, threads)
    except OSError as error:
        need = _size(stored_bytes(index.splits[split], content))
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise DataError(
            f"The cache {folder} cannot be written, which takes {need} ({reason}): free some space, set XDG_CACHE_HOME "
            "to another folder, or use --cache ram or --cache none."
        ) from error
    found = _open(folder, index, split, content)
    if found is None:
        raise DataError(f"The cache {folder} changed while it was written: remove it and start again.")
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; a process that dies gives it back."""
    with open(open_lock(folder.with_name(f".{folder.name}.lock")), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another run that is building the cache %s.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, index: Index, split: str, content: Content, threads: int) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that died
    try:
        scratch.mkdir()
        photos = index.splits[split]
        # One image's pixels at a time, never all of them: the buffer is the file.
        layout = PixelStore(photos, content, torch.empty(0, dtype=torch.uint8))
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
            "signature": _signature(index, split, content),
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
