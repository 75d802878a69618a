"""First use: what is chosen by an injected clock, what injected faults come to, and what is kept."""

from __future__ import annotations

import json
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
from fastnet.config import RunOptions
from fastnet.errors import UserError, run_command
from fastnet.forms import Form
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.optim import freeze_stages
from fastnet.training.tuning import make_tuner, prepare_inference, trial, tuner
from fastnet.training.tuning.kept import KeptResults
from fastnet.training.tuning.measure import NO_MEMORY, Bench, Result, pick, within_memory
from fastnet.training.tuning.subjects import Context, Occurrences, Subject, subjects
from fastnet.training.tuning.timers import HostTimer
from fastnet.training.tuning.tuner import Tuner
from kernels import configs, launch
from kernels.block import mbconv_ops
from kernels.mbconv import PendingResidual
from tests.networks import THREE_BLOCKS, variant
from tests.runs import make_pictures
from tests.tuning import IMAGES, RESOLUTION, A, B, C, Machine, Other, block_forms, machine, small_model

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="stands in for a GPU on a CPU")
__all__ = ["machine"]


def prepare(measured: Tuner, kernels: str = "auto", **options: Any) -> list[Form]:
    """The forms of the three blocks of the small model in training."""
    model = small_model(kernels)
    measured.prepare(model, RESOLUTION, IMAGES, **{"training": True} | options)
    return block_forms(model)


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


# --- what is right --------------------------------------------------------------------------------------------------


def in_output(channels: int, form: Form, y: Tensor) -> Tensor:
    return y + 1e-3 * y.detach().abs().max() if (channels, form) == (16, "triton") else y


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dy = dy.clone()
        dy[-1] *= 1.01
        return dy


def in_gradient(channels: int, form: Form, y: Tensor) -> Tensor:
    return _WrongGradient.apply(y) if (channels, form) == (16, "triton") else y


def raises(channels: int, form: Form, y: Tensor) -> Tensor:
    if (channels, form) == (16, "triton"):
        raise ArithmeticError("the kernel's bounds")
    return y


def no_memory(channels: int, form: Form, y: Tensor) -> Tensor:
    if (channels, form) == (16, "triton"):
        raise torch.OutOfMemoryError
    return y


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (in_output, "its result is wrong here (y: "),
        (in_gradient, "its result is wrong here (d"),
        (raises, "it fails here with ArithmeticError: the kernel's bounds"),
        (no_memory, NO_MEMORY),
    ],
)
@pytest.mark.parametrize("tune", ["on", "off"])
def test_a_fault_of_one_block_costs_that_block_alone_and_is_said_once(
    fault: Any, sentence: str, tune: Any, machine: Machine
) -> None:
    machine.fault = fault
    finds = tune == "on" or fault in (raises, no_memory)
    tuner = machine.tuner(tune=tune)
    assert prepare(tuner) == (["triton-ops"] if finds else ["triton"]) + ["triton"] * 2
    assert len(machine.said) == finds
    if finds:
        assert machine.said[0].startswith("block 16→16→8 k3 s1 at 4, batch 4, fp32, training is not fused, since ")
        assert sentence in machine.said[0]
        assert machine.said[0].endswith("left to PyTorch's convolutions and our single operations.")
    prepare(tuner)
    prepare(tuner, training=False)
    assert sum("training is not fused" in text for text in machine.said) == finds


def test_a_wrong_configuration_costs_the_choice_and_not_the_block(machine: Machine) -> None:
    machine.configs, machine.operations = {A: 3.0, B: 1.0, C: 3.0}, 60.0

    def fault(channels: int, form: Form, y: Tensor) -> Tensor:
        return y * 1.01 if form == "triton" and machine.launched[-1:] == [B] else y

    machine.fault = fault
    assert prepare(machine.tuner()) == ["triton"] * 3
    assert not configs._choices


def test_a_configuration_that_does_not_fit_is_left_out(machine: Machine) -> None:
    machine.configs = {A: 3.0, B: 1.0, C: 2.0}
    machine.broken = {B}
    assert prepare(machine.tuner()) == ["triton"] * 3
    assert set(configs._choices.values()) == {C}
    configs.forget()
    machine.broken = {A}  # the predicted one
    assert prepare(machine.tuner(tune="again")) == ["triton"] * 3
    assert set(configs._choices.values()) == {B}


