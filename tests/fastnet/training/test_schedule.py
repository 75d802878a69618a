"""Learning rate, decay of the average and resolution as functions of the position in a run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn

from fastnet.config import OptimizerOptions
from fastnet.training.schedule import ema_decay, learning_rate, progressive_resolution, step_seed


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


def test_cosine_has_the_known_values() -> None:
    options = OptimizerOptions(sched="cosine", epochs=12, warmup_epochs=2, min_lr=0.1, warmup_lr=0.5)
    rate = [learning_rate(step, 10, 1.1, options) for step in range(121)]
    assert rate[0] == pytest.approx(0.5 + 0.6 / 20)
    assert rate[19] == rate[20] == pytest.approx(1.1)
    assert rate[70] == pytest.approx(0.6)  # half way, half height
    assert rate[45] == pytest.approx(0.1 + (1 + math.sqrt(0.5)) / 2)
    assert rate[120] == pytest.approx(0.1)


def test_the_staircase_stops_at_the_least_rate() -> None:
    options = OptimizerOptions(warmup_epochs=0, lr_decay=0.5, decay_epochs=1, min_lr=0.2)
    assert [learning_rate(step, 1, 1.0, options) for step in range(5)] == [1.0, 0.5, 0.25, 0.2, 0.2]


@pytest.mark.parametrize("warmup", [True, False])
def test_the_averages_decay_is_timms(warmup: bool) -> None:
    timms = ModelEmaV3(nn.Linear(1, 1), decay=0.999, use_warmup=warmup)
    for update in (1, 2, 3, 10, 1000, 100_000):
        assert ema_decay(update, 0.999, warmup) == pytest.approx(timms.get_decay(update))


def test_resolution_grows_in_equal_stages() -> None:
    sides = [progressive_resolution(epoch, 8, 224, 4, None) for epoch in range(8)]
    assert sides == [112, 112, 152, 152, 184, 184, 224, 224]
    assert [progressive_resolution(epoch, 3, 100, 3, 40) for epoch in range(3)] == [40, 72, 100]
    assert {progressive_resolution(epoch, 5, 224, stages, 96) for epoch in range(5) for stages in (0, 1)} == {224}


@given(epochs=st.integers(1, 30), resolution=st.integers(32, 600), stages=st.integers(2, 8), share=st.floats(0.2, 1.0))
def test_resolution_never_falls_and_ends_whole(epochs: int, resolution: int, stages: int, share: float) -> None:
    sides = [progressive_resolution(e, epochs, resolution, stages, round(share * resolution)) for e in range(epochs)]
    assert all(a <= b <= resolution for a, b in pairwise(sides))
    assert sides[-1] == resolution or epochs < stages


def test_a_steps_randomness_depends_on_seed_and_step_alone() -> None:
    keys = [step_seed(seed, step) for seed in (-1, 0, 1) for step in (0, 1, 2, 10**9)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    assert step_seed(3, 5) == step_seed(3, 5)
