"""A weights file's whole view: logits from the photo equal those of timm's or torchvision's own transform and model."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fastnet.analysis.predictions import index_files, load_views
from fastnet.config import FINETUNE, ModelOptions, TrainConfig
from fastnet.config_file import config_from_dict
from fastnet.loading.options import WeightsOptions
from fastnet.loading.trained import load_trained
from fastnet.loading.view import View, timm_view
from fastnet.loading.weights import load_weights, save_weights
from fastnet.model import efficientnet
from fastnet.training.build import view_of

PHOTOS = 50
LEVELS, BIAS, SHARPNESS = 5.0, 0.1, 0.02
"""How far our pixels may be from theirs, of 255: in the mean of the differences, as each window ends on whole pixels of
the photo and so may lie half a pixel beside theirs; in their sum; and as a share of the energy of the differences
between neighbours, which tells bicubic (bilinear has 22 % less)."""


def known_names() -> list[str]:
    names = [n for n in timm.list_pretrained("*efficientnet_[bl]*") if (timm_view(n) and "pruned" not in n)]
    return [n for n in names if n.split(".")[0].removeprefix("tf_").removeprefix("efficientnet_") in SHORT]


SHORT = {*(f"b{n}" for n in range(8)), *(f"lite{n}" for n in range(5))}


def test_timms_names_mean_timms_views() -> None:
    names = known_names()
    assert len(names) >= 41
    halves = 0
    for name in names:
        cfg = timm.models.get_pretrained_cfg(name)
        view = timm_view(name)
        side = cfg.input_size[-1]
        expected = View(side, side / math.floor(side / cfg.crop_pct), cfg.interpolation, cfg.mean, cfg.std)
        assert view == expected, name
        halves += view.mean == (0.5, 0.5, 0.5)
    assert halves >= 10


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """With batch norm's statistics of `images`: without, random weights give every photo the same logits."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def namespace(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**values)


def plain(folder: Path, model: nn.Module) -> Path:
    path = folder / "efficientnet_b0_rwightman-7f5810bc.pth"
    torch.save(model.state_dict(), path)
    return path


def hub(folder: Path, model: nn.Module) -> Path:
    """As timm pushes a model to the hub."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def timm_checkpoint(folder: Path, model: nn.Module) -> Path:
    wrong = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    ema = {f"module.{name}": value for name, value in model.state_dict().items()}
    args = namespace(model="tf_efficientnet_b0", mean=None, std=None, crop_pct=None, interpolation="", img_size=None)
    torch.save(
        {"arch": "tf_efficientnet_b0.ap_in1k", "state_dict": wrong, "state_dict_ema": ema, "args": args, "epoch": 3},
        folder / "model_best.pth.tar",
    )
    return folder / "model_best.pth.tar"


def torchvision_checkpoint(folder: Path, model: nn.Module) -> Path:
    state = model.state_dict()
    ema = {"n_averaged": torch.tensor(7), **{f"module.{name}": value for name, value in state.items()}}
    args = namespace(model="efficientnet_b0", val_resize_size=256, val_crop_size=224, interpolation="bicubic")
    torch.save({"model": {n: v + 1 for n, v in state.items()}, "model_ema": ema, "args": args}, folder / "model_9.pth")
    return folder / "model_9.pth"


def timm_model(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False)


def timm_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    return timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))


def torchvision_model() -> nn.Module:
    return torchvision.models.efficientnet_b0()


def torchvision_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    return torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[[Image.Image], Tensor]], Callable[..., Path]]
CASES: dict[str, Case] = {
    "torchvision's file": (torchvision_model, torchvision_transform, plain),
    "torchvision's checkpoint": (torchvision_model, torchvision_transform, torchvision_checkpoint),
    "hub folder": (lambda: timm_model("efficientnet_b0.ra4_e3600_r224_in1k"), timm_transform, hub),
    "timm's checkpoint": (lambda: timm_model("tf_efficientnet_b0.ap_in1k"), timm_transform, timm_checkpoint),
}


def sharpness(pixels: Tensor) -> Tensor:
    return pixels.diff(dim=-1).square().sum() + pixels.diff(dim=-2).square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_photo_looks_and_is_judged_as_theirs(case: str, photos: Path, tmp_path: Path) -> None:
    make, transform, write = CASES[case]
    torch.manual_seed(0)
    theirs = make()
    files = sorted(photos.rglob("*.jpg"))[:: 800 // PHOTOS][:PHOTOS]
    prepare = transform(theirs)
    expected = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    settled(theirs, expected[:8])
    trained = load_trained(write(tmp_path, theirs))
    found = load_views(trained, index_files(files)[0])
    scale = 255 * torch.tensor(trained.normalization.std)[:, None, None]
    off = (found - expected) * scale
    assert off.abs().mean() <= LEVELS
    assert off.mean().abs() <= BIAS
    assert abs(sharpness(found * scale) / sharpness(expected * scale) - 1) <= SHARPNESS
    with torch.no_grad():
        torch.testing.assert_close(trained.model(expected[:8]), theirs(expected[:8]), rtol=1e-3, atol=1e-3)


def test_a_saved_file_keeps_its_view(tmp_path: Path) -> None:
    model = efficientnet("b0", num_classes=3)
    view = View(96, 0.9, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    save_weights(tmp_path / "w.safetensors", model, classes=("a", "b", "c"), view=view)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.view == view
    assert loaded.resolution == 96
    trained = load_trained(tmp_path / "w.safetensors", WeightsOptions(mean=(0.1, 0.1, 0.1)))
    assert trained.view == View(96, 0.9, "bicubic", (0.1, 0.1, 0.1), (0.2, 0.3, 0.4))


def test_a_run_normalises_as_its_weights_were(tmp_path: Path) -> None:
    from fastnet.loading.weights import to_timm

    folder = tmp_path / "hub"
    folder.mkdir()
    save_file({n: v.contiguous() for n, v in to_timm(efficientnet("b0")).items()}, folder / "model.safetensors")
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875, "input_size": [3, 224, 224], "tag": "mine"}
    (folder / "config.json").write_text(json.dumps({"architecture": "efficientnet_b0", "pretrained_cfg": cfg}))
    config = config_from_dict({"model": {"pretrained": str(folder), "resolution": 64}}, tmp_path)
    view = view_of(config, None)
    assert (view.mean, view.std, view.resolution) == ((0.5,) * 3, (0.5,) * 3, 64)
    assert (view.interpolation, view.crop_fraction) == ("bilinear", 0.875)
    assert view_of(TrainConfig(), {"resolution": 64, "view": view.to_dict()}) == view
    whole = view_of(replace(FINETUNE, model=ModelOptions(pretrained=str(folder))), None)
    assert whole == View(224, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not a config\.json of timm"):
        load_weights(folder)


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    torch.save({"state_dict": {}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as a file of plain tensors"):
        load_weights(tmp_path / "evil.pth")