@pytest.mark.parametrize("tune", ["on", "off"])
def test_where_no_configuration_fits_the_block_falls_back(tune: Any, machine: Machine) -> None:
    machine.broken = {A, B, C}
    assert prepare(machine.tuner(tune=tune)) == ["triton-ops"] * 3
    assert len(machine.said) == 1
    assert " and 2 more are not fused, since " in machine.said[0]
    assert "needs too much shared memory" in machine.said[0]
    assert "impl=" not in machine.said[0]


@pytest.mark.parametrize("tune", ["on", "off"])
def test_kernels_asked_for_by_name_never_fall_back(tune: Any, machine: Machine) -> None:
    machine.fault = raises
    with pytest.raises(UserError, match=r"--kernels triton can't run block 16→16→8 .*bounds.*: use --kernels auto"):
        prepare(machine.tuner(tune=tune), "triton")


def test_wrong_kernels_asked_for_by_name_are_refused(machine: Machine) -> None:
    machine.fault = in_output
    with pytest.raises(UserError, match="wrong here"):
        prepare(machine.tuner(), "triton")


def test_triton_says_which_blocks_it_cannot_fuse(machine: Machine) -> None:
    model = small_model("triton")
    model.blocks[1].eval()
    machine.tuner().prepare(model, RESOLUTION, IMAGES, training=True)
    assert "1 blocks run as with --kernels triton-ops" in machine.said[0]


def test_nothing_is_measured_where_pytorch_computes_everything(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(kernels: Any) -> Tuner | None:
        return make_tuner(RunOptions(), kernels, torch.device("cpu"), "off", machine.said.append)

    assert made("auto") is not None
    assert made("torch") is None
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "torch")  # as on a GPU that the kernels don't support
    monkeypatch.setattr(tuner, "unavailable", lambda: "there is no compiler")
    assert made("auto") is None
    prepare_inference(small_model(), RESOLUTION, IMAGES, "off")
    assert machine.now == 0


def test_a_lost_gpu_is_remembered(machine: Machine) -> None:
    """A kernel that has written out of bounds takes the process with it, once."""

    def fault(channels: int, form: Form, y: Tensor) -> Tensor:
        if (channels, form) == (16, "triton") and launch._recorded is None:
            machine.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return y

    machine.fault = fault
    with pytest.raises(UserError, match="left the GPU unusable: start again"):
        prepare(machine.tuner())
    machine.lost = False  # a new process
    assert prepare(machine.tuner())[0] != "triton"


# --- what is kept ---------------------------------------------------------------------------------------------------


def refuse(*args: Any, **options: Any) -> Any:
    raise AssertionError("measured again")


