"""Checkpoints: one safetensors file that is replaced atomically, and a readable JSON beside it.

`last.safetensors` holds the weights under their own names and, under `training/`, all that continuing needs; its
header holds the same JSON as the file beside it, so that tensors and numbers can't come from two moments.
`best.safetensors` holds weights alone. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data_pipeline.dataset.known import Known
from data_pipeline.files import refuse_special, words_of
from fastnet.errors import UserError
from fastnet.typed import fits, parse_object

FORMAT = 2
TRAINING_PREFIX = "training/"
_RESTORE = "restore it from a backup, or start a new run"


@dataclass
class Progress:
    """Where a run stands. `step` counts finished steps; the loader continues at (epoch, step_in_epoch)."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    train_seconds: float = 0.0
    images_seen: int = 0
    best_top1: float = -1.0
    best_epoch: int = -1
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder: a reader sees the old file or the new one, whole.

    Raises UserError where there is no space or no permission; what was there before stays.
    """
    # A name of this process's own: two that write one file must not tear it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(write_failure(path, error)) from error


def write_failure(path: Path, error: OSError) -> str:
    """The sentence for a file of a run that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        on = f"continue with --resume {path.parent}" if (path.parent / "last.safetensors").exists() else "start again"
        return f"no space left to write {path}: free some and {on}."
    if error.errno == errno.ENAMETOOLONG:
        return f"the name {path} is too long to be written: choose a shorter --out."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {path}: choose another folder with --out."
    return f"cannot write {path} ({error.strerror or error}): fix that or choose another folder with --out."


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], training: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write `path` (*.safetensors) and its readable `*.json`. `metadata` must be JSON-serialisable."""
    tensors = dict(weights) | {TRAINING_PREFIX + name: value for name, value in training.items()}
    text = json.dumps({"format": FORMAT} | metadata, indent=2)
    # safetensors stores the elements in logical order only for contiguous tensors; a copy of a channels_last weight.
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"fastnet": text})
    write_atomically(path, content)
    write_readable(path, metadata)


def write_readable(path: Path, metadata: dict[str, Any]) -> None:
    """The JSON beside a checkpoint. A process that ended between the two files leaves that of an earlier one."""
    text = json.dumps({"format": FORMAT} | metadata, indent=2)
    write_atomically(path.with_suffix(".json"), text.encode() + b"\n")


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(weights, training state, metadata) of a file that `save_checkpoint` wrote, on the CPU; else UserError."""
    try:
        refuse_special(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("fastnet")
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: name a run's folder with --resume.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({one_line(error)}): {_RESTORE}.") from None
    if text is None:
        raise UserError(f"{path} is no fastnet checkpoint: to start from other weights use --pretrained.")
    metadata = read_metadata(text, path)
    if metadata["format"] not in (1, FORMAT):
        raise UserError(
            f"checkpoint {path} has format {metadata['format']}, this version reads 1 to {FORMAT}: "
            "use the version of fastnet that wrote it."
        )
    training = {
        name.removeprefix(TRAINING_PREFIX): value for name, value in tensors.items() if name.startswith(TRAINING_PREFIX)
    }
    weights = {name: value for name, value in tensors.items() if not name.startswith(TRAINING_PREFIX)}
    if metadata["format"] == 1 and "progress" in metadata:
        _complete_format_1(training, metadata)
    return weights, training, metadata


def notes_of(path: Path) -> dict[str, Any]:
    """What stands in the header of a file that `save_checkpoint` wrote; nothing where another wrote it."""
    try:
        refuse_special(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("fastnet", "{}")
        return parse_object(text)
    except (SafetensorError, OSError, ValueError):
        return {}


def files_of(run: Path) -> Known | None:
    """The images that a run began with; None where its folder does not tell."""
    path = run / "last.safetensors"
    try:
        refuse_special(path)
        with safe_open(path, "pt") as file:
            return Known.unpack(file.get_tensor(f"{TRAINING_PREFIX}index").numpy().tobytes())
    except (SafetensorError, OSError, ValueError):
        return None


def read_metadata(text: str, path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote into the header; UserError where that is damaged."""
    try:
        metadata = parse_object(text)
        for name, hint in (("format", int), ("model", dict[str, Any] | None), ("progress", dict[str, Any] | None)):
            if not fits(metadata.get(name), hint):
                raise ValueError(f"{name} cannot be {metadata.get(name)!r:.60}")
        for name in ("progress", "scaler"):
            if name in metadata and metadata["format"] == 1:
                checked = metadata[name] or {}
                if not all(fits(value, float | list[Any]) for value in checked.values()):
                    raise ValueError(f"{name} holds what is no number")
    except (ValueError, AttributeError) as error:
        raise UserError(f"the header of {path} is damaged ({error}): {_RESTORE}.") from None
    return metadata


def one_line(error: BaseException) -> str:
    """What an error of a library or of the system says, without its newlines."""
    if isinstance(error, OSError) and error.strerror:
        return words_of(error)
    return " ".join(str(error).split())[:300] or type(error).__name__


def _complete_format_1(training: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Format 1 kept the loss scale as numbers, and did not count steps that were left out."""
    scaler = metadata.pop("scaler", None) or {"scale": 2.0**16, "_growth_tracker": 0}
    training |= {
        "step/loss_scale": torch.tensor(scaler["scale"], dtype=torch.float32),
        "step/growth_tracker": torch.tensor(scaler["_growth_tracker"], dtype=torch.int32),
        "step/steps": torch.tensor(metadata["progress"]["step"]),
        "step/skipped": torch.tensor(0),
        "step/first_bad": torch.tensor(0),
    }
