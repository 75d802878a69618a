"""First use: what is chosen by an injected clock, what injected faults come to, and what is kept."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastnet import forms, layers
from fastnet import train as train_file
from fastnet.arch import Stage
from fastnet.errors import run_command
from fastnet.forms import Form
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.optim import freeze_stages
from fastnet.training.tuning import trial, tuner
from fastnet.training.tuning.measure import NO_MEMORY, Bench, Result, pick, within_memory
from fastnet.training.tuning.subjects import Context, Occurrences, Subject, subjects
from fastnet.training.tuning.timers import HostTimer
from kernels import configs, launch
from kernels.block import mbconv_ops
from kernels.mbconv import PendingResidual
from tests.networks import THREE_BLOCKS, variant
from tests.runs import make_pictures
from tests.tuning import (
    IMAGES,
    RESOLUTION,
    A,
    B,
    C,
    Machine,
    block_forms,
    machine,
    prepare,
    small_model,
)

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="stands in for a GPU on a CPU")
__all__ = ["machine"]


# --- what is fastest ------------------------------------------------------------------------------------------------


def test_every_launch_takes_its_fastest_configuration_and_every_block_its_fastest_form(machine: Machine) -> None:
    machine.configs = {A: 3.0, B: 1.0, C: 2.0}
    assert prepare(machine.tuner()) == ["triton"] * 3
    assert len(configs._choices) == 3
    assert set(configs._choices.values()) == {B}
    assert {A, B, C} <= set(machine.launched)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"triton": 1.0, "triton-ops": 1.5, "torch": 3.0}, "triton"),
        ({"triton": 1.0, "triton-ops": 0.96, "torch": 3.0}, "triton"),  # within the margin
        ({"triton": 1.0, "triton-ops": 0.9, "torch": 3.0}, "triton-ops"),
        ({"triton": 1.0, "triton-ops": 0.9, "torch": 0.7}, "torch"),
        ({"triton-ops": 1.0, "torch": 0.97}, "triton-ops"),
        ({}, "triton-ops"),
    ],
)
def test_another_form_is_taken_where_it_is_clearly_faster(seconds: dict[Form, float], expected: Form) -> None:
    refused: dict[Form, str] = {} if "triton" in seconds else {"triton": "wrong"}
    result = Result(eager=seconds, refused=refused)
    assert pick([result], ("triton", "triton-ops", "torch"), compiled=False) == expected


def test_compiled_times_decide_for_a_compiled_model_where_there_are_any() -> None:
    candidates: tuple[Form, ...] = ("triton", "triton-ops", "torch")
    result = Result(eager={"triton": 1.0, "torch": 3.0}, compiled={"triton": 1.0, "torch": 0.5})
    assert pick([result], candidates, compiled=True) == "torch"
    assert pick([result], candidates, compiled=False) == "triton"
    assert pick([Result(eager={"triton": 1.0, "torch": 0.5})], candidates, compiled=True) == "torch"


def test_of_several_kinds_of_gpu_the_slowest_decides_and_what_fails_on_one_is_out() -> None:
    candidates: tuple[Form, ...] = ("triton", "triton-ops", "torch")
    fast = Result(eager={"triton": 1.0, "triton-ops": 0.5, "torch": 2.0})
    slow = Result(eager={"triton": 4.0, "triton-ops": 5.0, "torch": 6.0})
    assert pick([fast, slow], candidates, compiled=False) == "triton"
    wrong = Result(eager={"torch": 1.0, "triton-ops": 3.0}, refused={"triton": "wrong"})
    assert pick([fast, wrong], candidates, compiled=False) == "torch"


def test_where_no_form_has_memory_the_model_is_left_to_say_so() -> None:
    refused: dict[Form, str] = {"triton": "wrong", "triton-ops": NO_MEMORY, "torch": NO_MEMORY}
    assert pick([Result(refused=refused)], ("triton", "triton-ops", "torch"), compiled=False) == "triton-ops"


def test_forms_that_keep_more_are_taken_as_long_as_there_is_memory() -> None:
    """Three blocks that PyTorch computes faster; those go back first that gain least for each byte."""
    todo, results = {}, {}
    for height, count, gain, extra in ((1, 1, 0.1, 100), (2, 2, 0.5, 100), (3, 1, 0.3, 300)):
        subject = Subject(("block", 8, 8, 3, 1, 6, "symmetric"), 4, height, height, torch.float32, True)
        todo[subject] = Occurrences(count)
        results[subject] = Result(eager={"triton": 1.0, "torch": 1.0 - gain}, kept={"triton": 50, "torch": 50 + extra})
    picks: dict[Subject, Form] = dict.fromkeys(todo, "torch")
    for budget, expected in (
        (800, ["torch"] * 3),
        (700, ["triton", "torch", "torch"]),  # 0.1 and 0.3 of a second for 100 and 300 bytes: the fewer of them
        (500, ["triton", "torch", "triton"]),
        (100, ["triton"] * 3),
    ):
        assert list(within_memory(picks, todo, results, budget).values()) == expected


def test_memory_bounds_what_a_training_step_keeps(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.torch = 0.5
    monkeypatch.setattr(Bench, "_kept", lambda *args: {"triton": 10, "triton-ops": 20, "torch": 1 << 40})
    monkeypatch.setattr(tuner, "environment", lambda device: {"gpu": "small", "memory": str(1 << 39), "driver": "1"})
    assert prepare(machine.tuner()) == ["triton"] * 3
    assert prepare(machine.tuner(), training=False)
    assert block_forms(small_model(), training=False) == ["torch"] * 3


def test_a_slower_form_is_not_taken_and_the_table_says_by_how_much(machine: Machine, tmp_path: Path) -> None:
    machine.torch = 0.5
    assert prepare(machine.tuner(table=tmp_path / "kernels.txt")) == ["torch"] * 3
    table = (tmp_path / "kernels.txt").read_text()
    assert "block 16→16→8 k3 s1 at 4, batch 4, fp32, training: torch" in table
    assert "triton 2000.000 ms" in table  # two launches of a second
    assert "torch 500.000 ms" in table


def test_compiled_forms_are_compared_where_the_model_is_compiled(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []

    def compiled_copy(function: Callable[..., Tensor], name: str, options: Any) -> Callable[..., Tensor]:
        def run(x: Tensor) -> Tensor:
            y = function(x)
            machine.now += 0.0 if name == "trial_torch" else 2.0
            return y

        copied.append(name)
        return run

    monkeypatch.setattr(trial, "compiled_copy", compiled_copy)
    machine.torch, machine.operations, machine.configs = 0.3, 0.2, {A: 0.05, B: 0.05, C: 0.05}
    model = small_model()
    machine.tuner(compiled=True).prepare(model, RESOLUTION, IMAGES, training=True)
    assert set(copied) == {"trial_triton", "trial_triton_ops", "trial_torch"}
    assert block_forms(model, compiled=True)[0] == "torch"
    assert block_forms(model)[0] == "triton"
    # The blocks took all the time there is: the head is compared by a later run.
    before = len(copied)
    assert before == 2 + 3 * 3
    forms.forget()
    machine.tuner(compiled=True).prepare(model, RESOLUTION, IMAGES, training=True)
    assert len(copied) == before + 2
    assert block_forms(model, compiled=True)[0] == "torch"


# --- what there is to measure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("training", "frozen"), [(True, 0), (True, 1), (False, 0)])
def test_what_is_measured_is_what_the_model_asks_for(
    training: bool, frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places, and in which blocks an expansion makes the output of the block before."""
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "triton")
    asked: set[forms.Place] = set()
    contexts: list[Context] = []
    look_up, single = forms._look_up, layers.mbconv

    def record(*place: Any) -> Form:
        asked.add(forms.Place(*place))
        return look_up(*place)

    def fused(x: Any, *args: Any, stride: int, defer_residual: bool, **options: Any) -> Any:
        pending = (x.residual is not None, x.drop_scale is not None) if isinstance(x, PendingResidual) else None
        contexts.append(Context(args[4] is not None, pending))
        if isinstance(x, PendingResidual):
            x = x.p
        out, drop_scale = args[3].weight.shape[0], args[4]
        y = torch.zeros(len(x), out, *(-(-side // stride) for side in x.shape[2:]))
        residual = y if options["residual"] else None
        return PendingResidual(y, residual, drop_scale, *torch.zeros(4, out)) if defer_residual else y

    def whole(x: Tensor, *args: Any, training: bool, **options: Any) -> Tensor:
        if training:
            return fused(x, *args, defer_residual=False, **options)
        return single(x, *args, training=False, **options)

    monkeypatch.setattr(forms, "_look_up", record)
    monkeypatch.setattr(layers, "mbconv_training", fused)
    monkeypatch.setattr(layers, "mbconv", whole)
    name = variant("neighbours", Stage(1, 3, 1, 16, 2), Stage(6, 5, 2, 24, 3), Stage(6, 3, 1, 24, 1))
    model = EfficientNet(ModelConfig(name, width=0.3, num_classes=5, drop_connect_rate=0.3))
    freeze_stages(model, frozen)
    model.train(training)
    found = subjects(model, 17, 2, torch.float32, training=training)
    with torch.set_grad_enabled(training):
        model(torch.randn(2, 3, 17, 17))
    assert {subject.place(torch.device("cpu"), compiled=False) for subject in found} == asked
    expected = [c for s, o in found.items() if s.is_block and s.training for c in o.contexts.elements()]
    assert sorted(map(str, contexts)) == sorted(map(str, expected))
    assert sum(occurrences.count for occurrences in found.values()) == len(model.blocks) + 2


def test_few_images_are_checked_and_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(("block", 8, 8, 3, 1, 6, "symmetric"), 60, 10, 10, torch.float32, True)
    for most, expected in ((1, 1), (48 * 100 * 7, 6), (10**9, 60)):
        monkeypatch.setattr(trial, "CHECKED_ELEMENTS", most)
        assert trial.distinct_images(subject) == expected


@pytest.mark.parametrize("form", ["torch", "triton-ops"])
def test_no_form_is_timed_as_another(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block that follows another, too, where the fused form leaves its residual to the next."""
    monkeypatch.setattr(layers, "mbconv_training", mock.Mock(side_effect=AssertionError("the fused form")))
    subject = Subject(("block", 4, 4, 3, 1, 2, "symmetric"), 2, 3, 3, torch.float32, True)
    bench = Bench(torch.device("cpu"), "off", ModelConfig(kernels="torch"), HostTimer(), 1)
    found = bench._trial(subject, Context(True, (True, True))).runner(form, defer_residual=True)()
    assert found["y"].shape == (2, 4, 3, 3)
    with pytest.raises(AssertionError, match="the fused form"):
        bench._trial(subject, Context(True, (True, True))).runner("triton", defer_residual=True)()


@pytest.mark.slow
def test_real_kernels_are_found_right_and_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, in a block that makes the output of the block before; the batch repeats what is checked."""
    torch.manual_seed(0)
    subject = Subject(("block", 4, 4, 3, 1, 2, "symmetric"), 4, 3, 3, torch.float32, True)
    occurrences = Occurrences(1, Counter({Context(True, (True, True)): 1}))
    monkeypatch.setattr(trial, "CHECKED_ELEMENTS", 2 * 9 * 8)
    assert trial.distinct_images(subject) == 2
    bench = Bench(torch.device("cpu"), "off", ModelConfig(), HostTimer(), 1)
    left = bench._trial(subject, Context(True, (True, True))).runner("triton", defer_residual=True)()
    assert set(left) >= {"y", "dx", "dexpand.conv.weight", "dproject.bn.bias"}
    assert bench._why_wrong(subject, occurrences, "triton", {}) is None
    expand = mbconv_ops.residual_expand

    def off(p: Tensor, *args: Any) -> tuple[Tensor, ...]:
        x, e, mean, var = expand(p, *args)
        return x, e, mean, var * 4

    monkeypatch.setattr(mbconv_ops, "residual_expand", off)
    wrong = bench._why_wrong(subject, occurrences, "triton", {})
    assert wrong is not None
    assert "wrong" in wrong
    assert bench._why_wrong(subject, Occurrences(1, Counter({Context(True): 1})), "triton", {}) is None


# --- through the command line ---------------------------------------------------------------------------------------


def train(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    return run_command(train_file.train)


@pytest.mark.slow
def test_a_run_measures_falls_back_and_the_next_one_reads(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pictures(tmp_path / "data", per_class=2)
    common = f"--data {data} --loader torch --workers 0 --device cpu --batch-size 2 --epochs 2 --resolution 40".split()
    common += ["--variant", THREE_BLOCKS, "--progressive", "2", "--progressive-start", "32", "--log-every", "1"]
    machine.configs = {A: 3.0, B: 1.0, C: 2.0}
    machine.fault = lambda channels, form, y: y + (0.1 if (channels, form) == (32, "triton") else 0.0)

    def run(*arguments: str) -> tuple[int, str, str]:
        forms.forget()
        configs.forget()
        status = train([*common, *arguments], monkeypatch)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    status, text, _ = run("--out", str(tmp_path / "first"))
    assert status == 0
    # Each resolution before its first step, and evaluation's before the first of all.
    lines = [line for line in text.splitlines() if "measuring blocks" in line or "step 1/" in line or "step 4/" in line]
    assert lines[0] == "measuring blocks: 0 of 5"
    assert sum("measuring blocks: 0 of" in line for line in lines) == 3
    assert [("measuring" in line) for line in lines][-3:] == [True, True, False]
    assert (
        text.count("block 32→32→16 k3 s1 at 16, batch 2, fp32, training is not fused, since its result is wrong") == 1
    )
    assert set(configs._choices.values()) == {B}
    table = (tmp_path / "first" / "kernels.txt").read_text()
    for what in ("at 16, batch 2, fp32, training", "at 20, batch 2, fp32, training", "at 20, batch 2, fp32, inference"):
        assert f"1 x block 32→32→16 k3 s1 {what}: triton-ops" in table
    kept = list((tmp_path / "cache" / "fastnet" / "tuning").glob("*.json"))
    assert len(kept) == 1

    machine.fault = lambda channels, form, y: y
    status, text, _ = run("--out", str(tmp_path / "second"))
    assert status == 0
    assert "measuring" not in text
    assert "training is not fused, since its result is wrong" in text
    assert load_file(tmp_path / "first" / "last.safetensors")["stem.conv.weight"].equal(
        load_file(tmp_path / "second" / "last.safetensors")["stem.conv.weight"]
    )
    machine.broken = {A, B, C}  # since it was measured
    status, text, said = run("--out", str(tmp_path / "third"))
    assert status == 1
    assert "needs too much shared memory: find out what works with --tune again" in said
    assert said.count("\n") == 1
    status, text, said = run("--kernels", "triton", "--out", str(tmp_path / "fourth"))
    assert status == 1
    assert said.startswith("error: --kernels triton can't run block 32→32→16 k3 s1 at 16, batch 2, fp32, training (")
    assert "needs too much shared memory" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_measuring_does_not_change_what_is_learnt(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's fused form is PyTorch's to the bit; dropout, drop-connect and mixing draw what they would."""
    data = make_pictures(tmp_path / "data", per_class=2)
    common = f"--data {data} --loader torch --workers 0 --device cpu --batch-size 2 --epochs 1 --resolution 32".split()
    common += ["--mixup", "0.5"]
    for tune in ("on", "off"):
        assert train([*common, "--tune", tune, "--out", str(tmp_path / tune)], monkeypatch) == 0
    measured, not_measured = (load_file(tmp_path / tune / "last.safetensors") for tune in ("on", "off"))
    assert all(tensor.equal(not_measured[name]) for name, tensor in measured.items())
