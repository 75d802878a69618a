"""The form that a block is computed in: what `--kernels auto` was told, and what frozen blocks take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnet import forms, layers
from fastnet.arch import BlockShape, Kernels, Stage
from fastnet.forms import Form, Place
from fastnet.layers import ConvBNAct, MBConv
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.optim import freeze_stages
from kernels import launch
from tests.networks import variant

SHAPE = BlockShape(8, 12, 3, 2, 6)
IMAGES = (2, 8, 10, 10)
HERE = Place(("block", *SHAPE[:5], "symmetric"), 10, 10, torch.bfloat16, "cpu", True, False)


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    yield
    forms.forget()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "torch"),
        ({"dtype": torch.float32}, "triton"),
        ({"height": 8}, "triton"),
        ({"kind": ("block", *SHAPE[:5], "same")}, "triton"),
        ({"training": False}, "triton"),
        ({"compiled": True}, "triton"),
        ({"device": "cuda"}, "triton"),
    ],
)
def test_a_choice_holds_for_its_place_alone(change: dict[str, Any], expected: str) -> None:
    forms.use({HERE: "torch"})
    there = HERE._replace(**change)
    device = "meta" if there.device == "cuda" else "cpu"
    x = torch.empty(IMAGES, dtype=there.dtype, device=device)
    if there.compiled:
        assert forms._look_up(*there) == expected
    else:
        assert forms.chosen(there.kind, x, there.height, there.width, there.training) == expected


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `auto` believe in the fused form here; the calls of `mbconv` by the impl that they ask for."""
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "triton")
    whole, called = layers.mbconv, []

    def record(*args: Any, **options: Any) -> Tensor:
        called.append(options["impl"])
        return whole(*args, **options)

    monkeypatch.setattr(layers, "mbconv", record)
    return called


def trained(kernels: Kernels, x: Tensor, compiled: bool = False) -> list[Tensor]:
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
def test_auto_runs_the_chosen_form(form: Form, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch computes every form, so the results are those of `torch`; what tells them apart is the call."""
    torch.compiler.reset()  # a choice is looked up once, when a block is traced
    forms.use({HERE._replace(compiled=compiled): form})
    called = as_on_a_gpu(monkeypatch)
    x = torch.randn(IMAGES).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained("auto", x, compiled)
        assert called == {"triton": ["auto"], "triton-ops": [], "torch": ["torch"]}[form]
        expected = trained("torch", x, compiled)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_stem_and_head_take_pytorch_where_their_kernels_were_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    stem = ConvBNAct(3, 8, 3, ModelConfig(), stride=2, alone=True)
    inside = ConvBNAct(3, 8, 3, ModelConfig(), stride=2)
    asked: list[str] = []
    single = layers.bn_silu

    def record(*args: Any, **options: Any) -> Tensor:
        asked.append(options["impl"])
        return single(*args, **options)

    monkeypatch.setattr(layers, "bn_silu", record)
    forms.use({Place(stem.kind, 4, 4, torch.float32, "cpu", True, False): "torch"})
    for layer, images in ((stem, 8), (stem, 6), (inside, 8)):
        layer(torch.randn(2, 3, images, images))
    assert asked == ["torch", "auto", "auto"]


def test_frozen_blocks_run_fused_where_nothing_in_them_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    called = as_on_a_gpu(monkeypatch)
    block = MBConv(SHAPE, ModelConfig(kernels="auto")).eval()
    x = torch.randn(IMAGES)
    assert torch.is_grad_enabled()
    assert block.form(x, 10, 10) == "triton-ops"  # its weights are trained
    block.requires_grad_(False)
    assert block.form(x, 10, 10) == "triton"
    assert block.form(x.clone().requires_grad_(), 10, 10) == "triton-ops"  # what lies below is trained
    block.expand.bn.train()  # type: ignore[union-attr]
    assert block.form(x, 10, 10) == "triton-ops"  # statistics of two kinds
    block.eval()(x)
    assert called == ["auto"]


@pytest.mark.slow
def test_a_frozen_stage_is_computed_by_the_fused_inference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the model, in a training step, in the interpreter."""
    name = variant("first-stage-of-two", Stage(1, 3, 1, 16, 2), Stage(6, 5, 2, 24, 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = EfficientNet(ModelConfig(name, width=0.3, num_classes=5, dropout=0.0, kernels="triton"))
    freeze_stages(model, 1)
    model.to(device).train()
    images = torch.randn(2, 3, 8, 8, device=device)
    run: list[str] = []
    single = launch.launch

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        run.append(kernel.fn.__name__)
        single(kernel, *args, **options)

    monkeypatch.setattr(launch, "launch", record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = model(images)
    frozen = [name for name in run if "depthwise" in name]
    logits.square().sum().backward()
    assert len(frozen) == 3  # one a block, also for the two frozen ones, of which one could be dropped
    assert model.droppable == (False, True, False)
    assert all(p.grad is None for block in model.blocks[:2] for p in block.parameters())
    assert all(p.grad is not None for p in model.blocks[2].parameters())


def test_triton_says_where_it_cannot_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "triton")
    block = MBConv(SHAPE, ModelConfig(kernels="triton")).eval()
    with pytest.warns(UserWarning, match="norms are frozen while gradients flow"):
        assert block.form(torch.randn(IMAGES), 10, 10) == "triton-ops"


def test_auto_leaves_what_is_too_wide_to_squeeze_to_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "triton")
    shape = BlockShape(1032, 8, 3, 1, 1)  # a squeeze to 258
    assert MBConv(shape, ModelConfig()).form(torch.empty(1, 1032, 4, 4), 4, 4) == "triton-ops"


def test_a_block_may_keep_its_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "resolve", lambda impl, x: "triton")
    block, following = (MBConv(BlockShape(8, 8, 3, 1, 6), ModelConfig(kernels="triton")) for _ in range(2))
    x = torch.empty(IMAGES)
    assert block.can_defer_residual(following, x)
    block.defers_residual = False
    assert not block.can_defer_residual(following, x)
