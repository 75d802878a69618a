"""The library of the CPU operations: when it is compiled, what the cache gives back, and who may not compile it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import build as builds
from kernels.cpu.build import BuildError, build, cpu_level

# Writes a line for each compilation into calls.txt beside it, and something that is no library.
FAKE = """#!/bin/sh
here=$(dirname "$0")
[ "$1" = --version ] && { cat "$here/version.txt"; exit; }
echo "$*" >> "$here/calls.txt"
while [ "$1" != -o ]; do shift; done
echo "made $$" > "$2"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a compiler that is quick, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "version.txt").write_text("fake 1.0\n")
    (folder / "c++").write_text(FAKE)
    (folder / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(folder / "c++"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builds._key.cache_clear()
    return folder


def calls(fake: Path) -> int:
    return len((fake / "calls.txt").read_text().splitlines())


SOURCES = len(list(builds.SOURCES.glob("*.cpp")))


def test_the_second_build_is_found(fake: Path) -> None:
    lines: list[str] = []
    first, second = build("plain", log=lines.append), build("plain", log=lines.append)
    assert first == second
    assert calls(fake) == SOURCES + 1
    assert len(lines) == 1
    assert "once" in lines[0]
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".lock", ".so"]  # nothing half-made is left


def test_what_a_killed_build_left_is_removed_by_the_next(fake: Path) -> None:
    first = build("plain")
    prefix = first.stem.rpartition("-")[0]
    first.unlink()
    left_over = first.parent / f"{prefix}-scratch-abc"
    left_over.mkdir()
    (left_over / "half.o").write_text("")
    assert build("plain").is_file()
    assert not left_over.exists()


def test_another_cpu_flag_compiler_or_source_is_another_library(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {build("plain"), build("avx2"), build("plain", ("-DX",))}
    (fake / "version.txt").write_text("fake 1.1\n")
    builds._key.cache_clear()
    made.add(build("plain"))
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "one.cpp").write_text("// another")
    monkeypatch.setattr(builds, "SOURCES", sources)
    builds._key.cache_clear()
    made.add(build("plain"))
    assert len(made) == 5


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:]])
def test_a_torn_or_changed_library_is_not_loaded_but_made_anew(fake: Path, damage: object) -> None:
    path = build("plain")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    whole = build("plain")
    assert calls(fake) == 2 * (SOURCES + 1)
    assert whole.stem.endswith(builds._digest(whole))


@pytest.mark.slow
def test_two_processes_that_build_at_once_compile_once(fake: Path) -> None:
    (fake / "c++").write_text(FAKE.replace("while", "sleep 0.2\nwhile", 1))
    program = "from kernels.cpu.build import build; print(build('plain'))"
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {child.communicate()[0] for child in children}
    assert len(found) == 1
    assert calls(fake) == SOURCES + 1


def test_no_compiler_is_named(fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: install"):
        build("plain")


def test_a_compiler_that_fails_is_named_with_its_reason(fake: Path) -> None:
    (fake / "c++").write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "x.cpp:1: error: too old" >&2\nexit 1\n')
    with pytest.raises(BuildError, match=r"c\+\+ on \w+\.cpp failed \(x\.cpp:1: error: too old\)") as raised:
        build("plain")
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_is_named(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot be kept in .*XDG_CACHE_HOME"):
        build("plain")


def test_what_a_cpu_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(builds, "amx_permitted", lambda: True)
    info = tmp_path / "cpuinfo"
    avx512 = "avx512f avx512bw avx512dq avx512vl"
    for flags, level in (
        ("sse2", "plain"), ("avx2", "plain"), ("avx2 fma", "avx2"), (f"avx2 fma {avx512}", "avx512"),
        (f"avx2 fma {avx512} avx512_bf16", "avx512-bf16"),
        (f"avx2 fma {avx512} avx512_bf16 amx_tile amx_bf16", "amx"),
    ):  # fmt: skip
        info.write_text(f"model name\t: x\nflags\t\t: fpu {flags}\n")
        assert cpu_level(info) == level
    monkeypatch.setattr(builds, "amx_permitted", lambda: False)
    assert cpu_level(info) == "avx512-bf16"
    info.write_text("flags : fma avx2\nflags : avx2\n")  # cores that differ: what all have
    assert cpu_level(info) == "plain"
    assert cpu_level(tmp_path / "nothing") == "plain"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_level(info) == "neon"


@pytest.mark.slow
def test_the_source_compiles_for_arm_to_its_vectors(tmp_path: Path) -> None:
    """By a cross compiler, where there is one; nothing is run."""
    cross = shutil.which("aarch64-linux-gnu-g++")
    if cross is None and importlib.util.find_spec("ziglang") is None:
        pytest.skip("no aarch64-linux-gnu-g++ and no ziglang, which compiles for other machines: pip install ziglang")
    command = [cross] if cross else [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    where = [builds.compiler(), "-print-file-name=include/omp.h"]
    header = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    shutil.copy(header, tmp_path)
    for source in sorted(builds.SOURCES.glob("*.cpp")):
        out = tmp_path / f"{source.stem}.s"
        flags = [*builds.FLAGS, *builds.LEVELS["neon"], "-w", f"-I{tmp_path}", "-S", str(source), "-o", str(out)]
        subprocess.run([*command, *flags], check=True)
        assert re.search(r"fmla\s+v\d+\.4s", out.read_text()), source


SANITIZED = """
import torch
from kernels.cpu.build import build
from kernels.cpu.library import Library, using
from tests.kernels.cpu import test_ops as cases
from tests.kernels.block.test_mbconv import call, inputs, run
import sys
torch.set_num_threads(2)
with using(Library(build(sys.argv[1], tuple(sys.argv[2:])))):
    for block in cases.BLOCKS:
        run(block, inputs(block), "native")
        with torch.no_grad():
            call(block, inputs(block), "native", training=False)
print("whole")
"""


@pytest.mark.slow
def test_no_address_is_out_of_bounds_and_no_behaviour_undefined() -> None:
    """Over all kinds of block, under the compiler's sanitizers."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
    found = subprocess.run(
        [builds.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    runtime = found.stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    level = cpu_level()
    build(level, flags)  # outside the sanitizers, which would watch the compiler
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, level, *flags], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "whole" in done.stdout
