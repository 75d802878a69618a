"""What the summary counts: the published figures, and torch's own counter on torchvision's and timm's models."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastnet.errors import UserError
from fastnet.scaling import CompoundScaler
from fastnet.summary import summarise, summary

# At the official resolution, 1000 classes: parameters, GMACs (torchvision's `_ops`), M activations (timm's `macts`).
PUBLISHED_FIGURES = {
    "b0": (224, 5_288_548, 0.386, 6.75),
    "b1": (240, 7_794_184, 0.687, 10.88),
    "b3": (300, 12_233_232, 1.827, 23.83),
    "b4": (380, 19_341_616, 4.394, 49.49),
    "b5": (456, 30_389_784, 10.266, 98.86),
    "b6": (528, 43_040_704, 19.068, 167.39),
    "b7": (600, 66_347_960, 37.746, 289.94),
}


@pytest.mark.parametrize("variant", PUBLISHED_FIGURES)
def test_published_figures(variant: str) -> None:
    resolution, parameters, gmacs, mactivations = PUBLISHED_FIGURES[variant]
    total = summarise(variant, "published", resolution).totals[1000]
    assert total.parameters == parameters
    assert round(total.macs / 1e9, 3) == gmacs
    assert round(total.activations / 1e6, 2) == mactivations


@pytest.mark.parametrize(("variant", "resolution"), [("b0", 70), ("b2", 101), ("lite1", 70)])
def test_equal_to_counting_torchvisions_or_timms_model(variant: str, resolution: int) -> None:
    activations = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    with torch.device("meta"):
        make = timm.create_model if variant.startswith("lite") else torchvision.models.get_model
        model = make(f"efficientnet_{variant}", num_classes=101).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, resolution, resolution))
    total = summarise(variant, "published", resolution).totals[101]
    assert total.macs == counter.get_total_flops() // 2
    assert total.activations == activations
    assert total.parameters == sum(p.numel() for p in model.parameters())


def test_stages_follow_the_papers_table_1() -> None:
    stages = summarise("b0", resolution=224).stages
    assert [stage.stage for stage in stages] == list(range(1, 10))
    assert [stage.channels for stage in stages] == [32, 16, 24, 40, 80, 112, 192, 320, 1280]
    assert [stage.resolution for stage in stages] == [112, 112, 56, 28, 14, 14, 7, 7, 7]
    assert [stage.layers for stage in stages] == [1, 1, 2, 2, 3, 3, 4, 1, 1]
    assert stages[2].operator == "MBConv6, k3x3"


def test_pure_powers_are_another_model() -> None:
    assert summarise("b1", "compound").totals[1000].parameters == 9_109_994  # depth 1.2, width 1.1: as b2
    free = summarise(CompoundScaler(1).architecture())
    assert (free.variant, free.scaling, free.resolution) == ("phi=1", "compound", 232)
    assert free.totals[1000].parameters == 9_109_994


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary("b3") == 0
    table = capsys.readouterr().out
    assert "efficientnet_b3 at 304 px" in table
    assert "12,233,232" in table
    assert "10,851,469" in table
    assert summary("b3", json=True, resolution=300) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["1000"]["parameters"] == 12_233_232
    assert sum(stage["macs"] for stage in found["stages"]) + 1536 * 101 == found["totals"]["101"]["macs"]
    with pytest.raises(UserError, match="--resolution 8 must lie between") as caught:
        summary("b0", resolution=8)
    assert caught.value.exit_status == 2
