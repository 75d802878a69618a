"""Several processes that train as one: `torchrun --nproc-per-node N -m fastnet.train ...`, on GPUs one process each.

What a step computes on is fixed when the run starts: its images (--batch-size x --grad-accum-steps x ranks), their
order, crops, drop-connect and mixing draws. Each rank takes its share of every step's images (`data_pipeline.Shard`),
so that a run may go on with another number of ranks, in the middle of an epoch too: it sees the same images in the same
steps, each once, in more or fewer parts where --batch-size asks for it. What does depend on the ranks: batch norm's
batches without --sync-bn, dropout's masks, and rounding.

Gradients are added up during backward (`fastnet.training.gradients`), loss and hits step by step, evaluation's sums
once. Batch norm's running statistics are those of rank 0, which alone writes files and prints; they are what a
continued run starts from, so that it computes what an uninterrupted one does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline import DataError, Shard
from fastnet.config import processes
from fastnet.errors import UserError
from fastnet.training.peers import Peers
from fastnet.typed import torchrun_number

T = TypeVar("T")

PATIENCE = timedelta(hours=1)  # for ranks that wait while one decodes a data set into the cache


@dataclass
class Ranks:
    """This process among those of the run. Alone (the default) every method does nothing, or what one process would."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this machine, of which local_rank is this one's number."""
    nodes: int = 1
    """Machines of the run."""
    processes: dict[int, int] = field(default_factory=dict, repr=False)
    """Rank -> process id, of the ranks of this machine."""
    _asked: tuple[Any, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.peers = Peers(self)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank; UserError where there are fewer GPUs than ranks on this machine."""
        if self.size == 1 or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"--nproc-per-node {self.local_size} is more than the {count} GPUs here: start one process a GPU.",
                exit_status=2,
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can hold what ranks send each other between GPUs: NCCL does it, gloo would not."""
        return self.size == 1 or dist.is_nccl_available()

    # --- words between ranks, on the host ---------------------------------------------------------------------------

    def broadcast(self, value: T) -> T:
        """Rank 0's value, which can be pickled."""
        if self.size == 1:
            return value
        self.peers.passed()
        holder = [value if self.is_main else None]
        dist.broadcast_object_list(holder, device=torch.device("cpu"))
        return holder[0]  # type: ignore[return-value]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        self.peers.passed()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0. Where it raises there, the others exit silently."""
        status: Any = None
        value: Any = None
        failure: BaseException | None = None
        if self.is_main:
            try:
                value = make()
            except (UserError, DataError, SystemExit) as error:
                failure, status = error, _status(error)
        value, status = self.broadcast((value, status))
        if failure is not None:
            raise failure
        if status is not None:
            raise SystemExit(status)
        return value

    def first_failure(self, reason: str | None) -> str | None:
        """Of all ranks' reasons that something failed the first one; None where none has one."""
        return next((one for one in self.all_gather_object(reason) if one is not None), None)

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers; waits for them."""
        if self.size == 1:
            return number
        self.peers.passed()
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def previous_max(self, number: int) -> int:
        """The largest of the numbers that the ranks gave in the call before this one (0 in the first): it never
        blocks."""
        if self.size == 1:
            return number
        self.peers.passed()
        before, value = self._asked, torch.tensor(number)
        self._asked = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True), value
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The body runs in one process of each machine before it runs in the others, which then find what it made."""
        if self.local_rank:
            self.all_reduce_max(0)
        try:
            yield
        finally:
            if not self.local_rank:
                self.all_reduce_max(0)

    def shared_memory(self, size: int) -> Tensor:
        """[size] zeroed bytes that the ranks of each machine share; gone with the last of them."""
        own = os.memfd_create("fastnet")
        os.ftruncate(own, size)
        places = self.all_gather_object(f"/proc/{os.getpid()}/fd/{own}")
        shared = torch.from_file(places[self.rank - self.local_rank], shared=True, size=size, dtype=torch.uint8)
        self.all_reduce_max(0)  # all have opened it
        os.close(own)
        return shared

    @contextmanager
    def one_report(self) -> Iterator[None]:
        """The body of a run. Of the errors that end it, the first that a rank meets is raised, and the ranks that fail
        of it or in turn exit silently."""
        if self.size == 1:
            yield
            return
        try:
            yield
            if self._asked is not None:
                self._asked[0].wait()
            self.all_reduce_max(0)  # no rank leaves before the others have finished
            dist.destroy_process_group()
        except (UserError, DataError) as error:
            if not self._fails_first():
                raise SystemExit(_status(error)) from None
            raise
        except Exception as error:
            if not _lost_a_peer(error):
                self._fails_first()  # its traceback is what there is to read
                raise
            gone = self._gone()
            if not self._fails_first():
                raise SystemExit(1) from None
            raise UserError(
                f"{gone} ended: the last checkpoint is from before; continue with --resume, or let torchrun do it "
                "(--max-restarts, with --out and --resume auto)."
            ) from error
        finally:
            self.peers.stop()

    def _gone(self) -> str:
        """The rank of this machine that is no longer there, if it is one."""
        for _ in range(20):
            for rank, pid in self.processes.items():
                if rank != self.rank and not _runs(pid):
                    return f"rank {rank} (process {pid}, killed from outside or out of memory: see dmesg)"
            time.sleep(0.1)
        return "another process of this run"

    def _fails_first(self) -> bool:
        try:
            return bool(dist.distributed_c10d._get_default_store().add("failures", 1) == 1)
        except RuntimeError:  # the store went with the process that failed
            return False

    # --- tensors, on the device -------------------------------------------------------------------------------------

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place."""
        if self.size > 1:
            self.peers.passed()
            dist.all_reduce(tensor)

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """The largest of all ranks', in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """They become rank 0's, bit for bit, in place."""
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.detach().contiguous()
                dist.broadcast(sent, 0)
                tensor.detach().copy_(sent)

    def average_statistics(self, model: nn.Module) -> None:
        """Batch norm's running statistics become the mean of all ranks'."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size


ALONE = Ranks()


def init_process_group() -> Ranks:
    """Meet the other processes that torchrun started."""
    if processes() == 1:
        return ALONE
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    for name in names:
        torchrun_number(name, 0)
    said = os.environ.get("RANK", "")
    if said.isascii() and said.isdigit() and int(said[:9]) >= processes():  # it would wait for others for an hour
        raise UserError(
            f"RANK is {said} and WORLD_SIZE {processes()}, and ranks count from 0: start with torchrun, or unset them."
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"WORLD_SIZE is {processes()}, and its processes cannot meet ({reason}): start with torchrun, or unset it."
        ) from error
    # torchrun's store outlives the processes that it starts again, and still holds the addresses of the previous ones.
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}"
    dist.init_process_group(
        backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=size, timeout=PATIENCE
    )
    local_rank, local_size, nodes = (int(os.environ.get(name, "0")) for name in names)
    ranks = Ranks(rank, size, local_rank, max(1, local_size), max(1, nodes))
    mine, here = ranks.rank - ranks.local_rank, ranks.all_gather_object(os.getpid())
    ranks.processes = {at: here[at] for at in range(mine, mine + ranks.local_size)}
    return ranks


