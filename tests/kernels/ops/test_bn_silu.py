"""bn_silu and its batch statistics against the fp64 oracle: op × dtype × shape × direction."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels import launch
from kernels.batch_norm import batch_stats
from tests import parity
from tests.parity import Case, kernel_device  # noqa: F401


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", parity.cases("bn_silu"))
def test_bn_silu(case: Case, direction: str) -> None:
    parity.check(case, direction)


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    with parity.nan_allocations():
        return batch_stats(x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("programs", [1, 2, 1024])
@pytest.mark.parametrize("channels", [10, 24])
def test_bn_statistics_survive_a_large_mean(channels: int, programs: int) -> None:
    x = torch.randn(3, channels, 15, 15) * 0.1 + 1e3
    with parity.few_programs(programs):
        mean, var = statistics_of(x)
    var64, mean64 = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    # E[x²] - E[x]² would be off by 1e6 * 2**-24 = 0.06 where the variance is 0.01. Merged means are right to a unit
    # in the last place of 1000, and their error enters the variance squared or times a deviation.
    unit = torch.finfo(torch.float32).eps * 1e3
    assert (mean - mean64).abs().max() < unit
    assert (var - var64).abs().max() < 0.1 * unit


def test_bn_statistics_weigh_parts_of_unequal_size() -> None:
    # The last tile holds few rows, and they are the only ones that differ.
    x = torch.zeros(1, 24, 1, 130)
    x[..., 128:] = 65.0
    with parity.few_programs(10**9):
        mean, var = statistics_of(x)
    torch.testing.assert_close(mean, torch.ones(24))
    torch.testing.assert_close(var, torch.full((24,), 64.0))


def test_bn_of_a_constant_channel_is_its_bias() -> None:
    x = torch.full((2, 8, 5, 5), 3.0)
    y = kernels.bn_silu(
        x, torch.ones(8), torch.arange(8.0), torch.zeros(8), torch.ones(8),
        training=True, momentum=0.1, eps=1e-3, impl="triton",
    )  # fmt: skip
    torch.testing.assert_close(y[0, :, 0, 0], torch.nn.functional.silu(torch.arange(8.0)))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_bn_running_statistics_move_as_nn_batchnorm2d_and_only_in_training(impl: launch.Impl) -> None:
    module = torch.nn.BatchNorm2d(10, eps=1e-3, momentum=0.1)
    values = parity.inputs(Case("bn_silu", torch.float32, (3, 10, 7, 7), mode="train"))
    x = values["x"]
    assert x is not None
    mean, var = torch.zeros(10), torch.ones(10)
    options = {"momentum": 0.1, "eps": 1e-3, "impl": impl}
    for _ in range(3):
        module(x)
        kernels.bn_silu(x, torch.ones(10), torch.zeros(10), mean, var, training=True, **options)  # type: ignore[arg-type]
    assert module.running_mean is not None
    assert module.running_var is not None
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)
    before = mean.clone(), var.clone()
    kernels.bn_silu(x, torch.ones(10), torch.zeros(10), mean, var, training=False, **options)  # type: ignore[arg-type]
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_bn_silu_far_from_zero_saturates_without_nan() -> None:
    x = torch.tensor([-200.0, 200.0]).repeat(8)[None, None].reshape(1, 1, 4, 4).requires_grad_()
    y = kernels.bn_silu(
        x, torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1),
        training=False, momentum=0.1, eps=0.0, impl="triton",
    )  # fmt: skip
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, torch.relu(x))
    torch.testing.assert_close(dx, (x > 0).float())


def test_bn_training_needs_more_than_one_value_per_channel() -> None:
    vectors = [torch.ones(8) for _ in range(4)]
    with pytest.raises(ValueError, match="more than one value per channel"):
        kernels.bn_silu(torch.randn(1, 8, 1, 1), *vectors, training=True, momentum=0.1, eps=1e-3, impl="triton")
