"""drop_connect_add and bn_drop_connect_add against the fp64 oracle: op × dtype × shape × direction."""

import pytest
import torch

import kernels
from tests import parity
from tests.parity import Case, kernel_device  # noqa: F401


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", parity.cases("drop_connect_add"))
def test_drop_connect_add(case: Case, direction: str) -> None:
    parity.check(case, direction)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", parity.cases("bn_drop_connect_add"))
def test_bn_drop_connect_add(case: Case, direction: str) -> None:
    parity.check(case, direction)


def test_drop_connect_add_of_a_dropped_sample_is_the_residual_to_the_bit() -> None:
    values = parity.inputs(Case("drop_connect_add", torch.float16, (3, 10, 7, 7)))
    x, residual = values["x"], values["residual"]
    assert x is not None
    assert residual is not None
    y = kernels.drop_connect_add(x, residual, torch.tensor([0.0, 1.0, 0.0]), impl="triton")
    assert torch.equal(y[0], residual[0])
    assert torch.equal(y[2], residual[2])
    assert not torch.equal(y[1], residual[1])


def test_drop_connect_dropped_samples_still_feel_the_batch_statistics() -> None:
    # A dropped sample is part of the statistics, so its x has a gradient in training and none in evaluation.
    for mode in ("train", "eval"):
        case = Case("bn_drop_connect_add", torch.float32, (3, 10, 7, 7), mode=mode)
        dx = parity.run(case, "triton")["dx"]
        assert bool(dx[1].abs().max() > 0) == (mode == "train")


def test_drop_connect_scale_gets_no_gradient() -> None:
    values = parity.inputs(Case("drop_connect_add", torch.float32, (3, 10, 7, 7)))
    x, residual = values["x"], values["residual"]
    assert x is not None
    assert residual is not None
    scale = torch.ones(3, requires_grad=True)
    kernels.drop_connect_add(x.requires_grad_(), residual, scale, impl="triton").sum().backward()
    assert scale.grad is None
