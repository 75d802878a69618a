"""A data set looked at as a whole: every file decoded, counted, hashed and held against the metadata."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from data_pipeline.dataset.formats import is_picture, suffix_of
from data_pipeline.dataset.index import list_files
from data_pipeline.dataset.layouts import Listing
from data_pipeline.dataset.probe import KINDS, Probe, decode_fully
from data_pipeline.dataset.tar import opened
from data_pipeline.files import patiently, words_of

_SHOWN = 20  # of each kind of finding; the counts are always those of all


@dataclass
class Report:
    """What `verify` found; paths are relative to the root."""

    root: Path
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """class -> split -> images that can be decoded"""
    kinds: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Files under images/ that no split names."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of pictures that are not read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are no photos of a class, by their ending."""
    notes: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of files with the same bytes."""
    leaks: list[list[str]] = field(default_factory=list)
    """Those of the duplicates whose files differ in class or split."""

    @property
    def empty(self) -> list[str]:
        """Classes without an image in one of the splits."""
        return [name for name, splits in self.counts.items() if not all(splits.values())]

    @property
    def sound(self) -> bool:
        return not (self.missing or self.extra or self.damaged or self.leaks or self.empty)


def verify(root: Path) -> Report:
    """Decode every pixel of every file of a data set, in any layout that `build_index` reads.

    Raises:
        DataError: there is no data set.
    """
    root, listing = list_files(root)
    homes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for split, files in listing.files.items():
        for name, label in files:
            homes[name].append((split, label))
    report = Report(root, {name: dict.fromkeys(listing.files, 0) for name in listing.classes})
    by_content: dict[bytes, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looked = pool.map(lambda name: _look(listing.path(root, name)), homes)
        console = Console(stderr=True)
        shown = track(looked, "decoding", len(homes), console=console, disable=not console.is_terminal, transient=True)
        for name, (probe, digest) in zip(homes, shown, strict=True):
            if probe is None or digest is None:
                report.missing.append(name)
                continue
            by_content[digest].append(name)
            if probe.reason is not None:
                report.damaged.append((name, probe.reason))
                continue
            report.kinds[KINDS[probe.kind]] += 1
            for split, label in homes[name]:
                report.counts[listing.classes[label]][split] += 1
    for path, reason in listing.left_out:
        report.left_out[suffix_of(path) or "no ending"] += 1
        if is_picture(path):
            report.damaged.append((path.removeprefix(f"{root}/"), reason))
    report.notes = list(listing.notes)
    if listing.divide:
        report.notes.append("there is no validation split: training keeps a share of each class for that")
    report.extra = _extra(root, listing)
    report.duplicates = [names for names in by_content.values() if len(names) > 1]
    report.leaks = [names for names in report.duplicates if len({home for n in names for home in homes[n]}) > 1]
    report.leaks += [[name] for name, places in homes.items() if len(set(places)) > 1]
    return report


def _look(path: str) -> tuple[Probe | None, bytes | None]:
    try:
        digest = patiently(lambda: _digest(path))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return Probe(0, 0, 1, 0, words_of(error)), path.encode("utf-8", "surrogatepass")
    return decode_fully(path, every_pixel=True), digest


def _digest(path: str) -> bytes:
    with opened(path) as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def _extra(root: Path, listing: Listing) -> list[str]:
    """Food-101's layout only: in folders, whatever is there counts."""
    if not (root / "meta").is_dir():
        return []
    named = {name for files in listing.files.values() for name, _ in files}
    found = (str(path.relative_to(root)) for path in (root / "images").rglob("*") if not path.is_dir())
    return sorted(name for name in found if name not in named)


def show(report: Report, console: Console) -> None:
    table = Table(title=escape(str(report.root)))
    table.add_column("class")
    splits = list(next(iter(report.counts.values()), {}))
    for split in splits:
        table.add_column(split, justify="right")
    for name, counts in report.counts.items():
        table.add_row(escape(name), *(str(counts[split]) for split in splits))
    console.print(table)
    for split in splits:
        counts_of = [counts[split] for counts in report.counts.values()]
        console.print(f"{split}: {sum(counts_of)} images, {min(counts_of)} to {max(counts_of)} a class")
    console.print("kinds: " + ", ".join(f"{count} {kind}" for kind, count in report.kinds.most_common()))
    if report.left_out:
        console.print("left out: " + ", ".join(f"{count} {kind}" for kind, count in report.left_out.most_common()))
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    _list(console, "missing", report.missing)
    _list(console, "extra (no split names them)", report.extra)
    _list(console, "damaged", [f"{name}: {reason}" for name, reason in report.damaged])
    _list(console, "without images in a split", report.empty)
    _list(console, "the same content twice", [" = ".join(names) for names in report.duplicates])
    _list(console, "in more than one class or split", [" = ".join(names) for names in report.leaks])
    console.print("sound" if report.sound else "not sound", style="green" if report.sound else "red")


def _list(console: Console, title: str, lines: list[str]) -> None:
    console.print(f"{title}: {len(lines)}")
    for line in lines[:_SHOWN]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > _SHOWN:
        console.print(f"  and {len(lines) - _SHOWN} more")
