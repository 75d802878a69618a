"""Data sets of the Hugging Face hub, as folders: their parquet or arrow files, with images as bytes, are unpacked once.

They are read by the `datasets` library. A row becomes a file <split>/<class>/<row>.<jpg>, byte for byte, in the user's
cache folder, and takes as much of the disk again; every loader, cache and check then is that of folders.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from data_pipeline.dataset.synthetic import user_cache_folder
from data_pipeline.errors import DataError
from data_pipeline.files import read_regular

HUB = "hf://"
_SPLIT = re.compile(r"(train|validation|valid|val|test)\b|(train|validation|valid|val|test)[-_.]")
_NAMES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
_IMAGE, _LABEL = ("image", "img", "picture", "photo"), ("label", "labels", "class", "category", "fine_label")
_KINDS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"))


def hub_name(data: Path) -> str | None:
    """ "ethz/food101" for "hf://ethz/food101", which a path has with one stroke less."""
    found = re.fullmatch(r"hf:/+([\w.\-]+/[\w.\-]+)", str(data))
    return found[1] if found else None


def parquet_files(root: Path) -> dict[str, list[str]]:
    """split -> the files of a downloaded data set, which lie in `root` or its data/; empty where it is none."""
    found: dict[str, list[str]] = {}
    for folder in (root, root / "data"):
        for file in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
            match = _SPLIT.match(file.name)
            found.setdefault(_NAMES[match[1] or match[2]] if match else "train", []).append(str(file))
    return found


def is_saved(root: Path) -> bool:
    """Whether `datasets` wrote the folder by save_to_disk."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def unpacked(root: Path, cache: Path | None = None) -> Path | None:
    """The folder of `root`'s images by split and class; None where `root` is no data set of the hub's.

    Raises:
        DataError: `datasets` is not installed, or the data set cannot be read or has no images and labels.
    """
    name, files = hub_name(root), parquet_files(root)
    if not (name or files or is_saved(root)):
        return None
    if name is None:
        every = [file for group in files.values() for file in group] or sorted(map(str, root.rglob("*.arrow")))
        stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in every]
        key = hashlib.sha256(repr((str(root), stamps)).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    else:
        key = name.replace("/", "--")
    folder = (cache or user_cache_folder()) / "huggingface" / key
    if folder.is_dir():
        return folder
    splits = _read(root, name, files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        for split, rows in splits.items():
            _write(rows, scratch / split, name or str(root))
        os.replace(scratch, folder)
    except OSError as error:
        if not folder.is_dir():  # nor did another process unpack it meanwhile
            raise DataError(
                f"{name or root} cannot be unpacked into {folder} ({error.strerror or error}): free some space, or set "
                "XDG_CACHE_HOME to another disk."
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _read(root: Path, name: str | None, files: dict[str, list[str]]) -> dict[str, Any]:
    source = name or str(root)
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name or root} is a data set of Hugging Face's: pip install datasets, which reads it."
        ) from None
    try:
        if name:
            found = datasets.load_dataset(name)
        elif files:
            found = datasets.load_dataset("parquet", data_files=files)
        else:
            found = datasets.load_from_disk(str(root))
    except Exception as error:  # of the library, of its transport, of the disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source} cannot be read by datasets ({reason}): check the name and the network, or download it again."
        ) from error
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    splits: dict[str, Any] = {}
    for split, rows in found.items():
        image = _column(rows, _IMAGE, lambda feature: isinstance(feature, datasets.Image))
        label = _column(rows, _LABEL, lambda feature: isinstance(feature, datasets.ClassLabel))
        if image is None or label is None:
            raise DataError(
                f"{name or root} has the columns {', '.join(rows.column_names)}: needed are image and label."
            )
        rows = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
        splits[_NAMES.get(split, split)] = rows.cast_column("image", datasets.Image(decode=False))
    return splits


def _column(rows: Any, names: tuple[str, ...], fits: Any) -> str | None:
    """The column of a kind, or of one of some names."""
    of_kind = [name for name, feature in rows.features.items() if fits(feature)]
    named = [name for name in names if name in rows.features]
    return next((name for name in named if name in of_kind), None) or next(iter((*of_kind, *named)), None)


def _write(rows: Any, folder: Path, source: str) -> None:
    feature = rows.features["label"]
    classes = getattr(feature, "names", None)
    folders: dict[str, Any] = {}
    for at, row in enumerate(rows):
        if row["label"] in (None, -1):  # as test splits of contests have
            continue
        content = row["image"]["bytes"]
        if content is None:
            path = Path(row["image"]["path"])
            if not path.is_file():
                raise DataError(f"row {at} of {source} has neither an image nor the path of one: download it again.")
            content = bytes(read_regular(str(path)))
        label = classes[row["label"]] if classes else row["label"]
        # A name from a file of somebody's: it must not lead out of the folder, nor be hidden there.
        named = re.sub(r"^\.|[/\\\0]", "_", str(label)) or "_"
        if folders.setdefault(named, label) != label:
            raise DataError(f"{source}: the classes {folders[named]} and {label} would share a folder: rename one.")
        place = folder / named
        place.mkdir(parents=True, exist_ok=True)
        kind = next((kind for start, kind in _KINDS if content.startswith(start)), "jpg")
        (place / f"{at:07}.{kind}").write_bytes(content)
