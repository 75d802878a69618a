"""A training step as one CUDA graph: recorded once for each shape of batch, then replayed with one launch.

Several ranks record one each, NCCL's collectives included: batch norm's statistics (--sync-bn), the gradients'
all-reduce and the flag of a step that is not finite. While they record, nothing runs or blocks; whether all
could is agreed on afterwards, on the host, so that all replay or none.

What a replay reads has fixed addresses: inputs are copied into buffers of their own first. Everything that is not an
input must live in tensors that stay (weights, optimizer state, learning rate) or be drawn by the device's default
generator, which the graph asks anew at each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastnet.errors import UserError

Outputs = tuple[Tensor, ...]
# Steps of a shape before it is recorded: compilation, cuDNN's choices, NCCL's connections and optimizer state must all
# be settled.
WARMUP_STEPS = 3


class Recorder(Protocol):
    def run(self, function: Callable[[], Outputs]) -> Outputs:
        """Call the function where it will be recorded."""

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """(what replays it, the tensors that a replay fills); nothing is computed yet. RuntimeError if impossible."""


class CudaRecorder:
    """Records on a stream of its own, as autograd wants it: its accumulation nodes remember the stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function()
        current.wait_stream(self._stream)
        return outputs

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # A loader's threads may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


def own_failure(reason: str | None) -> str | None:
    """What a process alone agrees on."""
    return reason


class GraphedStep:
    """`function(*inputs) -> outputs` by replay. The first calls with inputs of new shapes run it as it is.

    Every call computes one step, recording itself none, so that steps are neither lost nor done twice. Outputs are
    overwritten by the next call. on_failure is told why recording failed, and then every call runs the function as it
    is; without it RuntimeError is raised. agree: what all processes that train together call after recording, each
    with its failure or None, and what gives all of them one answer. Shapes must change in all of them at once.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        recorder: Recorder,
        *,
        warmup: int = WARMUP_STEPS,
        on_failure: Callable[[RuntimeError], None] | None = None,
        agree: Callable[[str | None], str | None] = own_failure,
    ) -> None:
        self._function, self._recorder, self._warmup = function, recorder, warmup
        self._on_failure, self._agree = on_failure, agree
        self._key: Any = None
        self._buffers: list[Tensor | None] = []
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._outputs: Outputs = ()
        self.broken = False

    def __call__(self, *inputs: Tensor | None) -> Outputs:
        if self.broken:
            return self._function(*inputs)
        key = tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in inputs)
        if key != self._key:
            # First of all, so that the old graph's memory is free for the new one's.
            self._replay, self._outputs = None, ()
            self._key, self._calls = key, 0
            self._buffers = [None if t is None else torch.empty_like(t) for t in inputs]
        for buffer, given in zip(self._buffers, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer.copy_(given, non_blocking=True)
        call = partial(self._function, *self._buffers)
        if self._replay is None:
            if self._calls < self._warmup:
                self._calls += 1
                return self._recorder.run(call)
            failure = self._record(call)
            if failure is not None:
                self.broken, self._buffers = True, []
                if self._on_failure is None:
                    raise failure
                self._on_failure(failure)
                return self._function(*inputs)
        assert self._replay is not None
        self._replay()
        return self._outputs

    def _record(self, call: Callable[[], Outputs]) -> RuntimeError | None:
        """Why some process could not record; None where all did."""
        failure: RuntimeError | None = None
        try:
            self._replay, self._outputs = self._recorder.record(call)
        except torch.OutOfMemoryError:
            raise  # which ends this process, and the others with it
        except RuntimeError as error:
            failure = error
        reason = self._agree(None if failure is None else str(failure))
        if reason is None:
            return None
        self._replay, self._outputs = None, ()
        return failure or RuntimeError(reason)


def pick_cuda_graph(name: Literal["auto", "on", "off"], device: torch.device, *, recordable: bool = True) -> bool:
    """What --cuda-graph means on `device`; UserError where "on" is impossible. recordable: whether a graph can hold
    what the processes send each other."""
    if name == "on" and device.type != "cuda":
        raise UserError("--cuda-graph on needs a GPU: leave it out, or train with --device cuda.", exit_status=2)
    if name == "on" and not recordable:
        raise UserError(
            "--cuda-graph on needs NCCL between several processes, which this PyTorch lacks: leave it out.",
            exit_status=2,
        )
    return name != "off" and device.type == "cuda" and recordable
