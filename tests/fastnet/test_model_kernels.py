"""The whole model on the Triton kernels, fused blocks and single operations, against the whole model on PyTorch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastnet.arch import Stage
from fastnet.config import OptimizerOptions
from fastnet.layers import MBConv
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.optim import make_optimizer
from fastnet.training.step import TrainStep
from kernels.mbconv import PendingResidual
from tests.kernels.conv2d import depthwise_conv2d, pointwise_conv2d
from tests.networks import THREE_BLOCKS, variant

NATIVE = pytest.param("native", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU"))

NO_RESIDUAL = variant("no-residual", Stage(1, 3, 1, 16, 1), Stage(6, 5, 2, 24, 1))
SMALL = ModelConfig(THREE_BLOCKS, width=0.3, num_classes=5, dropout=0.0, drop_connect_rate=0.5, kernels="torch")


class Course(NamedTuple):
    """losses [steps]; gradients: all of a step in one vector, [steps, parameters]; running statistics at the end."""

    losses: Tensor
    gradients: Tensor
    statistics: Tensor


def course(kernels: str, dtype: torch.dtype, device: torch.device, steps: int, turn: int = 0) -> Course:
    """Train from one state, on one sequence of batches and drop-connect scales; `turn` rotates the images of a batch,
    which changes the order of the sums alone."""
    torch.manual_seed(3)
    config = replace(SMALL, kernels=kernels)  # type: ignore[arg-type]
    model = EfficientNet(config).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    generator = torch.Generator().manual_seed(4)
    losses, gradients = [], []
    for _ in range(steps):
        images = torch.randn(4, 3, 8, 8, generator=generator).to(device, dtype, memory_format=torch.channels_last)
        labels = torch.randint(5, (4,), generator=generator).to(device)
        scales = (torch.rand(len(model.blocks), 4, generator=generator) < 0.7).float() / 0.7
        images = images.roll(turn, 0).contiguous(memory_format=torch.channels_last)
        labels, scales = labels.roll(turn, 0), scales.roll(turn, 1)
        loss = F.cross_entropy(model(images, scales.to(device)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double().cpu())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().cpu())
    statistics = torch.cat([torch.cat([bn.running_mean, bn.running_var]) for bn in model.batch_norms()])
    return Course(torch.stack(losses), torch.stack(gradients), statistics.double().cpu())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "steps"),
    [
        ("triton", 4),
        ("triton-ops", 4),
        pytest.param("native", 20, marks=NATIVE.marks),
        pytest.param("triton-ops", 20, marks=pytest.mark.full),
        pytest.param("triton", 20, marks=pytest.mark.full),
        pytest.param("triton", 200, marks=pytest.mark.full),
        pytest.param("native", 200, marks=[*NATIVE.marks, pytest.mark.full]),
    ],
)
def test_training_stays_as_close_to_fp64_as_pytorch_does(kernels: str, steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    oracle = course("torch", torch.float64, device, steps)
    # Steps multiply a rounding, so that where it falls decides the error of a course: PyTorch's is the largest over the
    # orders of a batch's images, which are one course but for roundings (and differ from CPU to CPU like them).
    pytorch = [course("torch", torch.float32, device, steps, turn) for turn in range(4)]
    ours = course(kernels, torch.float32, device, steps)
    assert oracle.losses[-1] < oracle.losses[0]
    assert all(torch.isfinite(part).all() for part in ours)
    for name, exact, found, *theirs in zip(Course._fields, oracle, ours, *pytorch, strict=True):
        error = max((part - exact).abs().max() for part in theirs)
        allowed = 2 * error + torch.finfo(torch.float32).eps * exact.abs().max()
        assert (found - exact).abs().max() <= allowed, name


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["triton", pytest.param("triton-ops", marks=pytest.mark.full), NATIVE])
def test_the_model_compiles_whole_and_once(kernels: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = EfficientNet(replace(SMALL, kernels=kernels)).to(device)  # type: ignore[arg-type]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    images = torch.randn(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    for step in range(2):
        scales = torch.full((len(model.blocks), 2), 1.0 + step, device=device)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        compiled(images, scales).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model.load_state_dict(state)
        model(images, scales).square().sum().backward()
        for found, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad)
        model.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_residual_adds_are_left_to_expansions_but_not_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deferred: list[bool] = []
    inner = MBConv.forward

    def record(
        block: MBConv, x: Tensor | PendingResidual, drop_scale: Tensor | None = None, *, defer_residual: bool = False
    ) -> Any:
        deferred.append(defer_residual)
        return inner(block, x, drop_scale, defer_residual=defer_residual)

    monkeypatch.setattr(MBConv, "forward", record)
    model = EfficientNet(replace(SMALL, kernels="triton")).to(device)
    images = torch.randn(2, 3, 8, 8, device=device)
    model(images)
    assert deferred == [True, True, False]
    with torch.no_grad():
        model.eval()(images)
    assert deferred[3:] == [False, False, False]
    seen: list[torch.Size] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.train()(images)
    assert deferred[6:] == [False, True, False]
    assert seen == [(2, 8, 4, 4)]


@pytest.mark.slow
def test_blocks_compiled_one_by_one_leave_their_residual_adds_too() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    eager = EfficientNet(replace(SMALL, kernels="triton")).to(device)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_regions(fullgraph=True, dynamic=False, backend=counter)
    images = torch.randn(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    scales = torch.full((len(eager.blocks), 2), 2.0, device=device)
    for model in (eager, compiled):
        model(images, scales).square().sum().backward()
    assert counter.frame_count == len(eager.blocks) + 2
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "layout"),
    [("triton", torch.channels_last), ("triton-ops", torch.contiguous_format), ("torch", torch.channels_last)],
)
def test_gradients_have_their_parameters_strides(kernels: str, layout: torch.memory_format) -> None:
    """In axes of length 1 too: an optimizer's lists of tensors go in one launch only where strides are equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(SMALL, variant=NO_RESIDUAL, kernels=kernels)  # type: ignore[arg-type]
    model = EfficientNet(config).to(device, memory_format=layout)  # type: ignore[call-overload]
    step = TrainStep(model, make_optimizer(model, OptimizerOptions(), 0.01), device=device)
    step(torch.randn(2, 3, 8, 8, device=device).contiguous(memory_format=layout), torch.tensor([1, 3], device=device))
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_kernels_weight_gradient_has_the_weights_strides(layout: torch.memory_format) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(1, 6, 5, 5, device=device)
    for convolution, shape in ((pointwise_conv2d, (4, 6, 1, 1)), (depthwise_conv2d, (6, 1, 3, 3))):
        weight = torch.randn(shape, device=device).to(memory_format=layout).requires_grad_()
        convolution(x, weight, impl="triton").sum().backward()
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride()
    apart = torch.randn(4, 6, 2, 1, device=device)[:, :, :1].requires_grad_()  # strides of a weight that has gaps
    pointwise_conv2d(x, apart, impl="triton").sum().backward()
    assert apart.grad is not None
    torch.testing.assert_close(apart.grad, x.sum((0, 2, 3))[:, None, None].expand(4, 6, 1, 1))
