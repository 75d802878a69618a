"""Weights by their name on the Hugging Face hub, through huggingface_hub: cached, resumed, and checked."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fastnet import DISTRIBUTION
from fastnet.errors import UserError
from fastnet.loading.checkpoint import one_line

_NAME = re.compile(r"(?:hf[-_]hub:)?(timm/[\w.\-]+)|hf[-_]hub:([\w.\-]+/[\w.\-]+)")


def hub_name(text: str | Path) -> str | None:
    """ "owner/model" for "timm/…" and for "hf-hub:owner/model"; None for what is no name, or a file or folder here."""
    found = _NAME.fullmatch(str(text))
    return None if found is None or Path(text).exists() else found[1] or found[2]


def hub_file(name: str) -> Path:
    """model.safetensors of a model of timm's, in the cache of huggingface_hub, its config.json beside it.

    Raises UserError where it cannot be fetched, or is not what the hub says it is.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name} is on the Hugging Face hub, which takes `pip install '{DISTRIBUTION}[hf]'`; or name a folder with "
            "its model.safetensors and config.json."
        ) from None
    try:
        huggingface_hub.hf_hub_download(name, "config.json")
        path = Path(huggingface_hub.hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # of the hub, of its transport, of the disk
        raise UserError(
            f"{name} cannot be fetched from the Hugging Face hub ({one_line(error)}): check the "
            "name and the network, or name a folder with its model.safetensors and config.json."
        ) from error
    # The hub keeps a large file under its own sha256.
    stored = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", stored.name):
        with open(stored, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != stored.name:
            raise UserError(f"{stored} is damaged (its sha256 is {found[:8]}…): delete it and run again.")
    return path
