"""TensorBoard and Weights & Biases get what the run's own file gets, and only if asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastnet.config import FOOD101
from fastnet.errors import UserError
from fastnet.training.reporting.metrics import MetricsFile
from fastnet.training.reporting.trackers import make_trackers


def write_two(path: Path, trackers: Any) -> None:
    metrics = MetricsFile(path / "metrics.jsonl", 0, trackers)
    metrics.write("train", step=20, loss=1.5, epoch=0)
    metrics.write("eval", step=30, top1=50.0, weights="ema")
    metrics.close()


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    config = replace(FOOD101, run=replace(FOOD101.run, tensorboard=True))
    write_two(tmp_path, make_trackers(config, tmp_path, 0, "0a1b"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/epoch", "eval_ema/top1"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(20, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval_ema/top1")] == [(30, 50.0)]


def test_wandb_gets_the_numbers_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any]) -> None:
            logged.append(values)

        def finish(self) -> None:
            logged.append("finished")

    def init(**options: Any) -> Run:
        logged.append(options)
        return Run()

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = replace(FOOD101, run=replace(FOOD101.run, wandb=True))
    write_two(tmp_path, make_trackers(config, tmp_path, 0, "0a1b"))
    options, *rest = logged
    assert (options["project"], options["id"], options["resume"]) == ("fastnet", "0a1b", "allow")
    assert options["config"]["optimizer"]["epochs"] == FOOD101.optimizer.epochs
    assert rest == [{"train/loss": 1.5, "train/epoch": 0, "step": 20}, {"eval_ema/top1": 50.0, "step": 30}, "finished"]


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        make_trackers(replace(FOOD101, run=replace(FOOD101.run, wandb=True)), tmp_path, 0, "")


def test_nothing_is_imported_unasked(tmp_path: Path) -> None:
    assert make_trackers(FOOD101, tmp_path, 0, "") == []
    assert list(tmp_path.iterdir()) == []
