"""EfficientNet-Lite beyond its equality with timm (`test_weights.py`): the table, and every choice of kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from fastnet.analysis.gradcam import grad_cam
from fastnet.arch import Kernels
from fastnet.config import RunOptions
from fastnet.device import check_kernels
from fastnet.errors import UserError
from fastnet.exports.formats import check_expressible
from fastnet.model import EfficientNet, ModelConfig, efficientnet
from fastnet.scaling import architecture
from fastnet.summary import summarise
from fastnet.training.tuning import make_tuner

SMALL = replace(efficientnet("lite1", num_classes=4).config, width=0.25, dropout=0.0, drop_connect_rate=0.5)


def test_only_what_lies_between_the_ends_is_scaled() -> None:
    lite0, lite4 = architecture("lite0").network, architecture("lite4").network
    assert (lite0.stem, lite0.head) == (lite4.stem, lite4.head) == (32, 1280)
    assert [len(blocks) for blocks in lite4.by_stage.values()] == [1, 4, 4, 6, 6, 8, 1]
    assert [blocks[-1].shape.out_channels for blocks in lite4.by_stage.values()] == [24, 32, 56, 112, 160, 272, 448]
    assert {block.shape.squeezed for block in lite4.blocks} == {0}
    with pytest.raises(ValueError, match="lite1 has published coefficients only: leave out --scaling compound"):
        architecture("lite1", "compound")


def test_every_choice_of_kernels_is_pytorch_and_says_so_once() -> None:
    images, scales = torch.randn(4, 3, 32, 32), torch.ones(len(SMALL.network.blocks), 4)
    scales[:, 1] = 0
    found: list[torch.Tensor] = []
    for kernels in get_args(Kernels):
        torch.manual_seed(0)
        model = EfficientNet(replace(SMALL, kernels=kernels)).train()
        logits = model(images, scales)
        logits.square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append(torch.cat([logits.detach().flatten(), gradients, model.eval()(images).detach().flatten()]))
        said: list[str] = []
        check_kernels(kernels, torch.device("cpu"), said.append, variant="lite0")
        assert len(said) == (kernels not in ("auto", "torch")), said
        assert make_tuner(RunOptions(), model.config.kernels, torch.device("cpu"), "off", said.append) is None
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_relu6_bounds_every_activation() -> None:
    model = EfficientNet(SMALL)
    torch.nn.init.constant_(model.stem.bn.weight, 100.0)
    y = model.stem(torch.randn(2, 3, 16, 16))
    assert (y.min(), y.max()) == (0, 6)


def test_what_reads_the_network_takes_it() -> None:
    model = EfficientNet(SMALL).eval()
    _, maps = grad_cam(model, torch.randn(1, 3, 64, 64), stages=(2, 9))
    assert {stage: tuple(found.shape) for stage, found in maps.items()} == {2: (1, 32, 32), 9: (1, 2, 2)}
    told = summarise("lite0", resolution=224)
    assert (told.totals[1000].parameters, told.totals[1000].byte_passes) == (4_652_008, None)
    with pytest.raises(UserError, match="torchvision has no lite1: use --to timm, onnx, pt2 or openvino"):
        check_expressible(ModelConfig("lite1"), "torchvision", preprocessing=False)
