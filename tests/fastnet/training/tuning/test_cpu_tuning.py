"""`--kernels auto` on a CPU: blocks in C++ where they are right and faster there, PyTorch elsewhere, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastnet import forms, layers
from fastnet.config import RunOptions
from fastnet.device import check_kernels
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.tuning import make_tuner, pick_precision, precision, tuner
from fastnet.training.tuning.timers import HostTimer
from kernels.cpu import library as libraries
from kernels.cpu import ops as cpu_ops
from kernels.cpu.build import cpu_level
from tests.fastnet.training.test_trainer import folder, tiny, train
from tests.kernels.cpu.test_build import fake
from tests.networks import THREE_BLOCKS
from tests.runs import measured_on_a_cpu

__all__ = ["fake", "folder"]

CPU = torch.device("cpu")
SIDE, IMAGES = 32, 2
pytestmark = pytest.mark.skipif(cpu_level() == "plain", reason="PyTorch's kernels are predicted first on this CPU")


class FormTimer(HostTimer):
    """A block in C++ takes `native` seconds, any other one."""

    native = 0.5

    def whole(self, run: Callable[[], object]) -> float:
        with mock.patch.object(cpu_ops, "project", wraps=cpu_ops.project) as projections:
            run()
        return self.native if projections.called else 1.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FormTimer]:
    own = FormTimer()
    measured_on_a_cpu(monkeypatch)
    monkeypatch.setattr(tuner, "timer_for", lambda device: own)
    monkeypatch.setattr("fastnet.training.tuning.kept.user_cache_folder", lambda: tmp_path / "cache")
    yield own
    forms.forget()


def small_model() -> EfficientNet:
    model = EfficientNet(ModelConfig(THREE_BLOCKS, num_classes=3))
    return model.to(memory_format=torch.channels_last)


def prepare(model: EfficientNet, said: list[str], table: Path | None = None, **options: Any) -> None:
    made = make_tuner(RunOptions(**options), "auto", CPU, "off", said.append, table=table)
    assert made is not None
    made.prepare(model, SIDE, IMAGES, training=True)


def native_blocks(model: EfficientNet) -> int:
    """How many blocks of a training step are computed in C++."""
    images = torch.randn(IMAGES, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    with mock.patch.object(cpu_ops, "project", wraps=cpu_ops.project) as projections:
        model.train()(images).sum().backward()
    return projections.call_count


def test_what_was_not_measured_is_left_to_pytorch() -> None:
    assert native_blocks(small_model()) == 0


@pytest.mark.slow
def test_blocks_that_are_right_and_faster_run_in_c(tmp_path: Path) -> None:
    model = small_model()
    said: list[str] = []
    with mock.patch.object(layers, "mbconv_training", wraps=layers.mbconv_training) as fused:
        prepare(model, said, tmp_path / "kernels.txt")
    # Only blocks in C++ have left their residual to a neighbour: PyTorch's were timed as PyTorch's.
    assert fused.call_count > 0
    assert all(call.kwargs["native"] for call in fused.call_args_list)
    assert native_blocks(model) == len(model.blocks)
    assert said == []
    table = (tmp_path / "kernels.txt").read_text()
    assert f"{cpu_level()}, {torch.get_num_threads()} threads" in table
    assert ": native\n  eager: native 500.000 ms, torch 1000.000 ms" in table
    forms.forget()
    with mock.patch.object(FormTimer, "whole", side_effect=AssertionError("it was kept")):
        prepare(model, said)
    assert native_blocks(model) == len(model.blocks)


@pytest.mark.slow
def test_blocks_that_are_slower_are_left_to_pytorch(clock: FormTimer) -> None:
    clock.native = 2.0
    model = small_model()
    prepare(model, [])
    assert native_blocks(model) == 0


@pytest.mark.slow
def test_blocks_that_are_wrong_are_left_to_pytorch_and_named() -> None:
    right = cpu_ops.project

    def wrong(*arguments: Any) -> Any:
        p, *others = right(*arguments)
        return p * 2, *others

    model = small_model()
    said: list[str] = []
    with mock.patch.object(cpu_ops, "project", wrong):
        prepare(model, said)
    assert native_blocks(model) == 0
    assert len(said) >= 1
    assert "not fused, since its result is wrong here" in said[0]
    assert said[0].endswith("left to PyTorch.")


def test_the_faster_precision_is_taken_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, float]] = []
    seconds = {"off": 1.0, "bf16": 0.5}
    monkeypatch.setattr(precision, "unavailable", lambda say: None)

    def measure(timer: HostTimer) -> dict[str, float]:
        measured.append(dict(seconds))
        return measured[-1]

    monkeypatch.setattr(precision, "_measure", measure)

    def pick(name: str = "auto", kernels: Any = "auto", variant: str = "b0", tune: Any = "on") -> str:
        return pick_precision(name, CPU, kernels, variant, print, tune)

    assert pick() == pick(kernels="native") == "bf16"
    assert [pick(name) for name in ("off", "bf16")] == ["off", "bf16"]
    assert pick(kernels="torch") == pick(variant="lite0") == "off"
    seconds["bf16"] = 2.0
    assert pick() == "bf16"
    assert len(measured) == 1
    assert pick(tune="again") == pick() == "off"
    assert len(measured) == 2
    monkeypatch.setattr(precision.KeptResults, "writable", lambda self: False)
    monkeypatch.setattr(precision.KeptResults, "read", lambda self: {})
    for level, expected in (("amx", "bf16"), ("avx2", "off")):
        monkeypatch.setattr(precision, "cpu_level", lambda level=level: level)
        assert pick() == expected
    assert len(measured) == 2


@pytest.mark.slow
def test_both_precisions_are_measured() -> None:
    found = precision._measure(HostTimer())
    assert found.keys() == {"off", "bf16"}
    assert min(found.values()) > 0


def test_without_a_compiler_pytorch_computes_and_says_why(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_own", None)
    (fake / "c++").write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    said: list[str] = []
    check_kernels("auto", CPU, said.append)
    assert len(said) == 1
    assert said[0].startswith("computing with PyTorch alone because ")
    assert "install g++" in said[0]
    assert make_tuner(RunOptions(), "auto", CPU, "off", said.append) is None


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["a compiler", "a compiler that works", "a cache"])
def test_a_run_needs_none_of_it(
    lacking: str, fake: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_own", None)
    if lacking == "a compiler":
        monkeypatch.setattr("kernels.cpu.build.shutil.which", lambda name: None)
    elif lacking == "a cache":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        (fake / "c++").write_text("#!/bin/sh\nexit 1\n")
    status, text, _ = train(tiny(folder), tmp_path / "run", stop_at=2)
    assert status == 130
    assert text.count("computing with PyTorch alone because ") == 1
