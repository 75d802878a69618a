"""The CPU operations' library: compiled at first use into the user's cache, in seconds, and found there later.

A library's name holds the hash of what it was made from (sources, compiler, flags, which say what the CPU must have)
and that of its own bytes: another CPU's, another compiler's or a torn one is never loaded. It is written beside its
place and renamed; of processes that build at once the first does, under a lock, and the others find its work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

Level = Literal["amx", "avx512-bf16", "avx512", "avx2", "neon", "plain"]

SOURCES = Path(__file__).with_name("src")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
LEVELS: dict[Level, tuple[str, ...]] = {
    "amx": (*AVX512_BF16, "-mamx-tile", "-mamx-bf16"), "avx512-bf16": AVX512_BF16, "avx512": AVX512, "avx2": AVX2,
    "neon": (), "plain": (),
}  # fmt: skip
HAVE_AVX2 = frozenset({"avx2", "fma"})
HAVE_AVX512 = HAVE_AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDS: tuple[tuple[Level, frozenset[str]], ...] = (
    ("amx", HAVE_AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}),
    ("avx512-bf16", HAVE_AVX512 | {"avx512_bf16"}),
    ("avx512", HAVE_AVX512),
    ("avx2", HAVE_AVX2),
)
"""Flags of /proc/cpuinfo, best first."""
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h of Linux
COMPILE_SECONDS = 300


class BuildError(RuntimeError):
    """The library cannot be had here; one sentence with what to do."""


def cpu_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> Level:
    """The best that this machine's CPU can run; "plain" where that isn't known."""
    return cpu_levels(cpuinfo)[0]


def cpu_levels(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Level]:
    """All that this machine's CPU can run, best first."""
    if platform.machine() in ("aarch64", "arm64"):
        return ["neon"]
    try:
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    except OSError:
        return ["plain"]
    # What every core has.
    flags = frozenset.intersection(*(frozenset(line.partition(":")[2].split()) for line in lines)) if lines else set()
    levels = [level for level, needed in NEEDS if needed <= flags]
    if "amx" in levels and not amx_permitted():
        levels.remove("amx")
    return [*levels, "plain"]


@functools.cache
def amx_permitted() -> bool:
    """Whether Linux lets this process use AMX's tiles, for which a process has to ask."""
    return ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


def has_vectors(level: Level) -> bool:
    """Whether the kernels are meant for such a CPU: elsewhere PyTorch's are predicted to be faster."""
    return level != "plain"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the system calls this machine's CPU."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastnet/kernels, by default ~/.cache/fastnet/kernels."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "fastnet" / "kernels"


def compiler() -> str:
    """$CXX, c++, g++ or clang++. Raises BuildError where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("there is no C++ compiler: install g++ or clang++, or name one in CXX")


def _run(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{what} failed ({error}): install a g++ or clang++ that works, or name one in CXX") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        reason = lines[0].strip() if lines else f"exit status {done.returncode}"
        raise BuildError(f"{what} failed ({reason}): install g++ 9 or clang++ 10 or newer, or name one in CXX")
    return done.stdout


def _link_flags() -> tuple[str, ...]:
    """Nothing where the process has an OpenMP already, which is torch's: one pool of threads for both."""
    return () if hasattr(ctypes.CDLL(None), "GOMP_parallel") else ("-fopenmp",)


@functools.cache
def _key(compiler: str, flags: tuple[str, ...], sources: Path) -> str:
    parts = [compiler, _run([compiler, "--version"], f"{compiler} --version"), *flags, platform.machine()]
    parts += [path.name + path.read_text(encoding="utf-8") for path in sorted(sources.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _found(folder: Path, prefix: str) -> Path | None:
    """The whole library of that key, if the cache has one."""
    for path in sorted(folder.glob(f"{prefix}-*.so")):
        try:
            if path.stem == f"{prefix}-{_digest(path)}":
                return path
        except OSError:
            continue
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    # Not through a link, which would make or empty what it points to.
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Recipe(NamedTuple):
    """What a library is made of, and the beginning of its name."""

    compiler: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    sources: Path
    prefix: str


def _recipe(level: Level | None, extra: tuple[str, ...], sources: Path | None) -> _Recipe:
    cxx, sources = compiler(), sources or SOURCES
    level = level or _compilable(cxx, cpu_level())
    compile_flags, link_flags = (*FLAGS, *LEVELS[level], *extra), (*_link_flags(), *extra)
    what = "block" if sources == SOURCES else sources.name
    prefix = f"{what}-{level}-{_key(cxx, (*compile_flags, '--', *link_flags), sources)}"
    return _Recipe(cxx, compile_flags, link_flags, sources, prefix)


def find(level: Level | None = None, extra: tuple[str, ...] = (), sources: Path | None = None) -> Path | None:
    """The library that `build` would find in the cache, if there is one. Raises BuildError without a compiler."""
    return _found(cache_folder(), _recipe(level, extra, sources).prefix)


def build(
    level: Level | None = None,
    extra: tuple[str, ...] = (),
    log: Callable[[str], None] = lambda line: None,
    sources: Path | None = None,
) -> Path:
    """The library for `level` (default: this CPU's), compiled where the cache has none.

    extra: flags of the compiler and linker, as a sanitizer's. log: gets one line before a compilation. sources:
    their folder; default: the blocks'.
    Raises BuildError.
    """
    recipe, folder = _recipe(level, extra, sources), cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if found := _found(folder, recipe.prefix):
            return found
        with _locked(folder / f"{recipe.prefix}.lock"):
            if found := _found(folder, recipe.prefix):
                return found
            log(f"compiling {recipe.prefix} with {recipe.compiler}, once, to be kept in {folder}")
            return _compile(recipe, folder)
    except OSError as error:
        raise BuildError(
            f"the CPU kernels cannot be kept in {folder} ({error.strerror or error}): make room or make it writable, "
            "or name another place in XDG_CACHE_HOME"
        ) from error


@functools.cache
def _compilable(cxx: str, level: Level) -> Level:
    """`level`, or the best below it whose flags the compiler knows: one of before AMX compiles for AVX-512."""
    order = [known for known, _ in NEEDS]
    for lower in order[order.index(level) :] if level in order else ():
        command = [cxx, *LEVELS[lower], "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(command, capture_output=True, timeout=COMPILE_SECONDS).returncode == 0:
            return lower
    return level


def _compile(recipe: _Recipe, folder: Path) -> Path:
    from concurrent.futures import ThreadPoolExecutor

    cxx, scratch_prefix = recipe.compiler, f"{recipe.prefix}-scratch-"
    for left_over in folder.glob(f"{scratch_prefix}*"):  # by a build that was killed: this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=scratch_prefix) as scratch:
        sources = sorted(recipe.sources.glob("*.cpp"))
        objects = [str(Path(scratch, source.stem + ".o")) for source in sources]
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(_run, [cxx, *recipe.compile_flags, "-c", str(source), "-o", out], f"{cxx} on {source.name}")
                for source, out in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        library = Path(scratch, "library.so")
        _run([cxx, "-shared", *objects, *recipe.link_flags, "-o", str(library)], f"linking with {cxx}")
        with library.open("rb+") as file:
            os.fsync(file.fileno())
        final = folder / f"{recipe.prefix}-{_digest(library)}.so"
        library.replace(final)
    return final
