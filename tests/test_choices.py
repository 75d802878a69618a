"""What `--kernels auto` runs a block by, and where that is read from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import choices as bench_choices
from bench.launches import describe
from fastnet import choices, layers
from fastnet.layers import MBConv
from fastnet.model import BlockShape, ModelConfig
from kernels.mbconv_traffic import Block

SHAPE = BlockShape(8, 12, 3, 2, 6)
IMAGES = (2, 8, 10, 10)
MEASURED = describe(Block(2, 8, 48, 12, 2, 10, 10, 3, 2))
KEY = MEASURED.removesuffix(", batch 2")


def results(folder: Path, eager: dict[str, float], compiled: float | None, gpu: str = "X1") -> Path:
    """A folder of results with one block."""
    cases = {MEASURED: {name: {"seconds": seconds} for name, seconds in eager.items()}, "bad": {"error": "no"}}
    stages: dict[str, Any] = {"blocks": {"cases": cases}}
    if compiled is not None:
        stages["blocks, compiled"] = {"cases": {MEASURED: {"compiled": {"seconds": compiled}}}}
    (folder / gpu).mkdir()
    content = {"machine": {"gpu": gpu, "time": "2030-01-02"}, "stages": stages}
    (folder / gpu / "new.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("eager", "compiled", "expected"),
    [
        ({"triton": 1.0, "triton-ops": 1.5, "torch": 3.0}, 2.0, {}),
        ({"triton": 1.0, "triton-ops": 0.96, "torch": 3.0}, 0.97, {}),  # within the margin
        ({"triton": 1.0, "triton-ops": 0.9, "torch": 3.0}, 2.0, {"eager": "triton-ops", "compiled": "triton-ops"}),
        ({"triton": 1.0, "triton-ops": 0.9, "torch": 3.0}, 0.8, {"eager": "triton-ops", "compiled": "torch"}),
        ({"triton": 1.0, "triton-ops": 1.1, "torch": 0.7}, None, {"eager": "torch"}),
    ],
)
def test_another_form_is_taken_where_it_was_clearly_faster(
    eager: dict[str, float], compiled: float | None, expected: dict[str, str], tmp_path: Path
) -> None:
    found = bench_choices.exceptions(results(tmp_path, eager, compiled))
    assert found == ({"X1": {KEY: expected}} if expected else {})


def test_the_kept_choices_are_those_of_the_kept_results() -> None:
    assert bench_choices.exceptions() == choices.EXCEPTIONS == json.loads(choices.FILE.read_text(encoding="utf-8"))


def test_a_choice_holds_for_its_gpu_block_mode_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "EXCEPTIONS", {"cpu": {KEY: {"eager": "torch"}}})
    x = torch.empty(IMAGES, dtype=torch.bfloat16)
    assert choices.chosen(SHAPE, x, 10) == "torch"
    assert choices.chosen(SHAPE, x.float(), 10) == "triton"
    assert choices.chosen(SHAPE, x, 8) == "triton"
    assert choices.chosen(SHAPE._replace(expand_ratio=4), x, 10) == "triton"
    monkeypatch.setattr(choices, "EXCEPTIONS", {"another": {KEY: {"eager": "torch"}}})
    assert choices.chosen(SHAPE, x, 10) == "triton"


def trained(kernels: Any, x: Tensor, compiled: bool = False) -> list[Tensor]:
    """y, the input's gradient, the running statistics and every parameter's gradient after one step of a block."""
    torch.manual_seed(0)
    block = MBConv(SHAPE, replace(ModelConfig(), kernels=kernels)).train()
    x = x.detach().requires_grad_()
    run = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else block
    y = run(x)
    y.float().square().sum().backward()
    return [t.detach() for t in (y, x.grad, *block.buffers(), *(p.grad for p in block.parameters())) if t is not None]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["triton", "triton-ops", "torch"])
def test_auto_runs_the_chosen_form(form: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch computes every form, so the results are those of `torch`; what tells them apart is the call."""
    mode = "compiled" if compiled else "eager"
    monkeypatch.setattr(choices, "EXCEPTIONS", {"cpu": {KEY: {mode: form}}})
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "triton")  # as on a GPU
    whole, called = layers.mbconv, []

    def record(*args: Any, **options: Any) -> Tensor:
        called.append(options["impl"])
        return whole(*args, **options)

    monkeypatch.setattr(layers, "mbconv", record)
    x = torch.randn(IMAGES).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained("auto", x, compiled)
        assert called == {"triton": ["auto"], "triton-ops": [], "torch": ["torch"]}[form]
        expected = trained("torch", x, compiled)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))
