"""The proof goes on: past a failing test or a bad rounding, on cards with little memory; and stops at gross errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.contenders import OURS, RESNET50, TIMM, TORCHVISION, Entry, Workload
from bench.proof import blocks as proof_blocks
from bench.proof import caches as proof_caches
from bench.proof import candidates as proof_candidates
from bench.proof import parity as proof_parity
from bench.proof import steps as proof_steps
from bench.proof.caches import CacheFiller
from bench.proof.candidates import LaunchTimer, rounds_of, summary, time_candidates
from bench.proof.memory import largest_batch
from bench.proof.parity import Suite, summary_of
from bench.stages import Case, Context, Refused, Stage, attempt, not_correct, run_part, verdict
from kernels import configs
from kernels.configs import Site
from kernels.device import REFERENCE
from kernels.tolerance import Errors

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WRONG, GROSS = Errors(3e-6, 5e-7, 1e-7, 0.0, 1.0), Errors(0.5, 5e-7, 1e-7, 0.0, 1.0)
SUITE = Suite("test_depthwise.py")


def test_a_bad_rounding_is_marked_and_a_gross_error_is_not_timed() -> None:
    assert verdict(Errors(1e-7, 1e-7, 0.0, 0.0, 1.0)) == {"error_share": 0.5}
    found = verdict(WRONG)
    assert found["error_share"] == pytest.approx(3e-6 / 1.1e-6)
    assert not_correct(found) == f"  NOT CORRECT: {WRONG}"
    assert "2.73 times" in found["not_correct"]
    with pytest.raises(RuntimeError, match="not timed: gross: error"):
        verdict(GROSS)


def test_a_block_that_is_not_correct_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the stage to its table and the status, by errors that stand in for the check's."""
    monkeypatch.setattr(proof_blocks, "block_errors", lambda *_: WRONG)
    names = (proof_blocks.FUSED, "torch")
    real = proof_blocks.BlockCase
    monkeypatch.setattr(proof_blocks, "BlockCase", lambda block, kernels, *rest: real(block, "torch", *rest))
    monkeypatch.setattr(proof_blocks, "INTERPRETED", True)
    bandwidth = Stage("copy bandwidth", lambda _: iter([("large copy", {"bytes_per_second": 1e12})]), str)
    stage = proof_blocks.blocks("blocks", names)
    assert run_part(1, [bandwidth, stage], CPU, None, resume=False, minutes=1) == 1
    printed = capsys.readouterr().out
    assert "NOT CORRECT: error 3.000e-06 against 1.100e-06 allowed" in printed
    assert "not correct: blocks: 8→16→8" in printed
    assert "refused" not in printed


def test_the_check_takes_as_many_images_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(block: Any, *_: object) -> Errors:
        if block.images > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return WRONG

    monkeypatch.setattr(proof_blocks, "block_errors", errors)
    block = proof_blocks.TINY_BLOCK._replace(images=32)
    assert proof_blocks.check(block, torch.float32, CPU)["checked_images"] == 8
    assert "checked_images" not in proof_blocks.check(block._replace(images=8), torch.float32, CPU)
    monkeypatch.setattr(proof_blocks, "block_errors", lambda *_: errors(SimpleNamespace(images=9)))
    with pytest.raises(torch.OutOfMemoryError):
        proof_blocks.check(block, torch.float32, CPU)


def test_out_of_memory_is_recorded_in_a_sentence() -> None:
    def work() -> Case:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    assert attempt(work) == {"error": "out of memory: CUDA out of memory"}


FAILED = "FAILED tests/kernels/block/test_depthwise.py::test_x[k5] - AssertionError: dx: {}"


