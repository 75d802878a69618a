"""The training step: left out without a trace when it is not finite, blind to the host, the same in parts as whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from fastnet.config import OptimizerOptions
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training import step as step_module
from fastnet.training.ema import ModelEma
from fastnet.training.optim import make_optimizer
from fastnet.training.step import TrainStep
from tests.tape import RefuseHostReads

CPU = torch.device("cpu")
OPTIMIZERS = ["rmsprop_tf", "rmsprop", "adamw", "sgd"]
MIX = (4.0, 20.0, 8.0, 30.0, 0.0, 1.0, 0.7)


def make_step(
    optimizer: str = "rmsprop_tf", *, capturable: bool = True, device: torch.device = CPU, **options: Any
) -> TrainStep:
    torch.manual_seed(0)
    model = EfficientNet(ModelConfig(width=0.25, depth=0.1, num_classes=5, kernels="torch"))
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    made = make_optimizer(model, OptimizerOptions(optimizer=optimizer), 0.01, capturable=capturable)  # type: ignore[arg-type]
    ema = ModelEma(model, 0.5, capturable=capturable)
    ema.set_update(2)
    common: dict[str, Any] = dict(device=device, clip_grad_norm=1.0, ema=ema, capturable=capturable)
    return TrainStep(model, made, **common | options)


def batch(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 5, (size,), generator=generator)


def everything(step: TrainStep) -> dict[str, Tensor]:
    """Bits that a step may change."""
    assert step.ema is not None
    tensors = dict(step.model.state_dict()) | {f"ema.{k}": v for k, v in step.ema.state_dict().items()}
    for i, p in enumerate(step.model.parameters()):
        tensors |= {f"{i}.{key}": value for key, value in step.optimizer.state[p].items()}
    return {k: v.clone() for k, v in tensors.items() if "num_batches_tracked" not in k}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_no_bit(optimizer: str, capturable: bool, amp: str) -> None:
    step = make_step(optimizer, capturable=capturable, amp=amp)
    images, labels = batch()
    if amp == "fp16":
        step.loss_scale.fill_(1.0)  # so that the first step is a good one
    step(images, labels)
    before = everything(step)
    assert step.health()[:2] == (0, 0)
    for bad in (float("nan"), float("inf")):
        spoiled = images.clone()
        spoiled[1, 0, 3, 3] = bad
        step(spoiled, labels)
        after = everything(step)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(bits(before[name]), bits(after[name]))] == []
    assert step.health()[:2] == (2, 2)
    step(images, labels)
    moved = not torch.equal(step.model.state_dict()["classifier.weight"], before["classifier.weight"])
    assert moved == (amp == "fp16")  # without a loss scale the run is over
    assert step.health().first_bad == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_graph_could_hold_computes_the_same(optimizer: str) -> None:
    steps = [make_step(optimizer, capturable=capturable) for capturable in (True, False)]
    for seed in range(3):
        for step in steps:
            torch.manual_seed(seed)
            step(*batch(seed))
    for (name, a), b in zip(everything(steps[0]).items(), everything(steps[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_capturable_step_never_waits_for_the_device(optimizer: str, amp: str) -> None:
    step = make_step(optimizer, amp=amp, grad_accum_steps=2)
    images, labels = batch()
    inputs = images, labels, step.model.draw_drop_scales(4), torch.tensor(MIX)  # type: ignore[operator]
    step.run(*inputs)
    with RefuseHostReads():
        step.run(*inputs)


def test_the_guard_sees_a_host_read() -> None:
    step = make_step(capturable=False)
    with RefuseHostReads(), pytest.raises(AssertionError, match="needs the host"):
        step(*batch())


def test_the_loss_scale_moves_as_gradscalers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 3)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], 0.0)
    step = make_step(amp="fp16")
    images, labels = batch()
    for bad in (True, False, False, False, False, True, True, False):
        spoiled = images.clone()
        if bad:
            spoiled[0, 0, 0, 0] = float("nan")
        step.loss_scale.clamp_(max=256.0)  # this model overflows fp16 at the usual scale
        theirs.scale(weight.sum())
        assert theirs._scale is not None
        theirs._scale.clamp_(max=256.0)
        weight.grad = torch.tensor([float("nan") if bad else 1.0])
        theirs.step(sgd)
        theirs.update()
        step(spoiled, labels)
        assert step.health().loss_scale == theirs.get_scale()


@pytest.mark.parametrize(("amp", "scale"), [("off", 1.0), ("fp16", 8.0), ("fp16", 128.0)])
def test_the_unscaled_gradients_are_clipped(amp: str, scale: float) -> None:
    step = make_step("sgd", amp=amp, clip_grad_norm=0.01, ema=None)
    step.loss_scale.fill_(scale)
    for group in step.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in step.model.parameters()]
    step(*batch())
    assert step.health().skipped == 0
    moved = [(p - b).flatten() for p, b in zip(step.model.parameters(), before, strict=True)]
    # A first step of Nesterov's: lr (1 + momentum) times the gradient, whose norm is 0.01.
    assert torch.cat(moved).double().norm().item() == pytest.approx(0.01 * 1.9 * 0.01, rel=1e-3)


@pytest.mark.parametrize("mixed", [False, True])
def test_parts_add_up_to_one_big_batch(mixed: bool) -> None:
    """With batch norm out of the way: in evaluation mode, where it neither takes statistics nor moves them."""
    results = []
    for parts in (1, 2, 4):
        step = make_step(grad_accum_steps=parts, capturable=False)
        step.model.double().eval()
        images, labels = batch(size=8)
        mix = torch.tensor(MIX, dtype=torch.float64) if mixed else None
        loss, correct = step(images.double(), labels, torch.ones(7, 8, dtype=torch.float64), mix)
        results.append((loss, correct, [p.detach().clone() for p in step.model.parameters()]))
    for loss, correct, parameters in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(correct, results[0][1])
        for a, b in zip(parameters, results[0][2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("parts", "ranks"), [(3, 1), (2, 3)])
def test_uneven_parts_weigh_by_their_images(parts: int, ranks: int) -> None:
    """8 images in parts of 3, 3 and 2, or on ranks with 3, 3 and 2; the loss is computed in fp32."""
    images, labels = batch(size=8)
    scales = torch.ones(7, 8, dtype=torch.float64)

    def gradient(rows: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        step = make_step(capturable=False, clip_grad_norm=0.0, **options)
        step.model.double().eval()
        loss, _ = step(images[rows].double(), labels[rows], scales[:, rows])
        return loss, torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])

    loss, whole = gradient(torch.arange(8))
    shares = torch.arange(8).tensor_split(ranks)
    found = [gradient(rows, grad_accum_steps=parts, images=8) for rows in shares]
    mean_loss = sum(found[r][0] * len(shares[r]) for r in range(ranks)) / 8
    torch.testing.assert_close(mean_loss, loss)
    total = torch.stack([gradient for _, gradient in found]).sum(0)
    assert (total - whole).norm() < 1e-6 * whole.norm()


def test_a_batch_that_cannot_be_divided_is_named() -> None:
    with pytest.raises(ValueError, match="a batch of 4 can't go through the model in 5 parts"):
        make_step(grad_accum_steps=5)(*batch())


def test_only_the_last_part_is_reduced_and_the_flag_is_shared() -> None:
    backward = 0

    def count(_: Tensor) -> None:
        nonlocal backward
        backward += 1

    @contextmanager
    def all_reduce() -> Iterator[None]:
        assert backward == 3
        yield
        assert backward == 4

    def another_rank_failed(found_inf: Tensor) -> None:
        found_inf.fill_(1.0)

    step = make_step(grad_accum_steps=4, all_reduce=all_reduce, reduce_found_inf=another_rank_failed)
    next(step.model.parameters()).register_post_accumulate_grad_hook(count)
    before = everything(step)
    step(*batch(size=8))
    assert backward == 4
    after = everything(step)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert step.health().skipped == 1


def test_a_mixed_loss_is_that_of_timms_soft_targets() -> None:
    step = make_step(label_smoothing=0.1)
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    mine, correct = step._loss(logits, labels, labels.flip(0), torch.tensor(0.3))
    target = mixup_target(labels, 5, lam=0.3, smoothing=0.1)
    torch.testing.assert_close(mine, SoftTargetCrossEntropy()(logits, target))
    hits = logits.argmax(1)
    assert correct == pytest.approx(
        0.3 * (hits == labels).sum().item() + 0.7 * (hits == labels.flip(0)).sum().item(), abs=1e-5
    )


def test_what_continues_a_run_goes_through_its_state() -> None:
    step, fresh = make_step(amp="fp16"), make_step(amp="fp16")
    images, labels = batch()
    images[0, 0, 0, 0] = float("nan")
    step(images, labels)
    fresh.load_state_dict({k: v.clone() for k, v in step.state_dict().items()})
    assert fresh.health() == step.health()
    assert fresh.health() == (1, 1, 2.0**15)
