"""Resizing batches on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DynamicResize(nn.Module):
    """Resizes batches to a square of `resolution` pixels, which may be set anew between two calls.

    Bilinear with antialiasing, so that shrinking doesn't alias. Batches that have that size pass untouched.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    @property
    def resolution(self) -> int:
        return self._resolution

    @resolution.setter
    def resolution(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"resolution must be positive, got {value}.")
        self._resolution = value

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> [B, C, resolution, resolution] of the same dtype, channels_last.

        Raises ValueError for another number of dimensions.
        """
        if images.ndim != 4:
            raise ValueError(f"images must be [B, C, H, W], got {list(images.shape)}.")
        side = self.resolution
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return images.contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}"
