"""The whole training step on fake CUDA tensors: what a CPU forgives (a tensor on the wrong device, a value read in the
middle of a step, a promise about strides that the kernels do not keep) and a GPU does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline import Augmentation, Batch, build_index, make_loader
from data_pipeline.loaders.cache import PixelCache
from data_pipeline.loaders.prefetch import SideStream
from fastnet.config import EmaOptions, MixOptions, ModelOptions, OptimizerOptions, TrainConfig
from fastnet.device import Amp
from fastnet.errors import UserError
from fastnet.model import EfficientNet
from fastnet.training.build import build_model, build_step
from fastnet.training.distributed import ALONE, divide
from fastnet.training.mixup import draw_mix
from fastnet.training.optim import set_learning_rate
from fastnet.training.reporting.metrics import RunningMetrics
from fastnet.training.resize import DynamicResize
from fastnet.training.step import AMP_DTYPES, TrainStep
from fastnet.training.validate import evaluate_model, reestimate_batch_norm
from kernels.block import mbconv_ops
from tests.batches import write_photos
from tests.fake_cuda import CUDA, Witness, fake_cuda, to_cuda
from tests.networks import KINDS, variant

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]

FORMS = ("torch", "triton", "triton-ops", "auto")
FUSED = {"_pointwise_kernel", "_pointwise_wgrad_kernel", "_depthwise_kernel", "_depthwise_backward_kernel"}
OPERATIONS = {"_bn_silu_fwd_kernel", "_bn_silu_dx_kernel", "_drop_connect_kernel", "_bn_drop_connect_dx_kernel"}
BATCH, SIDE = 4, 32
VARIANT = variant("kinds", *KINDS)


def settings(kernels: Any = "triton", **changes: Any) -> TrainConfig:
    options: dict[str, Any] = dict(batch_size=BATCH, grad_accum_steps=2, clip_grad_norm=1.0)
    return TrainConfig(
        model=ModelOptions(VARIANT, kernels=kernels),
        optimizer=OptimizerOptions(**options | changes),
        mix=MixOptions(mixup=0.2, cutmix=1.0),
        ema=EmaOptions(model_ema=True),
    )


def made(config: TrainConfig) -> EfficientNet:
    return build_model(config, 5, torch.device("cpu"), None, print)


def batch(side: int = SIDE, count: int = BATCH) -> Batch:
    images = torch.empty(count, 3, side, side, device=CUDA).to(memory_format=torch.channels_last)
    return Batch(images, torch.empty(count, dtype=torch.int64, device=CUDA))


def train(config: TrainConfig, model: EfficientNet, amp: Amp, seen: Witness) -> TrainStep:
    """One step as `Trainer` makes it. What the host saw is of the step alone."""
    batch_layout = divide(config.images_per_step, ALONE, BATCH, config.optimizer.grad_accum_steps)
    step, sums, resize = build_step(config, model, CUDA, amp, batch_layout), RunningMetrics(CUDA), DynamicResize(SIDE)
    model.train()
    set_learning_rate(step.optimizer, 0.1)
    assert step.ema is not None
    step.ema.set_update(1)
    images, labels = batch(SIDE + 4, batch_layout.images)
    scales = model.draw_drop_scales(batch_layout.images, CUDA)
    mix = torch.tensor(draw_mix(config.mix, SIDE, 0, 0)).to(CUDA, non_blocking=True)
    seen.host.clear()
    loss, correct = step(resize(images), labels, scales, mix)
    sums.add(loss, correct, batch_layout.images)
    return step


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("kernels", FORMS)
def test_a_step_stays_on_the_gpu(kernels: str, amp: Amp) -> None:
    config = settings(kernels)
    model = made(config)
    with fake_cuda() as seen:
        to_cuda(model)
        step = train(config, model, amp, seen)
        assert seen.host == []  # or no CUDA graph could hold it
        assert seen.products == {AMP_DTYPES[amp]}
        launched = set(seen.kernels)
        assert launched >= {"triton": FUSED, "auto": FUSED, "triton-ops": OPERATIONS, "torch": set()}[kernels]
        assert launched.isdisjoint({"triton-ops": FUSED, "torch": FUSED | OPERATIONS}.get(kernels, set()))
        kept = [*model.parameters(), *model.buffers(), *step.state_dict().values()]
        kept += [p.grad for p in model.parameters() if p.grad is not None]
        assert step.ema is not None
        kept += step.ema.state_dict().values()
        kept += [value for state in step.optimizer.state.values() for value in state.values()]
        assert {tensor.device for tensor in kept} == {CUDA}
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kernels", FORMS)
def test_evaluation_and_reestimation_stay_on_the_gpu(kernels: str) -> None:
    model = made(settings(kernels))
    with fake_cuda() as seen:
        to_cuda(model)
        assert reestimate_batch_norm(model, [batch(), batch()], 2, amp="bf16", device=CUDA) == 2
        seen.host.clear()
        with pytest.raises(UserError, match="no image to evaluate"):  # a fake tensor counts nothing
            evaluate_model(model, [batch(), batch(count=1)], classes=model.config.num_classes, device=CUDA, amp="bf16")
        assert len(seen.host) == 5  # the sums, once
        assert seen.products == {torch.bfloat16}
        assert bool(seen.kernels) == (kernels != "torch")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_every_optimizer_stays_on_the_gpu(optimizer: str) -> None:
    config = settings("torch", optimizer=optimizer, grad_accum_steps=1)
    model = made(config)
    with fake_cuda() as seen:
        to_cuda(model)
        step = train(config, model, "fp16", seen)
        assert seen.host == []
        assert {value.device for state in step.optimizer.state.values() for value in state.values()} <= {CUDA}


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_frozen_stages_stay_on_the_gpu(kernels: str) -> None:
    config = settings(kernels, freeze_stages=2, grad_accum_steps=1)
    model = made(config)
    with fake_cuda() as seen:
        to_cuda(model)
        train(config, model, "bf16", seen)
        assert seen.host == []
        assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_batches_from_pixels_on_the_gpu_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, "feed", lambda self, batches: batches)  # there are no streams without a driver
    index = build_index(write_photos(tmp_path / "photos"), cache_dir=tmp_path)
    pixels = PixelCache("gpu", "", index, 24, tmp_path)
    common: dict[str, Any] = dict(cache=pixels, resolution=24, batch_size=4, seed=0, workers=1, device=CUDA)
    with fake_cuda() as seen:
        for augmentation in (Augmentation(random_erasing=1.0), Augmentation(rand_augment_ops=2)):
            loader = make_loader(index, "train", train=True, augmentation=augmentation, **common)
            assert loader.backend == "device"
            for number, (images, labels) in enumerate(loader.batches(0), 1):
                assert seen.kernels["_augment_kernel"] == number
                assert (images.device, labels.device, images.dtype) == (CUDA, CUDA, torch.float32)
                assert images.is_contiguous(memory_format=torch.channels_last)
            loader.close()
            seen.kernels.clear()


# The test of the test


def norm_on_the_host(model: EfficientNet, monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = model.blocks[1]
    block.depthwise.bn.running_mean = block.depthwise.bn.running_mean.cpu()


def gate_on_the_host(model: EfficientNet, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = mbconv_ops.E.excite

    def excite(*args: Any) -> tuple[Any, ...]:
        pooled, hidden, gate, dsilu_sums = usual(*args)
        return pooled, hidden, gate.cpu(), dsilu_sums

    monkeypatch.setattr(mbconv_ops.E, "excite", excite)


def other_strides(model: EfficientNet, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = mbconv_ops.P.forward
    monkeypatch.setattr(mbconv_ops.P, "forward", lambda *args: (usual(*args)[0].contiguous(), *usual(*args)[1:]))


def kernel_scratch_on_the_host(model: EfficientNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kernels.launch.empty", lambda shape, like, dtype=torch.float32: torch.empty(shape, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (norm_on_the_host, r"_foreach_\w+_ is given tensors on cpu and cuda"),
        (gate_on_the_host, r"_pointwise_kernel is given a tensor \[4, 32\] on cpu"),
        (kernel_scratch_on_the_host, r"_kernel is given a tensor \[.*\] on cpu"),
        (other_strides, "fastnet::mbconv_project makes .* and register_fake promises"),
    ],
)
def test_a_planted_tensor_is_seen(
    fault: Callable[[EfficientNet, pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("triton", grad_accum_steps=1)
    model = made(config)
    with fake_cuda() as seen:
        to_cuda(model)
        fault(model, monkeypatch)
        with pytest.raises((AssertionError, ValueError), match=message):
            train(config, model, "bf16", seen)


def test_a_planted_look_and_a_planted_copy_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: TrainStep, logits: Tensor, labels: Tensor, other: Tensor, share: Any) -> tuple[Tensor, Tensor]:
        correct = (logits.argmax(1) == labels.to("cpu").to(CUDA)).sum()
        return usual(self, logits, labels, other, share)[0], correct * int(correct)

    usual = TrainStep._loss
    config = settings("torch", grad_accum_steps=1)
    model = made(config)
    with fake_cuda() as seen:
        to_cuda(model)
        monkeypatch.setattr(TrainStep, "_loss", forward)
        train(config, model, "bf16", seen)
        assert [note.partition(":")[0] for note in seen.host] == ["cpu and cuda"] * 2 + ["a value is read"]
