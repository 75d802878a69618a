"""Folders of photos as an index: every image that can be decoded, its label, its oriented size.

The forms of data: Food-101's official layout (images/<class>/<id>.jpg with meta/train.json and meta/test.json, or the
same as .txt), train/<class>/* with val/, valid/ or validation/<class>/* (or test/), a folder a class, photos with a
.csv (data_pipeline/dataset/table.py), shards (data_pipeline/dataset/tar.py), and "sample", which is generated. Where
there is nothing to validate on, a share of each class is drawn (data_pipeline/dataset/divide.py).

Of every file the header and the end are read (data_pipeline/dataset/probe.py); files that fail are left out and
counted. The result is remembered in the user's cache folder by path, size and modification time.
"""

import hashlib
import json
import os
from bisect import insort
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.divide import VAL_FRACTION, divide, divide_as_known, thumbnails
from data_pipeline.dataset.folds import Folds
from data_pipeline.dataset.huggingface import hub_name, unpacked
from data_pipeline.dataset.index_cache import cache_file, read_cache, stamp_of, stamps_of, write_cache
from data_pipeline.dataset.known import Known, place_as_known, refuse_additions, went_bad
from data_pipeline.dataset.layouts import LAYOUTS, OFFLINE, VAL_FOLDERS, Listing, listed_in_folders, listed_in_metadata
from data_pipeline.dataset.probe import Probe, scan_files
from data_pipeline.dataset.synthetic import SAMPLE, make_sample, user_cache_folder
from data_pipeline.dataset.table import find_table, listed_in_table
from data_pipeline.dataset.tar import Sample, contents, find_shards, read_shard
from data_pipeline.errors import DataError
from data_pipeline.files import expanded, words_of

NAME = "food-101"  # the official archive's folder
_NO_TEST = "leave --split test out, or name data that has one with --data"
_CHOSEN_ON_TEST = "where these images validated a run, its best epoch was chosen on them, which makes figures flatter"
_SHARDS_AT_ONCE = 8  # read at once: a network's delays add up


@dataclass(frozen=True)
class Split:
    """One split; row i of every field is image i."""

    paths: tuple[str, ...]
    """Files, or members of shards (`data_pipeline.dataset.tar.TarMember`)."""
    labels: NDArray[np.int64]
    """[N]: position of the class in `Index.classes`."""
    sizes: NDArray[np.int32]
    """[N, 2]: width and height in pixels, after EXIF rotation."""
    orientations: NDArray[np.uint8]
    """[N]: EXIF orientation, 1 to 8; 1 is upright."""
    kinds: NDArray[np.uint8]
    """[N]: position in `data_pipeline.dataset.probe.KINDS`."""

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Index:
    """What a folder of photos holds."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    """"train" and "val"."""
    excluded: tuple[tuple[str, str], ...]
    """(path, reason) of every file that was left out."""
    fingerprint: str
    """Hash of classes, relative paths, labels and sizes: equal where a run can be resumed."""
    content: str
    """The same with every file's length and modification time: equal where decoded pixels can be reused."""
    quarantined: dict[str, dict[int, str]] = field(default_factory=dict)
    """split -> position -> why: images that the loaders must not ask for, though they keep their places."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the data set was read, a sentence each without its full stop."""

    def known(self) -> Known:
        """What `build_index` needs to build this index again when files are gone."""
        start = len(str(self.root)) + 1
        files: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, split in self.splits.items():
            fields = zip(
                split.labels.tolist(), *split.sizes.T.tolist(), split.orientations.tolist(), split.kinds.tolist(),
                strict=True,
            )  # fmt: skip
            files[name] = {path[start:]: tuple(one) for path, one in zip(split.paths, fields, strict=True)}
        return Known(self.classes, files, frozenset(path[start:] for path, _ in self.excluded))

    def quarantine_records(self, found: Iterable[tuple[str, str]]) -> list[list[Any]]:
        """What `build_index` needs to know of files (path, reason) that became unreadable during a run; of
        JSON's types."""
        reasons, records = dict(found), []
        for name, split in self.splits.items():
            for at, path in enumerate(split.paths):
                if path in reasons:
                    fields = [*split.sizes[at], split.orientations[at], split.kinds[at]]
                    relative = path[len(str(self.root)) + 1 :]
                    records.append([name, relative, int(split.labels[at]), *map(int, fields), reasons[path]])
        return records


