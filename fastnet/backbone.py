"""The backbone without its head: the feature maps that detectors and segmenters are built on."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from fastnet.model import EfficientNet, block_shapes, stage_repeats


class FeatureInfo(NamedTuple):
    """One feature map: its channels, the input's side over its side, and the stage of the paper's table 1 it ends."""

    channels: int
    reduction: int
    stage: int


class FeatureExtractor(nn.Module):
    """`images [B, 3, R, R] -> [f2, f4, f8, f16, f32]`, f_k [B, channels, ceil(R/k), ceil(R/k)]: the output of the last
    stage at each stride, after its batch norm and residual (timm's `features_only=True`).

    It shares the model's parameters, holds stem and blocks alone, and is in the mode that they are in; in training the
    blocks drop as the model's do. `feature_info` describes the maps in the same order.
    """

    def __init__(self, model: EfficientNet) -> None:
        super().__init__()
        self.stem, self.blocks = model.stem, model.blocks
        # Not a submodule: head and classifier stay out of parameters() and state_dict().
        self._draw = model.draw_drop_scales
        self._drops = model.config.drop_connect_rate > 0
        last: dict[int, tuple[int, FeatureInfo]] = {}  # by stride, the last stage wins
        stride = 2
        ends = list(accumulate(stage_repeats(model.config.depth)))
        shapes = block_shapes(model.config.width, model.config.depth)
        for stage, (first, end) in enumerate(zip([0, *ends], ends, strict=False), start=2):
            stride *= shapes[first].stride
            last[stride] = end - 1, FeatureInfo(shapes[end - 1].out_channels, stride, stage)
        self._taps = {block for block, _ in last.values()}
        self.feature_info = [info for _, info in last.values()]

    def forward(self, images: Tensor) -> list[Tensor]:
        scales = self._draw(images.shape[0], images.device) if self.stem.training and self._drops else None
        x, maps = self.stem(images), []
        for i, block in enumerate(self.blocks):
            x = block(x, scales[i] if scales is not None and block.has_residual else None)
            if i in self._taps:
                maps.append(x)
        return maps
