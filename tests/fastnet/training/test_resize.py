"""DynamicResize: sizes, memory format, and that shrinking averages instead of picking."""

from __future__ import annotations

import pytest
import torch

from fastnet import DynamicResize


def test_the_resolution_may_change_between_calls() -> None:
    resize = DynamicResize(24)
    images = torch.randn(2, 3, 48, 40)
    for side in (24, 32, 64):
        resize.resolution = side
        result = resize(images)
        assert result.shape == (2, 3, side, side)
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert list(resize.state_dict()) == []


def test_shrinking_does_not_alias() -> None:
    checkers = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    gray = DynamicResize(16)(checkers)
    # Every fourth pixel alone would be all black. At the border the filter is cut.
    torch.testing.assert_close(gray[..., 1:-1, 1:-1], torch.full((1, 3, 14, 14), 0.5))
    assert (gray - 0.5).abs().max() < 0.01
    constant = DynamicResize(23)(torch.full((1, 3, 64, 64), 0.7))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7))


def test_the_right_size_passes_untouched() -> None:
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert DynamicResize(16)(images) is images


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        DynamicResize(0)
    with pytest.raises(ValueError, match=r"\[3, 8, 8\]"):
        DynamicResize(8)(torch.zeros(3, 8, 8))
