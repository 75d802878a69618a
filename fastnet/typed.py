"""Values from JSON held against the annotations of the dataclass that they are for; numbers of the environment."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from data_pipeline.files import read_text
from fastnet.errors import UserError


def parse_object(text: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object, or one of a depth that no file of ours has.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: there is none, or it cannot be read, the reason in a few words.
        ValueError: as `parse_object`, or it is no text.
    """
    return parse_object(read_text(path))


def torchrun_number(name: str, least: int) -> int:
    """A variable of torchrun's, `least` where it is not set; UserError where it is no number from there on."""
    said = os.environ.get(name, str(least))
    if not (said.isascii() and said.isdigit() and least <= int(said[:9]) < 1e6):
        raise UserError(f"{name} is {said!r}, and torchrun sets a number: start with torchrun, or unset it.")
    return int(said)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand where the annotation `hint` does; a whole number may where float does, if finite."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(hints) and all(map(fits, value, hints))
    if origin in (list, dict):
        return isinstance(value, origin)
    if hint is None or hint is NoneType:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def checked_fields(cls: type, values: Any) -> dict[str, Any]:
    """The fields of a dataclass from JSON: those that it knows, of the right types.

    Raises:
        ValueError: the message names the first that is not.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{values!r:.40} stands where {cls.__name__} should")
    hints = get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{unknown[0]!r:.60} is unknown")
    for name, value in values.items():
        # A registered network's name is a variant's too.
        hint = str if name == "variant" else hints[name]
        if not dataclasses.is_dataclass(hint) and not fits(value, hint):
            raise ValueError(f"{name} cannot be {value!r:.60}")
    return values
