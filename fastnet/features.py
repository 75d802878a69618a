"""The backbone without its head: the feature maps that detectors and segmenters are built on."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from fastnet.layers import BatchNorm
from fastnet.model import EfficientNet


class FeatureInfo(NamedTuple):
    """One feature map: its channels, the input's side over its side, and the stage of the paper's table 1 it ends."""

    channels: int
    reduction: int
    stage: int


class FeatureExtractor(nn.Module):
    """`images [B, 3, R, R] -> [f2, f4, f8, f16, f32]`, f_k [B, channels, ceil(R/k), ceil(R/k)]: the output of the last
    stage at each stride, after its batch norm and residual (timm's `features_only=True`).

    It shares the model's parameters, holds stem and blocks alone, and is in the mode that they are in; in training the
    blocks drop and count their batches as the model's do. `feature_info` describes the maps in the same order.
    """

    def __init__(self, model: EfficientNet) -> None:
        super().__init__()
        self.stem, self.blocks = model.stem, model.blocks
        # Not a submodule: head and classifier stay out of parameters() and state_dict().
        self._trunk = model.trunk
        stride = 2
        last: dict[int, FeatureInfo] = {}  # by stride, the last stage wins
        for stage, blocks in model.network.by_stage.items():
            stride *= math.prod(block.shape.stride for block in blocks)
            last[stride] = FeatureInfo(blocks[-1].shape.out_channels, stride, stage)
        self.feature_info = list(last.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        maps: list[Tensor] = []

        def keep(stage: int, x: Tensor) -> Tensor:
            maps.append(x)
            return x

        training = any(norm.training for norm in norms)
        stages = [info.stage for info in self.feature_info]
        self._trunk(images, norms=norms if training else (), tap=keep, stages=stages)
        return maps
