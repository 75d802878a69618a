"""`--pretrained imagenet`: torchvision's published files, fetched once and checked by the hash in their names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from fastnet.errors import UserError

IMAGENET = "imagenet"


def published(variant: str) -> Any:
    """torchvision's entry for the best weights of "b0" … "b7" that it publishes: its url, transforms and categories."""
    from torchvision.models import get_model_weights

    return get_model_weights(f"efficientnet_{variant}").DEFAULT


def imagenet_file(variant: str) -> Path:
    """torchvision's ImageNet file of "b0" … "b7" in torch.hub's cache, downloaded with a progress bar where absent.

    Raises UserError, with the file's address and place, where it cannot be fetched or is not what was published.
    """
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


def pretrained_file(pretrained: str, variant: str) -> Path:
    """The file that `--pretrained` means: a path, or "imagenet" for the variant's published weights."""
    return imagenet_file(variant) if pretrained == IMAGENET else Path(pretrained)
