"""Recording a step: what is copied before each replay, when it is recorded anew, and what a GPU computes from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnet.errors import UserError
from fastnet.training.cuda_graph import WARMUP_STEPS, CudaRecorder, GraphedStep, Outputs, pick_cuda_graph
from tests.fastnet.training.test_step import batch, everything, make_step
from tests.tape import OperationTape


class Tape:
    """Stands in for CUDA's recording: nothing runs while it records, a replay runs it into outputs of its own."""

    def __init__(self) -> None:
        self.ran = self.recorded = self.replayed = 0

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        self.ran += 1
        return function()

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.recorded += 1
        outputs = torch.zeros(()), torch.zeros((), dtype=torch.int64)

        def replay() -> None:
            self.replayed += 1
            for output, value in zip(outputs, function(), strict=True):
                output.copy_(value)

        return replay, outputs


@pytest.mark.parametrize("options", [{}, {"amp": "fp16", "grad_accum_steps": 2}])
def test_replayed_steps_are_the_steps(options: dict[str, Any]) -> None:
    plain, graphed, tape = make_step(**options), make_step(**options), OperationTape()
    graphed.use_graph(tape)
    for seed in range(6):
        results = []
        for step in (plain, graphed):
            step.loss_scale.clamp_(max=1.0)  # this model overflows fp16 at the usual scale
            torch.manual_seed(seed)  # fresh drop-connect scales and dropout each time
            results.append([value.clone() for value in step(*batch(seed))])
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    assert (tape.ran, tape.recorded, tape.replayed) == (WARMUP_STEPS, 1, 6 - WARMUP_STEPS)
    expected, found = everything(plain), everything(graphed)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert graphed.steps == 6
    assert graphed.skipped == 0


def test_the_tape_notices_what_does_not_stay() -> None:
    """A number that Python draws for itself, as no graph would again, and a value that it reads."""
    tape, counter = OperationTape(), iter(range(9))
    step = GraphedStep(lambda x: (x + next(counter), x), tape, warmup=1)
    assert [step(torch.zeros(()))[0].item() for _ in range(4)] == [0, 1, 1, 1]
    with pytest.raises(AssertionError, match="needs the host"):
        tape.record(lambda: (torch.ones(()) * torch.ones(()).item(),))


def recording(tape: Any, **options: Any) -> GraphedStep:
    def function(x: Tensor, y: Tensor | None) -> Outputs:
        return x.sum() if y is None else (x * y).sum(), torch.tensor(len(x))

    return GraphedStep(function, tape, **options)


def test_each_replay_reads_the_inputs_of_its_call() -> None:
    tape = Tape()
    step = recording(tape, warmup=1)
    for value in range(1, 5):
        x = torch.full((2, 3), float(value))
        assert step(x, None)[0] == 6 * value
        x.fill_(-1.0)  # a loader may reuse its memory at once
    assert tape.replayed == 3


def test_another_shape_is_recorded_anew_after_its_own_warm_up() -> None:
    tape = Tape()
    step = recording(tape, warmup=2)
    for size in (2, 2, 2, 3, 3, 3, 3, 2):
        assert step(torch.ones(size), None)[1] == size
    assert (tape.ran, tape.recorded, tape.replayed) == (5, 2, 3)
    step(torch.ones(2), torch.ones(2))  # an input that was not there before
    assert tape.ran == 6


class Broken(Tape):
    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_recorded_still_runs_and_says_so() -> None:
    said: list[str] = []
    step = recording(Broken(), warmup=1, on_failure=lambda error: said.append(str(error)))
    assert [step(torch.ones(2), None)[0].item() for _ in range(4)] == [2.0] * 4
    assert said == ["operation not permitted when stream is capturing"]
    insisting = recording(Broken(), warmup=0)
    with pytest.raises(RuntimeError, match="not permitted"):
        insisting(torch.ones(2), None)


def test_no_memory_is_no_reason_to_go_on_without() -> None:
    class Full(Tape):
        def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        recording(Full(), warmup=0, on_failure=lambda error: None)(torch.ones(2), None)


def test_on_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="--cuda-graph on needs a GPU"):
        pick_cuda_graph("on", torch.device("cpu"))
    assert not pick_cuda_graph("auto", torch.device("cpu"))
    assert pick_cuda_graph("auto", torch.device("cuda"))
    assert not pick_cuda_graph("off", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize("optimizer", ["rmsprop_tf", "adamw", "sgd"])
def test_a_gpu_replays_what_it_computes_eagerly(cuda: torch.device, optimizer: str, amp: str) -> None:
    plain, graphed = (make_step(optimizer, device=cuda, amp=amp, grad_accum_steps=2) for _ in range(2))
    graphed.use_graph(CudaRecorder(cuda))
    losses = []
    for seed in range(8):
        images, labels = (t.to(cuda) for t in batch(seed))
        if seed == 6:
            images[0, 0, 0, 0] = float("nan")  # the flag acts inside the recording too
        for step in (plain, graphed):
            torch.manual_seed(seed)
            losses.append(step(images, labels)[0].clone())
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert len({loss.item() for loss in losses[1:-4:2]}) > 1
    assert plain.health() == graphed.health()
    expected, found = everything(plain), everything(graphed)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)
