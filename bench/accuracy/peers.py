"""Fine-tuning by timm's own model, transforms, optimizer and scheduler factories, stepping by update as its train.py
does; and by torchvision's reference recipe. One run, described by a JSON argument; the result is a line of JSON.

`bench/accuracy/__main__.py` runs it in a process of its own.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data_pipeline.loaders.augment import CROP_FRACTION, IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Peer:
    """The settings of a peer's run; the defaults are those of timm's train.py, which takes SGD's rate as 0.1 x batch /
    256. warmup is at most a fifth of the epochs: its five would be all of a short run."""

    data: str
    weights: str
    model: str
    resolution: int
    epochs: int
    seed: int
    by: str = "timm"
    batch: int = 128
    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float = 2e-5
    layer_decay: float | None = None
    schedule: str = "cosine"
    warmup: float = 5.0
    scale: tuple[float, float] = (0.08, 1.0)
    jitter: float | None = 0.4
    smoothing: float = 0.1
    dropout: float = 0.0
    drop_path: float = 0.0
    clip: float | None = None
    workers: int = 1


def transforms(peer: Peer) -> tuple[Any, Any]:
    """(training, validation)"""
    from timm.data import create_transform

    common: dict[str, Any] = dict(input_size=peer.resolution, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if peer.by == "timm":
        train = create_transform(**common, is_training=True, scale=peer.scale, color_jitter=peer.jitter)
        return train, create_transform(**common, interpolation="bicubic", crop_pct=CROP_FRACTION)
    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    train = v2.Compose([v2.RandomResizedCrop(peer.resolution, peer.scale), v2.RandomHorizontalFlip(), *finish])
    whole = round(peer.resolution / CROP_FRACTION)
    return train, v2.Compose([v2.Resize(whole), v2.CenterCrop(peer.resolution), *finish])


def evaluate(model: nn.Module, batches: Any) -> tuple[float, float]:
    """(top-1 in percent, loss)"""
    hits = loss = 0.0
    count = 0
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            logits = model(images.contiguous(memory_format=torch.channels_last))
            hits += (logits.argmax(1) == labels).sum().item()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
    model.train()
    return 100 * hits / count, loss / count


def train(peer: Peer) -> dict[str, float]:
    import timm
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(peer.seed)
    state = torch.load(peer.weights, map_location="cpu", weights_only=True)
    kept, held = [
        ImageFolder(f"{peer.data}/{split}", by) for split, by in zip(("train", "val"), transforms(peer), strict=True)
    ]
    model = timm.create_model(
        peer.model, num_classes=len(kept.classes), drop_rate=peer.dropout, drop_path_rate=peer.drop_path
    )
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.")}, strict=False)
    model = model.to(memory_format=torch.channels_last)
    batch = min(peer.batch, len(kept))
    common: dict[str, Any] = dict(num_workers=peer.workers, persistent_workers=peer.workers > 0)
    batches = DataLoader(kept, batch, shuffle=True, drop_last=True, **common)
    judged = DataLoader(held, 64, **common)
    optimizer = create_optimizer_v2(
        model, peer.optimizer, lr=0.1 * batch / 256 if peer.lr is None else peer.lr, weight_decay=peer.weight_decay,
        momentum=0.9, layer_decay=peer.layer_decay,
    )  # fmt: skip
    scheduler = None
    if peer.schedule != "none":
        scheduler, _ = create_scheduler_v2(
            optimizer, peer.schedule, num_epochs=peer.epochs, warmup_epochs=min(peer.warmup, 0.2 * peer.epochs),
            warmup_lr=1e-5, step_on_epochs=False, updates_per_epoch=len(batches),
        )  # fmt: skip
    best = {"top1": -1.0, "loss": 0.0}
    seconds, updates = 0.0, 0
    for _ in range(peer.epochs):
        began = time.perf_counter()
        for images, labels in batches:
            logits = model(images.contiguous(memory_format=torch.channels_last))
            F.cross_entropy(logits, labels, label_smoothing=peer.smoothing).backward()
            if peer.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), peer.clip)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if scheduler is not None:
                scheduler.step_update(updates)
        seconds += time.perf_counter() - began
        top1, loss = evaluate(model, judged)
        if top1 > best["top1"]:
            best = {"top1": top1, "loss": loss}
    return best | {"seconds": seconds, "images_per_second": updates * batch / seconds}


if __name__ == "__main__":
    print(json.dumps(train(Peer(**json.loads(sys.argv[1])))))
