"""RMSprop in TF's form, the groups that decay, and the schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import RMSpropTF as TimmRMSpropTF
from torch import nn

from fastnet.config import OptimizerOptions
from fastnet.optim import (
    RMSpropTF,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
)
from fastnet.schedule import learning_rate


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_first_step_is_the_known_value() -> None:
    # v = 0.9 + 0.1 * 1e-4; lr * g / sqrt(v + eps) = 0.256 * 0.01 / sqrt(0.90101)
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = RMSpropTF([p], 0.256, decay=0.9, momentum=0.9, eps=1e-3)
    p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    assert p.item() == pytest.approx(-0.256 * 0.01 / math.sqrt(0.90001 + 1e-3), rel=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_steps_equal_timms(weight_decay: float, momentum: float) -> None:
    mine, theirs = ([nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (5, 7)] for _ in range(2))
    ours = RMSpropTF(mine, 0.05, decay=0.9, momentum=momentum, eps=1e-3, weight_decay=weight_decay)
    timms = TimmRMSpropTF(theirs, 0.05, alpha=0.9, momentum=momentum, eps=1e-3, weight_decay=weight_decay)
    for step in range(10):
        for group in (*ours.param_groups, *timms.param_groups):
            group["lr"] = 0.05 * 0.9**step  # a changing rate tells the two places for lr apart
        for a, b in zip(mine, theirs, strict=True):
            gradient = torch.randn_like(a)
            a.grad, b.grad = gradient.clone(), gradient.clone()
        ours.step()
        timms.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_vectors_do_not_decay() -> None:
    model = small_model()
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 3, 3, 3), (2, 4)}
    assert sum(len(group["params"]) for group in (decayed, plain)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["rmsprop_tf", "rmsprop"])
def test_state_survives_the_way_through_named_tensors(name: str) -> None:
    options = OptimizerOptions(optimizer=name)  # type: ignore[arg-type]
    models = [small_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(model, options, 0.1) for model in models]

    def step(which: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in models[which].parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers[which].step()

    step(0, 1)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_tensors(models[1], optimizers[1], optimizer_tensors(models[0], optimizers[0]))
    step(0, 2)
    step(1, 2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_foreign_state_is_refused() -> None:
    model = small_model()
    optimizer = make_optimizer(model, OptimizerOptions(), 0.1)
    with pytest.raises(ValueError, match=r"square_avg/9\.weight"):
        load_optimizer_tensors(model, optimizer, {"square_avg/9.weight": torch.zeros(2)})


def test_schedule_has_the_known_values() -> None:
    options = OptimizerOptions(warmup_epochs=5, lr_decay=0.96, decay_epochs=8)
    rate = [learning_rate(step, 10, 1.0, options) for step in range(300)]
    assert rate[0] == pytest.approx(1 / 50)
    assert rate[49] == rate[50] == rate[129] == 1.0
    assert rate[130] == rate[209] == pytest.approx(0.96)
    assert rate[210] == pytest.approx(0.96**2)


@given(warmup=st.floats(0, 3), per_epoch=st.integers(1, 50), peak=st.floats(1e-4, 1.0), decay=st.floats(0.5, 1.0))
def test_schedule_rises_to_the_peak_and_never_after(warmup: float, per_epoch: int, peak: float, decay: float) -> None:
    options = OptimizerOptions(warmup_epochs=warmup, lr_decay=decay, decay_epochs=0.7)
    rates = [learning_rate(step, per_epoch, peak, options) for step in range(6 * per_epoch)]
    top = math.ceil(warmup * per_epoch)
    assert all(0 < r <= peak * (1 + 1e-9) for r in rates)
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:top]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
