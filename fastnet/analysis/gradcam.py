"""Grad-CAM: where in the image a model saw evidence for a class (Selvaraju et al. 2017).

    alpha_k = mean over positions of dy_c / dA_k        (equation 1)
    map     = ReLU(sum_k alpha_k A_k)                   (equation 2)

with y_c the logit of class c and A the feature maps of a stage. After the last stage (9, the head's convolution)
there are only a mean and the classifier, so there the map is the class activation map of Zhou et al. 2016 over h·w.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastnet.model import EfficientNet


def grad_cam(
    model: EfficientNet, images: Tensor, classes: Tensor | None = None, *, stages: Sequence[int] | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """images [B, 3, R, R] -> (logits [B, num_classes], {stage: maps [B, h, w], 0 or more}).

    classes [B] int64: what each map is of; None: what the model predicts. stages: rows of the paper's table 1, 1 (the
    stem) to 9 (the head's convolution); None: that. Works in evaluation mode with any `kernels`, and keeps no gradient.
    Raises ValueError for another mode or stage.
    """
    if model.training:
        raise ValueError("Grad-CAM explains a model in evaluation mode: call model.eval() first.")
    last = model.network.last_stage
    stages = (last,) if stages is None else stages
    if not stages or not all(1 <= stage <= last for stage in stages):
        raise ValueError(f"stages must be numbers from 1 (the stem) to {last} (the head), got {list(stages)}.")
    maps: dict[int, Tensor] = {}

    def reach(stage: int, x: Tensor) -> Tensor:
        """From the first stage that is asked for on, the graph is recorded."""
        if stage not in stages:
            return x
        maps[stage] = x if maps else x.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return maps[stage]

    with torch.inference_mode(False), torch.no_grad():
        x = model.head(model.trunk(images, tap=reach, stages=stages))
        logits = model.forward_head(reach(last, x))
        of = logits.argmax(1) if classes is None else classes
        # Images do not meet in evaluation mode: one backward pass gives each its own gradients.
        gradients = torch.autograd.grad(logits.gather(1, of[:, None]).sum(), list(maps.values()))
    found = {
        stage: (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu().detach()
        for (stage, activation), gradient in zip(maps.items(), gradients, strict=True)
    }
    return logits.detach(), found


def heat(maps: Tensor, side: int) -> Tensor:
    """Maps [B, h, w] -> [B, side, side] in [0, 1]: enlarged bilinearly, each by its own maximum (zero stays zero)."""
    enlarged = F.interpolate(maps[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
    return enlarged / enlarged.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.floating], strength: float = 0.5) -> NDArray[np.uint8]:
    """Picture [R, R, 3] under a heat map [R, R] in [0, 1], more opaque where it is hot -> [R, R, 3]."""
    from matplotlib import colormaps

    colors = colormaps["jet"](heat)[:, :, :3] * 255
    opacity = strength * (0.4 + 0.6 * heat[:, :, None])
    return np.clip(np.rint((1 - opacity) * picture + opacity * colors), 0, 255).astype(np.uint8)
