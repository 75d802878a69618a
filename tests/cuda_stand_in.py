"""What a GPU's streams and copies are held to where there is no GPU: order, memory, and who waits for whom."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.loaders import prefetch


class Device:
    """Runs what its streams hold in an order that `seed` decides, among those that streams and events allow; only when
    the host waits for something, or `finish` is called: as late as a GPU may."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.default = Stream(self)
        self.current = [self.default]
        self.free: list[Block] = []
        self.pending: list[tuple[Block, list[Event]]] = []
        self.blocks = 0
        self.ran: list[str] = []

    def step(self) -> bool:
        """Run one piece of work; False where none is left."""
        ready = [stream for stream in self.streams if stream.work and stream.work[0][0]()]
        if not ready:
            assert not any(stream.work for stream in self.streams), "deadlock"
            return False
        _, name, act = self.random.choice(ready).work.popleft()
        act()
        if name:
            self.ran.append(name)
        return True

    def finish(self) -> None:
        while self.step():
            pass

    def allocate(self) -> Block:
        """Memory of the current stream, as torch's allocator gives it: what was dropped, if the other streams that it
        was marked for have passed that point."""
        for block, events in list(self.pending):
            if all(event.done for event in events):
                self.pending.remove((block, events))
                self.free.append(block)
        mine = [block for block in self.free if block.stream is self.current[-1]]
        if mine:
            self.free.remove(mine[0])
            return mine[0]
        self.blocks += 1
        return Block(self.current[-1])


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: deque[tuple[Callable[[], bool], str, Callable[[], None]]] = deque()
        device.streams.append(self)

    def put(self, name: str, act: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        self.work.append((ready, name, act))

    def wait_event(self, event: Event) -> None:
        self.put("", lambda: None, lambda: event.done)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.device)
        event.record(other)
        self.wait_event(event)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.done = device, True

    def record(self, stream: Stream) -> None:
        self.done = False
        stream.put("", lambda: setattr(self, "done", True))

    def synchronize(self) -> None:
        while not self.done:
            self.device.step()


class Block:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.value = stream, -1


class Memory:
    """A tensor: gives its block back when the host drops it."""

    def __init__(self, device: Device) -> None:
        self.device, self.block = device, device.allocate()
        self.used_on: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream)

    def __del__(self) -> None:
        events = []
        for stream in self.used_on:
            event = Event(self.device)
            event.record(stream)
            events.append(event)
        self.device.pending.append((self.block, events))


@contextmanager
def stand_in(seed: int) -> Iterator[Device]:
    """torch.cuda's streams and events are those of the device that this gives."""
    device = Device(seed)

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        device.current.append(stream)
        yield
        device.current.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda _: Stream(device))
        patch.setattr(torch.cuda, "Event", lambda blocking=False: Event(device))
        patch.setattr(torch.cuda, "current_stream", lambda _=None: device.current[-1])
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "stream", inside)
        prefetch._stream_of.cache_clear()
        yield device
        prefetch._stream_of.cache_clear()


# --- copies ---------------------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[Watch]:
    """Inside, tensors on "cuda" have shapes and no values, and what would wait for a GPU is noted."""
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


class Watch(TorchDispatchMode):
    """waits: what made the host wait for the device, or the device for pageable memory. copies: of the other kind."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0
        self._pinned: list[Any] = []  # storages, kept, because their addresses tell them apart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", None)  # there is no driver to pin with
        name = func.name().partition("::")[2].partition(".")[0]
        given = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        masks = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if on_gpu and (name in ("_local_scalar_dense", "nonzero", "equal", "_unique2") or (masks and not _fills(args))):
            self.waits.append(name)
        if name not in ("_to_copy", "copy_") and len({t.device.type for t in given if t.dim()}) > 1:
            self.waits.append(f"{name} of tensors on both")
        out = func(*args, **kwargs)
        if pinned:
            self._pinned.append(out.untyped_storage())
        if name == "_to_copy":
            self._copied(args[0], out, bool(kwargs.get("non_blocking")))
        elif name == "copy_":
            self._copied(args[1], args[0], bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False)))
        return out

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type == target.device.type:
            return
        pinned = any(source.untyped_storage()._cdata == storage._cdata for storage in self._pinned)
        if non_blocking and pinned and target.device.type == "cuda":
            self.copies += 1
        else:
            self.waits.append(f"copy of {list(source.shape)} from {'pinned' if pinned else 'pageable'} memory")


def _fills(args: Any) -> bool:
    """Whether `index_put_` writes one number where the mask is set, which needs no places."""
    return len(args) > 2 and args[2].numel() == 1
