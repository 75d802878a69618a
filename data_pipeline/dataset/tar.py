"""Shards in webdataset's format: tar files of photos and their labels, read where they lie.

Members of one folder whose names are equal up to the first dot are one sample (https://github.com/webdataset/webdataset):
<key>.jpg or another picture that is read, and its label in <key>.cls, a number or a class name, or in <key>.json under
"label" or "class". Without one of these the member's folder is its class, as in a folder of photos that was packed as
it is.

Headers are read once, of one shard after the other; an image is then one read at an offset. So shards cannot be
compressed.
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
import re
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.dataset.formats import SUFFIXES
from data_pipeline.errors import DataError
from data_pipeline.files import MAX_BYTES, open_regular, patiently

_SHARD = re.compile(r".+\.(tar|tgz|tar\.(gz|bz2|xz|zst|lz4))", re.IGNORECASE)
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)", re.IGNORECASE)  # "val" is also where "validation" starts
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_NAMING = "shards are called train*.tar and val*.tar, validation*.tar or test*.tar"
_LABEL_BYTES = 1 << 20  # more of a label member is not read
_BLOCK = 512
_BEHIND = 1 << 20  # looked at behind the end: an archive is filled up with zeros to a multiple of 10,240 bytes


class TarMember(str):
    """The path of a file in a tar file, "shard.tar::member", with the place of its bytes."""

    __slots__ = ("archive", "offset", "size")
    archive: str
    offset: int
    size: int

    def __new__(cls, archive: str, member: str, offset: int, size: int) -> TarMember:
        self = super().__new__(cls, f"{archive}::{member}")
        self.archive, self.offset, self.size = archive, offset, size
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return TarMember, (self.archive, self[len(self.archive) + 2 :], self.offset, self.size)

    def read(self) -> bytes:
        def once() -> bytes:
            with open(open_regular(self.archive, math.inf)[0], "rb") as file:
                return _read_at(file, self.offset, self.size)

        return patiently(once)


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise OSError(f"{size / 1e9:.1f} GB, more than is read")
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise OSError("its shard is shorter than when it was indexed")
    return data


def file_of(path: str) -> str:
    """The file on disk that holds the bytes of `path`."""
    return path.archive if isinstance(path, TarMember) else path


def opened(path: str) -> BinaryIO:
    """A file, or a member of a shard, from its first byte to its last."""
    return io.BytesIO(path.read()) if isinstance(path, TarMember) else open(open_regular(path)[0], "rb")


# --- one shard ------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """An image of a shard."""

    member: str
    offset: int
    size: int
    label: int | str
    reason: str | None
    """Why it is left out."""


def read_shard(archive: str) -> list[Sample]:
    """The images of a shard, in the order of its members.

    Raises:
        DataError: it is compressed or damaged, or no tar file.
        OSError: it cannot be read.
    """
    with open(open_regular(archive, math.inf)[0], "rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise DataError(f"{archive} is compressed, and shards are read in place: decompress it to a plain .tar.")
        groups: dict[tuple[str, str], list[tuple[str, tarfile.TarInfo]]] = defaultdict(list)
        for name, info in _members(file, archive).items():
            folder, _, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            if key and not info.isdir():  # as in folders, hidden files do not count
                groups[folder, key].append((f".{extension.lower()}", info))
        return [sample for (folder, _), members in groups.items() for sample in _samples(file, folder, members)]


def _members(file: BinaryIO, archive: str) -> dict[str, tarfile.TarInfo]:
    """By name; of several with one name the last counts, as when they are extracted."""
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            found = {info.name: info for info in tar}
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{archive} is not a whole tar file ({error}): copy it again or remove it.") from error
    file.seek(end)
    if any(file.read(_BLOCK)):  # tarfile takes a damaged header for the end
        raise DataError(f"{archive} is damaged at byte {end}: copy it again or remove it.")
    file.seek(end)
    behind = file.read(_BEHIND)
    if len(behind) < 2 * _BLOCK:
        raise DataError(f"{archive} is not whole, its end is missing after {end} bytes: copy it again or remove it.")
    if any(behind):
        raise DataError(
            f"{archive} goes on after its end at byte {end}, as when archives are joined with cat: keep them apart, or "
            "join them with tar --concatenate."
        )
    return found


def _samples(file: BinaryIO, folder: str, members: list[tuple[str, tarfile.TarInfo]]) -> Iterator[Sample]:
    images = [info for extension, info in members if extension in SUFFIXES]
    # <key>.mask.png belongs to <key>.jpg; alone it is an image whose name has one dot too many.
    dotted = [info for extension, info in members if os.path.splitext(extension)[1] in SUFFIXES]
    label: int | str = ""
    reason = None
    try:
        label = _label(file, folder, dict(members)) if images else ""
    except (ValueError, OSError) as error:
        reason = str(error)
    for info in images or dotted:
        why = reason if images else "a dot in its key: only the name up to the first dot is the key"
        if not info.isreg() or info.issparse():
            why = "a link or special file in its shard"
        yield Sample(info.name, info.offset_data, info.size, label, why)


def _label(file: BinaryIO, folder: str, members: dict[str, tarfile.TarInfo]) -> int | str:
    """
    Raises:
        ValueError: there is none; the message is the reason.
    """
    found: object = None
    for extension in (".cls", ".json"):
        if found is None and (info := members.get(extension)) is not None:
            try:
                text = _read_at(file, info.offset_data, min(info.size, _LABEL_BYTES)).decode().strip()
                held = json.loads(text) if extension == ".json" else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"its label {info.name} is not {extension[1:].upper()} text") from error
            if extension == ".cls":
                found = int(text) if re.fullmatch(r"-?\d+", text) else text
            elif isinstance(held, dict):
                found = held.get("label", held.get("class"))
            if found is not None and (isinstance(found, bool) or not isinstance(found, int | str) or found == ""):
                raise ValueError(f"its label in {info.name} is neither a number nor a name")
            if isinstance(found, int) and found < 0:
                raise ValueError(f"its label in {info.name} is negative")
    name = folder.rpartition("/")[2]
    if isinstance(found, int | str):
        return found
    if name in ("", ".", ".."):
        raise ValueError("no label: it has neither a .cls nor a .json with a label, nor a folder")
    return name


# --- all shards -----------------------------------------------------------------------------------------------------


def find_shards(data: Path) -> tuple[Path, dict[str, list[str]]] | None:
    """(the folder, split -> names of its shards below the folder) of a folder of shards, a pattern of shell wildcards,
    or one shard; None where `data` is no such thing.

    Raises:
        DataError: a split has no shard; a pattern that matches nothing, or a file that is no shard of a split.
    """
    if data.is_dir():
        named = [name for name in sorted(os.listdir(data)) if _SHARD.fullmatch(name) and not name.startswith(".")]
        paths = [str(data / name) for name in named if _SPLIT.search(name)]
        root = data
        if not paths:
            return None
    elif data.exists():
        if not _SHARD.fullmatch(data.name):
            return None
        paths, root = [str(data)], data.parent
    elif glob.escape(str(data)) != str(data):
        paths, root = sorted(glob.glob(str(data), recursive=True)), data
        while glob.escape(str(root)) != str(root):
            root = root.parent
        if not paths:
            raise DataError(f"No file matches {data}: check the pattern; {_NAMING}.")
    else:
        return None
    splits: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        split = _SPLIT.search(os.path.basename(path))
        if split is None or not _SHARD.fullmatch(os.path.basename(path)):
            raise DataError(f"{path} belongs to no split: {_NAMING}; rename it or narrow --data.")
        splits[split[1].lower()].append(os.path.relpath(path, root))
    splits["val"] = splits["val"] or splits["test"]
    for split_name, what in (("train", "train*.tar"), ("val", "val*.tar or test*.tar")):
        if not splits[split_name]:
            raise DataError(
                f"{data} has {len(paths)} shard(s) and none of them is called {what}: add or rename some, so that "
                "there is something to train on and something to validate on."
            )
    return root, {split_name: splits[split_name] for split_name in ("train", "val")}


class Contents(NamedTuple):
    """What the shards of a data set hold; names are "shard.tar::member", with the shard below the root."""

    classes: list[str]
    files: dict[str, list[tuple[str, int]]]
    """split -> (name, label), in the order of labels and members, whichever shards these lie in."""
    members: dict[str, TarMember]
    left_out: list[tuple[str, str]]
    """(name, reason)."""


def order(name: str) -> tuple[str, str]:
    """The key by which names are sorted within a class."""
    shard, _, member = name.partition("::")
    return (member, shard) if member else (name, "")


def contents(root: Path, splits: dict[str, list[str]], samples: Mapping[str, Sequence[Sample]]) -> Contents:
    """
    splits: shards by split. samples: of each shard.

    Raises:
        DataError: no image has a label, or validation has a class that training does not have.
    """
    members: dict[str, TarMember] = {}
    left_out: list[tuple[str, str]] = []
    labels: dict[str, dict[str, int | str]] = {split: {} for split in splits}
    for split, shards in splits.items():
        for shard in shards:
            archive = f"{root}/{shard}"
            for member, offset, size, label, reason in samples[shard]:
                if reason is not None:
                    left_out.append((f"{archive}::{member}", reason))
                    continue
                name = f"{shard}::{member}"
                members[name] = TarMember(archive, member, offset, size)
                labels[split][name] = label
        if not labels[split]:
            why = f" ({left_out[0][0]}: {left_out[0][1]})" if left_out else ""
            raise DataError(
                f"No {split} shard of {root} has an image with a label{why}: put <key>.jpg beside <key>.cls or "
                "<key>.json in them, or photos in folders named for their classes."
            )
    # macOS writes é as two characters where others write one.
    labels = {
        split: {name: unicodedata.normalize("NFC", at) if isinstance(at, str) else at for name, at in held.items()}
        for split, held in labels.items()
    }
    found = set(labels["train"].values())
    # Numbers keep their order; names of folders that look like numbers are sorted as folders are.
    numbers = all(isinstance(label, int) for label in found)
    classes = sorted(map(str, found), key=int) if numbers else sorted({str(label) for label in found})
    number = {label: at for at, label in enumerate(classes)}
    for name, label in labels["val"].items():
        if str(label) not in number:
            raise DataError(
                f'{root}/{name} has the class "{label}", which no train shard has: both need the same ones.'
            )
    files = {
        split: sorted(
            ((name, number[str(label)]) for name, label in held.items()), key=lambda file: (file[1], order(file[0]))
        )
        for split, held in labels.items()
    }
    return Contents(classes, files, members, left_out)
