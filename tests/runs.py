"""A run that was never trained: a folder of pictures, a model whose signals reach its end, and the files of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastnet.config import FOOD101
from fastnet.loading.weights import save_weights
from fastnet.model import EfficientNet, efficientnet

CLASSES = ("apple <pie>", "bread", "soup")


def settle(model: EfficientNet, resolution: int = 64) -> EfficientNet:
    """Batch statistics of random images, smooth and grainy, and logits of deviation 1 on them; in evaluation mode."""
    images = F.interpolate(torch.randn(16, 3, 5, 5), (resolution, resolution), mode="bicubic")
    images = (images + 0.5 * torch.randn_like(images)).to(model.classifier.weight.dtype)
    for norm in model.batch_norms():
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images, torch.ones(len(model.blocks), 16))
        for norm in model.batch_norms():
            # Channels that vary little over so few images would be blown up on any other.
            norm.running_var.clamp_(min=norm.running_var.mean().item() / 2)
        logits = model.eval()(images)
        model.classifier.weight /= logits.std()
    return model


def make_pictures(root: Path, per_class: int = 4) -> Path:
    """train/ and val/ of three classes of smooth random pictures, no two of one size."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                small = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
                size = (int(random.integers(60, 90)), int(random.integers(60, 90)))
                Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(root / split / name / f"{i}.jpg")
    return root


def make_run(folder: Path, data: Path, resolution: int = 48) -> Path:
    """config.json and best.safetensors of a b0 for `make_pictures`."""
    folder.mkdir(parents=True)
    config = replace(
        FOOD101,
        model=replace(FOOD101.model, resolution=resolution),
        data=replace(FOOD101.data, data=str(data), loader="torch", workers=0),
    )
    (folder / "config.json").write_text(config.to_json())
    torch.manual_seed(0)
    model = settle(efficientnet("b0", num_classes=len(CLASSES)), resolution)
    save_weights(folder / "best.safetensors", model, classes=CLASSES, resolution=resolution)
    return folder


def measured_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--kernels auto` and `--amp auto` as users have them; `tuner.timer_for` stays the test's own."""
    from fastnet import device, forms
    from fastnet.training import ema, optim, step
    from fastnet.training.tuning import precision, tuner
    from kernels.cpu.library import unavailable

    for module in (device, tuner, precision):
        monkeypatch.setattr(module, "unavailable", unavailable)
    for module in (ema, optim, step):
        monkeypatch.setattr(module, "computes_natively", forms.computes_natively)
