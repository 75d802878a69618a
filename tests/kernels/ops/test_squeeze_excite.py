"""squeeze_excite, alone and behind its batch norm and SiLU, against the fp64 oracle: op × dtype × shape × direction."""

import pytest
import torch

import kernels
from kernels.ops import excite
from tests import parity
from tests.parity import Case, kernel_device  # noqa: F401


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", parity.cases("squeeze_excite"))
def test_squeeze_excite(case: Case, direction: str) -> None:
    parity.check(case, direction)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", parity.cases("bn_silu_squeeze_excite"))
def test_bn_silu_squeeze_excite(case: Case, direction: str) -> None:
    parity.check(case, direction)


def test_squeeze_without_pixels_left_over_is_the_mean() -> None:
    # w_expand = 0 and b_expand = 0 make every gate 1/2, whatever the mean is.
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    y = kernels.squeeze_excite(x, torch.randn(4, 8), torch.randn(4), torch.zeros(8, 4), torch.zeros(8), impl="triton")
    torch.testing.assert_close(y, x / 2, rtol=0, atol=0)


def test_squeeze_excite_images_do_not_mix() -> None:
    values = parity.inputs(Case("squeeze_excite", torch.float32, (3, 10, 7, 7)))
    whole = parity.call("squeeze_excite", values, "triton", {})
    x = values["x"]
    assert x is not None
    for i in range(3):
        alone = parity.call("squeeze_excite", {**values, "x": x[i : i + 1]}, "triton", {})
        assert torch.equal(alone[0], whole[i])


def test_squeeze_width_beyond_the_kernels_is_refused_in_a_sentence() -> None:
    s = excite.MAX_SQUEEZE + 1
    arguments = (torch.randn(1, 8, 3, 3), torch.randn(s, 8), torch.randn(s), torch.randn(8, s), torch.randn(8))
    with pytest.raises(ValueError, match="at most 256 channels, got 257"):
        kernels.squeeze_excite(*arguments, impl="triton")
    assert kernels.squeeze_excite(*arguments, impl="auto").shape == (1, 8, 3, 3)


@pytest.mark.parametrize("squeeze", [16, 48, 100, 256])
def test_every_squeeze_block_size_passes_forward_and_backward(squeeze: int) -> None:
    case = Case("squeeze_excite", torch.float32, (2, 8, 3, 3), squeeze)
    for direction in ("forward", "backward"):
        parity.check(case, direction)


def test_images_of_many_chunks_are_summed() -> None:
    # Four tiles an image and the least work a program: several partial sums an image reach the excite kernel.
    case = Case("bn_silu_squeeze_excite", torch.float32, (2, 24, 23, 23), 6, "train")
    for direction in ("forward", "backward"):
        parity.check(case, direction)
