"""Averaged weights against timm's, and what is kept out of them."""

from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.ema import ModelEma


def tiny() -> EfficientNet:
    return EfficientNet(ModelConfig(width=0.25, depth=0.1, num_classes=5, kernels="torch"))


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model.train()(torch.randn(2, 3, 48, 48))  # moves batch norm's statistics


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_timms(capturable: bool, warmup: bool) -> None:
    model = tiny()
    ours = ModelEma(model, 0.9, warmup=warmup, capturable=capturable)
    timms = ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    for update in range(1, 6):
        shake(model)
        ours.set_update(update)
        ours.update(torch.zeros(()))
        timms.update(model, step=update)
    for (name, mine), theirs in zip(ours.state_dict().items(), timms.module.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert ours.state_dict()["stem.bn.num_batches_tracked"] == 5


@pytest.mark.parametrize("capturable", [True, False])
def test_a_step_that_is_left_out_is_not_averaged(capturable: bool) -> None:
    model = tiny()
    ema = ModelEma(model, 0.9, capturable=capturable)
    before = {k: v.clone() for k, v in ema.state_dict().items() if v.is_floating_point()}
    shake(model)
    with torch.no_grad():
        model.stem.bn.running_mean.fill_(3.0)
    ema.set_update(7)
    ema.update(torch.ones(()))
    assert all(torch.equal(before[name], ema.state_dict()[name]) for name in before)


def test_the_average_neither_trains_nor_follows_the_model_by_itself() -> None:
    model = tiny()
    ema = ModelEma(model, 0.9)
    shake(model)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not torch.equal(ema.module.stem.conv.weight, model.stem.conv.weight)
