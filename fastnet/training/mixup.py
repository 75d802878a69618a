"""Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): each image of a batch mixed with the one opposite to it.

Both are one formula whose seven numbers travel in a tensor, so that a CUDA graph holds whichever a step draws:

    x <- w x + (1 - w) flip(x),  w = inside if the pixel lies in rows top..bottom, columns left..right, else outside
    loss <- share loss(y) + (1 - share) loss(flip(y))

Mixup has an empty box and outside = share; cutmix has inside 0, outside 1 and share = 1 - the box's area.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnet.config import MixOptions
from fastnet.training.schedule import step_seed


class Mix(NamedTuple):
    """One step's draw; the box is in pixels, its ends excluded."""

    top: float = 0.0
    bottom: float = 0.0
    left: float = 0.0
    right: float = 0.0
    inside: float = 1.0
    outside: float = 1.0
    share: float = 1.0


def draw_mix(options: MixOptions, resolution: int, seed: int, step: int) -> Mix:
    """What step `step` mixes, with the distributions and probabilities of timm's Mixup in its mode "batch".

    share ~ Beta(alpha, alpha); cutmix's box has the sides sqrt(1 - share) of the image's around a uniform centre, is
    cut at the border, and share is corrected to what is left of it.
    """
    generator = np.random.Generator(np.random.Philox(step_seed(seed, step)))
    mixes, switches = generator.random(2)
    if not options.enabled or mixes >= options.mixup_prob:
        return Mix()
    cuts = options.cutmix > 0 and (options.mixup == 0 or switches < options.mixup_switch_prob)
    alpha = options.cutmix if cuts else options.mixup
    share = float(generator.beta(alpha, alpha))
    if not cuts:
        return Mix(outside=share, share=share)
    side = int(resolution * math.sqrt(1 - share))
    edges = []
    for center in generator.integers(0, resolution, 2):
        edges += [max(0, int(center) - side // 2), min(resolution, int(center) + (side + 1) // 2)]
    top, bottom, left, right = edges
    area = (bottom - top) * (right - left) / resolution**2
    return Mix(top, bottom, left, right, inside=0.0, outside=1.0, share=1 - area)


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """images [B, 3, H, W], mix [7] as in `Mix` -> [B, 3, H, W] in the same memory format."""
    top, bottom, left, right, inside, outside, _ = mix.to(images.dtype).unbind()
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.lerp(images.flip(0), images, torch.where(box, inside, outside))
