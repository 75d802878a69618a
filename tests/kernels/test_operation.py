"""The schema of an operation is what its function's annotations say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels  # noqa: F401 (declares the operations)
from kernels.operation import schema_of


def several(x: Tensor, w: Tensor | None, many: list[Tensor], eps: float, stride: int) -> tuple[Tensor, Tensor | None]:
    raise NotImplementedError


def one(x: Tensor, padding: str, residual: bool) -> Tensor:
    raise NotImplementedError


def test_annotations_become_a_schema() -> None:
    assert schema_of(several) == "(Tensor x, Tensor? w, Tensor[] many, float eps, int stride) -> (Tensor, Tensor?)"
    assert schema_of(one) == "(Tensor x, str padding, bool residual) -> Tensor"


def test_torch_knows_the_operation_under_it() -> None:
    stated = torch.ops.fastnet.mbconv_depthwise_backward.default._schema
    assert [str(returned.type) for returned in stated.returns] == ["Tensor", "Tensor", "Optional[Tensor]"]
    strides = {argument.name: str(argument.type) for argument in stated.arguments}
    assert (strides["stride"], strides["padding"], strides["mean"]) == ("int", "str", "Optional[Tensor]")


def test_what_no_operation_takes_is_refused() -> None:
    def bad(x: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    with pytest.raises(KeyError):
        schema_of(bad)


def test_a_second_derivative_is_refused_in_one_sentence() -> None:
    op: Any = torch.ops.fastnet.drop_connect_backward
    dy = torch.zeros(1, 4, 1, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="drop_connect_add has no second derivative in Triton"):
        op(dy, torch.ones(1)).sum().backward()
