"""How large a training photo has to be stored: what its views lose in sharpness, and what a classifier loses by that.

For each smallest crop and stored side: the energy of the differences between neighbours, over that of the views of the
photos themselves; and the loss, on validation views without any cache, of a linear classifier that is trained on
EfficientNet-Lite0's features of the views, as the mean of three seeds beside the mean of their distances from the
classifier of the photos themselves. The network is fixed, so that nothing but the pixels differs.

`python -m bench.accuracy.stored_side`
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.accuracy.starts import lite0_start
from bench.machine import photos_folder
from data_pipeline import Augmentation, Index, build_index, choose_cache, make_loader
from data_pipeline.loaders.augment import CROP_FRACTION, IMAGENET_STD
from data_pipeline.loaders.pixel_store import PIXELS_A_PIXEL, training_side

SCALES = (0.6, 0.08)
PER_PIXEL = (1.0, PIXELS_A_PIXEL)
DECAY = 0.3  # of the classifier's weights: it has more of them than it sees views


def network() -> nn.Module:
    import timm

    state = {name: value for name, value in lite0_start().items() if not name.startswith("classifier.")}
    made: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    made.load_state_dict(state)
    return made.eval().to(memory_format=torch.channels_last)


def energy(images: Tensor) -> float:
    levels = (images * 255 * torch.tensor(IMAGENET_STD)[:, None, None]).double()
    return float((levels.diff(dim=-1) ** 2).sum() + (levels.diff(dim=-2) ** 2).sum())


def seen(net: nn.Module, loader: Any, epochs: int) -> tuple[Tensor, Tensor, float]:
    """(features [N, C], labels [N], energy) of all views."""
    features, labels, total = [], [], 0.0
    with torch.no_grad():
        for epoch in range(epochs):
            for images, truth in loader.batches(epoch):
                features.append(net(images))
                labels.append(truth.clone())
                total += energy(images)
    loader.close()
    return torch.cat(features), torch.cat(labels), total


def classifier_loss(features: Tensor, labels: Tensor, judged: Tensor, truth: Tensor) -> float:
    """Of multinomial logistic regression, fitted to `features` and judged on other images."""
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    weight = torch.zeros(int(truth.max()) + 1, features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy((features - mean) / deviation @ weight.T + bias, labels) + DECAY * (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return F.cross_entropy((judged - mean) / deviation @ weight.T + bias, truth).item()


def sides(resolution: int, augmentation: Augmentation, largest: int) -> Iterator[tuple[str, int | None]]:
    """(in words, stored short side); None is the photo itself."""
    yield "the photo", None
    yield f"resolution / {CROP_FRACTION}", round(resolution / CROP_FRACTION)
    for pixels in PER_PIXEL:
        side = round(pixels / PIXELS_A_PIXEL * training_side(resolution, augmentation))
        if side < largest:
            yield f"{pixels:g} a pixel of the smallest crop", side


def rows(index: Index, resolution: int, epochs: int, seeds: int) -> Iterator[str]:
    net = network()
    common: dict[str, Any] = dict(backend="torch", resolution=resolution, workers=1)
    judged, truth, _ = seen(
        net, make_loader(index, "val", train=False, batch_size=50, seed=0, augmentation=None, **common), 1
    )
    largest = int(index.splits["train"].sizes.min(axis=1).max())
    for low in SCALES:
        augmentation = Augmentation(scale=(low, 1.0))
        plain: list[tuple[float, float]] = []
        for words, side in sides(resolution, augmentation, largest):
            found = []
            cache = None if side is None else choose_cache("ram", index, resolution, side=side)
            for seed in range(seeds):
                drawn: dict[str, Any] = dict(seed=seed, augmentation=augmentation, cache=cache)
                loader = make_loader(index, "train", train=True, batch_size=50, **drawn, **common)
                features, labels, total = seen(net, loader, epochs)
                found.append((classifier_loss(features, labels, judged, truth), total))
            plain = plain or found
            loss = statistics.mean(one for one, _ in found)
            more = statistics.mean(a - b for (a, _), (b, _) in zip(found, plain, strict=True))
            sharp = statistics.mean(a / b for (_, a), (_, b) in zip(found, plain, strict=True))
            yield f"| {low} | {words} | {side or '–'} | {sharp:.3f} | {loss:.3f} | {more:+.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.stored_side", description=__doc__)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2, help="views of each photo that the classifier is trained on")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    folder = photos_folder()
    if folder is None:
        parser.error("no real photos: set FASTNET_PHOTOS to a folder in Food-101's layout")
    print("| smallest crop | stored | short side | sharpness | loss | more than from the photo |")
    print("|---|---|---|---|---|---|")
    for row in rows(build_index(folder), given.resolution, given.epochs, given.seeds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
