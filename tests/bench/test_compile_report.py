"""Ahead-of-time compilation for GPUs that are not here: limits, access widths, and the stored baseline."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile_baseline, compile_report
from bench.compile_baseline import Entry, differences
from bench.compile_report import Report, access_widths, loops, occupancy, select, wide_share

ROOT = Path(__file__).resolve().parents[2]

SASS = """
        /*0a00*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0a10*/                   LDG.E.128.CONSTANT R8, desc[UR6][R2.64+0x10] ;
        /*0a20*/              @P1  LDG.E R9, desc[UR6][R12.64] ;
        /*0a30*/                   LDG.E.U16 R9, desc[UR6][R12.64] ;
        /*0a40*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0a50*/                   STL [R1+0x4], R7 ;
        /*0a60*/                   LDL.LU R7, [R1+0x4] ;
        /*0a70*/                   LDGSTS.E.128 [R0], desc[UR6][R2.64] ;
"""
GOOD = Report("k[bf16,VEC=8]", 90, "elementwise", 80, 0, 0, 1024, 4, 0.375, {16: 4, 4: 2}, {16: 4}, (4, 4))


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that compiles rather than interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.compile_report", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(["--changed"], marks=pytest.mark.slow, id="changed, and one of each kernel"),
        pytest.param([], marks=pytest.mark.full, id="all"),
    ],
)
def test_configurations_keep_the_limits_and_the_baseline(tmp_path: Path, chosen: list[str]) -> None:
    done = report("--json", str(tmp_path / "report.json"), *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    built = json.loads((tmp_path / "report.json").read_text())
    assert {r["arch"] for r in built} >= ({90} if "--changed" in chosen else set(compile_report.ARCHS))
    assert not any(r["stack"] > compile_report.BOUNDED_STACK for r in built)
    assert not any(r["stack"] > compile_report.STACK or r["local_accesses"] for r in built if not r["bounded"])
    assert {"gemm", "strips"} <= {r["kind"] for r in built}
    assert {r["hgmma"] for r in built if r["kind"] == "gemm" and r["arch"] == 90 and "fp32" not in r["name"]} == {True}


def test_widths_are_read_from_machine_code() -> None:
    found = access_widths(SASS)
    assert found["LDG"] == {16: 2, 4: 1, 2: 1}
    assert found["STG"] == {8: 1}
    assert (found["STL"], found["LDL"]) == ({4: 1}, {4: 1})
    assert wide_share({16: 3, 4: 4}) == 0.75
    assert wide_share({}) == 1


def test_loops_end_with_the_branch_back() -> None:
    sass = """
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;    /* 0x0000 */
        /*0020*/                   LDGSTS.E.128 [R0], desc[UR6][R2.64] ;
        /*0030*/              @!P0 BRA 0x50 ;
        /*0040*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*0048*/              @P2  EXIT ;
        /*0050*/              @P1  BRA.U UP0, 0x20 ;
        /*0060*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/              @!P1 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R2 ;
        /*0090*/                   BRA 0x10;
        /*00a0*/                   BRA 0xa0;
    """
    inside = access_widths(loops(sass))
    assert (inside["LDG"], inside["LDGSTS"], inside["STG"]) == ({}, {16: 1}, {8: 1})


def test_occupancy_of_known_launches() -> None:
    # 128 registers x 32 lanes x 4 warps = 16,384: four blocks of four warps in 65,536.
    assert occupancy(128, 0, 4, 90) == 16 / 64
    # 32 registers: 16 blocks of four warps by registers and by warps.
    assert occupancy(32, 0, 4, 90) == 1.0
    # Registers are handed out in steps of eight a lane: 33 count as 40.
    assert occupancy(33, 0, 4, 90) == occupancy(40, 0, 4, 90) == 48 / 64
    # 100 KB of shared memory: two blocks on 228 KB, one on 164 KB.
    assert occupancy(32, 100 * 1024, 8, 90) == 16 / 64
    assert occupancy(32, 100 * 1024, 8, 80) == 8 / 64
    # 48 warps at most on sm_86 and sm_89: three blocks of 16.
    assert occupancy(32, 0, 16, 86) == occupancy(32, 0, 16, 89) == 1.0
    assert occupancy(128, 0, 4, 86) == 16 / 48


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 24}, "spills"),
        ({"local_accesses": 2}, "spills"),
        ({"bounded": True, "stack": 40}, "spills"),
        ({"bounded": True, "stack": 32, "local_accesses": 9}, "spills"),
        ({"shared": 232_449}, "shared memory"),
        ({"arch": 86, "shared": 101_377}, "101376 exist"),
        ({"shared": 5000, "shared_bound": 4999}, "bounded by 4999"),
        ({"arch": 86, "shared": 120_001, "shared_bound": 120_000}, "bounded by 120000"),
        ({"loads": {16: 3, 4: 2}}, "needs 4 loads"),
        ({"loads": {16: 4, 2: 8}}, "none under 4"),
        ({"stores": {8: 8}}, "needs 4 stores"),
        ({"stores": {16: 4, 4: 1}}, "in pieces"),
        ({"kind": "gemm", "stores": {16: 4, 8: 1}}, "in pieces"),
        ({"kind": "gemm", "hgmma": False}, "HGMMA"),
        ({"long_offsets": False}, "64-bit"),
    ],
)
def test_each_limit_is_seen_when_broken(change: dict[str, object], words: str) -> None:
    assert GOOD.problems() == []
    problems = dataclasses.replace(GOOD, **change).problems()  # type: ignore[arg-type]
    assert problems
    assert all(words in problem for problem in problems[:1]), problems


def test_a_configuration_that_a_card_does_not_choose_is_held_to_its_bound_alone() -> None:
    large = dataclasses.replace(GOOD, arch=86, shared=115_200, shared_bound=115_328, stack=24, local_accesses=2)
    assert not large.chosen
    assert large.problems() == []
    assert any("spills" in problem for problem in dataclasses.replace(large, arch=80).problems())


@dataclasses.dataclass
class Spec:
    name: str
    kind: str = "elementwise"
    needs: int = 0

    def shared_bytes(self, capability: tuple[int, int]) -> int:
        return self.needs


def test_selection_is_complete_on_one_architecture_and_a_sample_on_the_others() -> None:
    names = ["a[fp32,X=1]", "a[bf16,X=1]", "a[bf16,X=2]", "b[fp32,X=1]"]
    specs = [Spec(name) for name in names]
    sample = ["b[fp32,X=1]", "a[bf16,X=1]"]
    assert select(specs, [86, 90]) == [*((name, 86) for name in sample), *((name, 90) for name in names)]
    assert select(specs, [90], quick=True) == [(name, 90) for name in sample]
    assert select(specs, [90], ["X=2", "a["]) == [("a[bf16,X=2]", 90)]


def test_products_are_built_where_they_are_near_the_limit_and_all_of_them_on_sm_80() -> None:
    specs = [
        Spec("g[bf16,no_x,SPAN=0,K=1]", "gemm", 40_000), Spec("g[bf16,SPAN=2,K=1]", "gemm", 40_000),
        Spec("g[fp16,SPAN=0,K=1]", "gemm", 40_000), Spec("g[bf16,SPAN=0,K=2]", "gemm", 60_000),
    ]  # fmt: skip
    assert sorted(select(specs, [80])) == sorted((spec.name, 80) for spec in specs)
    assert select(specs, [86]) == [("g[bf16,no_x,SPAN=0,K=1]", 86), ("g[bf16,SPAN=0,K=2]", 86)]
    assert select(specs, [100]) == [("g[bf16,no_x,SPAN=0,K=1]", 100)]


def test_baseline_notices_a_change_a_newcomer_and_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_baseline, "BASELINE", tmp_path / "baseline.json")
    one = Entry(80, 1024, "a")
    assert "missing" in differences({"k": one}, "3.9.0", complete=True)[0]
    compile_baseline.write({"k": one, "other": one}, "3.9.0")
    assert differences({"k": one, "other": one._replace(key="b")}, "3.9.0", complete=True) == []
    heavier = {"k": Entry(90, 1024, "a")}
    assert "[80, 1024]" in differences(heavier, "3.9.0", complete=False)[0]
    assert differences(heavier, "3.6.0", complete=False) == []
    found = differences({"k": one, "new": one}, "3.9.0", complete=True)
    assert [line.split()[0] for line in found[:2]] == ["new", "other"]
    assert "--update-baseline" in found[2]


def test_only_what_the_baseline_does_not_know_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_baseline, "BASELINE", tmp_path / "baseline.json")
    tasks = [("a", 80), ("b", 90), ("c", 90)]
    monkeypatch.setattr(compile_report, "keys", lambda tasks: {f"sm_{arch} {name}": name for name, arch in tasks})
    assert compile_report.changed(tasks, "3.9.0") == tasks
    broken = dataclasses.replace(GOOD, name="c", stack=24)
    built = compile_report.entries([dataclasses.replace(GOOD, name="a", arch=80), broken])
    assert built == {"sm_80 a": Entry(80, 1024, "a"), "sm_90 c": Entry(80, 1024, "")}
    compile_baseline.write(built | {"sm_90 b": Entry(80, 1024, "of an older source")}, "3.9.0")
    assert compile_report.changed(tasks, "3.9.0") == tasks[1:]
    assert compile_report.changed(tasks, "3.9.0", always=[("a", 80)]) == tasks
    assert compile_report.changed(tasks, "3.6.0") == tasks


def test_a_key_follows_the_source_of_all_that_a_kernel_calls_and_not_its_comments(tmp_path: Path) -> None:
    def of(helper: str, kernel: str = "x + SIZE", size: int = 2) -> str:
        path = tmp_path / f"k{len(list(tmp_path.iterdir()))}.py"
        path.write_text(
            f"SIZE = {size}\nclass Jit:\n    def __init__(self, fn): self.fn = fn\n    def __call__(self): ...\n"
            f"@Jit\ndef helper(x):\n    {helper}\n@Jit\ndef kernel(x):\n    helper({kernel})\n"
        )
        spec = importlib.util.spec_from_file_location("k", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return compile_baseline.source_of(module.kernel)

    plain = of("return x * 2")
    assert of("return (x   * 2)  # twice") == plain
    assert of("return x * 3") != plain
    assert of("return x * 2", "x - SIZE") != plain
    assert of("return x * 2", size=3) != plain


def test_interpreting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_report.build([])
