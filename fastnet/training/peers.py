"""The other ranks of a run: whether they read the same data, and whether they still answer.

Each rank counts the points that its main thread has passed (batches, exchanges), and a thread of its own publishes the
count, so that a rank whose main thread waits in vain can tell who is behind: a rank whose count is lower, or that
publishes nothing any more. Ranks that wait for one of these end, and torchrun does what it was asked to.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from data_pipeline import DataError, Index
from data_pipeline.dataset.known import Known

T = TypeVar("T")


class Ranks(Protocol):
    """What of `fastnet.training.distributed.Ranks` is needed here."""

    rank: int
    size: int

    def all_gather_object(self, value: T) -> list[T]: ...


LIMIT = 110.0  # seconds without progress after which others are looked at, for CONFIRM more
CONFIRM = 10.0
EVERY = 2.0  # seconds between two signs of life


def node_words() -> str:
    """The machine of this process among those of the run."""
    return f"node {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"


# --- data -----------------------------------------------------------------------------------------------------------


def check_same_data(ranks: Ranks, index: Index) -> None:
    """All ranks call it. DataError where a rank's images or labels are others than rank 0's, on all of them."""
    if ranks.size == 1:
        return
    found = ranks.all_gather_object((node_words(), index.fingerprint))
    other = next((rank for rank, (_, print_) in enumerate(found) if print_ != found[0][1]), None)
    if other is None:
        return
    lists = ranks.all_gather_object(index.known().pack() if ranks.rank in (0, other) else b"")
    words = difference(found[other][0], Known.unpack(lists[other]), found[0][0], Known.unpack(lists[0]))
    raise DataError(
        f"the nodes of this run have different data in {index.root}: {words}: copy the data set anew to one of them, "
        "or let all read one shared folder."
    )


def difference(here: str, mine: Known, there: str, theirs: Known) -> str:
    """The first thing in which two indices differ."""
    missing, more = sorted(set(theirs.classes) - set(mine.classes)), sorted(set(mine.classes) - set(theirs.classes))
    if missing and more:
        return f'{here} has the class "{more[0]}" and not "{missing[0]}", which {there} has'
    for names, a, b in ((missing, here, there), (more, there, here)):
        if names:
            return f'{a} has not the class "{names[0]}", which {b} has'
    for split in theirs.files:
        ours, others = mine.files[split], theirs.files[split]
        for a, b, one, two in ((here, there, ours, others), (there, here, others, ours)):
            if name := next((name for name in two if name not in one), None):
                return f"{a} has no {name} that can be read, which {b} has"
        for name, fields in others.items():
            if ours[name][:3] != fields[:3]:
                what = "label" if ours[name][0] != fields[0] else "size"
                return f"{name} has another {what} on {here} than on {there}"
    return f"{here} lists the same images in another order than {there}"


# --- signs of life --------------------------------------------------------------------------------------------------


class Peers:
    """Watches the other ranks while a run trains. All ranks begin and end together."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.points = 0
        self._signs = 0
        self._patient = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def passed(self) -> None:
        """The main thread has come to its next point."""
        self.points += 1

    @contextmanager
    def patient(self) -> Iterator[None]:
        """What this rank does in the body may take its time, and what it waits for too."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            self.points += 1

    def start(self) -> None:
        if self.ranks.size == 1 or self._thread is not None:
            return
        from torch.distributed import distributed_c10d

        store: Any = distributed_c10d._get_default_store()
        # A connection of its own: the main thread may wait in the other.
        store = store.clone() if hasattr(store, "clone") else store
        nodes = self.ranks.all_gather_object(node_words())
        self._thread = threading.Thread(target=self._watch, args=(store, nodes), name="peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _watch(self, store: Any, nodes: list[str]) -> None:
        seen, since = -1, time.monotonic()
        try:
            while not self._end.wait(EVERY):
                self._publish(store)
                if self.points != seen or self._patient:
                    seen, since = self.points, time.monotonic()
                elif time.monotonic() - since >= LIMIT:
                    late = self._late(store, seen)
                    if late and self.points == seen and not self._end.is_set():
                        self._leave(store, late, nodes, time.monotonic() - since)
        except RuntimeError:  # the store went with the process that kept it
            seen = self.points
            if not self._end.wait(CONFIRM) and self.points == seen:
                os._exit(1)  # that one said why; the main thread would have known by now if it could

    def _publish(self, store: Any) -> None:
        self._signs += 1
        store.set(f"alive/{self.ranks.rank}", f"{self.points} {self._signs} {self._patient}")

    def _late(self, store: Any, mine: int) -> list[int]:
        """Ranks that are behind or silent, as seen for a while."""
        before, end = self._read(store), time.monotonic() + CONFIRM
        while time.monotonic() < end:
            if self._end.wait(EVERY):
                return []
            self._publish(store)
        now = self._read(store)
        others = [rank for rank in now if rank != self.ranks.rank and rank in before]
        silent = [rank for rank in others if now[rank] == before[rank]]
        behind = [rank for rank in others if now[rank][0] == before[rank][0] < mine and not now[rank][2]]
        return silent or behind

    def _read(self, store: Any) -> dict[int, tuple[int, ...]]:
        """rank -> (points, signs of life, whether it asked for patience)."""
        keys = {rank: f"alive/{rank}" for rank in range(self.ranks.size)}
        return {
            rank: tuple(map(int, store.get(key).decode().split())) for rank, key in keys.items() if store.check([key])
        }

    def _leave(self, store: Any, late: list[int], nodes: list[str], seconds: float) -> None:
        if store.add("hang", 1) == 1:
            who = ", ".join(f"rank {rank} on {nodes[rank]}" for rank in late)
            print(
                f"error: {who} has not answered for {seconds:.0f} s: look at that machine's disk, network and GPU; the "
                "last checkpoint is from before, continue with --resume.",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(1.0)  # until it is said
        os._exit(1)  # the main thread waits where nothing can reach it
