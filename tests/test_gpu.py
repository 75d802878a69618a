"""The kernels on a CUDA device: the tolerance rule, graph replay, addresses past 2^31. `python -m bench.proof` runs
these before it times anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from tests import parity
from tests.parity import ARGUMENTS, Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", [case for op in ARGUMENTS for case in parity.cases(op)])
def test_parity_on_the_gpu(case: Case, direction: str, cuda: torch.device) -> None:
    parity.check(replace(case, device=str(cuda)), direction)


@pytest.mark.parametrize("op", list(ARGUMENTS))
def test_cuda_graph_replays_with_new_values(op: str, cuda: torch.device) -> None:
    case = Case(op, torch.bfloat16, (3, 24, 15, 15), 6, "train" if op.startswith("bn") else "plain", device=str(cuda))
    static = parity.inputs(case)
    fresh = parity.inputs(case, seed=1)
    names = [name for name in ARGUMENTS[op] if name not in parity.CONSTANT]
    leaves = [value.requires_grad_() for name in names if (value := static[name]) is not None]

    def step(values: dict[str, Tensor | None]) -> list[Tensor]:
        y = parity.call(op, values, "triton", case.options)
        return [y, *torch.autograd.grad(y, leaves, values["dy"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    with torch.no_grad():
        for name, value in static.items():
            if value is not None:
                value.copy_(fresh[name])  # type: ignore[arg-type]
    graph.replay()
    replayed = [result.clone() for result in captured]
    for result, again in zip(replayed, step(static), strict=True):
        assert torch.equal(result, again)


@pytest.mark.parametrize("op", ["bn_silu", "drop_connect_add"])
def test_addresses_past_two_to_the_31(op: str, cuda: torch.device) -> None:
    height, width, channels = 16_400, 16_400, 8
    assert height * width * channels > 2**31
    if torch.cuda.get_device_properties(cuda).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    x = torch.ones(1, height, width, channels, dtype=torch.bfloat16, device=cuda).permute(0, 3, 1, 2)
    last = torch.arange(channels, device=cuda, dtype=torch.bfloat16)
    x[0, :, -1, -1] = last
    if op == "bn_silu":
        ones, zeros = torch.ones(channels, device=cuda), torch.zeros(channels, device=cuda)
        y = kernels.bn_silu(x, ones, zeros, zeros, ones, training=False, momentum=0.1, eps=0.0, impl="triton")
        expected = torch.nn.functional.silu(last.float())
    else:
        y = kernels.drop_connect_add(x, x, torch.full((1,), 2.0, device=cuda), impl="triton")
        expected = 3 * last.float()
    torch.testing.assert_close(y[0, :, -1, -1].float(), expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(y[0, :, -2, -1].float(), expected[1].expand(channels), rtol=2**-8, atol=0)
