"""A small generated data set in Food-101's layout: the default that a newcomer runs offline.

Ten classes of pattern in random colours, sizes, positions and contrast, so that the shapes carry the label and the
colours don't.
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

# Part of the folder's name: raise it when a change below alters a pixel.
VERSION = 1
TRAIN_PER_CLASS, VAL_PER_CLASS = 150, 30
_SHORT_SIDE, _LONGEST = (96, 150), 200

Field = NDArray[np.floating]


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastnet, by default ~/.cache/fastnet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "fastnet"


def _objects(shape: Callable[[Field, Field], Field]) -> Callable[..., Field]:
    """A pattern of one to five copies of `shape`, a signed distance in units of its radius (negative inside)."""

    def pattern(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
        height, width = x.shape
        distance = np.full(x.shape, np.inf, np.float32)
        for _ in range(rng.integers(1, 6)):
            radius = short * rng.uniform(0.16, 0.3)
            cx, cy = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
            angle = np.deg2rad(rng.uniform(-15, 15))
            u, v = (x - cx) / radius, (y - cy) / radius
            u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
            np.minimum(distance, shape(u, v) * radius, out=distance)
        return distance

    return pattern


def _polar(u: Field, v: Field) -> tuple[Field, Field]:
    return np.hypot(u, v), np.arctan2(v, u)


def _disc(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 0.9


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.85) - 0.2


def _square(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _triangle(u: Field, v: Field) -> Field:
    return np.maximum(0.87 * np.abs(u) - 0.5 * v - 0.5, v - 0.55)


def _cross(u: Field, v: Field) -> Field:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.27, v - 1), np.maximum(v - 0.27, u - 1))


def _star(u: Field, v: Field) -> Field:
    radius, angle = _polar(u, v)
    return radius - (0.72 + 0.4 * np.cos(5 * angle + np.pi / 2))


def _period(rng: np.random.Generator, short: float) -> float:
    return short * rng.uniform(0.16, 0.34)


def _wave(rng: np.random.Generator, along: Field, period: float) -> Field:
    """Distance to bands of random duty across `along`, in pixels, negative inside."""
    phase = (along / period + rng.uniform()) % 1
    return (np.abs(phase - 0.5) - rng.uniform(0.15, 0.35)) * period


def _horizontal(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    return _wave(rng, y + rng.uniform(-0.15, 0.15) * x, _period(rng, short))


def _vertical(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    return _wave(rng, x + rng.uniform(-0.15, 0.15) * y, _period(rng, short))


def _checkerboard(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    period = 1.5 * _period(rng, short)
    tilt = rng.uniform(-0.15, 0.15)
    u, v = (x + tilt * y) / period + rng.uniform(), (y - tilt * x) / period + rng.uniform()
    return np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v) * period / 4


def _zigzag(rng: np.random.Generator, x: Field, y: Field, short: float) -> Field:
    period = _period(rng, short)
    teeth = np.abs((x / (1.6 * period) + rng.uniform()) % 1 - 0.5) * 2
    return _wave(rng, y + 1.1 * period * teeth, period)


PATTERNS: dict[str, Callable[..., Field]] = {
    "checkerboard": _checkerboard,
    "cross": _objects(_cross),
    "disc": _objects(_disc),
    "horizontal_stripes": _horizontal,
    "ring": _objects(_ring),
    "square": _objects(_square),
    "star": _objects(_star),
    "triangle": _objects(_triangle),
    "vertical_stripes": _vertical,
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
