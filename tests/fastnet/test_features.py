"""The five stage outputs: timm's maps on timm's weights, gradients, and what the extractor holds."""

from __future__ import annotations

import pytest
import timm
import torch

from fastnet import FeatureExtractor
from fastnet.loading.weights import to_timm
from fastnet.model import efficientnet
from fastnet.training.optim import freeze_stages
from tests.networks import THREE_BLOCKS
from tests.runs import settle


@pytest.mark.parametrize("variant", ["b0", pytest.param("b3", marks=pytest.mark.slow)])
def test_equal_to_timm(variant: str) -> None:
    model = settle(efficientnet(variant, num_classes=2)).double()
    # At features_only timm leaves the head out and keeps the other names.
    theirs = timm.create_model(f"efficientnet_{variant}", features_only=True, bn_eps=1e-3).double().eval()
    wanted = theirs.state_dict()
    theirs.load_state_dict({name: value for name, value in to_timm(model).items() if name in wanted})
    extractor = FeatureExtractor(model)
    assert [info.channels for info in extractor.feature_info] == theirs.feature_info.channels()
    assert [info.reduction for info in extractor.feature_info] == theirs.feature_info.reduction() == [2, 4, 8, 16, 32]
    x = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    with torch.no_grad():
        for ours, expected, info in zip(extractor(x), theirs(x), extractor.feature_info, strict=True):
            assert ours.shape == (2, info.channels, -(-70 // info.reduction), -(-64 // info.reduction))
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_the_head_on_the_last_map_is_the_model() -> None:
    model = settle(efficientnet("b1", num_classes=3))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.classify(FeatureExtractor(model)(x)[-1]), model(x))


def test_trains_without_the_head_and_drops_as_the_model_does() -> None:
    model = efficientnet("b0", num_classes=3, drop_connect_rate=0.9)
    extractor = FeatureExtractor(model).train()
    names = {name.split(".")[0] for name, _ in extractor.named_parameters()}
    assert names == {"stem", "blocks"}
    x = torch.randn(4, 3, 64, 64)
    torch.manual_seed(1)
    first = extractor(x)[-1]
    torch.manual_seed(1)
    expected = x
    scales = model.draw_drop_scales(4)
    assert (scales == 0).any()
    expected = model.stem(x)
    for block, scale in zip(model.blocks, scales, strict=True):
        expected = block(expected, scale if block.has_residual else None)
    assert torch.equal(first, expected)
    first.square().mean().backward()
    assert all(p.grad is not None for p in extractor.parameters())
    assert model.classifier.weight.grad is None


def test_with_frozen_stages_it_drops_and_counts_as_the_model_does() -> None:
    model = efficientnet(THREE_BLOCKS, num_classes=3, drop_connect_rate=0.9, kernels="torch")
    freeze_stages(model, 1)
    extractor = FeatureExtractor(model).train()
    x = torch.randn(8, 3, 16, 16)
    torch.manual_seed(1)
    found = extractor(x)[-1]
    torch.manual_seed(1)
    scales = model.draw_drop_scales(8)
    assert (scales[2] == 0).any()
    expected = model.stem(x)
    for block, scale in zip(model.blocks, [None, None, scales[2]], strict=True):
        expected = block(expected, scale)
    assert torch.equal(found, expected)
    counts = {name: int(v) for name, v in model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert {name: count for name, count in counts.items() if count != 1} == {"head.bn.num_batches_tracked": 0}
    model.eval()
    assert not torch.equal(extractor(x)[-1], expected)
    assert all(model.state_dict()[name] == count for name, count in counts.items())