def test_a_second_run_reads_what_the_first_measured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.configs, machine.fault = {A: 3.0, B: 1.0, C: 2.0}, in_output
    first = machine.tuner()
    chosen = prepare(first)
    content = json.loads(first.kept.path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert len(content["entries"]) == 5  # stem, three blocks, head
    forms.forget()
    configs.forget()
    with monkeypatch.context() as patched:
        patched.setattr(Bench, "measure", refuse)
        assert prepare(machine.tuner()) == chosen == ["triton-ops", "triton", "triton"]
    assert set(configs._choices.values()) == {B}
    machine.fault = lambda channels, form, y: y
    assert prepare(machine.tuner(tune="again")) == ["triton"] * 3
    assert prepare(machine.tuner()) == ["triton"] * 3


def test_other_shapes_and_modes_are_measured_for_themselves(machine: Machine) -> None:
    tuner, model = machine.tuner(), small_model()
    for images, training in ((IMAGES, True), (2 * IMAGES, True), (IMAGES, False)):
        before = machine.now
        tuner.prepare(model, RESOLUTION, images, training=training)
        assert machine.now > before
        after = machine.now
        tuner.prepare(model, RESOLUTION, images, training=training)
        assert machine.now == after


@pytest.mark.parametrize("content", ["{", "[]", '{"environment": {}, "entries": {}}', "\udcff"])
def test_a_damaged_or_foreign_file_costs_a_sentence(content: str, machine: Machine) -> None:
    tuner = machine.tuner()
    tuner.kept.path.parent.mkdir(parents=True)
    tuner.kept.path.write_bytes(content.encode("utf-8", "surrogateescape"))
    prepare(tuner)
    assert len(machine.said) == 1
    assert str(tuner.kept.path) in machine.said[0]
    assert json.loads(tuner.kept.path.read_text())["entries"]


def test_a_damaged_entry_is_measured_again(machine: Machine) -> None:
    tuner = machine.tuner()
    prepare(tuner)
    content = json.loads(tuner.kept.path.read_text())
    name = next(name for name in content["entries"] if name.startswith("block"))
    content["entries"][name] = {"eager": 3}
    tuner.kept.path.write_text(json.dumps(content))
    before = machine.now
    prepare(machine.tuner())
    assert machine.now > before


def test_a_configuration_that_is_no_candidate_any_more_is_forgotten(machine: Machine) -> None:
    machine.configs = {A: 3.0, B: 1.0, C: 2.0}
    tuner = machine.tuner()
    prepare(tuner)
    tuner.kept.path.write_text(tuner.kept.path.read_text().replace('"letter": "B"', '"letter": "Z"'))
    configs.forget()
    assert prepare(machine.tuner()) == ["triton"] * 3
    assert not configs._choices


def test_of_two_processes_that_measured_at_once_the_first_counts(tmp_path: Path) -> None:
    said: list[str] = []
    where = {"gpu": "A B", "torch": "1"}
    first, second = (KeptResults(where, said.append, tmp_path) for _ in range(2))
    mine = {"block": {"eager": {"torch": 1.0}, "compiled": {}}}
    assert first.add(mine) == mine
    late = {"block": {"eager": {"torch": 2.0}, "compiled": {"torch": 3.0}}, "other": {"eager": {}}}
    expected = {"block": {"eager": {"torch": 1.0}, "compiled": {"torch": 3.0}}, "other": {"eager": {}}}
    assert second.add(late) == first.read() == expected
    assert second.add(late, replace=True) == first.read() == late
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock"]
    assert not said
    assert KeptResults({"gpu": "A B", "torch": "2"}, said.append, tmp_path).read() == {}


def test_a_cache_that_cannot_be_written_costs_a_sentence_and_determinism_believes_predictions(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.torch = 0.5
    assert prepare(machine.tuner()) == ["torch"] * 3
    assert len(machine.said) == 1
    assert "can't be kept in" in machine.said[0]
    forms.forget()
    machine.said.clear()
    assert prepare(machine.tuner(deterministic=True)) == ["triton"] * 3
    assert "--deterministic wants one choice a machine" in machine.said[0]


def test_an_evaluation_takes_what_is_kept_and_measures_nothing(machine: Machine, capsys: Any) -> None:
    model = small_model().eval()
    machine.fault = raises
    prepare_inference(model, RESOLUTION, IMAGES, "off")
    assert block_forms(model, training=False) == ["triton-ops", "triton", "triton"]
    assert "inference is not fused, since it fails here" in capsys.readouterr().err
    forms.forget()
    machine.fault, machine.torch = lambda channels, form, y: y, 0.5
    machine.tuner().prepare(model, RESOLUTION, IMAGES, training=False)
    forms.forget()
    machine.torch = 10.0
    prepare_inference(model, RESOLUTION, IMAGES, "off")
    assert block_forms(model, training=False) == ["torch"] * 3


def test_predictions_are_believed_where_asked_and_nothing_is_kept(machine: Machine) -> None:
    machine.torch = 0.5
    tuner = machine.tuner(tune="off")
    assert prepare(tuner) == ["triton"] * 3
    assert not tuner.kept.path.exists()
    assert not configs._choices


# --- several ranks --------------------------------------------------------------------------------------------------


def test_ranks_with_the_same_gpu_share_the_result_of_the_first(machine: Machine) -> None:
    machine.torch = 0.5
    other = Other(lambda mine: mine if isinstance(mine, dict) and "gpu" in mine else None)
    assert prepare(machine.tuner(ranks=other)) == ["torch"] * 3


def test_another_kind_of_gpu_has_its_say(machine: Machine) -> None:
    machine.torch = 0.5

    def theirs(mine: Any) -> Any:
        if "gpu" in mine:
            return mine | {"gpu": "another"}
        return {subject: Result(eager={"triton": 9.0, "triton-ops": 20.0, "torch": 20.0}) for subject in mine}

    assert prepare(machine.tuner(ranks=Other(theirs))) == ["triton"] * 3


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
