"""A validation split where a data set has none: a share of each class, drawn by a hash of the files' paths.

It is a function of the paths and pictures alone, so that a resumed run, another process and another machine draw the
same. Copies of a photo, re-encoded or resized ones too, stay on one side: a model would recognise them.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.dataset.folds import Folds
from data_pipeline.dataset.formats import FORMATS
from data_pipeline.dataset.known import Known
from data_pipeline.dataset.layouts import Listing
from data_pipeline.dataset.probe import PARSE_ERRORS
from data_pipeline.files import read_regular

VAL_FRACTION = 0.2


SIDE = 8  # of a thumbnail, in pixels
_APART = 3.0  # root mean square of the differences of two thumbnails, of 255, from which photos are different ones
_ROWS = 1024  # thumbnails held against all others at once

File = tuple[str, int]


def thumbnail(path: str) -> bytes:
    """SIDE x SIDE x 3 pixels of a photo; none where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(read_regular(path)), formats=FORMATS) as image:
                image.draft("RGB", (8 * SIDE, 8 * SIDE))
                return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()
    except (OSError, Image.DecompressionBombError, *PARSE_ERRORS):
        return b""


def thumbnails(paths: Sequence[str]) -> list[bytes]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(thumbnail, paths))


def divide(files: Sequence[File], thumbs: Sequence[bytes], share: float | Folds) -> list[File]:
    """Those of the files (name, label) that validate, in their order; thumbs: of each. share: a part of each class."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for at, (_, label) in enumerate(files):
        by_class[label].append(at)
    drawn: set[int] = set()
    for rows in by_class.values():
        names, seen = [files[at][0] for at in rows], [thumbs[at] for at in rows]
        chosen = _fold(names, seen, share) if isinstance(share, Folds) else _draw(names, seen, share)
        drawn |= {rows[at] for at in chosen}
    return [files[at] for at in sorted(drawn)]


def divide_as_known(listing: Listing, known: Known) -> Listing:
    """The listing with the split that a run began with; new files count as training's."""
    before = known.files["val"]
    files = listing.files["train"]
    split = {
        "train": [file for file in files if file[0] not in before],
        "val": [file for file in files if file[0] in before],
    }
    return listing._replace(files=split, divide=False)


def _draw(names: Sequence[str], thumbs: Sequence[bytes], fraction: float) -> set[int]:
    """Positions of a class's files that validate: a share of them, at least one and not all where there are two."""
    if len(names) < 2:
        return set()
    target = min(max(1, round(fraction * len(names))), len(names) - 1)
    groups = _groups_in_order(names, thumbs)
    drawn: set[int] = set()
    for group in groups:
        if len(drawn) + len(group) <= target:
            drawn |= set(group)
    smallest = min(groups, key=len)
    return drawn or set(smallest)


def _fold(names: Sequence[str], thumbs: Sequence[bytes], folds: Folds) -> set[int]:
    """The same for one of several folds of about equal size, which share no image and leave none out."""
    drawn: list[set[int]] = [set() for _ in range(folds.parts)]
    for group in _groups_in_order(names, thumbs):
        min(drawn, key=len).update(group)
    return drawn[folds.fold]


def _groups_in_order(names: Sequence[str], thumbs: Sequence[bytes]) -> list[list[int]]:
    """Positions of pictures that look the same, ordered by a hash of their paths."""
    groups = _groups(thumbs)
    if len(groups) == 1:  # all alike
        groups = [[at] for at in range(len(names))]
    return sorted(groups, key=lambda group: min(_hash(names[at]) for at in group))


def _hash(name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(name), digest_size=16).digest()


def _groups(thumbs: Sequence[bytes]) -> list[list[int]]:
    """Positions of pictures that look the same, directly or through others."""
    size = 3 * SIDE * SIDE
    parent = list(range(len(thumbs)))

    def root_of(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    known = np.array([at for at, thumb in enumerate(thumbs) if len(thumb) == size], np.int64)
    pixels: NDArray[np.float32] = np.array([np.frombuffer(thumbs[at], np.uint8) for at in known], np.float32)
    if len(known):
        pixels -= pixels.mean()  # smaller numbers, and the differences lose fewer digits
    squares = (pixels * pixels).sum(-1)
    for first in range(0, len(known), _ROWS):
        some = slice(first, first + _ROWS)
        distances = squares[some, None] + squares[None] - 2 * pixels[some] @ pixels.T
        for a, b in np.argwhere(distances < size * _APART**2).tolist():
            if first + a < b:
                parent[root_of(int(known[first + a]))] = root_of(int(known[b]))
    groups: dict[int, list[int]] = defaultdict(list)
    for at in range(len(thumbs)):
        groups[root_of(at)].append(at)
    return list(groups.values())