def _listed_in_shards(root: Path, splits: dict[str, list[str]], cache: Path | None) -> Listing:
    """train*.tar and val*.tar; a shard is read where `cache` does not know it as it is now."""
    file = None if cache is None else cache_file(root, cache, "-shards")
    known = {} if file is None else read_cache(file)
    stamps = {name: stamp_of(f"{root}/{name}") for names in splits.values() for name in names}
    unknown = [name for name, stamp in stamps.items() if name not in known or known[name][:2] != stamp]
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        found = dict(zip(unknown, pool.map(lambda name: read_shard(f"{root}/{name}"), unknown), strict=True))
    samples = {
        name: found[name] if name in found else [Sample(*fields) for fields in known[name][2]] for name in stamps
    }
    if file is not None and (unknown or stamps.keys() != known.keys()):
        write_cache(file, {name: [*stamps[name], samples[name]] for name in stamps})
    return Listing(*contents(root, splits, samples))


def list_files(
    data: Path, cache: Path | None = None, *, drawn: bool = False, test: bool = False
) -> tuple[Path, Listing]:
    """The absolute folder of a data set, and what it names. cache: where what was found in shards is remembered.
    drawn: validation comes from training rather than from a test split. test: as in `build_index`.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    root = data if hub_name(data) else Path(os.path.abspath(expanded(data)))
    if (root / NAME / "meta").is_dir():  # where `python -m data_pipeline prepare --root` put it
        root = root / NAME
    try:
        root = unpacked(root, cache) or root
        photos = (root / "train").is_dir() or ((root / "meta").is_dir() and (root / "images").is_dir())
        if not photos and (shards := find_shards(root)):
            if test:
                raise DataError(f"{root} has shards, of which none is for testing: {_NO_TEST}.")
            return shards[0], _listed_in_shards(*shards, cache)
        return (root if root.is_dir() else root.parent), _list(root, drawn, test)
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be read ({words_of(error)}): check it and its permissions."
        ) from error


def _list(root: Path, drawn: bool, test: bool) -> Listing:
    if not root.exists():
        target = root.parent if root.name == NAME else root
        raise DataError(
            f"There is no folder {root}: expected {LAYOUTS}; `python -m data_pipeline prepare --root {target}` "
            f"downloads Food-101, {OFFLINE}."
        )
    if root.is_file() and find_table(root):
        return listed_in_table(root, drawn, test)
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder: expected {LAYOUTS}; {OFFLINE}.")
    if not any(root.iterdir()):
        raise DataError(f"The folder {root} is empty: expected {LAYOUTS}; {OFFLINE}.")
    if (root / "meta").is_dir() and (root / "images").is_dir():
        listing = listed_in_metadata(root)
        if test and listing.divide:
            raise DataError(f"{root} has no meta/test.json or meta/test.txt: {_NO_TEST}.")
        return listing._replace(notes=[_CHOSEN_ON_TEST]) if test else listing
    if not (root / "train").is_dir() and (table := find_table(root)):
        return listed_in_table(table, drawn, test)
    if (root / "train").is_dir():
        return _list_split_folders(root, drawn, test)
    if test:
        raise DataError(f"{root} has no test/: {_NO_TEST}.")
    names = [name for name in sorted(os.listdir(root)) if not name.startswith(".") and (root / name).is_dir()]
    if named := [name for name in names if name.lower() in (*VAL_FOLDERS, "test", "train", "training")]:
        raise DataError(f"{root} has {named[0]}/ but no train/: expected {LAYOUTS}.")
    if len(names) >= 2:
        listing = listed_in_folders(root, root, None)
        if listing.files["train"]:
            return _without_empty(listing)
    raise DataError(f"{root} holds no data set that is known here: expected {LAYOUTS}; {OFFLINE}.")


def _list_split_folders(root: Path, drawn: bool, test: bool) -> Listing:
    train = root / "train"
    there = [name for name in VAL_FOLDERS if (root / name).is_dir()]
    has_test = (root / "test").is_dir()
    if test:
        if not has_test:
            raise DataError(f"{root} has no test/: {_NO_TEST}.")
        listing = listed_in_folders(root, train, root / "test")
        return listing if there or drawn else listing._replace(notes=[_CHOSEN_ON_TEST])
    if there:
        listing = listed_in_folders(root, train, root / there[0])
        ignored = there[1:] + ["test"] * has_test
        said = [f"{root} has {' and '.join(f'{name}/' for name in ignored)} too, which is not looked at"]
        return listing._replace(notes=said if ignored else [])
    if has_test and not drawn:
        said = [
            f"{root} has no {'/, '.join(VAL_FOLDERS)}/: the best epoch is chosen on test/, which makes its figures "
            "flatter; --val-fraction 0.2 keeps a part of train/ for that instead"
        ]
        return listed_in_folders(root, train, root / "test")._replace(notes=said)
    listing = listed_in_folders(root, train, None)
    return listing._replace(notes=["test/ is not looked at"]) if has_test else listing


def _without_empty(listing: Listing) -> Listing:
    """Folders without a photo are no classes where nothing else tells what is one."""
    used = sorted({label for _, label in listing.files["train"]})
    place = {label: at for at, label in enumerate(used)}
    files = [(name, place[label]) for name, label in listing.files["train"]]
    empty = [name for label, name in enumerate(listing.classes) if label not in place]
    notes = [f"no classes, as they hold no photo: {', '.join(f'{name}/' for name in empty)}"] if empty else []
    return listing._replace(classes=[listing.classes[label] for label in used], files={"train": files}, notes=notes)


def _probe_of(fields: Sequence[int]) -> Probe:
    width, height, orientation, kind = fields
    return Probe(width, height, orientation, kind, None)


def _probe_all(root: Path, listing: Listing, stamps: dict[str, list[int]], cache: Path) -> dict[str, Probe]:
    """Every file's probe by relative path, from the cache where the file has not changed since."""
    file = cache_file(root, cache)
    known, fresh = read_cache(file), {}
    probes: dict[str, Probe] = {}
    unknown = []
    for name, stamp in stamps.items():
        entry = known.get(name)
        # Failures are looked at again: what was unreadable may have been repaired without a trace.
        if isinstance(entry, list) and len(entry) == 6 and entry[:2] == stamp:
            probes[name] = _probe_of(entry[2:])
        else:
            unknown.append(name)
    if unknown:
        probes.update(zip(unknown, scan_files([listing.path(root, name) for name in unknown]), strict=True))
        for name, stamp in stamps.items():
            probe = probes[name]
            if probe.reason is None:
                fresh[name] = [*stamp, *probe[:4]]
        if fresh != known:
            write_cache(file, fresh)
    return probes


