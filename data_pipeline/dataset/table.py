"""Photos whose labels are in a .csv: one row a photo, its path and its label, and perhaps its split."""

from __future__ import annotations

import csv
import os
import unicodedata
from pathlib import Path, PurePosixPath

from data_pipeline.dataset.formats import is_picture, is_read, why_not
from data_pipeline.dataset.layouts import VAL_FOLDERS, Listing, below
from data_pipeline.errors import DataError
from data_pipeline.files import open_regular

_PATH = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
_LABEL = ("label", "class", "class_name", "category", "target")
_SPLIT = ("split", "subset", "set")
_MOST = 1 << 16  # characters of a header


def find_table(root: Path) -> Path | None:
    """The .csv of a folder that names photos and labels, or `root` where it is a .csv; None where there is none.

    Raises:
        DataError: there is more than one, or `root` is a .csv that names none.
    """
    if root.is_file():
        if root.suffix.lower() != ".csv":
            return None
        if _columns(root) is None:
            raise DataError(f"{root} has no columns path and label: name them so in its first line.")
        return root
    tables = [file for file in sorted(root.glob("*.csv")) if file.is_file() and _columns(file) is not None]
    if len(tables) > 1:
        raise DataError(
            f"{root} has {len(tables)} tables of photos and labels ({tables[0].name}, {tables[1].name}, ...): name one "
            f"with --data {tables[0]}."
        )
    return tables[0] if tables else None


def _columns(file: Path) -> tuple[str, dict[str, str]] | None:
    """(delimiter, role -> the column's name) of a table of photos."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as rows:
            header = rows.readline(_MOST).rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        return None
    if "\r" in header:
        return None
    for delimiter in ",;\t":
        names = {name.strip().lower(): name for name in next(csv.reader([header], delimiter=delimiter), [])}
        roles = {"path": _PATH, "label": _LABEL, "split": _SPLIT}
        found = {role: names[name] for role, known in roles.items() for name in known[::-1] if name in names}
        if {"path", "label"} <= found.keys():
            return delimiter, found
    return None


def listed_in_table(file: Path, drawn: bool = False, test: bool = False) -> Listing:
    """The photos that a .csv names, relative to its folder; the others there are left out by name. drawn: where it has
    no validation split, one is drawn although it has a test split. test: its test split validates.

    Raises:
        DataError: there is no such split, it cannot be read, a row lacks something, or a photo is named twice.
    """
    columns = _columns(file)
    assert columns is not None, "find_table looked"
    delimiter, roles = columns
    root = file.parent
    found: dict[str, tuple[str, str]] = {}
    try:
        with open(open_regular(str(file))[0], encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter), 2):
                name, label = (str(row.get(roles[role]) or "").strip() for role in ("path", "label"))
                split = str(row.get(roles.get("split", "")) or "").strip().lower()
                where = f"line {number} of {file}"
                if not name or not label:
                    raise DataError(f"{where} lacks a path or a label: complete or remove it.")
                name = str(PurePosixPath(os.path.normpath(name)))
                if name.startswith(("/", "../")):
                    raise DataError(f'{where} names "{name}", which does not lie below {root}: put the table above it.')
                if name in found:
                    raise DataError(f'{where} names "{name}" a second time: name each photo once.')
                found[name] = unicodedata.normalize("NFC", label), split
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is not a table in UTF-8 ({error}): save it as UTF-8.") from error
    labels = {label for label, _ in found.values()}
    # Numbers keep their order.
    classes = sorted(labels, key=int) if all(map(_is_number, labels)) else sorted(labels)
    number_of = {label: at for at, label in enumerate(classes)}
    files: dict[str, list[tuple[str, int]]] = {}
    for name, (label, split) in sorted(found.items(), key=lambda item: (number_of[item[1][0]], item[0])):
        files.setdefault(_split_of(file, split), []).append((name, number_of[label]))
    others = [name for name in below(root, str(root)) if name[len(str(root)) + 1 :] not in found and name != str(file)]
    left_out = [(name, f"not named in {file.name}" if is_read(name) else why_not(name)) for name in others]
    left_out = [(name, reason) for name, reason in left_out if is_picture(name)]
    notes = [f"labels are those of {file}"]
    tested = files.pop("test", None)
    if test and tested is None:
        raise DataError(f"{file} has no split called test: leave --split test out, or call that of some photos so.")
    if tested is not None and "val" not in files and not drawn:
        notes.append(f"{file} has no split called val: the best epoch is chosen on its test photos")
    if tested is not None and (test or not (drawn or "val" in files)):
        files["val"] = tested
    files.setdefault("train", [])
    return Listing(classes, files, left_out=left_out, notes=notes, divide="val" not in files)


def _is_number(label: str) -> bool:
    return label.isdecimal() and len(label) <= 18


def _split_of(file: Path, split: str) -> str:
    if split in ("", "train", "training"):
        return "train"
    if split in VAL_FOLDERS:
        return "val"
    if split in ("test", "testing"):
        return "test"
    raise DataError(f'{file} has the split "{split}": call them train, val and test.')
