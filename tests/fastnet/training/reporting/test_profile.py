"""`--profile`: its parts are the run's, its trace opens, and the run is the same."""

from __future__ import annotations

import gzip
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastnet.training.reporting.profile import StepProfiler, times
from tests.forked import Server
from tests.kill_trials import make_data


def test_counts_the_steps_behind_the_warm_up_once(tmp_path: Path) -> None:
    said: list[str] = []
    screen = StringIO()
    profiler = StepProfiler(tmp_path, torch.device("cpu"), Console(file=screen, width=120), said.append)
    for epoch in range(2):
        profiler.begin(5)  # two steps of warm-up, three recorded
        for step in range(5):
            with torch.profiler.record_function("forward"):
                torch.ones(8 + 100 * step, 1000).sum()
            profiler.step(1000.0 * (epoch == 0 and step == 3))
    assert "3 steps, " in screen.getvalue()
    assert screen.getvalue().count("forward") == 1
    (waited,) = [line for line in screen.getvalue().splitlines() if "waiting for images" in line]
    assert "333333.33" in waited
    assert said == [f"trace: {tmp_path / 'profile.json.gz'} (open it in ui.perfetto.dev)"]
    trace = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))
    assert sum(event.get("name") == "forward" and event["ph"] == "X" for event in trace["traceEvents"]) == 3


def test_an_operations_time_is_without_those_that_it_calls() -> None:
    def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [
        event("inner", 2e6, 3e6), event("outer", 1e6, 9e6), event("inner", 6e6, 1e6), event("innermost", 2e6, 1e6),
        event("outer", 11e6, 1e6), event("other", 3e6, 2e6, tid=2), event("forward", 1e6, 7e6, "user_annotation"),
        event("kernel", 4e6, 2e6, "kernel"), event("forward", 5e6, 3e6, "gpu_user_annotation"), {"ph": "M"},
    ]  # fmt: skip
    parts, own = times({"traceEvents": events}, gpu=False)
    assert (parts, own) == ({"forward": 7}, {"outer": 6, "inner": 3, "innermost": 1, "other": 2})
    assert times({"traceEvents": events}, gpu=True) == ({"forward": 3}, {"kernel": 2})


@pytest.mark.slow
def test_a_profiled_run_is_the_same_run(tmp_path: Path) -> None:
    data, server = make_data(tmp_path / "data"), Server()
    flags = f"--data {data} --resolution 32 --epochs 2 --batch-size 2 --device cpu --deterministic".split()
    found = {}
    for name, more in (("plain", []), ("profiled", ["--profile"])):
        status, said = server.run(1, tmp_path / name, *flags, "--loader", "torch", "--workers", "0", *more)
        assert status == [0], said
        found[name] = (tmp_path / name / "last.safetensors").read_bytes()
        assert ("backward" in said) == ((tmp_path / name / "profile.json.gz").exists()) == bool(more)
    server.close()
    from safetensors.torch import load

    plain, profiled = load(found["plain"]), load(found["profiled"])
    assert all(torch.equal(value, profiled[name]) for name, value in plain.items())
