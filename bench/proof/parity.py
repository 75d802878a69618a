"""The proof's first stage: the kernels' tests on this machine, while the compile caches are filled on a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench.contenders import Workload
from bench.machine import ROOT, free_gigabytes
from bench.proof.caches import CacheFiller, models_to_compile
from bench.stages import Case, Context, Refused, Stage, not_correct

SECONDS, TINY_SECONDS = 150, 900  # a CPU is in no hurry


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
    Suite("test_on_gpu.py"), Suite("test_tuning_on_gpu.py"),
)  # fmt: skip
CPU_TESTS = (Suite("test_drop_connect.py", names="fp16"),)


# What a file of tests takes of the GPU at most: a process's context and small tensors, but for the one test past 2^31
# elements, which runs where this much is free.
SUITE_GIGABYTES, LARGE_TEST_GIGABYTES = 2.0, 24.0
# As `kernels.tolerance` words it and the tests of unwritten memory do; or the GPU itself saw a bad address.
GROSS = re.compile("gross: |has NaN or inf|CUDA error|illegal memory access|misaligned address")


def parity_stage(works: Sequence[Workload]) -> Callable[[Context], Iterator[tuple[str, Case]]]:
    """The kernels' tests, a process for each file; on a GPU the compile caches for `works` are filled meanwhile.

    A test that fails is listed, and timing goes on, for what is timed is checked case by case; Refused where an error
    is gross (`kernels.tolerance`).
    """

    def run(context: Context) -> Iterator[tuple[str, Case]]:
        free = free_gigabytes(context.device)
        at_once = 1 if context.tiny else max(1, min(len(GPU_TESTS), int(free / SUITE_GIGABYTES)))
        filler = None
        if not context.tiny:
            tests = at_once * SUITE_GIGABYTES + LARGE_TEST_GIGABYTES * (free >= LARGE_TEST_GIGABYTES)
            fitting = [work.fitting(context.device) for work in works]
            jobs = [(model, work) for work in fitting for model in models_to_compile(work)]
            filler = CacheFiller(jobs, SECONDS, gigabytes=free - tests)
        if importlib.util.find_spec("pytest") is None:
            context.leave_out("the kernels' tests: pytest is not installed")
        else:
            yield from _run_suites(context, at_once)
        if filler is not None:
            yield "compile caches", {"filled": filler.wait()}
        suites = context.stages.get("parity", {}).get("cases", {})
        gross = [line for found in suites.values() for line in found.get("failures", ()) if GROSS.search(line)]
        if gross:
            raise Refused(f"kernels are grossly wrong, so nothing is timed: {'; '.join(gross)}")

    return run


def _run_suites(context: Context, at_once: int) -> Iterator[tuple[str, Case]]:
    seconds = TINY_SECONDS if context.tiny else SECONDS
    if context.tiny:
        context.leave_out("the tests of the other kernels: the interpreter takes minutes (`make test` runs them)")
    done = context.cases("parity")
    wanted = [s for s in (CPU_TESTS if context.tiny else GPU_TESTS) if not done.get(str(s), {}).get("finished")]
    with ThreadPoolExecutor(at_once) as pool:
        results = pool.map(lambda suite: run_tests(suite, seconds), wanted)
        for suite, found in zip(wanted, results, strict=True):
            if not found["finished"]:
                context.leave_out(f"the rest of {suite}: it did not end within {seconds} s; --resume runs it again")
            yield str(suite), found


def run_tests(suite: Suite, seconds: float) -> Case:
    """What pytest said: passed, failed, skipped, lines of failures, its last line."""
    file = next((ROOT / "tests").rglob(suite.file), None)
    if file is None:
        raise Refused(f"{suite.file} is not in tests/: run from the source tree")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-m", suite.marks, "-p", "no:cacheprovider"]
    command += ["-k", suite.names] if suite.names else []
    # COLUMNS: pytest cuts the lines of its summary to the terminal's width.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "COLUMNS": "400"},
    )  # fmt: skip
    try:
        output, finished = process.communicate(timeout=seconds)[0], True
    except subprocess.TimeoutExpired:
        finished = False
        process.send_signal(signal.SIGINT)  # pytest then sums up what it has seen
        try:
            output = process.communicate(timeout=15)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    return summary_of(suite, output, process.returncode, finished)


def summary_of(suite: Suite, output: str, status: int, finished: bool) -> Case:
    """A suite's case from what pytest printed and returned."""
    lines = output.strip().splitlines() or ["no output"]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])}
    progress = "".join(re.findall(r"^[.sFEx]+(?=\s|$)", output, re.MULTILINE))
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if not finished:
        failed = max(failed, progress.count("F") + progress.count("E"))
    elif status not in (0, 5) and not failed:  # 5: none was selected
        failed = 1
        failures = [f"pytest ended with status {status}: {next(filter(GROSS.search, lines), lines[-1])}"]
    found: Case = {
        "passed": counts.get("passed", progress.count(".")), "failed": failed, "skipped": counts.get("skipped", 0),
        "summary": lines[-1] if finished else "not finished", "finished": finished, "failures": failures[:50],
    }  # fmt: skip
    return found | ({"not_correct": f"{failed} tests fail"} if failed else {})


def show_parity(cases: dict[str, Case]) -> str:
    lines = []
    for name, found in cases.items():
        if "passed" in found:
            lines.append(f"{name}: {found['passed']} tests passed: {found['summary']}{not_correct(found)}")
            lines += [f"  {failure}" for failure in found["failures"]]
        for work, filled in found.get("filled", {}).items():
            result = filled.get("error") or f"first step after {filled['first_step']:.0f} s (contended)"
            lines.append(f"  compile cache, {work}: {result}")
    return "\n".join(lines)


def parity(works: Sequence[Workload]) -> Stage:
    return Stage("parity", parity_stage(works), show_parity)
