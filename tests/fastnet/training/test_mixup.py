"""Mixup and cutmix: the formula, the draw, and that the share is what the pixels say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnet.config import MixOptions
from fastnet.training.mixup import Mix, draw_mix, mix_images

BOTH = MixOptions(mixup=0.8, cutmix=1.0)


def images(side: int = 16) -> torch.Tensor:
    return torch.randn(4, 3, side, side).contiguous(memory_format=torch.channels_last)


def mixed(x: torch.Tensor, mix: Mix) -> torch.Tensor:
    return mix_images(x, torch.tensor(mix))


def test_mixup_is_a_weighted_sum() -> None:
    x = images()
    torch.testing.assert_close(mixed(x, Mix(outside=0.3, share=0.3)), 0.3 * x + 0.7 * x.flip(0))


def test_cutmix_pastes_a_box() -> None:
    x = images()
    result = mixed(x, Mix(2, 7, 4, 16, inside=0.0, share=0.5))
    expected = x.clone()
    expected[:, :, 2:7, 4:16] = x.flip(0)[:, :, 2:7, 4:16]
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_no_mix_changes_no_bit() -> None:
    x = images()
    assert torch.equal(mixed(x, Mix()), x)


@given(step=st.integers(0, 10**6), seed=st.integers(-5, 5), side=st.integers(8, 300))
def test_the_share_is_what_is_left_of_the_own_image(step: int, seed: int, side: int) -> None:
    mix = draw_mix(BOTH, side, seed, step)
    assert mix == draw_mix(BOTH, side, seed, step)
    own = torch.zeros(2, 1, side, side)
    own[0] = 1.0
    assert mixed(own, mix)[0].mean().item() == pytest.approx(mix.share, abs=1e-5)
    assert 0 <= mix.top <= mix.bottom <= side
    assert 0 <= mix.left <= mix.right <= side


def test_the_draws_have_timms_frequencies_and_distributions() -> None:
    def draws(options: MixOptions) -> list[Mix]:
        return [draw_mix(options, 224, 1, step) for step in range(3000)]

    some = draws(replace(BOTH, mixup_prob=0.7, mixup_switch_prob=0.25))
    cut = np.mean([mix.inside == 0 for mix in some])
    plain = np.mean([mix == Mix() for mix in some])
    assert plain == pytest.approx(0.3, abs=0.03)
    assert cut == pytest.approx(0.7 * 0.25, abs=0.03)
    shares = np.array([mix.share for mix in draws(MixOptions(mixup=0.8))])
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), abs=0.01)
    assert all(mix.inside == 0 for mix in draws(MixOptions(cutmix=1.0)))
    assert {draw_mix(MixOptions(), 224, 0, step) for step in range(9)} == {Mix()}
