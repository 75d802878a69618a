"""How a function becomes an operation that torch knows, `torch.ops.fastnet.<name>`.

A compiler takes an operation as a whole: `register_fake` says what comes out of it, `register_autograd` how it is
differentiated, and nothing looks inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

# `torch.library.infer_schema` makes every int symbolic and knows no optional result.
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", int: "int", float: "float", bool: "bool",
    str: "str",
}  # fmt: skip


def schema_of(function: Callable[..., Any]) -> str:
    """The schema that a function's annotations state; KeyError for a type that an operation can't take."""
    hints = get_type_hints(function)
    result = hints.pop("return")
    returned = ", ".join(SCHEMA_TYPES[t] for t in (get_args(result) if get_origin(result) is tuple else (result,)))
    arguments = ", ".join(f"{SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items())
    return f"({arguments}) -> " + (f"({returned})" if get_origin(result) is tuple else returned)


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: declare a function that writes into none of its arguments as `fastnet::<name>`, for CUDA and, in
    Triton's interpreter, the CPU."""

    def declared(function: Callable[..., Any]) -> Any:
        return torch.library.custom_op(
            f"fastnet::{name}", function, mutates_args=(), device_types=("cuda", "cpu"), schema=schema_of(function)
        )

    return declared


def once_differentiable(op: Any, name: str) -> None:
    """Make differentiating a backward operation raise one sentence instead of failing in the dispatcher."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name} has no second derivative in Triton: pass impl='torch' for double backward")

    op.register_autograd(refuse)