@dataclass(frozen=True)
class BatchLayout:
    """How the images of a step are divided: among ranks, and by each rank into micro-batches for the model."""

    images: int
    ranks: Ranks
    micro_batches: int

    @property
    def shard(self) -> Shard:
        return Shard(self.ranks.rank, self.ranks.size, self.micro_batches)


def divide(images: int, ranks: Ranks, batch_size: int, grad_accum_steps: int) -> BatchLayout:
    """How a step's `images` are divided as the flags say; for a run that goes on with other ranks, into the fewest
    micro-batches of at most batch_size images. UserError where one would have fewer than two."""
    micro_batches = grad_accum_steps
    if batch_size * grad_accum_steps * ranks.size != images:
        share = -(-images // ranks.size)
        micro_batches = -(-share // batch_size)
    if images // ranks.size // micro_batches < 2:
        raise UserError(
            f"a step of this run has {images} images, too few for {ranks.size} ranks: start fewer processes.",
            exit_status=2,
        )
    return BatchLayout(images, ranks, micro_batches)


def sync_batch_norm(model: nn.Module) -> None:
    """Let every batch norm normalise over the images of all ranks (--sync-bn)."""
    from fastnet.layers import BatchNorm

    group = dist.group.WORLD
    assert group is not None
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.group = group.group_name


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


def _status(error: BaseException) -> Any:
    if isinstance(error, SystemExit):
        return error.code or 0
    return error.exit_status if isinstance(error, UserError) else 1


def _lost_a_peer(error: Exception) -> bool:
    said = ("gloo", "Connection closed", "Connection reset", "NCCL")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in said)
    )
