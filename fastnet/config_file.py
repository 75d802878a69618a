"""The configuration of a run, read from the config.json in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from data_pipeline.files import words_of
from fastnet.arch import coefficients
from fastnet.config import ModelOptions, TrainConfig
from fastnet.errors import UserError
from fastnet.typed import checked_fields, read_object


def config_from_dict(values: dict[str, Any], source: Path) -> TrainConfig:
    """The inverse of `TrainConfig.to_json`; UserError names `source` where a key is unknown."""
    return _build(TrainConfig, values, source)


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run was started with; UserError where it can't be read."""
    try:
        config = config_from_dict(read_object(path), path)
        if config.optimizer.batch_size == 0:  # auto, of which a run keeps what it came to
            raise ValueError("batch_size cannot be 0")
        return config
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the folder of a run (no {path.name}): name one with --resume.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({words_of(error)}): restore it, or start a new run.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or start a new run.") from None


def _build(cls: type, values: Any, source: Path) -> Any:
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints) if isinstance(values, dict) else set()
    if unknown:
        raise UserError(
            f"{source} holds settings that this version does not know ({', '.join(sorted(unknown))}): "
            "continue the run with the version that wrote it."
        )
    try:
        checked_fields(cls, values)
        if cls is ModelOptions and "variant" in values:
            coefficients(values["variant"])
    except ValueError as error:
        raise UserError(f"{source} is damaged ({error}): restore it, or start a new run.") from None
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, source)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
