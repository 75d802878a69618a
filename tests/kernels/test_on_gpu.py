"""What the interpreter cannot show: parity on a GPU at real sizes, CUDA graphs, tensors past 2**31 elements."""

import pytest
import torch

import kernels
from tests import parity
from tests.parity import ARGUMENTS, NAMES, Case

pytestmark = pytest.mark.gpu
SHAPES = (
    ((3, 10, 7, 7), 4),
    ((8, 24, 56, 56), 6),
    ((8, 144, 28, 28), 10),
    ((4, 1152, 7, 7), 48),
    ((4, 112, 15, 15), 28),
)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("shape", "squeeze"), SHAPES)
@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_parity_on_gpu(
    op: str, dtype: torch.dtype, shape: tuple[int, int, int, int], squeeze: int, direction: str, cuda: torch.device
) -> None:
    for mode in ("train", "eval") if op.startswith("bn") else ("plain",):
        parity.check(Case(op, dtype, shape, squeeze, mode, device=cuda.type), direction)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_cuda_graph_replays_forward_and_backward(op: str, cuda: torch.device) -> None:
    mode = "train" if op.startswith("bn") else "plain"
    case = Case(op, torch.bfloat16, (8, 24, 28, 28), 6, mode, device=cuda.type)  # type: ignore[arg-type]
    values = parity.inputs(case)
    leaves = [values[n].requires_grad_() for n in ARGUMENTS[op] if n not in parity.CONSTANT]  # type: ignore[union-attr]

    def step() -> tuple[torch.Tensor, ...]:
        y = parity.call(op, values, "auto", case.options)
        return (y.detach(), *torch.autograd.grad(y, leaves, values["dy"]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    x = values["x"]
    assert x is not None
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for now, then in zip(step(), replayed, strict=True):
        assert torch.equal(now, then)


def test_addresses_past_two_to_the_31_elements(cuda: torch.device) -> None:
    shape = (33, 64, 1024, 1024)  # 2.2e9 elements, 4.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    x = torch.zeros(shape, device=cuda, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[-1] = 3.0
    vectors = [torch.ones(64, device=cuda) for _ in range(4)]
    mean, var = torch.zeros(64, device=cuda), torch.ones(64, device=cuda)
    y = kernels.drop_connect_add(x, x, torch.full((33,), 2.0, device=cuda))
    assert (y[-1] == 9).all()
    assert (y[0] == 0).all()
    del y
    kernels.bn_silu(x, vectors[0], vectors[1], mean, var, training=True, momentum=1.0, eps=1e-3)
    torch.testing.assert_close(mean, torch.full((64,), 3 / 33, device=cuda))
