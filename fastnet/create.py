"""`fastnet.create_model`: a model by name, as timm's function of that name makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnet.arch import Style, variant_name
from fastnet.errors import UserError
from fastnet.loading.pretrained import IMAGENET, read_pretrained
from fastnet.model import EfficientNet, efficientnet
from fastnet.scaling import Architecture


def create_model(
    variant: str | Architecture,
    pretrained: str | Path | bool | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    weights_style: Style | None = None,
    classes: Sequence[str] = (),
    log: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> EfficientNet:
    """An EfficientNet in training mode: `images [B, in_chans, R, R] -> logits [B, num_classes]`.

    variant: "b0", "B0", "efficientnet_b0", "lite4" and so on, or an Architecture. pretrained: True or "imagenet" for
    the published weights of the variant, or a file of fastnet, torchvision or timm, of which `weights_style` says whose
    where the file does not; padding and batch norm's constants are then the file's. A classifier for another number of
    classes is new, which is told to `log`; for other than three channels the stem's weights are summed (one channel) or
    repeated. classes: their names, if known; of a run's classifier those are taken that it has by name. options: those
    of `efficientnet`.

    Raises ValueError for what is unknown, out of range or no such file, UserError where weights cannot be fetched or
    are another variant's.
    """
    if isinstance(variant, str):
        variant = variant_name(variant)
    if not pretrained:
        return efficientnet(variant, num_classes=num_classes, in_chans=in_chans, **options)
    named = IMAGENET if pretrained is True else str(pretrained)
    name = variant if isinstance(variant, str) else variant.name
    scaling = options.get("scaling", "published") if isinstance(variant, str) else variant.scaling
    loaded = read_pretrained(named, name, weights_style)
    source = loaded.config
    if (source.variant, source.scaling) != (name, scaling):
        raise UserError(
            f"--pretrained {named} holds a {source.variant} ({source.scaling} scaling): "
            f"train it with --variant {source.variant} --scaling {source.scaling}."
        )
    own = {"padding": source.padding, "bn_eps": source.bn_eps, "bn_momentum": source.bn_momentum}
    model = efficientnet(variant, num_classes=num_classes, in_chans=in_chans, **options | own)
    state = dict(loaded.state_dict)
    known = loaded.classes if loaded.style == "fastnet" else None
    if known and classes and known != tuple(classes) and (shared := set(known) & set(classes)):
        new = f", {len(classes) - len(shared)} of them new" if shared != set(classes) else ""
        log(f"classifier: {named} knows {len(shared)} of the {len(classes)} classes by name{new}")
        for key in ("classifier.weight", "classifier.bias"):
            zero = torch.zeros_like(state[key][0])
            rows = [state[key][known.index(one)] if one in shared else zero for one in classes]
            state[key] = torch.stack(rows)
    elif source.num_classes != num_classes or (known and classes and known != tuple(classes)):
        other = "other " if source.num_classes == num_classes else ""
        log(f"new classifier: {named} knows {source.num_classes} {other}classes, the data has {num_classes}")
        # Zeros: a loss of log(classes), whose gradients leave the pretrained layers as good as they are. Drawn as for a
        # training from scratch, logits of ten classes have a deviation of several units and the loss begins at 8.
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith("classifier.")}
        state |= {k: torch.zeros_like(v) for k, v in fresh.items()}
    if source.in_chans != in_chans:
        state["stem.conv.weight"] = _for_channels(state["stem.conv.weight"], in_chans)
    model.load_state_dict(state)
    return model


def _for_channels(weight: Tensor, channels: int) -> Tensor:
    """A stem [C, 3, k, k] for another number of channels that answers equal images with the same sum, as in timm."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // weight.shape[1]), 1, 1)[:, :channels]
    return repeated * (weight.shape[1] / channels)
