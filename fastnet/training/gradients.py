"""The gradients of all ranks added up, while the backward pass goes on.

Gradients lie in buckets of a few MiB, the last layers' first, each parameter at a fixed place. As soon as backward has
made the last gradient of a bucket, the bucket is copied together and its all-reduce sent, so that it runs beside the
rest of backward. In EfficientNet the late stages hold most of the weights and the early ones take most of the time.

Everything is a launch: there is nothing to look at on the host, so a CUDA graph can hold it
(`fastnet.training.cuda_graph`). NCCL's stream is part of the recording, because it waits for the stream that sends, and
that one for it in the end. Places and order are the same in each step, recorded or not, and in each process: sums
repeat bit for bit. DistributedDataParallel does the same work, but lays its first step out otherwise and wants 11 steps
of warm-up before it can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Predicted, not measured: messages large enough for a link's full speed, and small enough that B0's 16 MB are four.
BUCKET_BYTES = 4 << 20
ALIGNMENT = 16  # bytes: what vector loads ask for


@dataclass(frozen=True)
class Bucket:
    """One message: `views` are the places of the parameters' gradients in `flat`, under the parameters' strides."""

    params: list[Tensor]
    views: list[Tensor]
    flat: Tensor
    gathered: Tensor | None
    """[ranks x elements of flat], for a sum in the order of the ranks."""


class GradientAllReduce:
    """`with all_reduce(): loss.backward()` leaves in each parameter's `grad` the sum over all ranks.

    A gradient from before is part of the sum, so that of several backward passes only the last one is sent; a parameter
    without a gradient counts as zero. The ranks' models must be alike. Until the next step `grad` lies in a bucket.

    in_order: ranks are added in their order, so that the sum does not depend on where in a message a gradient lies nor
    on how the ranks are connected; of two numbers there is one sum. Costs (ranks - 1) / 2 times the traffic.
    before_wait: called where this rank has done its part and begins to wait for the others.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        in_order: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        before_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_wait = before_wait
        ranks = dist.get_world_size()
        self._buckets = [_bucket(p, ranks if in_order and ranks > 2 else 0) for p in _divide(params, bucket_bytes)]
        self._missing: list[int] = []
        """Gradients that backward has yet to make, by bucket; empty outside of the pass that is sent."""
        self._sent: list[Any] = []
        for i, bucket in enumerate(self._buckets):
            for p in bucket.params:
                p.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._missing = [len(bucket.params) for bucket in self._buckets]
        self._sent = []
        try:
            yield
        finally:
            self._missing = []
        for bucket in self._buckets[len(self._sent) :]:
            self._send(bucket)
        self._before_wait()
        for bucket, work in zip(self._buckets, self._sent, strict=True):
            work.wait()  # on a GPU: its stream waits, not the host
            if bucket.gathered is not None:
                first, *others = bucket.gathered.split(bucket.flat.numel())
                bucket.flat.copy_(first)
                for other in others:
                    bucket.flat.add_(other)
            for p, view in zip(bucket.params, bucket.views, strict=True):
                p.grad = view

    def _arrived(self, i: int) -> None:
        if not self._missing:
            return
        self._missing[i] -= 1
        # In order, whatever is ready: all ranks must send the same messages one after the other.
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(self._buckets[len(self._sent)])

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        made = [(view, p.grad) for view, p in zip(bucket.views, bucket.params, strict=True) if p.grad is not None]
        if len(made) < len(bucket.views):
            bucket.flat.zero_()
        if made:
            torch._foreach_copy_([view for view, _ in made], [grad for _, grad in made])
        if bucket.gathered is None:
            self._sent.append(dist.all_reduce(bucket.flat, async_op=True))
        else:
            self._sent.append(dist.all_gather_into_tensor(bucket.gathered, bucket.flat, async_op=True))


def _divide(params: Iterable[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Those that take gradients, from the last to the first, in groups of one dtype and at least bucket_bytes."""
    groups: list[list[Tensor]] = []
    size = 0
    for p in reversed([p for p in params if p.requires_grad]):
        if not groups or size >= bucket_bytes or groups[-1][0].dtype != p.dtype:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += p.numel() * p.element_size()
    return groups


def _bucket(params: list[Tensor], gathering: int) -> Bucket:
    align = ALIGNMENT // params[0].element_size()
    starts, end = [], 0
    for p in params:
        starts.append(end)
        end += -(-p.numel() // align) * align
    flat = params[0].new_zeros(end)  # the gaps stay zero
    views = [flat.as_strided(p.shape, _dense_strides(p), start) for p, start in zip(params, starts, strict=True)]
    return Bucket(params, views, flat, flat.new_empty(gathering * end) if gathering else None)


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """Those of the parameter, or of a copy of it where it has gaps."""
    return torch.empty_like(p, device="meta").stride()
