"""What faults, injected into forms and configurations, cost at first use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastnet import layers
from fastnet.config import RunOptions
from fastnet.errors import UserError
from fastnet.forms import Form
from fastnet.training.tuning import make_tuner, prepare_inference, tuner
from fastnet.training.tuning.measure import NO_MEMORY
from fastnet.training.tuning.tuner import Tuner
from kernels import configs, launch
from tests.tuning import IMAGES, RESOLUTION, A, B, C, Machine, in_output, machine, prepare, raises, small_model

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="stands in for a GPU on a CPU")
__all__ = ["machine"]


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
