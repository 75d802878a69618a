"""The proof's first stage: the kernels' tests on this machine, while the compile caches are filled on a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench.contenders import OURS, Workload, compared_peers
from bench.machine import ROOT
from bench.proof_caches import CacheFiller
from bench.stages import Case, Context, Refused, Stage

SECONDS, TINY_SECONDS = 150, 90


class Suite(NamedTuple):
    """One call of pytest: a file, the marks, and a pattern of names."""

    file: str
    marks: str = "not slow and not full"
    names: str = ""

    def __str__(self) -> str:
        return self.file.removesuffix(".py") + ("" if self.marks.startswith("not slow") else f", {self.marks}")


# Of each file what a GPU decides; blocks of every kind are among test_mbconv's slow ones, slow for the interpreter.
BLOCKS, PRODUCTS = "parity or inference or repeats or scale_of_one", "not (refuses or states or selects or contract)"
CONVOLUTIONS = "not (traffic or opcheck or one_sentence)"
GPU_TESTS = (
    Suite("test_mbconv.py", names=BLOCKS), Suite("test_mbconv.py", "slow and not full", BLOCKS),
    Suite("test_pointwise.py", names=PRODUCTS), Suite("test_depthwise.py", names=CONVOLUTIONS),
    Suite("test_kernels_on_gpu.py"),
)  # fmt: skip
CPU_TESTS = (Suite("test_drop_connect.py", names="fp16"),)


def parity_stage(works: Sequence[Workload]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """The kernels' tests, a process for each file; on a GPU the compile caches for `works` are filled meanwhile.

    Refuses where a test fails. Where they don't end in time, what is timed later is still checked case by case.
    """

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        filler = None
        if context.tiny:
            context.leave_out("the tests of the other kernels: the interpreter takes minutes (`make test` runs them)")
        else:
            models = [OURS, *compared_peers()]
            filler = CacheFiller([(model, work) for work in works for model in models], SECONDS)
        done = context.cases("parity")
        suites = CPU_TESTS if context.tiny else GPU_TESTS
        wanted = [suite for suite in suites if not done.get(str(suite), {}).get("finished")]
        with ThreadPoolExecutor(len(GPU_TESTS)) as pool:
            results = list(pool.map(lambda suite: run_tests(suite, TINY_SECONDS if context.tiny else SECONDS), wanted))
        failures = []
        for suite, found in zip(wanted, results, strict=True):
            if not found["finished"]:
                context.leave_out(f"the rest of {suite}: it did not end within {SECONDS} s; --resume runs it again")
            failures += found["failures"]
            if not found["failed"]:
                yield str(suite), found
        if filler is not None:
            yield "compile caches", {"filled": filler.wait()}
        if failures:
            raise Refused(f"kernel tests fail, so nothing is timed: {'; '.join(failures)}")

    return run


def run_tests(suite: Suite, seconds: float) -> Case:
    """What pytest said: passed, failed, skipped, lines of failures, its last line."""
    file = ROOT / "tests" / suite.file
    if not file.exists():
        raise Refused(f"{file.name} is not in tests/: run from the source tree")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-m", suite.marks]
    command += ["-k", suite.names] if suite.names else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        progress = "".join(re.findall(r"^[.sFEx]+", output, re.MULTILINE))
        failed = progress.count("F") + progress.count("E")
        return {
            "passed": progress.count("."), "failed": failed, "summary": "not finished", "finished": False,
            "failures": [f"{failed} tests of {suite}, which did not end in time"] if failed else [],
        }  # fmt: skip
    summary = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode and not failed:
        failed = 1  # pytest itself could not run
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))] or [summary]
    return {
        "passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0), "summary": summary,
        "finished": True, "failures": failures[:20] if failed else [],
    }  # fmt: skip


def show_parity(cases: dict[str, Case]) -> str:
    lines = []
    for name, found in cases.items():
        if "passed" in found:
            lines.append(f"{name}: {found['passed']} tests passed: {found['summary']}")
        for work, filled in found.get("filled", {}).items():
            result = filled.get("error") or f"first step after {filled['first_step']:.0f} s (contended)"
            lines.append(f"  compile cache, {work}: {result}")
    return "\n".join(lines)


def parity(works: Sequence[Workload]) -> Stage:
    return Stage("parity", parity_stage(works), show_parity)