@pytest.mark.parametrize(
    ("output", "status", "finished", "passed", "failed", "lines"),
    [
        ("....\n4 passed in 2s", 0, True, 4, 0, 0),
        (f"..F\n{FAILED.format(WRONG)}\n1 failed, 2 passed in 2s", 1, True, 2, 1, 1),
        (f"..F.\n{FAILED.format(WRONG)}\n!!! KeyboardInterrupt !!!", 2, False, 3, 1, 1),
        ("..F", -9, False, 2, 1, 0),
        ("..", -11, True, 2, 1, 1),
        ("no tests ran in 0.1s", 5, True, 0, 0, 0),
        ("E   ImportError while loading conftest", 4, True, 0, 1, 1),
    ],
)
def test_what_pytest_said_is_kept(
    output: str, status: int, finished: bool, passed: int, failed: int, lines: int
) -> None:
    found = summary_of(SUITE, output, status, finished)
    assert (found["passed"], found["failed"], found["finished"]) == (passed, failed, finished)
    assert len(found["failures"]) == lines
    assert ("not_correct" in found) == bool(failed)


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        (str(WRONG), False),
        ("the launch needs 115200 bytes of shared memory", False),
        (str(GROSS), True),
        ("y has NaN or inf: something was not written", True),
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", True),
    ],
)
def test_a_failing_test_is_listed_and_stops_nothing_unless_it_is_gross(
    message: str, refused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"..F\n{FAILED.format(message)}\n1 failed, 2 passed in 2s"
    monkeypatch.setattr(proof_parity, "run_tests", lambda suite, _: summary_of(suite, output, 1, True))
    after: list[str] = []

    def timing(_: Context) -> Iterator[tuple[str, Case]]:
        after.append("timed")
        yield "x", {}

    stages = [proof_parity.parity([]), Stage("timing", timing, str)]
    assert run_part(1, stages, CPU, None, resume=False, minutes=1) == 1
    assert after == ([] if refused else ["timed"])
    assert message in capsys.readouterr().out


def gpu_of(gigabytes: float) -> Callable[..., Any]:
    return lambda *_: SimpleNamespace(total_memory=int(gigabytes * 2**30))


@pytest.mark.parametrize(("gigabytes", "batch"), [(80, 256), (24, 256), (20, 128), (12, 64), (5, 32)])
def test_the_batch_fits_the_card(gigabytes: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu_of(gigabytes))
    work = Workload("b0", 224, 256)
    assert work.fitting(CPU) == work
    assert work.fitting(CUDA).batch == batch
    assert 2 * work.fitting(CUDA).gigabytes - 2 <= 0.9 * gigabytes


@pytest.mark.parametrize(("gigabytes", "at_once", "left"), [(70.0, 3, 0), (27.0, 2, 0), (13.0, 1, 0), (9.0, 0, 5)])
def test_side_jobs_stay_within_the_free_memory(
    gigabytes: float, at_once: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def job(*_: object, **__: object) -> Case:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return {"first_step": 1.0}

    monkeypatch.setattr(proof_caches, "in_subprocess", job)
    jobs = [(f"model {i}", Workload("b0", 224, 256)) for i in range(5)]
    found = CacheFiller(jobs, 100, gigabytes=gigabytes).wait()
    assert most <= at_once
    assert sum("not compiled beforehand" in case.get("error", "") for case in found.values()) == left
    assert len(found) == 5


@pytest.mark.parametrize("true", [0, 1, 3, 5, 8, 12, 100, 103, 404])
@pytest.mark.parametrize("guess", [0, 1, 7, 8, 99, 104, 1000])
def test_the_largest_batch_is_found_from_any_guess(true: int, guess: int) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= true

    step = 4 if guess >= 8 else 1
    assert largest_batch(fits, guess) == true // step * step
    assert len(asked) == len(set(asked)), "no batch is tried twice"
    assert len(asked) < 22


def test_resnet50_stands_beside_and_is_no_peer() -> None:
    contenders = [Entry(OURS), Entry(TIMM), Entry(TORCHVISION), Entry(RESNET50, {})]
    times = {f"{OURS}, eager": 2.0, f"{TIMM}, eager": 6.0, f"{TORCHVISION}, eager": 8.0, f"{RESNET50}, compiled": 3.0}
    cases = {name: {"peak_bytes": 4} for name in times}
    cases[f"{RESNET50}, compiled"]["peak_bytes"] = 1
    found = proof_steps.ratios({name: [t] * 3 for name, t in times.items()}, cases, contenders)
    assert (found["speedup"], found["resnet50_speedup"]) == (3.0, 1.5)
    assert found["memory"]["leanest_peer"] == 1


def test_a_contender_that_no_longer_fits_is_dropped_and_named() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried …")

    runners: dict[str, Any] = {"small": lambda: None, "large": full}
    cases: dict[str, Case] = {"small": {"peak_bytes": 1}, "large": {"peak_bytes": 9}}
    proof_steps._drop_what_no_longer_fits(runners, cases, CPU)
    assert list(runners) == ["small"]
    assert cases == {
        "small": {"peak_bytes": 1},
        "large": {"peak_bytes": 9, "error": "out of memory: CUDA out of memory"},
    }


def test_every_candidate_of_every_launch_is_timed_and_the_fastest_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"gemm": {"a": 3.0, "b": 1.0, "c": 2.0}, "sum": {"only": 0.5}}
    sites = {name: Site(name, (64, "bf16")) for name in seconds}

    def candidates(site: Site) -> tuple[str, ...]:
        return tuple(seconds[site.kernel])

    monkeypatch.setattr(configs, "_candidates", {name: lambda site, _: candidates(site) for name in seconds})
    monkeypatch.setattr(configs, "to_json", lambda config: {"name": config})
    observers: list[LaunchTimer] = []

    @contextmanager
    def observing(timer: LaunchTimer) -> Iterator[None]:
        observers.append(timer)
        yield

    monkeypatch.setattr(proof_candidates, "observing", observing)
    clock = 0.0

    def launch(site: Site | None, spent: float) -> None:
        def run() -> None:
            nonlocal clock
            clock += spent

        observers[-1](site, run)

    def step() -> None:
        for name in ("gemm", "sum", "gemm"):
            launch(sites[name], seconds[name][configs.choose(sites[name], REFERENCE)])
        launch(None, 100.0)

    timer = LaunchTimer(lambda: clock, lambda before, after: after - before)
    assert len(rounds_of(list(sites.values()), candidates)) == 3
    found = summary(time_candidates(step, timer, candidates, runs=2), candidates)
    gemm, other = found["gemm 64 bf16"], found["sum 64 bf16"]
    assert (gemm["seconds"], gemm["fastest"]) == ([6.0, 2.0, 4.0], 1), "both of its launches in a step"
    assert (other["seconds"], other["fastest"]) == ([0.5], 0)
    assert gemm["candidates"] == [{"name": name} for name in "abc"]
    table = proof_candidates.show_candidates({"block": {"times": 2, "sites": found}})
    assert "6000000.0  2000000.0*  4000000.0" in table
    assert "13000.000 ms as predicted, 5000.000 ms by the fastest of each" in table


@pytest.mark.skipif(not proof_candidates.INTERPRETED, reason="on a GPU the proof itself runs this")
def test_candidates_of_a_real_block_are_timed() -> None:
    context = Context(CPU, time.monotonic() + 600, {})
    ((_, found),) = proof_candidates.CANDIDATES.run(context)
    assert "error" not in found, found
    kernels = {name.split()[0] for name in found["sites"]}
    assert {"pointwise", "pointwise_wgrad", "depthwise", "depthwise_backward"} <= kernels
    assert all(len(one["seconds"]) == len(one["candidates"]) for one in found["sites"].values())
    assert "all launches" in proof_candidates.show_candidates({"block": found})


def test_a_lost_gpu_ends_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(Refused, match="no longer answers this process: CUDA error: an illegal memory access"):
        attempt(lambda: {"x": 1 // 0})