def _split(root: Path, listing: Listing, split: str, probes: dict[str, Probe]) -> Split:
    kept = [(name, label) for name, label in listing.files[split] if probes[name].reason is None]
    found = [probes[name] for name, _ in kept]
    return Split(
        paths=tuple(listing.path(root, name) for name, _ in kept),
        labels=np.array([label for _, label in kept], np.int64),
        sizes=np.array([(probe.width, probe.height) for probe in found], np.int32).reshape(-1, 2),
        orientations=np.array([probe.orientation for probe in found], np.uint8),
        kinds=np.array([probe.kind for probe in found], np.uint8),
    )


def _check(root: Path, listing: Listing, splits: dict[str, Split], excluded: list[tuple[str, str]], test: bool) -> None:
    if len(listing.classes) < 2:
        raise DataError(f"{root} has {len(listing.classes)} class(es), and a classifier needs two or more.")
    for split, found in splits.items():
        if len(found) == 0:
            why = f" ({excluded[0][0]}: {excluded[0][1]})" if excluded else ""
            name = "test" if test and split == "val" else split
            raise DataError(f"No {name} image of {root} can be read{why}: check that the photos are complete.")
    counts = np.bincount(splits["train"].labels, minlength=len(listing.classes))
    if (counts == 0).any():
        name = listing.classes[int(counts.argmin())]
        raise DataError(f'The class "{name}" of {root} has no readable training image: add some or remove the class.')


