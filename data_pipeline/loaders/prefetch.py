"""How a batch reaches a GPU while the step before it runs: from pinned memory, on a stream of its own.

A copy is non-blocking when its source is pinned and it is asked to be. What a batch needs beside its pixels is
packed, so that it is one such copy. All loaders of a device share one stream, so that what one of them put there (a
cache's pixels) is there for the next; the consumer's stream waits for the batch, and its memory is not used again
before the consumer's work with it is done.

On a CPU there is nothing to do, and nothing of this does anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from data_pipeline.errors import DataError

_ALIGNMENT = 16  # bytes, which the widest loads of a kernel want

T = TypeVar("T", bound=Sequence[Tensor])


def staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of the host for what goes to `device`: pinned for a GPU.

    torch keeps pinned memory for the next caller, and does not give it away before the copies from it are done.
    """
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def sent(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on `device`, contiguous, by one copy that nothing waits for; on a CPU as they are."""
    if device.type == "cpu":
        return list(parts)
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.numel() * part.element_size() // _ALIGNMENT) * _ALIGNMENT
    packed = staging([end], torch.uint8, device)
    for part, start in zip(parts, starts, strict=True):
        _part(packed, part, start).copy_(part)
    moved = packed.to(device, non_blocking=True)
    return [_part(moved, part, start) for part, start in zip(parts, starts, strict=True)]


def _part(packed: Tensor, part: Tensor, start: int) -> Tensor:
    length = part.numel() * part.element_size()
    return packed[start : start + length].view(part.dtype).view(part.shape)


class SideStream:
    """Lets an iterator make its batches on a stream beside the consumer's; on a CPU it changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds_held = 0.0
        """How long `feed` held its consumer back because the device was behind, not the batches."""

    def feed(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, each when it is asked for, made by work of the device that runs beside what the consumer has
        queued. The consumer works with a batch on the stream that is current when it asks for it.

        A consumer that queues faster than the device works is held back until the batch before the one that it just
        queued is done: the device has a step's work meanwhile, and batches do not pile up in its memory.

        Raises:
            DataError: torch can use no GPU.
        """
        if self.device.type != "cuda":
            yield from batches
            return
        try:
            stream = _stream_of(torch.cuda.current_device() if self.device.index is None else self.device.index)
        except (RuntimeError, AssertionError) as error:  # no driver, or a torch without CUDA
            reason = str(error).partition("\n")[0].rstrip(".")
            raise DataError(f"torch can use no GPU here ({reason}): use --device cpu.") from error
        # What batches are made of may have been written there, and memory may come from there.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        before: torch.cuda.Event | None = None
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                made = torch.cuda.Event()
                made.record(stream)
            if batch is None:
                return
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(made)
            for tensor in batch:
                tensor.record_stream(consumer)
            yield batch
            del batch, tensor  # whose memory is then the consumer's to give back
            if before is not None:
                start = time.perf_counter()
                before.synchronize()
                self.seconds_held += time.perf_counter() - start
            before = torch.cuda.Event(blocking=True)  # a core for the decoders, not for a loop that waits
            before.record(torch.cuda.current_stream(self.device))


@cache
def _stream_of(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
