"""A small generated data set in Food-101's layout: the default that a newcomer runs offline.

Ten classes of pattern in random colours, sizes, positions and contrast, so that the pattern carries the label and the
colours don't; patterns fill the picture, so that any crop and any flip shows them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.files import expanded

SAMPLE = "sample"  # what --data calls it

# Part of the folder's name: raise it when a change below alters a pixel.
VERSION = 2
TRAIN_PER_CLASS, VAL_PER_CLASS = 150, 30
_SHORT_SIDE, _LONGEST = (96, 150), 200

Field = NDArray[np.floating]


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastnet, by default ~/.cache/fastnet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and os.path.isabs(base) else expanded(Path("~/.cache"))) / "fastnet"


def _period(rng: np.random.Generator, short: float) -> float:
    return short * rng.uniform(0.16, 0.34)


def _bands(rng: np.random.Generator, along: Field, period: float) -> Field:
    """Bands of random duty across `along`."""
    phase = (along / period + rng.uniform()) % 1
    return (np.abs(phase - 0.5) - rng.uniform(0.15, 0.35)) * period


def _horizontal_stripes(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    return _bands(rng, y + rng.uniform(-0.15, 0.15) * x, _period(rng, short))


def _vertical_stripes(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    return _bands(rng, x + rng.uniform(-0.15, 0.15) * y, _period(rng, short))


def _diagonal_stripes(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    # Either way: a flip turns one into the other.
    angle = np.deg2rad(rng.uniform(38, 52)) * rng.choice((-1, 1))
    return _bands(rng, x * np.cos(angle) + y * np.sin(angle), _period(rng, short))


def _zigzag(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    period = _period(rng, short)
    teeth = np.abs((x / (1.6 * period) + rng.uniform()) % 1 - 0.5) * 2
    return _bands(rng, y + 1.1 * period * teeth, period)


def _polar(rng: np.random.Generator, x: Field, y: Field) -> tuple[Field, Field]:
    """Radius and angle about a random centre."""
    height, width = x.shape
    u, v = x - rng.uniform(0.25, 0.75) * width, y - rng.uniform(0.25, 0.75) * height
    return np.hypot(u, v), np.arctan2(v, u)


def _rings(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    radius, _ = _polar(rng, x, y)
    return _bands(rng, radius, _period(rng, short))


def _rays(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    radius, angle = _polar(rng, x, y)
    count = int(rng.integers(6, 14))
    return _bands(rng, angle * count / (2 * np.pi), 1.0) * radius * (2 * np.pi / count)


def _lattice(rng: np.random.Generator, x: Field, y: Field, period: float) -> tuple[Field, Field]:
    """Position in a cell of a slightly turned square lattice, -0.5 to 0.5 in both directions."""
    angle = np.deg2rad(rng.uniform(-10, 10))
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (u / period + rng.uniform()) % 1 - 0.5, (v / period + rng.uniform()) % 1 - 0.5


def _checkerboard(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    period = 1.5 * _period(rng, short)
    u, v = _lattice(rng, x, y, period)
    return np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v) * period / 4


def _dots(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    period = 1.2 * _period(rng, short)
    return (np.hypot(*_lattice(rng, x, y, period)) - rng.uniform(0.25, 0.42)) * period


def _grid(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    period = 1.2 * _period(rng, short)
    u, v = _lattice(rng, x, y, period)
    return (np.minimum(np.abs(u), np.abs(v)) - rng.uniform(0.07, 0.17)) * period


def _blobs(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    """Camouflage: where a sum of waves in all directions is high."""
    length = short * rng.uniform(0.35, 0.6)
    total = np.zeros_like(x)
    for angle in np.pi * (np.arange(8) + rng.uniform(size=8)) / 8:
        along = (x * np.cos(angle) + y * np.sin(angle)) / length
        total += np.cos(2 * np.pi * (along + rng.uniform()))
    return (total + rng.uniform(-1, 1)) * length / 12


# Each gives the signed distance of every pixel to the figure's edge, in pixels (roughly), negative inside.
PATTERNS: dict[str, Callable[[np.random.Generator, Field, Field, float], Field]] = {
    "blobs": _blobs,
    "checkerboard": _checkerboard,
    "diagonal_stripes": _diagonal_stripes,
    "dots": _dots,
    "grid": _grid,
    "horizontal_stripes": _horizontal_stripes,
    "rays": _rays,
    "rings": _rings,
    "vertical_stripes": _vertical_stripes,
    "zigzag": _zigzag,
}


def _two_colors(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two random colours of clearly different brightness."""
    while True:
        first, second = rng.uniform(20, 235, (2, 3))
        if abs((first - second) @ (0.299, 0.587, 0.114)) > 60:
            return first, second


def render(name: str, number: int) -> NDArray[np.uint8]:
    """Picture `number` of class `name`: [H, W, 3], sides between 96 and 200 pixels; the same every time."""
    rng = np.random.Generator(np.random.Philox(key=[sorted(PATTERNS).index(name), number]))
    short = int(rng.integers(*_SHORT_SIDE, endpoint=True))
    long = min(_LONGEST, int(short * rng.uniform(1, 1.5)))
    width, height = (long, short) if rng.uniform() < 0.5 else (short, long)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    inside = np.clip(0.5 - PATTERNS[name](rng, x, y, short), 0, 1)[:, :, None]
    ink, paper = _two_colors(rng)
    # A slope of brightness over the picture, and grain: flat colours would be too easy for a histogram.
    slope = rng.uniform(-45, 45, 2)
    shade = (slope[0] * (x / width - 0.5) + slope[1] * (y / height - 0.5))[:, :, None]
    grain = rng.standard_normal((height, width, 3), np.float32) * rng.uniform(4, 16)
    picture = paper + (ink - paper) * inside + shade + grain
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _write(folder: Path, names: list[str]) -> None:
    def save(name: str, number: int) -> None:
        path = folder / "images" / name / f"{number:04d}.jpg"
        Image.fromarray(render(name, number)).save(path, quality=88)

    for name in names:
        (folder / "images" / name).mkdir(parents=True)
    count = TRAIN_PER_CLASS + VAL_PER_CLASS
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(save, name, number) for name in names for number in range(count)]
        for job in jobs:
            job.result()
    (folder / "meta").mkdir()
    (folder / "meta" / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "meta" / "labels.txt").write_text("".join(f"{name.replace('_', ' ').title()}\n" for name in names))
    for split, numbers in (("train", range(TRAIN_PER_CLASS)), ("test", range(TRAIN_PER_CLASS, count))):
        listed = {name: [f"{name}/{number:04d}" for number in numbers] for name in names}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        (folder / "meta" / f"{split}.txt").write_text("".join(f"{s}\n" for one in listed.values() for s in one))


def make_sample(cache: Path | None = None) -> Path:
    """The folder that holds the sample, generated on first use.

    It is built beside its final place and renamed, so a folder that exists is complete, whoever was interrupted.

    Raises:
        DataError: the cache folder cannot be written to.
    """
    cache = user_cache_folder() if cache is None else cache
    target = cache / f"sample-v{VERSION}"
    if target.is_dir():
        return target
    scratch = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
        _write(scratch, sorted(PATTERNS))
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError as error:
        # Another process may have finished the same folder first; its pictures are the same.
        if not target.is_dir():
            raise DataError(
                f"The sample data set cannot be written to {target} ({error.strerror or error}): "
                "free some space there or set XDG_CACHE_HOME to a folder that you can write to."
            ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