def build_index(
    data: str | Path,
    val_fraction: float | None = None,
    *,
    cache_dir: str | Path | None = None,
    folds: Folds | None = None,
    test: bool = False,
    quarantined: Sequence[Sequence[Any]] = (),
    known: Known | None = None,
    divided_as: Known | None = None,
) -> Index:
    """The index of a folder of photos, of shards, or of the generated "sample".

    Files that cannot be decoded, and files that the metadata names but are missing, are left out and listed in
    `excluded`. `cache_dir` (default: the user's cache folder) remembers what was found; where it cannot be written,
    the index is built anew each time. `quarantined`: records of `Index.quarantine_records`, of files that became
    unreadable during the run that is continued: they keep their places, whatever became of them, so that all others
    do. `known`: what that run began with; its files that are bad or gone now are quarantined in their places.
    `val_fraction`: share of each class that validates where the data set has no validation split (default: 0.2).

    `folds`: instead of a share, the one of several that validates. `divided_as`: what a run began with, whose share is
    drawn again, whatever came since. `test`: "val" is the data set's test split.

    Raises:
        DataError: no folder, no images, a class without images, damaged metadata, no permission; `folds` where there
            is a validation split; beside `known`, new images, other labels or sizes.
    """
    cache = user_cache_folder() if cache_dir is None else Path(cache_dir)
    drawn = val_fraction is not None or folds is not None
    place = make_sample(cache) if str(data) == SAMPLE else Path(data)
    root, listing = list_files(place, cache, drawn=drawn, test=test)
    has_val = not listing.divide
    if listing.divide and (began := known or divided_as) is not None and "val" in began.files:
        listing = divide_as_known(listing, began)
    added = {} if known is None else place_as_known(root, listing, known)
    kept_places = {record[1]: _probe_of(record[3:7]) for record in quarantined}
    for split, name, label, *_ in quarantined:
        if (name, label) not in listing.files[split]:  # a folder lists only what is there
            insort(listing.files[split], (name, label), key=listing.place)
    names = list(dict.fromkeys(name for held in (listing.files, added) for files in held.values() for name, _ in files))
    stamps = stamps_of({name: listing.path(root, name) for name in names})
    probes = _probe_all(root, listing, stamps, cache) | kept_places
    refuse_additions(root, added, probes)
    notes = list(listing.notes)
    if has_val and folds is not None and known is None and not test:
        raise DataError(f"--folds, and {root} has images for validation: leave the flag out, or name train/ alone.")
    if listing.divide:
        listing = _divided(root, listing, probes, stamps, cache, folds or val_fraction or VAL_FRACTION)
        share = f"{val_fraction or VAL_FRACTION:.0%} of each class"
        if folds is not None:
            share = f"fold {folds.fold} of {folds.parts}, which --fold 0 to {folds.parts - 1} name"
        notes.append(
            f"{len(listing.files['val'])} images, {share}, are kept for validation, drawn by a hash of their paths, "
            "copies together (--val-fraction)"
        )
    elif has_val and val_fraction is not None and known is None and not test:
        notes.append("--val-fraction has no effect here: the data set has images for validation")
    waiting = {} if known is None else went_bad(root, known, probes)
    excluded = [(f"{root}/{name}", reason) for name in names if (reason := probes[name].reason) is not None]
    excluded += listing.left_out
    if known is not None:
        named = {path for path, _ in excluded}
        missed = (f"{root}/{name}" for name in sorted(known.excluded))
        excluded += [(path, "left out when the run began") for path in missed if path not in named]
    splits = {split: _split(root, listing, split, probes) for split in listing.files}
    _check(root, listing, splits, excluded, test)
    kept = [name for held in listing.files.values() for name, _ in held if probes[name].reason is None]
    listed = [
        listing.classes,
        {
            split: [[name, label, *probes[name][:2]] for name, label in files if probes[name].reason is None]
            for split, files in listing.files.items()
        },
    ]
    fingerprint, content = _hash(listed), _hash([listed, [stamps[name] for name in dict.fromkeys(kept)]])
    for split, name, *_, reason in quarantined:
        waiting.setdefault(split, {})[splits[split].paths.index(f"{root}/{name}")] = reason
    return Index(root, tuple(listing.classes), splits, tuple(excluded), fingerprint, content, waiting, tuple(notes))


def _divided(
    root: Path,
    listing: Listing,
    probes: dict[str, Probe],
    stamps: dict[str, list[int]],
    cache: Path,
    share: float | Folds,
) -> Listing:
    """The listing with a validation split that is drawn from the files that can be read; the others stay in training's,
    from which they are left out. Thumbnails are remembered in `cache`."""
    good = [file for file in listing.files["train"] if probes[file[0]].reason is None]
    place = cache_file(root, cache, "-thumbnails")
    remembered = read_cache(place)
    known = ((name, remembered.get(name, [0, 0])) for name, _ in good)
    thumbs = {name: bytes.fromhex(kept[2]) for name, kept in known if kept[:2] == stamps[name] and len(kept) == 3}
    if unknown := [name for name, _ in good if name not in thumbs]:
        thumbs |= zip(unknown, thumbnails([listing.path(root, name) for name in unknown]), strict=True)
        write_cache(place, {name: [*stamps[name], thumb.hex()] for name, thumb in thumbs.items()})
    val = divide(good, [thumbs[name] for name, _ in good], share)
    if good and not val:
        raise DataError(f"{root} has one photo a class, too few to validate on some: add photos, or a val/ folder.")
    drawn = set(val)
    train = [file for file in listing.files["train"] if file not in drawn]
    return listing._replace(files={"train": train, "val": val}, divide=False)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
