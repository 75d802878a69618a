"""Training with the blocks in C++ from the command's side: checkpoints, stops, autocast, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import kernels.cpu.layer as cpu_layer
import kernels.cpu.ops as cpu_ops
from fastnet.config import FOOD101, TrainConfig
from fastnet.errors import UserError
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.build import build_model
from kernels.cpu import library as libraries
from kernels.cpu.build import BuildError
from tests.fastnet.training.test_trainer import folder, tiny, train
from tests.kernels.cpu.test_build import fake

__all__ = ["fake", "folder"]

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU")


def native(config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, kernels="native"))


@pytest.mark.slow
def test_runs_go_on_to_the_same_bits_with_other_threads_and_pass_between_native_and_torch(
    folder: Path, tmp_path: Path
) -> None:
    whole, stopped, mixed = (tmp_path / name for name in ("whole", "stopped", "mixed"))
    config = native(tiny(folder))
    assert train(config, whole)[0] == 0
    assert train(config, stopped, 3)[0] == 130
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before % 2 + 1)
        assert train(config, stopped)[0] == 0
    finally:
        torch.set_num_threads(before)
    expected, found = (load_file(run / "last.safetensors") for run in (whole, stopped))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert train(tiny(folder), mixed, 3)[0] == 130
    assert train(config, mixed)[0] == 0
    assert load_file(mixed / "last.safetensors").keys() == expected.keys()


def test_every_block_trains_and_evaluates_natively_also_in_bf16() -> None:
    model = EfficientNet(ModelConfig(width=0.25, depth=0.1, num_classes=3, kernels="native"))
    model.to(memory_format=torch.channels_last)
    images = torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for autocast in (False, True):
        with (
            mock.patch.object(cpu_ops, "project", wraps=cpu_ops.project) as projections,
            mock.patch.object(cpu_layer, "activate", wraps=cpu_layer.activate) as layers,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model.train()(images).square().mean().backward()
        assert projections.call_count == len(model.blocks)
        assert layers.call_count == 2  # stem and head
        dtype = torch.bfloat16 if autocast else torch.float32
        assert all(call.args[0].dtype == dtype for call in projections.call_args_list)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad(), mock.patch.object(cpu_ops, "inference", wraps=cpu_ops.inference) as blocks:
        found = model.eval()(images)
        assert blocks.call_count == len(model.blocks)
        plain = EfficientNet(replace(model.config, kernels="torch")).eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(found, plain(images), rtol=1e-4, atol=1e-4)
    model(images).sum().backward()  # PyTorch's operations: the fused block has no gradient in evaluation


def test_without_a_compiler_or_a_cpu_it_is_one_sentence(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_own", None)
    (fake / "c++").write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"--kernels native does not work here: .*install g\+\+") as raised:
        build_model(native(FOOD101), 3, CPU, None, print)
    assert raised.value.exit_status == 2
    with pytest.raises(UserError, match="cannot run on meta"):
        build_model(native(FOOD101), 3, torch.device("meta"), None, print)


def test_a_file_that_is_no_library_is_refused(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_own", None)
    with pytest.raises(BuildError, match="does not load"):
        libraries.library()
