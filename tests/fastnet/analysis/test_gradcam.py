"""Grad-CAM where its answer is known: the head in closed form, other stages by finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnet.analysis.gradcam import grad_cam, heat, overlay
from fastnet.arch import Kernels
from fastnet.model import EfficientNet, ModelConfig, efficientnet
from tests.runs import settle


@pytest.fixture(scope="module")
def model() -> EfficientNet:
    torch.manual_seed(0)
    return settle(efficientnet("b0", num_classes=4, kernels="torch").double())


def through(model: EfficientNet, x: Tensor, first: int, last: int | None) -> Tensor:
    for block in list(model.blocks)[first:last]:
        x = block(x)
    return x


def test_after_the_head_it_is_the_class_activation_map(model: EfficientNet) -> None:
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    classes = torch.tensor([3, 1])
    logits, maps = grad_cam(model, images, classes)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
        activation = model.head(through(model, model.stem(images), 0, None))
        expected = torch.einsum("bk,bkhw->bhw", model.classifier.weight[classes], activation).relu() / (3 * 2)
    assert maps[9].shape == (2, 3, 2)
    torch.testing.assert_close(maps[9], expected)
    assert expected.max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 4, 7])
def test_other_stages_by_finite_differences(model: EfficientNet, stage: int) -> None:
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    first = model.network.by_stage[stage + 1][0].index if stage > 1 else 0
    with torch.no_grad():
        activation = through(model, model.stem(images), 0, first)
        channels = activation.shape[1]
        step = 1e-6 * torch.eye(channels, dtype=torch.float64)[:, :, None, None]

        def score(x: Tensor) -> Tensor:
            return model.classify(through(model, x, first, None))[:, 2]

        # Raising a whole channel moves the logit by the sum of its gradients: h·w times alpha.
        alpha = (score(activation + step) - score(activation - step)) / 2e-6 / activation[0, 0].numel()
        expected = (alpha[None, :, None, None] * activation).sum(1).relu()
    _, maps = grad_cam(model, images, torch.tensor([2]), stages=(stage,))
    torch.testing.assert_close(maps[stage], expected, rtol=1e-5, atol=1e-6 * expected.max().item())


def test_stages_together_are_stages_alone_and_images_do_not_meet(model: EfficientNet) -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    logits, maps = grad_cam(model, images, stages=(7, 3, 9))
    for stage in (3, 7, 9):
        for i in range(2):
            _, alone = grad_cam(model, images[i : i + 1], logits.argmax(1)[i : i + 1], stages=(stage,))
            torch.testing.assert_close(maps[stage][i : i + 1], alone[stage])
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        grad_cam(model, images)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [k for k in get_args(Kernels) if k != "torch"])
def test_every_choice_of_kernels(kernels: Kernels) -> None:
    # One narrow block a stage: without a GPU the kernels are interpreted.
    tiny = ModelConfig(width=0.25, depth=0.25, num_classes=3, kernels="torch")
    reference, other = EfficientNet(tiny).eval(), EfficientNet(replace(tiny, kernels=kernels)).eval()
    other.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    expected, found = (grad_cam(m, images, torch.tensor([1]), stages=(7, 9)) for m in (reference, other))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4 * expected[0].abs().max().item())
    for stage in (7, 9):
        scale = expected[1][stage].max().item()
        torch.testing.assert_close(found[1][stage], expected[1][stage], rtol=1e-3, atol=1e-3 * scale)


def test_refused(model: EfficientNet) -> None:
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for stages in ((), (0,), (10,)):
        with pytest.raises(ValueError, match=r"from 1 \(the stem\) to 9"):
            grad_cam(model, images, stages=stages)
    with pytest.raises(ValueError, match="evaluation mode"):
        grad_cam(efficientnet("b0", num_classes=2), images.float())


def test_heat_is_between_0_and_1_and_colours_the_picture() -> None:
    maps = torch.stack([torch.tensor([[0.0, 1.0], [2.0, 4.0]]), torch.zeros(2, 2)])
    hot = heat(maps, 8)
    assert hot.shape == (2, 8, 8)
    assert hot[0].max() == 1
    assert hot[0, -1, -1] == 1
    assert hot[1].max() == 0
    picture = np.full((8, 8, 3), 100, np.uint8)
    colored = overlay(picture, hot[0].numpy())
    assert colored.dtype == np.uint8
    red, blue = colored[-1, -1].astype(int), colored[0, 0].astype(int)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
