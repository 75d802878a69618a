"""How a proof runs: what is written and when, resuming, refusing; a CPU's figures stay out of bench/results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, readme, stages
from bench.anatomy import Spent, kernel_bytes, top_kernels
from bench.cases import DIRECTIONS
from bench.contenders import OURS, TIMM, TORCHVISION, Entry, Workload, eager_entries
from bench.launches import describe, schedule
from bench.machine import commit, gpu_folder
from bench.measure import interleaved, median_ratio, summarise
from bench.proof import blocks as proof_blocks
from bench.proof import steps as proof_steps
from bench.proof.steps import ratios, time_passes
from bench.shapes import activations
from bench.stages import Case, Context, Refused, Stage, attempt, result_folder, run_part
from kernels.block import traffic as mbconv_traffic
from kernels.block.traffic import Block
from kernels.launch import INTERPRETED

CPU = torch.device("cpu")


class Recorder:
    """A stage of three cases that remembers which ones it ran."""

    def __init__(self, name: str = "numbers", broken: str = "") -> None:
        self.name, self.broken = name, broken
        self.ran: list[str] = []

    def run(self, context: Context) -> Iterator[tuple[str, Case]]:
        for case in ("a", "b", "c"):
            if case in context.cases(self.name):
                continue
            self.ran.append(case)
            if self.broken == f"die at {case}":
                raise KeyboardInterrupt
            if self.broken == f"refuse at {case}":
                raise Refused("two and two are five")
            yield case, attempt(lambda case=case: {"value": {"a": 1, "b": 2, "c": 3}[case]})  # type: ignore[misc]

    @property
    def stage(self) -> Stage:
        return Stage(self.name, self.run, lambda cases: f"sum {sum(c['value'] for c in cases.values())}")


def run(recorder: Recorder, out: Path | None, *, resume: bool = False, minutes: float = 1) -> int:
    return run_part(1, [recorder.stage], CPU, out, resume=resume, minutes=minutes)


def content(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    stored: dict[str, Any] = json.loads(file.read_text())["stages"]
    return stored


def test_file_is_written_after_every_case_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dying = Recorder(broken="die at c")
    with pytest.raises(KeyboardInterrupt):
        run(dying, tmp_path)
    assert content(tmp_path)["numbers"]["cases"] == {"a": {"value": 1}, "b": {"value": 2}}
    again = Recorder()
    assert run(again, tmp_path, resume=True) == 0
    assert again.ran == ["c"]
    assert content(tmp_path)["numbers"]["state"] == "done"
    assert "sum 6" in capsys.readouterr().out
    third = Recorder()
    assert run(third, tmp_path, resume=True) == 0
    assert third.ran == []


def test_results_are_only_ever_added(tmp_path: Path) -> None:
    run(Recorder(), tmp_path)
    (first,) = tmp_path.glob("*.json")
    before = first.read_text()
    run(Recorder(), tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert first.read_text() == before


def test_results_of_another_machine_are_not_continued(tmp_path: Path) -> None:
    run(Recorder(), tmp_path)
    (file,) = tmp_path.glob("*.json")
    other = json.loads(file.read_text())
    other["machine"]["torch"] = "2.0.0"
    file.write_text(json.dumps(other))
    (tmp_path / "unrelated.json").write_text("[1, 2]")
    recorder = Recorder()
    run(recorder, tmp_path, resume=True)
    assert recorder.ran == ["a", "b", "c"]
    assert json.loads(file.read_text()) == other


def test_refusal_ends_the_part_and_times_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, after = Recorder("check", "refuse at b"), Recorder("timing")
    assert run_part(1, [wrong.stage, after.stage], CPU, tmp_path, resume=False, minutes=1) == 1
    assert not after.ran
    stored = content(tmp_path)
    assert stored["check"]["refused"] == "two and two are five"
    assert "timing" not in stored
    assert "two and two are five" in capsys.readouterr().out


def test_a_failing_case_does_not_stop_the_others_and_is_tried_again(tmp_path: Path) -> None:
    def once(context: Context) -> Iterator[tuple[str, Case]]:
        for case in ("good", "bad"):
            if case not in context.cases("mixed"):
                yield case, attempt(lambda case=case: {"good": {"value": 1}}[case])  # type: ignore[misc]

    stage = Stage("mixed", once, str)
    assert run_part(1, [stage], CPU, tmp_path, resume=False, minutes=1) == 1
    stored = content(tmp_path)["mixed"]
    assert stored["cases"]["good"] == {"value": 1}
    assert stored["cases"]["bad"]["error"].startswith("KeyError")
    assert stored["state"] == "partial"


def test_what_no_time_is_left_for_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(context: Context) -> Iterator[tuple[str, Case]]:
        if context.has_time(3600, "the long one"):
            yield "long", {}

    assert run_part(1, [Stage("slow", slow, str)], CPU, tmp_path, resume=False, minutes=1) == 0
    assert content(tmp_path)["slow"]["state"] == "partial"
    assert "left out: the long one: no time left" in capsys.readouterr().out


def test_cpu_figures_stay_out_of_the_results(tmp_path: Path) -> None:
    assert result_folder(CPU, None) is None
    assert result_folder(CPU, tmp_path) == tmp_path
    for folder in (stages.RESULTS, stages.RESULTS / "h200"):
        with pytest.raises(ValueError, match="don't belong in bench/results"):
            result_folder(CPU, folder)


def test_commit_names_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit() == commit()
    monkeypatch.setattr("bench.machine._output_of", lambda *command: None)
    assert commit().startswith("tree+")
    assert gpu_folder("NVIDIA H200") == "h200"
    assert gpu_folder("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


def test_medians_and_pairs() -> None:
    timing = summarise([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.median, timing.best, timing.runs) == (3.0, 1.0, 5)
    assert summarise([2.0]).spread == 0
    with pytest.raises(ValueError, match="no samples"):
        summarise([])
    # A machine that slows down by ten for half of the rounds changes both of a pair.
    assert median_ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == 2.0


def test_rounds_are_interleaved_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    taken = interleaved({"x": lambda: order.append("x"), "y": lambda: order.append("y")}, CPU, rounds=3)
    assert order == ["x", "y", "y", "x", "x", "y"]
    assert {name: len(times) for name, times in taken.items()} == {"x": 3, "y": 3}
    order.clear()
    interleaved({"x": lambda: order.append("x")}, CPU, rounds=9, until=time.monotonic() - 1)
    assert order == ["x"], "the first round is always whole"
    monkeypatch.setattr(measure, "_host_seconds", lambda run: 6.0)
    assert interleaved({"x": lambda: None}, CPU, rounds=1, inner=3) == {"x": [2.0]}


def test_time_passes_of_a_known_step() -> None:
    # 128 images in 0.1 s at 1 TB/s: 1e11 bytes, over 128 x activations x 2.
    passes = time_passes(0.1, Workload("b0", 224, 128), 1e12)
    assert passes == pytest.approx(1e11 / (128 * activations("b0", 224) * 2))


TINY = proof_blocks.TINY_BLOCK
BANDWIDTH = {"copy bandwidth": {"cases": {"large copy": {"bytes_per_second": 1e12}}}}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the proof itself runs these")


@interpreted
@pytest.mark.parametrize("block", [TINY, Block(2, 6, 6, 4, 2, 5, 4, 5, 2, expands=False)], ids=describe)
def test_every_step_of_the_schedule_does_the_same_job_as_its_counterpart(block: Block) -> None:
    names = []
    for step, launch in schedule(block, torch.float32, CPU):
        names.append(step)
        expected = launch.job(*launch.arguments)
        ours = [value for value in launch.ours() if value is not None]
        assert len(ours) == len(expected), step
        for value, job in zip(ours, expected, strict=True):
            whole = value.sum(2) if value.dim() == 4 and job.dim() == 3 else value
            assert torch.linalg.norm(whole.view(job.shape) - job) <= 1e-5 * torch.linalg.norm(job), step
        assert launch.library is None or isinstance(launch.library(), torch.Tensor | tuple)
    moved = mbconv_traffic.forward(block, torch.float32) | mbconv_traffic.backward(block, torch.float32)
    assert names == list(moved)


def run_tiny(stage: Stage) -> tuple[Case, str]:
    """What a stage finds of its one tiny case, and its table."""
    context = Context(CPU, time.monotonic() + 600, dict(BANDWIDTH))
    ((key, found),) = stage.run(context)
    assert "error" not in found, found
    assert key == describe(TINY)
    context.stages[stage.name] = {"cases": {key: found}}
    assert list(stage.run(context)) == [], "a case is run once"
    return found, stage.table({key: found})


@interpreted
@pytest.mark.slow
def test_blocks_are_checked_and_timed() -> None:
    found, table = run_tiny(proof_blocks.BLOCKS)
    moved = proof_blocks.block_bytes(TINY, torch.float32)
    assert found["predicted"] == {direction: moved[direction] / 1e12 for direction in DIRECTIONS}
    assert 0 < found["error_share"] <= 1
    assert found["triton"]["seconds"] > 0
    assert "triton-ops ms" in table


@pytest.mark.slow
@interpreted
def test_launches_are_timed_with_their_bytes() -> None:
    found, table = run_tiny(proof_blocks.LAUNCHES)
    steps, moved = found["steps"], proof_blocks.block_bytes(TINY, torch.float32)
    assert list(steps) == [*mbconv_traffic.forward(TINY, torch.float32), *mbconv_traffic.backward(TINY, torch.float32)]
    assert sum(one["bytes"] for one in steps.values()) == sum(moved.values())
    expansion = steps["F1 expand"]
    assert expansion["gb_per_second"] == pytest.approx(expansion["bytes"] / expansion["ours"]["median"] / 1e9)
    assert "library" not in steps["F6 residual add"]
    assert all(step in table for step in steps)


def test_the_same_job_is_compared_and_the_bare_product_is_not() -> None:
    found: Case = {name: {"median": seconds} for name, seconds in {"ours": 2, "eager": 3, "library": 1}.items()}
    assert proof_blocks.fastest(found) == "ours"
    assert proof_blocks.fastest(found | {"compiled": {"median": 1.9}}) == "compiled"


def test_speed_and_memory_are_ours_against_the_best_peers() -> None:
    contenders = [*eager_entries(), Entry(OURS, kernels="torch"), Entry(OURS, graph=True)]
    contenders.append(Entry(OURS, own_residual_adds=True))
    names = {entry.label for entry in contenders}
    if not {f"{TIMM}, eager", f"{TORCHVISION}, eager"} <= names:
        pytest.skip("no peer is installed")
    times = {
        f"{OURS}, eager": 2.0, f"{OURS}, eager, graph": 1.0, f"{OURS} torch, eager": 0.5, f"{TIMM}, eager": 3.0,
        f"{TORCHVISION}, eager": 4.0, f"{OURS} with own residual adds, eager": 0.5,
    }  # fmt: skip
    assert times.keys() == names
    peaks = {f"{TIMM}, eager": 10, f"{TORCHVISION}, eager": 20}
    cases = {name: {"peak_bytes": peaks.get(name, 4)} for name in names}
    found = ratios({name: [seconds] * 3 for name, seconds in times.items()}, cases, contenders)
    assert (found["best"], found["speedup"]) == (f"{OURS}, eager, graph", 3.0), "with the kernels that a user gets"
    assert found["memory"] == {"torchvision_eager": 0.2, "leanest_peer": 0.4}


def test_kernels_of_a_step_are_ranked_with_their_bytes_and_share() -> None:
    work = Workload("b0", 64, 4)
    moved = kernel_bytes(work)
    assert {"_pointwise_kernel", "_depthwise_kernel", "_bn_silu_fwd_kernel"} <= moved.keys()
    times = {"_depthwise_kernel": Spent(3e-3, 16), "cutlass": Spent(6e-3, 2), "_bn_silu_fwd_kernel": Spent(1e-3, 2)}
    found = top_kernels(times | {f"small {i}": Spent(0.0, 1) for i in range(20)}, work, 1e9)
    assert [one["name"] for one in found["top"][:3]] == ["cutlass", "_depthwise_kernel", "_bn_silu_fwd_kernel"]
    assert len(found["top"]) == 10
    assert found["own_share"] == pytest.approx(0.4)
    assert "bytes" not in found["top"][0]
    assert found["top"][1]["of_copy_bandwidth"] == pytest.approx(moved["_depthwise_kernel"] / 3e-3 / 1e9)


def test_no_contender_is_built_for_a_cpu_that_needs_a_gpu() -> None:
    context = Context(CPU, time.monotonic() + 600, dict(BANDWIDTH))
    entries = [Entry(OURS, graph=True), Entry(OURS, {}), Entry(OURS, kernels="triton-ops")]
    stage = proof_steps.steps("steps", [Workload("b0", 224, 256)], entries)
    assert list(stage.run(context)) == []
    assert "fastnet, eager, graph; fastnet, compiled; fastnet triton-ops, eager" in context.left_out[-1]


def test_readme_table_is_made_from_the_newest_results(tmp_path: Path) -> None:
    assert readme.tables(tmp_path) == readme.NOTHING
    timing = {"median": 0.05, "spread": 0.01, "best": 0.049, "runs": 12}
    machine = {"gpu": "NVIDIA X1", "torch": "2.11", "triton": "3.6", "commit": "abc"}
    for day, median in (("02", 0.05), ("01", 0.5)):
        case = {"timing": {**timing, "median": median}, "images_per_second": 256 / median, "peak_bytes": 2.5e10}
        ours = {"triton": {"timing": {**timing, "median": 1e-4}, "of_copy_bandwidth": 0.875}}
        step = {
            "amp": "bf16", "contenders": {"fastnet, eager": case}, "speedup": 3.1, "best": "fastnet, eager",
            "fastest_peer": "timm", "memory": {"leanest_peer": 0.5}, "anatomy": {"own_share": 0.8},
        }  # fmt: skip
        block = {
            "times": 3, "predicted": {"forward": 5e-4, "backward": 5e-4},
            "triton": {"seconds": 2e-3, "peak_bytes": 1e6}, "torch": {"seconds": 8e-3, "peak_bytes": 3e6},
        }  # fmt: skip
        launch = {"ours": {"median": 1e-3}, "bytes": int(2e9), "predicted": 5e-4}
        content = {
            "machine": {**machine, "time": f"2030-01-{day}T00:00:00"},
            "stages": {
                "steps": {"cases": {"b0@224 batch 256": step}},
                "blocks": {"cases": {"16→96→24": block}},
                "blocks, compiled": {"cases": {"16→96→24": {"compiled": {"seconds": 4e-3}}}},
                "launches": {"cases": {"16→96→24": {"steps": {"F1 expand": launch}, "times": 2}}},
                "kernels": {"cases": {"bn_silu 1x8x4x4": dict.fromkeys(DIRECTIONS, ours), "broken": {"error": "no"}}},
            },
        }
        (tmp_path / "x1").mkdir(exist_ok=True)
        (tmp_path / "x1" / f"2030-01-{day}-abc.json").write_text(json.dumps(content))
    table = readme.tables(tmp_path)
    assert "| training step b0@224 batch 256, bf16 | fastnet, eager | 5,120 | 1.0% | 12 | 25.0 |  |" in table
    assert (
        "b0@224 batch 256: fastnet, eager is 3.10 × as fast as timm; its peak memory is 0.50 of leanest peer's" in table
    )
    assert "| 3 × 16→96→24 | 2.000 | 50% |  | 8.000 | 4.000 | 1 | 3 |" in table
    assert "| F1 expand | 2000 | 2000 | 50% |" in table
    assert "| bn_silu 1x8x4x4 | backward | 100.0 | 1.0% | 88% |  |  |" in table
    assert "broken" not in table
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.replaced(text, "new") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        readme.replaced("no markers", "new")


@pytest.mark.full  # test_proof_alone.py runs it where there is less
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this would be the proof itself")
def test_first_part_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # two would wait for each other where other tests run beside
    done = subprocess.run(
        [sys.executable, "-m", "bench.proof", "--part", "1", "--out", str(tmp_path)],
        capture_output=True, text=True, cwd=stages.ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: on a CPU: fastnet, eager, graph" in done.stdout
    assert "left out: triton and triton-ops on the blocks" in done.stdout
    assert {entry["state"] for entry in content(tmp_path).values()} == {"done"}
