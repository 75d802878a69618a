"""RMSprop in both forms, what is frozen, the groups that decay, and state by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.optim import RMSpropTF as TimmRMSpropTF
from torch import nn

from fastnet.config import OptimizerOptions
from fastnet.errors import UserError
from fastnet.model import EfficientNet, ModelConfig
from fastnet.training.optim import (
    RMSprop,
    RMSpropTF,
    freeze_stages,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)


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
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr_scale"] == plain["lr_scale"] == 1.0
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 3, 3, 3), (2, 4)}
    assert sum(len(group["params"]) for group in (decayed, plain)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["rmsprop_tf", "rmsprop", "adamw", "sgd"])
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


def test_foreign_options_name_their_flag() -> None:
    model = small_model().requires_grad_(False)
    with pytest.raises(UserError, match="--freeze-stages"):
        make_optimizer(model, OptimizerOptions(), 0.1)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_torch_flavour_equals_torchs(capturable: bool, momentum: float) -> None:
    mine, theirs = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 7)] for _ in range(2))
    ours = RMSprop(
        mine, torch.tensor(0.05), decay=0.9, momentum=momentum, eps=1e-3, weight_decay=1e-2, capturable=capturable
    )
    torchs = torch.optim.RMSprop(theirs, 0.05, alpha=0.9, momentum=momentum, eps=1e-3, weight_decay=1e-2)
    for step in range(5):
        set_learning_rate(ours, 0.05 * 0.9**step)
        set_learning_rate(torchs, 0.05 * 0.9**step)
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_capturable_moves_as_the_other() -> None:
    models = [small_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        make_optimizer(m, OptimizerOptions(), 0.1, capturable=c) for m, c in zip(models, (True, False), strict=True)
    ]
    for _ in range(4):
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_rate_is_filled_where_a_graph_reads_it() -> None:
    optimizer = make_optimizer(tiny(), OptimizerOptions(layer_decay=0.5), 0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 1.0)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate
        assert rate.item() == group["lr_scale"]


def tiny() -> EfficientNet:
    return EfficientNet(ModelConfig(width=0.25, depth=0.1, num_classes=5, kernels="torch"))


def test_each_layer_down_learns_slower() -> None:
    model = tiny()
    groups = parameter_groups(model, 0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    blocks = len(model.blocks)
    for name, p in model.named_parameters():
        parts = name.split(".")
        above = {"stem": blocks + 1, "blocks": blocks - int(parts[1]) if parts[0] == "blocks" else 0}.get(parts[0], 0)
        assert scale[id(p)] == 0.5**above, name
    assert all((group["weight_decay"] > 0) == (p.ndim > 1) for group in groups for p in group["params"])


@pytest.mark.parametrize(("stages", "blocks"), [(0, 0), (2, 3), (7, 16)])
def test_frozen_stages_stay_as_they_are(stages: int, blocks: int) -> None:
    model = EfficientNet(ModelConfig(width=0.25, num_classes=5, kernels="torch"))
    freeze_stages(model, stages)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        one.eval()
        one.train()
        frozen = [name for name, p in one.named_parameters() if not p.requires_grad]
        expected = [f"blocks.{i}." for i in range(blocks)] + (["stem."] if stages else [])
        assert {name for name, _ in one.named_parameters() if name.startswith(tuple(expected))} == set(frozen)
        assert [block.training for block in one.blocks] == [i >= blocks for i in range(len(one.blocks))]
        assert one.head.training
        assert (one.survival_prob[:blocks] == 1).all()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimizerOptions(), 0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 48, 48)).square().mean().backward()
        optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k]) and "tracked" not in k}
    assert moved == {k for k in before if not k.startswith(tuple(expected)) and "tracked" not in k}
    assert copied.stem is not model.stem
