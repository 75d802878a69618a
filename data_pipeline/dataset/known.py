"""What the index of a run knew when it began, so that a run goes on where files became unreadable or vanished since.

It travels in the run's checkpoint. Files keep their places by it: what is bad or gone now is quarantined there, and
whatever would put an image in another place, or make it another image, is refused by name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_pipeline.dataset.layouts import Listing
from data_pipeline.dataset.probe import Probe
from data_pipeline.errors import DataError
from data_pipeline.files import MAX_BYTES

_REMEDY = "or start a new run (--pretrained with this run's folder begins with its weights)"


@dataclass(frozen=True)
class Known:
    """classes, in their order. files: split -> name relative to the root -> (label, width, height, orientation, kind),
    in the order of the split. excluded: names of files that the run left out from the beginning."""

    classes: tuple[str, ...]
    files: dict[str, dict[str, tuple[int, ...]]]
    excluded: frozenset[str]

    def pack(self) -> bytes:
        files = {split: [[name, *fields] for name, fields in held.items()] for split, held in self.files.items()}
        value = {"classes": self.classes, "files": files, "excluded": sorted(self.excluded)}
        return zlib.compress(json.dumps(value).encode(), 6)

    @staticmethod
    def unpack(content: bytes) -> Known:
        """
        Raises:
            ValueError: it is not what `pack` made.
        """
        try:
            value = json.loads(zlib.decompressobj().decompress(content, MAX_BYTES))
            files = {
                split: {str(name): tuple(map(int, fields)) for name, *fields in held}
                for split, held in value["files"].items()
            }
            return Known(tuple(value["classes"]), files, frozenset(value["excluded"]))
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its list of files is damaged ({error})") from error

    def probe(self, split: str, name: str) -> Probe:
        _, width, height, orientation, kind = self.files[split][name]
        return Probe(width, height, orientation, kind, None)


def place_as_known(root: Any, listing: Listing, known: Known) -> dict[str, list[tuple[str, int]]]:
    """`listing.files` becomes what the run began with, in its order; the additions, by split, which the caller refuses
    where they can be read.

    Raises:
        DataError: the classes differ, or a file has another label.
    """
    if tuple(listing.classes) != known.classes:
        raise DataError(f"{root} {_class_difference(listing.classes, known.classes)}: give the data back, {_REMEDY}.")
    added: dict[str, list[tuple[str, int]]] = {}
    for split, held in known.files.items():
        for name, label in listing.files.get(split, []):
            if name in known.excluded:
                continue
            if name not in held:
                added.setdefault(split, []).append((name, label))
            elif held[name][0] != label:
                was, now = (listing.classes[at] for at in (held[name][0], label))
                raise DataError(
                    f'{root}/{name} was of class "{was}" when the run began and is "{now}" now: undo that, {_REMEDY}.'
                )
        listing.files[split] = [(name, label) for name, (label, *_) in held.items()]
    return added


def _class_difference(now: Iterable[str], before: Iterable[str]) -> str:
    if gone := sorted(set(before) - set(now)):
        return f'has no class "{gone[0]}" any more, which it had when the run began'
    if new := sorted(set(now) - set(before)):
        return f'has the class "{new[0]}", which it had not when the run began'
    return "has its classes in another order than when the run began"


def went_bad(root: Any, known: Known, probes: dict[str, Probe]) -> dict[str, dict[int, str]]:
    """split -> position -> why: files of the run that cannot be read now; their probes become what they were.

    Raises:
        DataError: a file is another picture now.
    """
    bad: dict[str, dict[int, str]] = {}
    for split, held in known.files.items():
        for at, name in enumerate(held):
            before, now = known.probe(split, name), probes[name]
            if now.reason is not None:
                bad.setdefault(split, {})[at] = now.reason
            elif now[:2] != before[:2]:
                raise DataError(
                    f"{root}/{name} had {before.width} x {before.height} pixels when the run began and has "
                    f"{now.width} x {now.height} now: put the file back, {_REMEDY}."
                )
    for split, positions in bad.items():
        names = list(known.files[split])
        probes |= {names[at]: known.probe(split, names[at]) for at in positions}
    return bad


def refuse_additions(root: Any, added: dict[str, list[tuple[str, int]]], probes: dict[str, Probe]) -> None:
    """
    Raises:
        DataError: one of them can be read, and would move all that come after it.
    """
    for split, files in added.items():
        for name, _ in files:
            if probes[name].reason is None:
                raise DataError(
                    f"{root}/{name} is new among the {split} images since the run began: take it away, {_REMEDY}."
                )
