"""What a folder of photos names, in Food-101's layout or as a folder a class, whether or not it is there."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.dataset.formats import is_picture, is_read, why_not
from data_pipeline.dataset.tar import TarMember, order
from data_pipeline.errors import DataError
from data_pipeline.files import read_text

VAL_FOLDERS = ("val", "valid", "validation")
LAYOUTS = (
    "a folder a class, or train/<class>/* and val/<class>/*, or photos beside a .csv with the columns path and label, "
    "or images/<class>/*.jpg with meta/train.json and meta/test.json (Food-101's layout), or shards train*.tar and "
    "val*.tar"
)
OFFLINE = "`--data sample` works without any photos"


class Listing(NamedTuple):
    """The files that a data set names, whether or not they are there."""

    classes: list[str]
    files: dict[str, list[tuple[str, int]]]
    """split -> (path relative to the root, label)."""
    members: Mapping[str, TarMember] = {}
    """Those of the paths that lie in shards."""
    left_out: Sequence[tuple[str, str]] = ()
    """(path, reason) of files that have no place in `files`."""
    notes: Sequence[str] = ()
    """What a user should know of how the layout was read."""
    divide: bool = False
    """`files` has only "train", and validation is to be drawn from it."""

    def place(self, file: tuple[str, int]) -> tuple[int, tuple[str, str]]:
        """The key by which the files of folders and of shards are sorted."""
        return file[1], order(file[0]) if self.members else (file[0], "")

    def path(self, root: Path, name: str) -> str:
        return self.members.get(name) or f"{root}/{name}"


def _names(path: Path) -> list[str]:
    """Sorted entries of a folder, hidden ones left out."""
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def _by_class(where: Path, names: Iterable[str]) -> dict[str, str]:
    """Class -> its name as written. macOS writes é as two characters where others write one: both are one class.

    Raises:
        DataError: two names are one class.
    """
    found: dict[str, str] = {}
    for name in names:
        known = unicodedata.normalize("NFC", name)
        if known in found:
            raise DataError(
                f'{where} has the class "{known}" twice, under names that differ only in how their accents are stored '
                "(Unicode NFC and NFD): put the photos of both into one."
            )
        found[known] = name
    return dict(sorted(found.items()))


def listed_in_metadata(root: Path) -> Listing:
    """Food-101's layout: meta/{train,test}.json, {class: ["class/id", ...]}, or .txt, one "class/id" a line."""
    entries: dict[str, list[str]] = {}
    stems = {"train": "train", "val": "test"}
    if not any((root / "meta" / f"test{suffix}").is_file() for suffix in (".json", ".txt")):
        del stems["val"]
    for split, stem in stems.items():
        as_json, as_text = root / "meta" / f"{stem}.json", root / "meta" / f"{stem}.txt"
        if as_json.is_file():
            try:
                listed = json.loads(read_text(as_json))
                entries[split] = [str(entry) for group in listed.values() for entry in group]
            except (ValueError, AttributeError, TypeError, RecursionError) as error:
                raise DataError(f'{as_json} is not of the form {{"class": ["class/id", ...]}}: {error}.') from error
        elif as_text.is_file():
            entries[split] = _lines(as_text)
        else:
            raise DataError(f"{root} has no meta/{stem}.json or meta/{stem}.txt; expected {LAYOUTS}.")
    for split, listed in entries.items():
        for entry in listed:
            if entry.count("/") != 1 or entry.startswith("/") or ".." in entry.split("/"):
                raise DataError(f'meta lists "{entry}" for {split} in {root}, which is not of the form class/id.')
    written = _by_class(root / "meta", sorted({entry.split("/")[0] for listed in entries.values() for entry in listed}))
    classes = list(written)
    named = root / "meta" / "classes.txt"
    if named.is_file():
        # A class that the list names but no photo has keeps its place, so that labels stay those of the full set.
        classes = sorted({*classes, *(unicodedata.normalize("NFC", name) for name in _lines(named))})
    label = {name: number for number, name in enumerate(classes)}
    # The folder's name may be stored in the other form than the list's.
    there = {unicodedata.normalize("NFC", name): name for name in _names(root / "images")}
    folder = {
        name: name if (root / "images" / name).is_dir() else there.get(known, name) for known, name in written.items()
    }
    files = {
        split: [
            (f"images/{folder[name]}/{photo}.jpg", label[unicodedata.normalize("NFC", name)])
            for name, photo in (entry.split("/") for entry in listed)
        ]
        for split, listed in entries.items()
    }
    return Listing(classes, files, divide="val" not in files)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}): save it as UTF-8.") from error


def listed_in_folders(root: Path, train: Path, val: Path | None) -> Listing:
    """<class>/* in the folders `train` and, where there is one, `val`, which lie in `root` or are it; classes are the
    folders of training. Photos may lie at any depth below their class."""
    folders = {"train": train} if val is None else {"train": train, "val": val}
    found = {
        split: _by_class(path, [name for name in _names(path) if (path / name).is_dir()])
        for split, path in folders.items()
    }
    classes = list(found["train"])
    if unknown := sorted(set(found.get("val", ())) - set(classes)):
        raise DataError(
            f'{folders["val"]} has the class "{unknown[0]}", which {folders["train"]} does not have: '
            "both need the same class folders."
        )
    files: dict[str, list[tuple[str, int]]] = {}
    left_out: list[tuple[str, str]] = []
    for split, path in folders.items():
        beside = [name for name in _names(path) if not (path / name).is_dir()]
        left_out += [
            (f"{path}/{name}", "beside the class folders, so of no class") for name in beside if is_picture(name)
        ]
        files[split] = []
        for label, name in enumerate(classes):
            if name not in found[split]:
                continue
            for file in sorted(below(path / found[split][name], f"{path}/{found[split][name]}")):
                if is_read(file):
                    files[split].append((file[len(str(root)) + 1 :], label))
                else:
                    left_out.append((file, why_not(file)))
    return Listing(classes, files, left_out=left_out, divide=val is None)


def below(folder: Path, path: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a folder, hidden ones left out; links are followed, but for those to a folder that they lie
    in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for name in _names(folder):
        if (folder / name).is_dir() and not is_read(name):
            yield from below(folder / name, f"{path}/{name}", (*above, real))
        else:
            yield f"{path}/{name}"
